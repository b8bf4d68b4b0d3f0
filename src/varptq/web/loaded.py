"""Models in memory, loaded when first asked for and dropped when unused for longest; and what is
known of a model before it is loaded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from varptq.artifact.load import WithoutInit, read_config
from varptq.models.families import family
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.presets import PRESETS
from varptq.runtime import load
from varptq.runtime.resolve import AUTO, asked_for
from varptq.web.catalogue import Entry, Kind

# A float model and the quantized one beside it.
CAPACITY = 2


class LoadedModels:
    """At most `capacity` pipelines on `device` in `dtype`, artifacts on `runtime`. A model that
    changed on disk is loaded again.

    Raises `ConfigError` for a device or dtype that cannot be used, `InputError` for an unknown
    runtime.
    """

    def __init__(
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        runtime: str = AUTO,
        capacity: int = CAPACITY,
    ) -> None:
        asked_for(runtime)
        self.device, self.dtype = checked_device(device), checked_dtype(dtype)
        self.runtime = runtime
        self.capacity = capacity
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[Entry, tuple[int, ...]], Pipeline] = OrderedDict()

    def get(self, entry: Entry) -> Pipeline:
        """The pipeline of `entry`. Raises `CheckpointError` or `ArtifactError` as loading does."""
        key = (entry, entry.stamp)
        with self._lock:
            if (pipe := self._held.pop(key, None)) is not None:
                self._held[key] = pipe
                return pipe
        # Outside the lock, so that jobs of other models need not wait; a model has one job at a
        # time.
        pipe = self._load(entry)
        with self._lock:
            self._held[key] = pipe
            while len(self._held) > self.capacity:
                self._held.popitem(last=False)
        return pipe

    def words(self, entry: Entry) -> list[str]:
        """The options of the command line that make `entry` compute as it does here."""
        dtype = str(self.dtype).removeprefix("torch.")
        runtime = ("--runtime", self.runtime) if entry.kind is Kind.artifact else ()
        return ["--device", str(self.device), "--dtype", dtype, *runtime]

    def _load(self, entry: Entry) -> Pipeline:
        placement: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if entry.kind is Kind.artifact:
            return load(entry.files[0], runtime=self.runtime, **placement)
        if entry.files:
            var, vae = entry.files
            return load_model(var=var, vae=vae, **placement)
        return load_model(entry.key, **placement)


@dataclass(frozen=True)
class About:
    """What is known of a model before it is loaded. side: of its images, in pixels."""

    names: tuple[str, ...]
    classes: int
    side: int


def about(entry: Entry) -> About | None:
    """None for a float model from files, which must be loaded to be known.

    Raises `ArtifactError` for an artifact that cannot be read.
    """
    if entry.kind is Kind.artifact:
        document, _ = read_config(entry.files[0])
        names, row = document.class_names, family(document.architecture.family)
        archs = document.architecture.document().archs()
    elif entry.files:
        return None
    else:
        preset = PRESETS[entry.key]
        names, row = preset.class_names, family(preset.family)
        archs = (preset.transformer_arch, preset.autoencoder_arch)
    with torch.device("meta"), WithoutInit():
        transformer, autoencoder = row.build(*archs)
    names = tuple(names or ())
    return About(names, len(transformer.pool(names)), autoencoder.image_size)


def class_choices(known: About | None) -> list[str]:
    """Names of the classes, or ids for a model without names; empty if they are not known yet."""
    if known is None:
        return []
    return list(known.names) or [str(label) for label in range(known.classes)]
