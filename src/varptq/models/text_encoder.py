"""T5 as the text encoder of Infinity: strings to features once, then from a cache on disk.

The encoder half of a T5 (Raffel et al. 2020) through transformers, which the extra `text` installs:
last hidden state of every token, the end token among them, at most 512. A text is computed alone
and without padding. Padded and masked it is the same up to rounding, only slower; and so it
does not depend on the texts beside it. Weights and cached features are float16, as the published
models were trained with; what is given out is float32.

A feature is looked up by what decides it: the text, and a key of the encoder's files. The network
is read when a text is not in the cache, and let go after the call.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from varptq.errors import CheckpointError, InputError, NonFiniteError, OutputError
from varptq.files import cache_folder, write_atomic
from varptq.models.file_kinds import SAFETENSORS_SUFFIX, read_content
from varptq.models.placement import checked_device, checked_dtype
from varptq.progress import Progress, silent
from varptq.torch_state import plain_torch

LONGEST = 512
FLAN_T5_XL = "google/flan-t5-xl"
CONFIG, WANTED = "config.json", ("*.json", "*.safetensors", "spiece.model")
INSTALL = "pip install 'varptq[text]', or give features (tokens, channels) in place of strings"
FEATURES, STAGE = "features", "encode texts"
# Raised when what is computed for a text changes.
CACHE_FORMAT = 1
# Of a file of weights this many pieces of these bytes are hashed: any training changes them all.
PIECES, PIECE_BYTES = 64, 4096


class T5Encoder:
    """A `TextEncoder` from a local folder, or from a repository on the Hugging Face hub.

    source: a folder with config.json, safetensors and a tokenizer, or a name such as
    "google/flan-t5-xl", of which the local hub cache is asked, and the hub with `download`. cache:
    folder for features; None is `text` in varptq's cache folder, False is none. Nothing is read
    before the first text.
    """

    def __init__(
        self,
        source: str | Path = FLAN_T5_XL,
        *,
        download: bool = False,
        cache: str | Path | bool | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = torch.float16,
        progress: Progress = silent,
    ) -> None:
        self.source, self.download, self.progress = source, download, progress
        self.device, self.dtype = checked_device(device), checked_dtype(dtype)
        self._cache = _cache(cache)
        self._place: Path | None = None
        self._key: str | None = None

    @plain_torch()
    def features(self, texts: Sequence[str]) -> list[Tensor]:
        """One (T, D) float32 tensor on the CPU per text, T in 1..512; longer texts are cut.

        Raises `InputError` without transformers, `CheckpointError` for a folder that is no T5,
        `NonFiniteError` for features that overflow."""
        found = {text: self._cached(text) for text in dict.fromkeys(texts)}
        missing = [text for text, features in found.items() if features is None]
        if missing:
            for text, features in zip(missing, self._computed(missing), strict=True):
                found[text] = features
                self._keep(text, features)
        return [features.float() for text in texts if (features := found[text]) is not None]

    @property
    def folder(self) -> Path:
        """Where the files are. Raises `CheckpointError` for a folder that is no T5 and a repository
        that is not on this machine, `InputError` for one without transformers, which is said first.
        """
        if self._place is None:
            place = Path(self.source)
            if not place.is_dir():
                _check_library(self.source)
                place = _of_hub(str(self.source), self.download)
            _check(place)
            self._place = place
        return self._place

    @property
    def key(self) -> str:
        """Of what is computed: the files, and the dtype."""
        if self._key is None:
            state = hashlib.sha256(f"{CACHE_FORMAT} {self.dtype} {LONGEST}".encode())
            for path in sorted(path for path in self.folder.iterdir() if path.is_file()):
                if path.suffix in (".json", ".model", SAFETENSORS_SUFFIX):
                    state.update(path.name.encode())
                    state.update(_pieces(path))
            self._key = state.hexdigest()[:32]
        return self._key

    def _computed(self, texts: Sequence[str]) -> Iterator[Tensor]:
        tokenizer, model = _load(self.folder, self.dtype)
        model = model.to(self.device).eval()
        self.progress(STAGE, 0, len(texts))
        for done, text in enumerate(texts, 1):
            ids = tokenizer(text, truncation=True, max_length=LONGEST)["input_ids"]
            ids_1T = torch.tensor([ids], dtype=torch.int64, device=self.device)
            with torch.inference_mode():
                features = model(input_ids=ids_1T).last_hidden_state[0]
            if not bool(features.isfinite().all()):
                raise NonFiniteError(
                    f"prompt {text!r:.60}: its features hold NaN or infinity in {self.dtype}; use "
                    "dtype float32"
                )
            yield features.to("cpu", self.dtype).clone()
            self.progress(STAGE, done, len(texts))

    def _file(self, text: str) -> Path | None:
        if self._cache is None:
            return None
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self._cache / self.key / f"{name}{SAFETENSORS_SUFFIX}"

    def _cached(self, text: str) -> Tensor | None:
        """What an earlier call found; a damaged file is made again."""
        path = self._file(text)
        if path is None or not path.is_file():
            return None
        with suppress(CheckpointError):
            features = read_content(path).get(FEATURES)
            if isinstance(features, Tensor) and features.dim() == 2 and len(features):
                return features.clone()
        return None

    def _keep(self, text: str, features: Tensor) -> None:
        if (path := self._file(text)) is None:
            return
        try:
            write_atomic(path, save({FEATURES: features.contiguous()}))
        except OutputError as error:
            warnings.warn(f"features are not kept: {error}", stacklevel=2)
            self._cache = None


def _cache(asked: str | Path | bool | None) -> Path | None:
    if asked is None or asked is True:
        place = cache_folder()
        return None if place is None else place / "text"
    return None if asked is False else Path(asked)


def _of_hub(name: str, download: bool) -> Path:
    """The files of a repository in the local hub cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, allow_patterns=list(WANTED), local_files_only=not download)
        )
    except Exception as error:
        # The library's errors come from several HTTP clients and differ between its versions.
        if not download:
            raise CheckpointError(
                f"text encoder {name!r}: neither a folder nor in the Hugging Face cache; give the "
                "folder of a T5, or run again with download=True (--download)"
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"text encoder {name!r}: cannot be downloaded ({reason:.100}); give the folder of a T5"
        ) from None


