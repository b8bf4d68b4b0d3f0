"""Sampling and measuring of the tiny model in a process of its own, alone or under torchrun.

    python tests/helpers/evaluation_process.py FOLDER [--die]

Writes FOLDER/document-RANK.json; one line on stdout per file written. --die: the last rank kills
itself after its first shard in torchrun's first attempt, after its first measured part in the
second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from conftest import build_tiny
from varptq.calibrate.quantize import quantize
from varptq.distributed import Ranks
from varptq.evaluate import sampling
from varptq.evaluate.evaluate import Subject, evaluate
from varptq.evaluate.features import ModuleFeatures
from varptq.evaluate.image_files import ImageFiles, write_npz
from varptq.evaluate.preflight import Instruments
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import SamplingSettings
from varptq.progress import silent
from varptq.quant.config import QuantConfig
from varptq.work import Piece, Work

COUNT, SHARD = 23, 2
SETTINGS = SamplingSettings(cfg=2, top_k=20)


class Means(nn.Module):
    """Three pooled features, two spatial ones, and probabilities of three classes."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means = images_B3HW.mean((2, 3))
        return means, images_B3HW[:, :2, 0, 0], (5 * means).softmax(-1)


def reference(folder: Path) -> ImageFiles:
    images = np.random.default_rng(0).integers(0, 256, (70, 6, 6, 3), np.uint8)
    write_npz(folder / "real.npz", 70, [(np.arange(70), images, np.arange(70) % 7)])
    return ImageFiles.open(folder / "real.npz")


def document(folder: Path, ranks: Ranks, work: Work) -> str:
    """Both sample sets and all metrics, as JSON."""
    pipe = build_tiny()
    quantized = quantize(pipe, QuantConfig.preset("w4a4+paper"), method="rtn")

    def subject(pipe: Pipeline, name: str) -> Subject:
        chosen = {"count": COUNT, "settings": SETTINGS, "shard_size": SHARD, "ranks": ranks}
        return Subject(pipe, sampling.sample_set(pipe, folder / name, **chosen))

    subjects = [subject(quantized, "quantized"), subject(pipe, "float")]
    tools = Instruments(ModuleFeatures(Means(), "means"), reference(folder.parent))
    work.begin({"of": "a test"}, silent)
    found = evaluate(*subjects, instruments=tools, token_images=20, work=work)
    return json.dumps(found, indent=1)


def killed_in(attempt: int, rank: int) -> None:
    if os.environ.get("TORCHELASTIC_RESTART_COUNT") == str(attempt) and rank:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    torch.set_num_threads(1)
    folder, die = Path(sys.argv[1]), "--die" in sys.argv
    ranks = Ranks.from_environment()
    write_shard = sampling._write_shard

    def noisy_shard(samples: sampling.SampleSet, images: range, *rest: object) -> None:
        write_shard(samples, images, *rest)  # pyright: ignore
        print(f"rank {ranks.rank} wrote {samples.folder.name} {images.start}", flush=True)
        if die:
            killed_in(0, ranks.rank)

    class Noisy(Work):
        def write(self, name: str, piece: Piece) -> None:
            super().write(name, piece)
            print(f"rank {self.ranks.rank} wrote {name}", flush=True)
            if die:
                killed_in(1, self.ranks.rank)

    sampling._write_shard = noisy_shard
    with Noisy(folder / "work", ranks) as work:
        text = document(folder, ranks, work)
        work.remove()
    (folder / f"document-{ranks.rank}.json").write_text(text)


if __name__ == "__main__":
    main()
