"""Sets of sampled images on disk, in shards: only one shard is in memory, and a run that was killed
continues where it stopped.

    folder/samples.json      what the images are: model, sampling settings, seed
    folder/00000.npz ...     `shard_size` images each (uint8 NHWC) with labels, tokens, first index

Image i is a function of (model, settings, seed, i), and its class of (seed, i). Batches begin where
shards begin, so a shard has the same bytes whenever it is made, and a set can grow. A shard carries
the fingerprint of samples.json. Metrics are elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from varptq.distributed import Ranks
from varptq.errors import InputError, OutputError
from varptq.evaluate.image_files import write_npz
from varptq.files import StagedFolder, write_atomic
from varptq.models.bare import bare
from varptq.models.generate import DEFAULT_BATCH, Output, generate
from varptq.models.pipeline import Pipeline
from varptq.models.prompts import balanced
from varptq.models.sampling import SamplingSettings
from varptq.models.state_file import networks_sha256
from varptq.pictures import Pixels, to_pixels
from varptq.progress import Progress, silent
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch
from varptq.work import brief

FORMAT_VERSION = 1
MANIFEST = "samples.json"
SHARD_NAME = re.compile(r"\d{5,}\.npz")
# Temporary files of `files.write_atomic` that a killed process leaves behind.
LEFTOVERS = ".varptq-*.tmp"
# A killed process loses at most this many images.
DEFAULT_SHARD = 64
EXPORT_SEED = 0
# Where the manifest says which prompts images were drawn for, if not for the model's own.
PROMPTS = "prompts_sha256"


class Shard(NamedTuple):
    """Images first, first + 1, ...: images (n, H, W, 3) uint8; labels (n,), places of their prompts
    in the pool, and tokens (n, L) or (n, L, draws), int64."""

    first: int
    images: Pixels
    labels: NDArray[np.int64]
    tokens: NDArray[np.int64]


@dataclass(frozen=True)
class SampleSet:
    """The first `count` images of a folder that `sample_set` has filled; `identity` is the content
    of its samples.json."""

    folder: Path
    count: int
    identity: dict[str, Any]

    @property
    def shard_size(self) -> int:
        return self.identity["shard_size"]

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(**self.identity["sampling"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of samples.json."""
        return hashlib.sha256(_encoded(self.identity)).hexdigest()

    def __len__(self) -> int:
        return self.count

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def shards(self, wanted: range | None = None) -> Iterator[Shard]:
        """All images in order, or those of the shards in `wanted`, one shard at a time. Raises
        `InputError` for a damaged file."""
        for index in range(self.num_shards) if wanted is None else wanted:
            first = index * self.shard_size
            path = shard_path(self.folder, index)
            kept = slice(0, self.count - first)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    parts = [arrays[name][kept] for name in ("images", "labels", "tokens")]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                raise InputError(
                    f"{path}: cannot be read ({error}); delete it and run again"
                ) from None
            yield Shard(first, *parts)

    def head(self, count: int) -> tuple[Tensor, Tensor]:
        """Labels (n,) and tokens (n, L) int64 of the first n = min(count, all) images."""
        count = min(count, self.count)
        shards = replace(self, count=count).shards()
        labels, tokens = zip(*((shard.labels, shard.tokens) for shard in shards), strict=True)
        return torch.from_numpy(np.concatenate(labels)), torch.from_numpy(np.concatenate(tokens))

    def sha256(self) -> str:
        """SHA-256 of all images, labels and tokens, however they are cut into shards."""
        hashes = [hashlib.sha256() for _ in range(3)]
        for shard in self.shards():
            for state, array in zip(hashes, shard[1:], strict=True):
                state.update(array.tobytes())
        return hashlib.sha256(b"".join(state.digest() for state in hashes)).hexdigest()

    def export_npz(self, path: str | Path) -> None:
        """All images as `arr_0` (N, H, W, 3) uint8 and labels as `arr_1`, the ADM evaluator's file.

        The order is a fixed shuffle: that evaluator cuts the file into splits for the Inception
        Score, which images sorted by class would make wrong. Raises `OutputError`.
        """
        generator = torch.Generator().manual_seed(EXPORT_SEED)
        place_N = torch.randperm(
            self.count, generator=generator, dtype=torch.int64, device="cpu"
        ).numpy()
        parts = (
            (place_N[shard.first : shard.first + len(shard.images)], shard.images, shard.labels)
            for shard in self.shards()
        )
        write_npz(path, self.count, parts)

    def export_png(self, folder: str | Path) -> None:
        """One file per image, 000000.png and on, in the order of the set.

        The folder appears whole, and replaces an earlier one of this kind: images left over from a
        larger set would count as well. Raises `OutputError`.
        """
        with exported_folder(folder) as staging:
            for shard in self.shards():
                for offset, image in enumerate(shard.images):
                    Image.fromarray(image).save(staging / _png_name(shard.first + offset))


