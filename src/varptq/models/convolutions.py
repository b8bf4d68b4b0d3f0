"""The convolutional encoder and decoder of the VQGAN kind, for the autoencoders of all families.

ResNet blocks (GroupNorm, SiLU, 3x3 convolution), self-attention at some levels and in the middle,
stride-2 convolution down, nearest neighbour up. Parameter names are upstream's. No training losses,
no dropout.

The seams, where quantizers and runtimes put modules of their own, are `Convolution`, with the
upsampling and the zeros before it, and `MapNorm`, with the SiLU behind it. `feeds` says which norm
is all that a convolution reads.

Shapes: B images, H and W their sides, C channels, P sides of the feature map, Z its channels, O and
I channels of a kernel of k x k taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS, OTHER_GROUPS = 32, 24
NORM_EPS = 1e-6
IMAGE_CHANNELS = 3
# Largest feature map of the decoder in copies of it that live at a time.
FEATURES = 6


@dataclass(frozen=True, kw_only=True)
class ConvArch:
    """What the tensors of a checkpoint say about encoder and decoder."""

    ch: int
    """Channels of the first convolution."""
    ch_mult: tuple[int, ...]
    """Channels of each level over `ch`, full resolution first; all levels but the last halve it."""
    num_res_blocks: int
    """ResNet blocks per encoder level; a decoder level has one more."""
    code_dim: int
    """Z, channels of the feature map."""
    attn_levels: tuple[int, ...] = ()
    """Levels whose ResNet blocks are each followed by self-attention."""
    mid_attn: bool = False
    """Self-attention between the two ResNet blocks of the middle."""

    @property
    def downsampling(self) -> int:
        """Image side / feature side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)


def norm_groups(channels: int) -> int:
    """32, or 24 where 32 does not divide the channels."""
    return NORM_GROUPS if channels % NORM_GROUPS == 0 else OTHER_GROUPS


class Taps(NamedTuple):
    """Where a convolution reads, in this order: the map itself or, with `upsample`, the nearest
    neighbours of one of twice the side; zeros around, `pads` (left, right, top, bottom); every
    `stride`-th place."""

    stride: int = 1
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    upsample: bool = False

    def arranged(self, x_BCHW: Tensor, zero: int = 0) -> Tensor:
        """The map as a convolution without padding reads it; `zero` is the number that stands for
        zeros around it."""
        if self.upsample:
            x_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return F.pad(x_BCHW, self.pads, value=zero) if any(self.pads) else x_BCHW

    def convolve(self, x_BCHW: Tensor, weight_OIkk: Tensor, bias_O: Tensor | None) -> Tensor:
        left, right, top, bottom = self.pads
        if (left, top) != (right, bottom):
            return F.conv2d(self.arranged(x_BCHW), weight_OIkk, bias_O, self.stride)
        # The convolution's own zeros are no copy of the map.
        x_BCHW = self._replace(pads=(0, 0, 0, 0)).arranged(x_BCHW)
        return F.conv2d(x_BCHW, weight_OIkk, bias_O, self.stride, (top, left))


class Convolution(nn.Conv2d):
    """Seam: a convolution of square kernels over what `taps` says."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, taps: Taps) -> None:
        super().__init__(channels_in, channels_out, kernel, dtype=torch.float32)
        self.taps = taps

    def forward(self, input: Tensor, skip: Tensor | None = None) -> Tensor:
        """`skip`, of the shape of the result, is added to it. Nobody reads `skip` afterwards: a
        runtime may put the result in its place."""
        y = self.taps.convolve(input, self.weight, self.bias)
        return y if skip is None else skip + y


class MapNorm(nn.GroupNorm):
    """Seam: GroupNorm, then SiLU where `silu`."""

    def __init__(self, channels: int, *, silu: bool = True) -> None:
        super().__init__(norm_groups(channels), channels, eps=NORM_EPS, dtype=torch.float32)
        self.silu = silu

    def forward(self, input: Tensor) -> Tensor:
        # In place for the same reason as `Level.steps`.
        return F.silu(super().forward(input), inplace=True) if self.silu else super().forward(input)


def conv3(channels_in: int, channels_out: int, *, upsample: bool = False) -> Convolution:
    return Convolution(channels_in, channels_out, 3, Taps(pads=(1, 1, 1, 1), upsample=upsample))


def conv1(channels_in: int, channels_out: int) -> Convolution:
    return Convolution(channels_in, channels_out, 1, Taps())


class ResBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); a 1x1 shortcut where the channels change."""

    FEEDS: ClassVar = {"conv1": "norm1", "conv2": "norm2"}

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = MapNorm(channels_in), conv3(channels_in, channels_out)
        self.norm2, self.conv2 = MapNorm(channels_out), conv3(channels_out, channels_out)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else conv1(channels_in, channels_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Nested for the same reason as `Level.steps`.
        # The shortcut comes second, when the map between the convolutions is gone.
        return self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))), self.nin_shortcut(x_BCHW))


class SpatialAttention(nn.Module):
    """x + proj_out(attention over all positions), one head as wide as the channels."""

    FEEDS: ClassVar = {"qkv": "norm"}

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = MapNorm(channels, silu=False)
        self.qkv, self.proj_out = conv1(channels, 3 * channels), conv1(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        channels, height, width = x_BCHW.shape[1:]
        qkv = self.qkv(self.norm(x_BCHW)).unflatten(1, (3, 1, channels)).flatten(-2)
        q_B1LC, k_B1LC, v_B1LC = qkv.transpose(-1, -2).unbind(1)
        h_B1LC = F.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC)
        h_BCHW = h_B1LC.squeeze(1).transpose(1, 2).unflatten(2, (height, width))
        return self.proj_out(h_BCHW, x_BCHW)


