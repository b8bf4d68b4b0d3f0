"""Images to features, on which FID, sFID, Inception Score, precision and recall are computed.

    pixels (B, H, W, 3) uint8 -> pooled (B, D), and where a network has them spatial features (B, S)
    and class probabilities (B, K)
`load_network("kind:path")` reads the known networks from their files, `ModuleFeatures` wraps any
torch module. Reading files is `weights.py`; nothing here computes a metric.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varptq.errors import CheckpointError, InputError, is_out_of_memory
from varptq.evaluate.networks import inception, resnet, weights
from varptq.models.meta import on_meta
from varptq.models.placement import checked_device

DOWNLOAD = "download"
Part = Literal["spatial", "probabilities"]
_NEEDED: dict[Part, tuple[str, str]] = {
    "spatial": ("sFID", "use the FID Inception"),
    "probabilities": (
        "the Inception Score",
        "use a file that includes the classification layer (Inception: fc.weight)",
    ),
}


class Features(NamedTuple):
    """pooled (B, D) float32; spatial (B, S) and probabilities (B, K) float32, or None."""

    pooled: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


class FeatureNetwork(Protocol):
    """What the metrics need: a name for the record, and features of images."""

    name: str

    def __call__(self, pixels_BHW3: Tensor) -> Features:
        """pixels (B, H, W, 3) uint8 -> features, on the network's device."""
        ...


def part_of(features: Features, part: Part, network: str) -> Tensor:
    """An optional part of `features`. Raises `InputError`, naming the metric, if it is missing."""
    tensor = features.spatial if part == "spatial" else features.probabilities
    if tensor is None:
        metric, remedy = _NEEDED[part]
        raise InputError(f"network {network!r} gives no {part}, which {metric} needs; {remedy}")
    return tensor


class InceptionFeatures:
    """The FID Inception behind a bilinear resize to 299 x 299, whose values are not rounded.

    legacy_resize off: pixels are areas (torch's align_corners=False, antialias=False). On: pixel i
    of the result is read at i * side / 299, as in the TensorFlow graph of the ADM suite; for
    comparison with statistics and values published with that suite.
    """

    def __init__(
        self,
        network: inception.Inception,
        device: torch.device | str = "cpu",
        *,
        legacy_resize: bool = False,
    ) -> None:
        self.name = "inception-adm" if legacy_resize else "inception"
        self.device = checked_device(device)
        self.network = network.to(self.device)
        self._legacy_resize = legacy_resize

    @torch.no_grad()
    def __call__(self, pixels_BHW3: Tensor) -> Features:
        images = planes(pixels_BHW3, self.device)
        size = (inception.SIDE, inception.SIDE)
        if images.shape[2:] != size:
            if self._legacy_resize:
                images = _legacy_resized(images, inception.SIDE)
            else:
                images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return Features(*self.network((images - 128) / 128))


def _legacy_resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side), bilinear with both corners at the upper left."""
    rows, columns = (_legacy_weights(size, side).to(images) for size in images.shape[2:])
    return rows @ images @ columns.T


def _legacy_weights(size: int, side: int) -> Tensor:
    """(side, size) float32: row i mixes the two pixels around i * size / side."""
    places = torch.arange(side, dtype=torch.float64, device="cpu") * size / side
    low = places.long()
    high = (low + 1).clamp_max(size - 1)
    share = (places - low).unsqueeze(1)
    pixels = torch.eye(size, dtype=torch.float64, device="cpu")
    return ((1 - share) * pixels[low] + share * pixels[high]).float()


class ResNet56Features:
    """The CIFAR classifier at the images' own size: 64 means and its class probabilities."""

    name = "resnet56"

    def __init__(self, network: resnet.ResNet56, device: torch.device | str = "cpu") -> None:
        self.device = checked_device(device)
        self.network = network.to(self.device)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1)
            for values in (resnet.MEAN, resnet.STD)
        )

    @torch.no_grad()
    def __call__(self, pixels_BHW3: Tensor) -> Features:
        images = planes(pixels_BHW3, self.device) / 255
        means, logits = self.network((images - self._mean) / self._std)
        return Features(means, probabilities=logits.softmax(-1))