def _check(folder: Path) -> None:
    """Raises `CheckpointError` for a folder that does not hold a T5."""
    path = folder / CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = found["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path}: missing or no config of transformers; give the folder of a T5"
        ) from None
    if kind != "t5":
        raise CheckpointError(f"{path}: of a {kind!r:.40}, expected the text encoder of a 't5'")
    if not list(folder.glob(f"*{SAFETENSORS_SUFFIX}")):
        raise CheckpointError(f"{folder}: holds no safetensors; download the encoder in them")


def _check_library(source: str | Path) -> Any:
    """transformers. Raises `InputError` where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise InputError(f"text encoder {source}: needs transformers; {INSTALL}") from None


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and encoder half. Raises `InputError` without transformers, `CheckpointError` for
    files it cannot read."""
    transformers = _check_library(folder)
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = transformers.T5EncoderModel.from_pretrained(
                folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
            )
    except Exception as error:
        # A missing tokenizer library, a damaged file and a foreign config raise a dozen types.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder}: no T5 with a tokenizer ({reason:.150})") from None
    return tokenizer, model


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's own bars, which would stand beside ours."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _pieces(path: Path) -> bytes:
    """SHA-256 of a file's size and of pieces all over it: gigabytes are not read for a key."""
    size = path.stat().st_size
    state = hashlib.sha256(f"{size}".encode())
    with path.open("rb") as file:
        for index in range(PIECES):
            file.seek(index * max(0, size - PIECE_BYTES) // (PIECES - 1))
            state.update(file.read(PIECE_BYTES))
    return state.digest()
