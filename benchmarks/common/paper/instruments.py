"""What measures the rows: networks and real images, and stand-ins for them in a dry run.

The stand-ins see colours only. Their numbers mean nothing, but they go the way of the real ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.common.judges import INCEPTION, LPIPS
from varptq.errors import InputError
from varptq.evaluate.features import FeatureNetwork, ModuleFeatures, load_network
from varptq.evaluate.frechet import Gaussian
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.networks.clip import ClipEncoder, TransformersClip
from varptq.evaluate.networks.lpips import LAYERS, Lpips
from varptq.evaluate.preflight import Instruments
from varptq.files import write_atomic
from varptq.models.scales import Size

NETWORK = "inception-adm"
# Beside the pictures of a row of texts, for numbers of the suites' own programs.
SCORES = "scores.json"
# Numbers of a suite of text-to-image, by the names of `rows.COLUMNS`, or None while they are not
# there. It is given the folders of its pictures by suite.
Scorer = Callable[[dict[str, Path]], dict[str, float] | None]


@dataclass(frozen=True)
class Files:
    """Where instruments are read from; None where they were not given."""

    network: str | None
    reference: Path | None
    lpips: Path | None
    clip: str | None

    @classmethod
    def found(
        cls, network: str | None, reference: Path | None, lpips: Path | None, clip: str | None
    ) -> Files:
        """As given, else those of the folder `VARPTQ_WEIGHTS` (docs/metrics.md)."""
        folder = os.environ.get("VARPTQ_WEIGHTS")
        if folder and network is None and (Path(folder) / INCEPTION).is_file():
            network = f"{NETWORK}:{Path(folder) / INCEPTION}"
        if folder and lpips is None and (Path(folder) / LPIPS).is_file():
            lpips = Path(folder) / LPIPS
        return cls(network, reference, lpips, clip)

    def names(self) -> dict[str, str | None]:
        """What was given, without the folders it lies in."""
        return {
            "network": self.network and self.network.partition(":")[0],
            "reference": self.reference and self.reference.name,
            "lpips": self.lpips and self.lpips.name,
            "clip": self.clip and Path(self.clip).name,
        }

    def load(self, device: str) -> Instruments:
        """Those that were given. Raises `VarptqError` for one that cannot be used."""
        return Instruments(
            load_network(self.network, device) if self.network else None,
            ImageFiles.open(self.reference) if self.reference else None,
            Lpips.load(self.lpips, device) if self.lpips else None,
            TransformersClip.load(self.clip, device) if self.clip else None,
        )

    def or_stand_ins(self, folder: Path, size: Size, count: int, device: str) -> Instruments:
        """With stand-ins for the others, in `folder`: a reference of `count` images of `size`, and
        its statistics."""
        own = self.load(device)
        network = own.network or ModuleFeatures(Colours(), "colours", device)
        reference = own.reference or ImageFiles.open(_reference(folder, size, count, network))
        return Instruments(
            network,
            reference,
            own.lpips or Lpips(random_lpips(), device),
            own.clip or ColourClip(),
        )


class Colours(nn.Module):
    """Three means and three deviations, spatial features, and probabilities of three classes."""

    def forward(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means, spread = images_B3HW.mean((2, 3)), images_B3HW.std((2, 3))
        return torch.cat((means, spread), 1), images_B3HW[:, :2, 0, 0], (5 * means).softmax(-1)


class ColourClip(ClipEncoder):
    """Mean colours of images; for a text a colour that depends on its letters."""

    def __call__(self, pixels_BHW3: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        colours = [list(hashlib.sha256(text.encode()).digest()[:3]) for text in texts]
        return pixels_BHW3.float().mean((1, 2)), torch.tensor(colours, dtype=torch.float32)


def from_file(folders: dict[str, Path]) -> dict[str, float] | None:
    """The `Scorer` of a real run: what stands in scores.json beside the folders, by suite. Raises
    `InputError` for another file."""
    path = next(iter(folders.values())).parent / SCORES
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return {name: float(found[name]) for name in folders}
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(folders)
        raise InputError(f"{path}: {error!r:.80}, expected a JSON object with {names}") from None


def random_lpips() -> dict[str, Tensor]:
    """Tensors of the network of LPIPS, drawn."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, layer in enumerate(LAYERS):
        shape = (layer.width, layer.channels, layer.kernel, layer.kernel)
        weight = torch.randn(shape, generator=generator) / (shape[1] * shape[2] * shape[3]) ** 0.5
        state[f"features.{layer.place}.weight"] = weight
        state[f"features.{layer.place}.bias"] = torch.zeros(layer.width)
        state[f"lin{number}.model.1.weight"] = torch.full((1, layer.width, 1, 1), 1 / layer.width)
    return state


def _reference(folder: Path, size: Size, count: int, network: FeatureNetwork) -> Path:
    """Noise of several colours with its statistics, as the suite's own files have them."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (max(count, 16), *size, 3), dtype=np.uint8)
    images //= draw.integers(1, 5, (len(images), 1, 1, 3), dtype=np.uint8)
    found = Gaussian.of(network(torch.from_numpy(images)).pooled)
    path, moments = folder / "reference.npz", (found.mean.cpu(), found.covariance.cpu())
    mu, sigma = (tensor.numpy() for tensor in moments)
    # Every process writes the same.
    write_atomic(path, lambda file: np.savez(file, arr_0=images, mu=mu, sigma=sigma))
    return path


def brightness(folders: dict[str, Path]) -> dict[str, float] | None:
    """A stand-in `Scorer`: the mean of all pictures of a suite."""
    found = {}
    for name, folder in folders.items():
        pictures = sorted(folder.rglob("*.png"))
        found[name] = float(np.mean([np.asarray(Image.open(path)).mean() for path in pictures]))
    return found
