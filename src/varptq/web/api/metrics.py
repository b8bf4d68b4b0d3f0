"""What is counted for Prometheus, in a registry of its own for each server."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of requests, batches and images; times in seconds."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        by_path, by_model = ("path",), ("model",)
        self._requests = Counter(
            "varptq_requests", "Requests by their answer.", ("path", "status"), registry=own
        )
        self._request_seconds = Histogram(
            "varptq_request_seconds",
            "Time to the end of an answer.",
            by_path,
            buckets=SECONDS,
            registry=own,
        )
        self._images = Counter("varptq_images", "Images drawn.", by_model, registry=own)
        self._batch_images = Histogram(
            "varptq_batch_images", "Images of a batch.", by_model, buckets=IMAGES, registry=own
        )
        self._batch_seconds = Histogram(
            "varptq_batch_seconds", "Time of a batch.", by_model, buckets=SECONDS, registry=own
        )

    def gauge(self, name: str, says: str, read: Callable[[], float]) -> None:
        """A number that is read when somebody asks."""
        Gauge(f"varptq_{name}", says, registry=self._registry).set_function(read)

    def answered(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path, str(status)).inc()
        self._request_seconds.labels(path).observe(seconds)

    def drawn(self, model: str, images: int, seconds: float) -> None:
        self._images.labels(model).inc(images)
        self._batch_images.labels(model).observe(images)
        self._batch_seconds.labels(model).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