@plain_torch()
def sample_set(
    pipe: Pipeline,
    folder: str | Path,
    *,
    count: int,
    seed: int = 0,
    settings: SamplingSettings | None = None,
    prompts: Any = None,
    batch: int = DEFAULT_BATCH,
    shard_size: int = DEFAULT_SHARD,
    force: bool = False,
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> SampleSet:
    """Sample `count` images into `folder`, keeping the shards that exist already.

    prompts: to draw for, as `Pipeline.prompts` takes them; None is the model's own pool.
    ranks: processes on the same call with the same folder; missing shards are dealt to them, and
    the call returns when all are there.
    force: remove samples of another model or other settings that are in the way, which are an
    error otherwise. Prompts are balanced: any consecutive images, as many as the pool has prompts,
    are of different ones. The batch size does not identify a set, but changes float summation: for
    the same bytes, continue a run with the same one. Raises `InputError` for numbers out of range,
    `OutputError` if the folder holds something else or cannot be written.
    """
    pipe = bare(pipe).drawing_for(prompts)
    settings = pipe.filled(settings)
    for name, value in (("count", count), ("batch", batch), ("shard_size", shard_size)):
        if value < 1:
            raise InputError(f"{name} {value}: must be at least 1")
    folder = Path(folder)
    identity = describe(pipe, settings, seed, shard_size)
    ranks = ranks or Ranks()
    if ranks.first:
        _claim(folder, identity, force)
    ranks.barrier()
    result = SampleSet(folder, count, identity)
    pool = pipe.pool()
    labels_N = balanced(len(pool), count, seed)
    wanted = [range(first, min(first + shard_size, count)) for first in range(0, count, shard_size)]
    missing = [images for images in wanted if not _is_there(result, images)]
    # No process writes before all have looked, so that all divide the same list.
    ranks.barrier()
    stage, done = f"samples of {title(pipe)}", count - sum(map(len, missing))
    progress(stage, done, count)
    for images in ranks.share(missing):
        output = generate(
            pipe,
            pool[labels_N[images.start : images.stop]],
            seed=seed,
            first_index=images.start,
            batch_size=batch,
            progress=_shifted(progress, stage, done, count),
            **settings.to_dict(),
        )
        _write_shard(result, images, output, labels_N)
        done += len(images)
    ranks.barrier()
    return result


def _shifted(progress: Progress, whole: str, before: int, count: int) -> Progress:
    """Progress of one shard, reported as progress of the whole set."""

    def report(stage: str, done: int, total: int, info: str = "") -> None:
        progress(whole, before + done, count, info)

    return report


def title(pipe: Pipeline) -> str:
    """The name shown for the model: "demo" or "demo w4a4"."""
    return f"{pipe.name} {pipe.config.name}" if isinstance(pipe, QuantizedPipeline) else pipe.name


def describe(
    pipe: Pipeline, settings: SamplingSettings, seed: int, shard_size: int
) -> dict[str, Any]:
    """Everything that determines the images of a set and their files, as plain JSON values."""
    prompts = {} if pipe.chosen is None else {PROMPTS: pipe.chosen.sha256()}
    # The last scale says the size, where there are several.
    size = {} if pipe.var.num_prompts else {"scales": pipe.scales.plain()}
    return {
        **prompts,
        **size,
        "format_version": FORMAT_VERSION,
        "model": title(pipe),
        "model_sha256": model_sha256(pipe),
        "sampling": settings.to_dict(),
        "seed": seed,
        "shard_size": shard_size,
    }


def model_sha256(pipe: Pipeline) -> str:
    """SHA-256 of everything that determines results: tensors of both networks with names and
    dtypes, the quantization config, theta and the runtime."""
    recipe = b""
    if isinstance(pipe, QuantizedPipeline):
        parts = [pipe.config.to_dict(), pipe.theta, pipe.runtime]
        recipe = json.dumps(parts, sort_keys=True).encode()
    return networks_sha256(pipe.var, pipe.vae, more=recipe)


def exported_folder(folder: str | Path) -> StagedFolder:
    """Where `SampleSet.export_png` writes: a new folder, or an earlier one of its kind."""
    return StagedFolder(folder, force=True, marker=_png_name(0))


def _png_name(index: int) -> str:
    return f"{index:06}.png"


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.npz"


def _encoded(identity: dict[str, Any]) -> bytes:
    return json.dumps(identity, indent=2, sort_keys=True).encode() + b"\n"


def _claim(folder: Path, identity: dict[str, Any], force: bool) -> None:
    """Make `folder` the place of these samples."""
    path, text = folder / MANIFEST, _encoded(identity)
    if folder.is_dir():
        for leftover in folder.glob(LEFTOVERS):
            leftover.unlink(missing_ok=True)
    if path.is_file() and path.read_bytes() != text:
        if not force:
            raise OutputError(
                f"{folder}: holds samples with {_difference(path, identity)}; "
                "choose another folder or force=True (--force)"
            )
        for old in folder.iterdir():
            if SHARD_NAME.fullmatch(old.name):
                old.unlink()
    write_atomic(path, text)


def _difference(path: Path, identity: dict[str, Any]) -> str:
    """The first field in which the existing samples differ from those asked for."""
    try:
        found = json.loads(path.read_text())
        for name, value in identity.items():
            if found[name] != value:
                return f"{name} {brief(found[name], value)}, not {brief(value, found[name])}"
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return f"a {path.name} that cannot be compared"


def _is_there(samples: SampleSet, images: range) -> bool:
    """Whether a readable shard holds these images. Raises `OutputError` for one of another run."""
    path = shard_path(samples.folder, images.start // samples.shard_size)
    if not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, length = str(arrays["fingerprint"]), len(arrays["labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        # Damaged; the shard can be made again with the same content.
        return False
    if found != samples.fingerprint:
        raise OutputError(f"{path}: a shard of another run; move it away")
    return length >= len(images)


def _write_shard(samples: SampleSet, images: range, output: Output, labels_N: Tensor) -> None:
    assert output.images is not None
    pixels, tokens = to_pixels(output.images), output.tokens.cpu().numpy()

    def fill(file: BinaryIO) -> None:
        np.savez(
            file,
            images=pixels,
            labels=labels_N[images.start : images.stop].numpy(),
            tokens=tokens,
            first=np.array(images.start),
            fingerprint=np.array(samples.fingerprint),
        )

    write_atomic(shard_path(samples.folder, images.start // samples.shard_size), fill)
