"""The model that a command line names: a published one, two checkpoint files, random weights of an
architecture, or an artifact: its folder, or its name on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.cli.options import DEVICE, DTYPE, RUNTIME
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.hub import Repo
    from varptq.models.pipeline import Pipeline

CHECKPOINT_SUFFIXES = {".pth", ".pt", ".ckpt", ".bin", ".safetensors"}


@dataclass(frozen=True)
class ModelChoice:
    """Exactly one of `source`, `random` and the two files, and where to put the model.

    Raises `InputError` for none or several of them.
    """

    source: str | None = None
    var: Path | None = None
    vae: Path | None = None
    random: str | None = None
    download: bool = False
    device: str = DEVICE
    dtype: str = DTYPE
    class_names: Path | None = None

    def __post_init__(self) -> None:
        files = self.var is not None or self.vae is not None
        if (self.source is not None) + (self.random is not None) + files != 1:
            raise InputError("model: give one of a name or folder, --var with --vae, or --random")

    @property
    def is_float(self) -> bool:
        """Whether a float model is named; model names take precedence over folders."""
        from varptq.models.presets import PRESETS

        return self.source is None or self.source in PRESETS

    def place(self) -> Path | Repo:
        """Where the artifact is; nothing is fetched. Raises `InputError` for what names none."""
        from varptq.artifact.remote import place_of
        from varptq.models.presets import PRESETS

        assert self.source is not None
        place = place_of(self.source)
        path = Path(self.source)
        if path.is_file() or path.suffix.lower() in CHECKPOINT_SUFFIXES:
            raise InputError(
                f"model {self.source!r}: a single file, but a model is two: give transformer "
                "and VQVAE as --var var.pth --vae vae.pth"
            )
        if isinstance(place, Path) and not place.is_dir():
            raise InputError(
                f"model {self.source!r}: neither an artifact folder nor a model, and no name on "
                f"the hub (org/name); models: {', '.join(PRESETS)}"
            )
        return place

    @cached_property
    def folder(self) -> Path | None:
        """The artifact's folder, None for a float model. One that is on the hub is fetched into its
        cache first."""
        if self.is_float:
            return None
        place = self.place()
        if isinstance(place, Path):
            return place
        from varptq.artifact.remote import artifact_folder

        return artifact_folder(str(place))

    def about(self) -> tuple[str, bool]:
        """The model's name, and whether it reads texts; no weights are read. Raises as `load`
        does."""
        from varptq.artifact.load import read_config
        from varptq.models.families import family, family_of
        from varptq.models.presets import preset

        if (folder := self.folder) is not None:
            document, _ = read_config(folder)
            return document.name, family(document.architecture.family).reads_texts
        if (name := self.source or self.random) is not None:
            return name, family(preset(name).family).reads_texts
        if self.var is None:
            raise InputError("model: --vae is one of two files; give the transformer as --var, too")
        return self.var.stem, family(family_of(self.var)).reads_texts

    def load(self, runtime: str = RUNTIME) -> Pipeline:
        """The float model, or the quantized one on `runtime`."""
        return self._named(lambda: self._load(runtime))

    def _load(self, runtime: str) -> Pipeline:
        if (folder := self.folder) is None:
            if runtime != RUNTIME:
                raise InputError(
                    f"runtime {runtime!r}: only for artifacts, and this model is float"
                )
            return self._load_float()
        from varptq.runtime import load

        return load(folder, runtime=runtime, **self.placement())

    def check_float(self) -> None:
        """Raise `InputError` for an artifact."""
        if not self.is_float:
            raise InputError(f"model {str(self.place())!r}: an artifact, expected a float model")

    def load_float(self, *, mapped: bool = False) -> Pipeline:
        """The float model; raises as `load_model` and `build_model` do."""
        return self._named(lambda: self._load_float(mapped))

    def _load_float(self, mapped: bool = False) -> Pipeline:
        from varptq.models.pipeline import build_model, load_model

        if self.random is not None:
            return build_model(self.random, **self.placement())
        files = {"var": self.var, "vae": self.vae, "download": self.download}
        return load_model(self.source, **files, **self.placement(), mapped=mapped)

    def _named(self, load: Callable[[], Pipeline]) -> Pipeline:
        """What `load` gives, with the names that were given: a bad file is refused before it."""
        if self.class_names is None:
            return load()
        from varptq.models.class_names import read_class_names

        names = read_class_names(self.class_names)
        return load().named(names)

    def float_words(self) -> list[str]:
        """The options that name a float model which is no published one."""
        named = {"--random": self.random, "--var": self.var, "--vae": self.vae}
        return [word for name, value in named.items() if value for word in (name, str(value))]

    def file_bytes(self) -> int:
        """Of the transformer's files, 0 for random weights. Raises `CheckpointError` where they
        cannot be found."""
        from varptq.models.presets import resolve
        from varptq.models.shards import files_of

        path = self.var
        if self.source is not None:
            path, _ = resolve(self.source, download=self.download)
        if path is None:
            return 0
        return sum(file.stat().st_size for file in files_of(path) if file.is_file())

    def placement(self) -> dict[str, Any]:
        from varptq.models.placement import checked_device, checked_dtype

        return {"device": checked_device(self.device), "dtype": checked_dtype(self.dtype)}