class Downsample(nn.Module):
    """Half the side: zeros in one column right and one row below, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, Taps(stride=2, pads=(0, 1, 0, 1)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, upsample=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Level(nn.Module):
    """The ResNet blocks of one resolution, each followed by self-attention if `attention`.

    Its owner runs the `steps`, so that no map outlives the step that takes it: at full resolution
    one is 40 MB an image.
    """

    def __init__(self, channels_in: int, channels: int, num_blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [channels_in, *[channels] * (num_blocks - 1)]
        self.block = nn.ModuleList(ResBlock(width, channels) for width in widths)
        self.attn = nn.ModuleList(SpatialAttention(channels) for _ in widths if attention)

    def steps(self) -> Iterator[nn.Module]:
        """What a map goes through, in order."""
        for index, block in enumerate(self.block):
            yield block
            if len(self.attn) > 0:
                yield self.attn[index]


class DownLevel(Level):
    """An encoder level: its blocks, then half the side unless it is the last."""

    def __init__(self, arch: ConvArch, index: int) -> None:
        before, after = (arch.ch, *arch.channels)[index], arch.channels[index]
        super().__init__(before, after, arch.num_res_blocks, index in arch.attn_levels)
        is_last = index == len(arch.channels) - 1
        self.downsample = nn.Identity() if is_last else Downsample(after)

    def steps(self) -> Iterator[nn.Module]:
        yield from super().steps()
        yield self.downsample


class UpLevel(Level):
    """A decoder level: its blocks, then twice the side unless it is at full resolution."""

    def __init__(self, arch: ConvArch, index: int) -> None:
        after, before = (*arch.channels, arch.channels[-1])[index : index + 2]
        super().__init__(before, after, arch.num_res_blocks + 1, index in arch.attn_levels)
        self.upsample = Upsample(after) if index > 0 else nn.Identity()

    def steps(self) -> Iterator[nn.Module]:
        yield from super().steps()
        yield self.upsample


class Middle(nn.Module):
    """ResNet block, self-attention (if any), ResNet block at the lowest resolution."""

    def __init__(self, arch: ConvArch) -> None:
        super().__init__()
        channels = arch.channels[-1]
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels) if arch.mid_attn else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCHW)))


class Encoder(nn.Module):
    """Images (B, 3, H, W) -> (B, Z, P, P)."""

    FEEDS: ClassVar = {"conv_out": "norm_out"}

    def __init__(self, arch: ConvArch) -> None:
        super().__init__()
        self.conv_in = conv3(IMAGE_CHANNELS, arch.ch)
        self.down = nn.ModuleList(DownLevel(arch, i) for i in range(len(arch.ch_mult)))
        self.mid = Middle(arch)
        self.norm_out = MapNorm(arch.channels[-1])
        self.conv_out = conv3(arch.channels[-1], arch.code_dim)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(images_B3HW)
        for level in self.down:
            for step in cast(Level, level).steps():
                x_BCHW = step(x_BCHW)
        return self.conv_out(self.norm_out(self.mid(x_BCHW)))


class Decoder(nn.Module):
    """(B, Z, P, P) -> images (B, 3, H, W), not clamped. `up.0`, full resolution, runs last."""

    FEEDS: ClassVar = {"conv_out": "norm_out"}

    def __init__(self, arch: ConvArch) -> None:
        super().__init__()
        self.conv_in = conv3(arch.code_dim, arch.channels[-1])
        self.mid = Middle(arch)
        self.up = nn.ModuleList(UpLevel(arch, i) for i in range(len(arch.ch_mult)))
        self.norm_out = MapNorm(arch.channels[0])
        self.conv_out = conv3(arch.channels[0], IMAGE_CHANNELS)

    def forward(self, z_BCPP: Tensor) -> Tensor:
        x_BCHW = self.mid(self.conv_in(z_BCPP))
        for level in reversed(list(self.up)):
            for step in cast(Level, level).steps():
                x_BCHW = step(x_BCHW)
        return self.conv_out(self.norm_out(x_BCHW))


def convolutions_of(network: nn.Module) -> dict[str, Convolution]:
    """The convolution seams of a float network by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Convolution)}


def feeds(network: nn.Module) -> dict[str, str]:
    """By the name of a convolution, the norm that is all it reads and that nothing else reads."""
    found: dict[str, str] = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        pairs: dict[str, str] = getattr(type(module), "FEEDS", {})
        found |= {prefix + conv: prefix + norm for conv, norm in pairs.items()}
    return found


def upsamplings(decoder: Decoder) -> list[nn.Module]:
    """The modules that enlarge maps."""
    return [module for module in decoder.modules() if isinstance(module, Upsample)]


@torch.no_grad()
def randomize(network: nn.Module, generator: torch.Generator) -> None:
    """Fill the parameters with a fresh model's values (for benchmarks and tests).

    Kernels and codebooks are normal with variance 1 / fan-in, norms the identity, biases 0.
    """
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            std = parameter[0].numel() ** -0.5
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            values.normal_(0.0, std, generator=generator)
            parameter.copy_(values)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
