"""LPIPS: the perceptual distance of two images, by AlexNet with the v0.1 heads.

    d = sum over 5 layers of mean over positions of  w . (a/|a| - b/|b|)^2
a and b are the activations (channels) of the two images at a position, w the head's weights. Zhang
et al. 2018. Tensors are named as in the reference package: `features.{0,3,6,8,10}.{weight,bias}`
and `lin{0..4}.model.1.weight`. Other backbones are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from varptq.errors import InputError
from varptq.evaluate.features import planes
from varptq.evaluate.networks.weights import check_shapes, read_tensors
from varptq.models.placement import checked_device

MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# The second pool needs a 3 x 3 map.
MIN_SIDE = 31
NORM_EPS = 1e-10
# Images in memory at a time; the first maps of a 256 x 256 image take 1 MB.
AT_ONCE = 64


class _Layer(NamedTuple):
    place: int
    channels: int
    width: int
    kernel: int
    stride: int
    padding: int
    pool_before: bool


LAYERS = (
    _Layer(0, 3, 64, 11, 4, 2, False),
    _Layer(3, 64, 192, 5, 1, 2, True),
    _Layer(6, 192, 384, 3, 1, 1, True),
    _Layer(8, 384, 256, 3, 1, 1, False),
    _Layer(10, 256, 256, 3, 1, 1, False),
)


class Lpips:
    """The distance as a callable of two batches of images."""

    def __init__(self, state: Mapping[str, Tensor], device: torch.device | str = "cpu") -> None:
        """state: the tensors named in the file's docstring. Raises `CheckpointError`."""
        check_shapes(state, _shapes(), "LPIPS")
        self.device = checked_device(device)
        self._state = {name: tensor.float().to(self.device) for name, tensor in state.items()}
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1)
            for values in (MEAN, STD)
        )

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Self:
        """From a .safetensors file. Raises `CheckpointError`, `NonFiniteError`."""
        state = read_tensors(path)
        check_shapes(state, _shapes(), path)
        return cls(state, device)

    @torch.no_grad()
    def __call__(self, first_BHW3: Tensor, second_BHW3: Tensor) -> Tensor:
        """(B,) float32 distances of two (B, H, W, 3) uint8 batches; 0 for equal images.

        Raises `InputError` for unequal shapes or images smaller than 31 x 31.
        """
        if first_BHW3.shape != second_BHW3.shape or min(first_BHW3.shape[1:3]) < MIN_SIDE:
            raise InputError(
                f"images: shapes {tuple(first_BHW3.shape)} and {tuple(second_BHW3.shape)}, "
                f"expected equal ones of at least {MIN_SIDE} x {MIN_SIDE}"
            )
        pairs = zip(first_BHW3.split(AT_ONCE), second_BHW3.split(AT_ONCE), strict=True)
        return torch.cat([self.between(self._signed(a), self._signed(b)) for a, b in pairs])

    def between(self, first_B3HW: Tensor, second_B3HW: Tensor) -> Tensor:
        """(B,) distances of two (B, 3, H, W) float32 batches in [-1, 1] on this object's device.

        Differentiable, so that it can be a loss too.
        """
        a, b = ((images - self._mean) / self._std for images in (first_B3HW, second_B3HW))
        total_B = torch.zeros(len(a), dtype=torch.float32, device=self.device)
        for number, layer in enumerate(LAYERS):
            a, b = self._layer(layer, a), self._layer(layer, b)
            squared = (_unit(a) - _unit(b)).square()
            head = self._state[f"lin{number}.model.1.weight"]
            total_B = total_B + F.conv2d(squared, head).mean((1, 2, 3))
        return total_B

    def _signed(self, pixels_BHW3: Tensor) -> Tensor:
        return planes(pixels_BHW3, self.device) / 127.5 - 1

    def _layer(self, layer: _Layer, x: Tensor) -> Tensor:
        if layer.pool_before:
            x = F.max_pool2d(x, 3, 2)
        weight, bias = (
            self._state[f"features.{layer.place}.{part}"] for part in ("weight", "bias")
        )
        return F.relu(F.conv2d(x, weight, bias, layer.stride, layer.padding))


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + NORM_EPS)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for number, layer in enumerate(LAYERS):
        name = f"features.{layer.place}"
        shapes[f"{name}.weight"] = (layer.width, layer.channels, layer.kernel, layer.kernel)
        shapes[f"{name}.bias"] = (layer.width,)
        shapes[f"lin{number}.model.1.weight"] = (1, layer.width, 1, 1)
    return shapes
