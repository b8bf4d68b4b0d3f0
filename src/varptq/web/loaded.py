"""Models in memory, loaded when first asked for and dropped when unused for longest; and what pages
need to know of a model, most before it is loaded."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import Any

from varptq.artifact.load import read_config
from varptq.models.autoencoder import Autoencoder
from varptq.models.class_names import title_of
from varptq.models.families import family
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.presets import PRESETS
from varptq.models.sampling import SamplingSettings
from varptq.models.scales import Size
from varptq.models.texts import TextEncoder
from varptq.models.transformer import Transformer
from varptq.runtime import load
from varptq.runtime.resolve import AUTO, asked_for
from varptq.web.catalogue import Entry, Kind

# A float model and the quantized one beside it.
CAPACITY = 2


class LoadedModels:
    """At most `capacity` pipelines on `device` in `dtype`, artifacts on `runtime`. A model that
    changed on disk is loaded again. encoder: for models that read texts, in place of their own.

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
        encoder: TextEncoder | None = None,
    ) -> None:
        asked_for(runtime)
        self.device, self.dtype = checked_device(device), checked_dtype(dtype)
        self.runtime = runtime
        self.capacity, self.encoder = capacity, encoder
        self._lock = threading.Lock()
        # A page that asks about a model and a job that needs it load it once.
        self._loading: defaultdict[Entry, threading.Lock] = defaultdict(threading.Lock)
        self._about: dict[tuple[Entry, tuple[int, ...]], About] = {}
        self._held: OrderedDict[tuple[Entry, tuple[int, ...]], Pipeline] = OrderedDict()

    def get(self, entry: Entry) -> Pipeline:
        """The pipeline of `entry`. Raises `CheckpointError` or `ArtifactError` as loading does."""
        key = (entry, entry.stamp)
        with self._lock:
            loading = self._loading[entry]
        # One lock a model, so that jobs of others need not wait.
        with loading:
            with self._lock:
                if (pipe := self._held.pop(key, None)) is not None:
                    self._held[key] = pipe
                    return pipe
            pipe = self._load(entry)
            with self._lock:
                self._held[key] = pipe
                while len(self._held) > self.capacity:
                    self._held.popitem(last=False)
            return pipe

    def about(self, entry: Entry) -> About:
        """What pages need to know of a model, which is loaded only if it comes from files. Raises
        as `get` does."""
        key = (entry, entry.stamp)
        if key not in self._about:
            if entry.kind is not Kind.artifact and entry.files:
                pipe = self.get(entry)
                self._about[key] = About.of(pipe.var, pipe.vae, pipe.class_names)
            else:
                self._about[key] = unloaded(entry)
        return self._about[key]

    def words(self, entry: Entry) -> list[str]:
        """The options of the command line that make `entry` compute as it does here."""
        dtype = str(self.dtype).removeprefix("torch.")
        runtime = ("--runtime", self.runtime) if entry.kind is Kind.artifact else ()
        return ["--device", str(self.device), "--dtype", dtype, *runtime]

    def _load(self, entry: Entry) -> Pipeline:
        pipe = self._read(entry)
        if self.encoder is not None and pipe.var.READS_TEXTS:
            pipe.encoder = self.encoder
        return pipe

    def _read(self, entry: Entry) -> Pipeline:
        placement: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        if entry.kind is Kind.artifact:
            return load(entry.files[0], runtime=self.runtime, **placement)
        if entry.files:
            var, vae = entry.files
            return load_model(var=var, vae=vae, **placement)
        return load_model(entry.key, **placement)


@dataclass(frozen=True)
class About:
    """What pages need to know of a model. size: height and width of its images; texts: whether it
    reads texts; sizes: labels and names of those it draws at, where they are several; sampling: how
    it draws where nobody says otherwise."""

    names: tuple[str, ...]
    classes: int
    size: Size
    texts: bool
    sizes: tuple[tuple[str, str], ...]
    sampling: SamplingSettings

    @classmethod
    def of(
        cls, transformer: Transformer, autoencoder: Autoencoder, names: tuple[str, ...]
    ) -> About:
        schedules = {name: transformer.schedule(name) for name in transformer.sizes()}
        sizes = {name: autoencoder.over(scales).image_size for name, scales in schedules.items()}
        labels = tuple((f"{width} x {height}", name) for name, (height, width) in sizes.items())
        return cls(
            names,
            transformer.num_prompts or 0,
            autoencoder.image_size,
            transformer.READS_TEXTS,
            labels,
            transformer.sampling,
        )


def unloaded(entry: Entry) -> About:
    """About a published model or an artifact, of which no weights are read.

    Raises `ArtifactError` for an artifact that cannot be read.
    """
    if entry.kind is Kind.artifact:
        document, _ = read_config(entry.files[0])
        names, row = document.class_names, family(document.architecture.family)
        archs, size = document.architecture.document().archs(), None
    else:
        preset = PRESETS[entry.key]
        names, row, size = preset.class_names, family(preset.family), preset.size
        archs = (preset.transformer_arch, preset.autoencoder_arch)
    with on_meta():
        transformer, autoencoder = row.build(*archs)
    if size is not None:
        scales = transformer.schedule(size)
        transformer, autoencoder = transformer.over(scales), autoencoder.over(scales)
    return About.of(transformer, autoencoder, tuple(names or ()))


def class_choices(known: About) -> list[str]:
    """Names of the classes, or ids for a model without names."""
    return [title_of(name) for name in known.names] or [
        str(label) for label in range(known.classes)
    ]