class ModuleFeatures:
    """Any torch module as a network.

    module: takes images (B, 3, H, W) float32 in [0, 1] of their own size; returns (B, D), or a
    `Features` (or tuple of its parts) if it has more of them. It is set to eval mode. Calls raise
    `InputError` for images that it cannot take and for results of another kind.
    """

    def __init__(self, module: nn.Module, name: str, device: torch.device | str = "cpu") -> None:
        self.device = checked_device(device)
        self.module = module.to(self.device).eval()
        self.name = name

    @torch.no_grad()
    def __call__(self, pixels_BHW3: Tensor) -> Features:
        images = planes(pixels_BHW3, self.device) / 255
        try:
            result = self.module(images)
        except RuntimeError as error:  # what torch raises for shapes that do not fit
            if is_out_of_memory(error):
                raise
            height, width = images.shape[2:]
            reason = str(error).strip().splitlines()[-1]  # TorchScript's first lines are a trace
            raise InputError(
                f"network {self.name!r}: fails for images of {height} x {width} ({reason})"
            ) from None
        pooled, *others = result if isinstance(result, tuple) else (result,)
        parts = (None if part is None else self._checked(part, len(pixels_BHW3)) for part in others)
        return Features(self._checked(pooled, len(pixels_BHW3)), *parts)

    def _checked(self, part: Tensor, images: int) -> Tensor:
        if part.ndim != 2 or len(part) != images:
            raise InputError(
                f"network {self.name!r}: returned shape {tuple(part.shape)}, expected ({images}, "
                "features); flatten or pool them"
            )
        return part.float()


def planes(pixels_BHW3: Tensor, device: torch.device) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 255] on `device`. Raises `InputError`."""
    if pixels_BHW3.dtype != torch.uint8 or pixels_BHW3.ndim != 4 or pixels_BHW3.shape[-1] != 3:
        raise InputError(
            f"images: {tuple(pixels_BHW3.shape)} {pixels_BHW3.dtype}, expected (B, H, W, 3) uint8"
        )
    return pixels_BHW3.to(device).permute(0, 3, 1, 2).float()


def load_network(spec: str, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A network from "kind:path".

    "inception:FILE" (.safetensors or TorchScript .pt), "inception:download" (downloads the trunk),
    "inception-adm:..." (the same with the legacy resize), "resnet56:FILE" (.safetensors),
    "module:FILE" (TorchScript of any network, as `ModuleFeatures` takes it). Formats:
    docs/metrics.md. Raises `InputError` for an unknown kind, `CheckpointError` for a file that
    cannot be used, `NonFiniteError` for one with NaN or infinity.
    """
    kind, _, path = spec.partition(":")
    if kind not in _LOADERS or not path:
        known = ", ".join(f"{name}:FILE" for name in _LOADERS)
        raise InputError(f"network {spec!r}: unknown, expected one of {known}, inception:download")
    return _LOADERS[kind](path, device)


def _load_inception(
    path: str, device: torch.device | str, *, legacy_resize: bool = False
) -> FeatureNetwork:
    file = weights.download_inception() if path == DOWNLOAD else Path(path)
    if file.suffix == weights.SCRIPT_SUFFIX:
        script = weights.read_script(file)
        state = {name: tensor.float() for name, tensor in script.state_dict().items()}
    else:
        state = weights.read_tensors(file)
    state = inception.plain_names(state)
    if any(name.startswith("AuxLogits.") for name in state):
        raise CheckpointError(
            f"{file}: is torchvision's Inception (it has AuxLogits), expected the FID Inception of "
            "2015-12-05; see docs/metrics.md"
        )
    state.pop("fc.bias", None)
    with on_meta():
        network = inception.Inception(with_fc="fc.weight" in state)
    weights.fill(network, state, file)
    network.fold()
    return InceptionFeatures(network, device, legacy_resize=legacy_resize)


def _load_resnet56(path: str, device: torch.device | str) -> FeatureNetwork:
    state = weights.read_tensors(path)
    with on_meta():
        network = resnet.ResNet56(len(state["linear.bias"]) if "linear.bias" in state else 10)
    weights.fill(network, state, path)
    return ResNet56Features(network, device)


def _load_module(path: str, device: torch.device | str) -> FeatureNetwork:
    return ModuleFeatures(weights.read_script(path), Path(path).stem, device)


_LOADERS: dict[str, Callable[[str, torch.device | str], FeatureNetwork]] = {
    "inception": _load_inception,
    "inception-adm": partial(_load_inception, legacy_resize=True),
    "resnet56": _load_resnet56,
    "module": _load_module,
}
