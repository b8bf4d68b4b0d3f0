"""The model that a command line names: a published one, two checkpoint files, random weights of an
architecture, or the folder of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.cli.options import DEVICE, DTYPE, RUNTIME
from varptq.errors import InputError

if TYPE_CHECKING:
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

    def __post_init__(self) -> None:
        files = self.var is not None or self.vae is not None
        if (self.source is not None) + (self.random is not None) + files != 1:
            raise InputError("model: give one of a name or folder, --var with --vae, or --random")

    @property
    def folder(self) -> Path | None:
        """The artifact's folder, None for a float model; model names take precedence over
        folders."""
        from varptq.models.presets import PRESETS

        if self.source is None or self.source in PRESETS:
            return None
        folder = Path(self.source)
        if folder.is_file() or folder.suffix.lower() in CHECKPOINT_SUFFIXES:
            raise InputError(
                f"model {self.source!r}: a single file, but a model is two: give transformer "
                "and VQVAE as --var var.pth --vae vae.pth"
            )
        if not folder.is_dir():
            names = ", ".join(PRESETS)
            raise InputError(
                f"model {self.source!r}: neither an artifact folder nor a model; models: {names}"
            )
        return folder

    def load(self, runtime: str = RUNTIME) -> Pipeline:
        """The float model, or the quantized one on `runtime`."""
        if (folder := self.folder) is None:
            if runtime != RUNTIME:
                raise InputError(
                    f"runtime {runtime!r}: only for artifacts, and this model is float"
                )
            return self.load_float()
        from varptq.runtime import load

        return load(folder, runtime=runtime, **self._placement())

    def check_float(self) -> None:
        """Raise `InputError` for an artifact."""
        if self.folder is not None:
            raise InputError(
                f"model {str(self.folder)!r}: an artifact folder, expected a float model"
            )

    def load_float(self) -> Pipeline:
        """The float model; raises as `load_model` and `build_model` do."""
        from varptq.models.pipeline import build_model, load_model

        if self.random is not None:
            return build_model(self.random, **self._placement())
        return load_model(
            self.source, var=self.var, vae=self.vae, download=self.download, **self._placement()
        )

    def _placement(self) -> dict[str, Any]:
        from varptq.models.placement import checked_device, checked_dtype

        return {"device": checked_device(self.device), "dtype": checked_dtype(self.dtype)}
