"""The Inception of 2015-12-05 on which FID is defined, as a plain module.

    x (B, 3, 299, 299) in [-1, 1) -> pooled (B, 2048), spatial (B, 2023), and with `fc` (B, 1008)
It differs from torchvision's: 3x3 average pools leave out the padding, the pool branch of the last
block is a max pool, BN eps 1e-3, 1008 classes. Tensors carry torchvision's names, as in pytorch-fid
(`Mixed_5b.branch1x1.conv.weight`); those of the TorchScript release (`layers.mixed.conv.weight`)
are renamed by `plain_names`. Reading files is `weights.py`, resizing images `features.py`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
# sFID takes the first 7 channels of TensorFlow's "mixed_6/conv:0", a map of 17 x 17.
SPATIAL_BLOCK, SPATIAL_CHANNELS = "Mixed_6d", 7
BN_EPS = 1e-3


class Conv(NamedTuple):
    """A convolution with BN and ReLU: its plain name, its name in the TorchScript release, shape.

    No padding for stride 2 or `valid`; all others keep the size of the map.
    """

    name: str
    script: str
    out: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


class Branch(NamedTuple):
    """A pool, then a chain of convolutions, then `fork`: convolutions side by side."""

    chain: tuple[Conv, ...] = ()
    fork: tuple[Conv, ...] = ()
    pool: Literal["", "mean", "max", "halve"] = ""


STEM = (
    Conv("Conv2d_1a_3x3", "conv", 32, (3, 3), stride=2),
    Conv("Conv2d_2a_3x3", "conv_1", 32, (3, 3), valid=True),
    Conv("Conv2d_2b_3x3", "conv_2", 64, (3, 3)),
    Conv("Conv2d_3b_1x1", "conv_3", 80),
    Conv("Conv2d_4a_3x3", "conv_4", 192, (3, 3), valid=True),
)
_HALVED_AFTER = {"Conv2d_2b_3x3", "Conv2d_4a_3x3"}
_STEM_CHANNELS = 192


def _map_35(pool_width: int) -> tuple[Branch, ...]:
    fives = Conv("branch5x5_1", "tower.conv", 48), Conv("branch5x5_2", "tower.conv_1", 64, (5, 5))
    threes = (
        Conv("branch3x3dbl_1", "tower_1.conv", 64),
        Conv("branch3x3dbl_2", "tower_1.conv_1", 96, (3, 3)),
        Conv("branch3x3dbl_3", "tower_1.conv_2", 96, (3, 3)),
    )
    pool = Branch((Conv("branch_pool", "tower_2.conv", pool_width),), pool="mean")
    return Branch((Conv("branch1x1", "conv", 64),)), Branch(fives), Branch(threes), pool


def _map_17(width: int) -> tuple[Branch, ...]:
    sevens = (
        Conv("branch7x7_1", "tower.conv", width),
        Conv("branch7x7_2", "tower.conv_1", width, (1, 7)),
        Conv("branch7x7_3", "tower.conv_2", 192, (7, 1)),
    )
    double = (
        Conv("branch7x7dbl_1", "tower_1.conv", width),
        Conv("branch7x7dbl_2", "tower_1.conv_1", width, (7, 1)),
        Conv("branch7x7dbl_3", "tower_1.conv_2", width, (1, 7)),
        Conv("branch7x7dbl_4", "tower_1.conv_3", width, (7, 1)),
        Conv("branch7x7dbl_5", "tower_1.conv_4", 192, (1, 7)),
    )
    pool = Branch((Conv("branch_pool", "tower_2.conv", 192),), pool="mean")
    return Branch((Conv("branch1x1", "conv", 192),)), Branch(sevens), Branch(double), pool


def _map_8(pool: Literal["mean", "max"]) -> tuple[Branch, ...]:
    threes = Branch(
        (Conv("branch3x3_1", "tower_conv", 384),),
        (
            Conv("branch3x3_2a", "tower_mixed_conv", 384, (1, 3)),
            Conv("branch3x3_2b", "tower_mixed_conv_1", 384, (3, 1)),
        ),
    )
    double = Branch(
        (
            Conv("branch3x3dbl_1", "tower_1_conv", 448),
            Conv("branch3x3dbl_2", "tower_1_conv_1", 384, (3, 3)),
        ),
        (
            Conv("branch3x3dbl_3a", "tower_1_mixed_conv", 384, (1, 3)),
            Conv("branch3x3dbl_3b", "tower_1_mixed_conv_1", 384, (3, 1)),
        ),
    )
    pooled = Branch((Conv("branch_pool", "tower_2_conv", 192),), pool=pool)
    return Branch((Conv("branch1x1", "conv", 320),)), threes, double, pooled


_TO_17 = (
    Branch((Conv("branch3x3", "conv", 384, (3, 3), stride=2),)),
    Branch(
        (
            Conv("branch3x3dbl_1", "tower.conv", 64),
            Conv("branch3x3dbl_2", "tower.conv_1", 96, (3, 3)),
            Conv("branch3x3dbl_3", "tower.conv_2", 96, (3, 3), stride=2),
        )
    ),
    Branch(pool="halve"),
)
_TO_8 = (
    Branch(
        (
            Conv("branch3x3_1", "tower.conv", 192),
            Conv("branch3x3_2", "tower.conv_1", 320, (3, 3), stride=2),
        )
    ),
    Branch(
        (
            Conv("branch7x7x3_1", "tower_1.conv", 192),
            Conv("branch7x7x3_2", "tower_1.conv_1", 192, (1, 7)),
            Conv("branch7x7x3_3", "tower_1.conv_2", 192, (7, 1)),
            Conv("branch7x7x3_4", "tower_1.conv_3", 192, (3, 3), stride=2),
        )
    ),
    Branch(pool="halve"),
)
# Plain name: name in the TorchScript release, branches.
BLOCKS: dict[str, tuple[str, tuple[Branch, ...]]] = {
    "Mixed_5b": ("mixed", _map_35(32)),
    "Mixed_5c": ("mixed_1", _map_35(64)),
    "Mixed_5d": ("mixed_2", _map_35(64)),
    "Mixed_6a": ("mixed_3", _TO_17),
    "Mixed_6b": ("mixed_4", _map_17(128)),
    "Mixed_6c": ("mixed_5", _map_17(160)),
    "Mixed_6d": ("mixed_6", _map_17(160)),
    "Mixed_6e": ("mixed_7", _map_17(192)),
    "Mixed_7a": ("mixed_8", _TO_8),
    "Mixed_7b": ("mixed_9", _map_8("mean")),
    "Mixed_7c": ("mixed_10", _map_8("max")),
}


class _ConvNorm(nn.Module):
    def __init__(self, channels: int, spec: Conv) -> None:
        super().__init__()
        free = spec.valid or spec.stride == 2
        padding = (0, 0) if free else (spec.kernel[0] // 2, spec.kernel[1] // 2)
        self.conv = nn.Conv2d(
            channels, spec.out, spec.kernel, spec.stride, padding, bias=False, dtype=torch.float32
        )
        self.bn: nn.Module = nn.BatchNorm2d(spec.out, eps=BN_EPS, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self) -> None:
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


class _Block(nn.Module):
    """Branches on the same input, their outputs side by side in the channels."""

    def __init__(self, channels: int, branches: tuple[Branch, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.out = 0
        for branch in branches:
            width = channels
            for spec in branch.chain:
                self.add_module(spec.name, _ConvNorm(width, spec))
                width = spec.out
            for spec in branch.fork:
                self.add_module(spec.name, _ConvNorm(width, spec))
            self.out += sum(spec.out for spec in branch.fork) or width

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for branch in self.branches:
            y = _pool(x, branch.pool)
            for spec in branch.chain:
                y = self.get_submodule(spec.name)(y)
            outputs += [self.get_submodule(spec.name)(y) for spec in branch.fork] or [y]
        return torch.cat(outputs, 1)


def _pool(x: Tensor, kind: Literal["", "mean", "max", "halve"]) -> Tensor:
    if kind == "mean":
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    if kind == "max":
        return F.max_pool2d(x, 3, 1, 1)
    return F.max_pool2d(x, 3, 2) if kind == "halve" else x


class Inception(nn.Module):
    """The FID Inception; with `with_fc` also its classification layer.

    The layer has no bias on purpose: the reference evaluator multiplies by the weight alone.
    """

    def __init__(self, with_fc: bool) -> None:
        super().__init__()
        channels = 3
        for spec in STEM:
            self.add_module(spec.name, _ConvNorm(channels, spec))
            channels = spec.out
        for name, (_, branches) in BLOCKS.items():
            block = _Block(channels, branches)
            self.add_module(name, block)
            channels = block.out
        self.fc = (
            nn.Linear(channels, NUM_CLASSES, bias=False, dtype=torch.float32) if with_fc else None
        )

    def fold(self) -> None:
        """Fold every BN into its convolution, which saves a fifth of the time and changes features
        by float32 rounding. The tensors no longer have the names above."""
        for module in self.modules():
            if isinstance(module, _ConvNorm):
                module.fold()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, 3, 299, 299) float32, (pixel - 128) / 128 -> pooled, spatial, probabilities.

        pooled (B, 2048); spatial (B, 17 * 17 * 7), channels last as TensorFlow lays them;
        probabilities (B, 1008), None without fc.
        """
        for spec in STEM:
            x = self.get_submodule(spec.name)(x)
            if spec.name in _HALVED_AFTER:
                x = _pool(x, "halve")
        spatial = x
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
            if name == SPATIAL_BLOCK:  # its first branch is "mixed_6/conv"
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pooled = x.mean((2, 3))
        return pooled, spatial, None if self.fc is None else self.fc(pooled).softmax(-1)


def plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of the TorchScript release to their plain names; other names stay.

    That release has no BN gain (it is 1) and calls the classification layer `output`.
    """
    marker = "layers.conv.beta"
    prefixes = [name.removesuffix(marker) for name in state if name.endswith(marker)]
    if not prefixes:
        return state
    root = prefixes[0]
    plain: dict[str, Tensor] = {}
    for ours, theirs in _conv_names():
        parts = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean"}
        for their_part, our_part in {**parts, "var": "bn.running_var"}.items():
            tensor = state.get(f"{root}layers.{theirs}.{their_part}")
            if tensor is not None:
                plain[f"{ours}.{our_part}"] = tensor
                if their_part == "beta":
                    plain[f"{ours}.bn.weight"] = torch.ones_like(tensor)
    if f"{root}output.weight" in state:
        plain["fc.weight"] = state[f"{root}output.weight"]
    return plain


def _conv_names() -> list[tuple[str, str]]:
    names = [(spec.name, spec.script) for spec in STEM]
    for block, (script, branches) in BLOCKS.items():
        for branch in branches:
            for spec in (*branch.chain, *branch.fork):
                names.append((f"{block}.{spec.name}", f"{script}.{spec.script}"))
    return names
