"""The float VQVAE: images to feature maps and back, of the VQGAN f16 kind.

    encode: images -> encoder -> quant_conv -> features -> token pyramid -> ids
    decode: ids -> token pyramid -> f_hat -> post_quant_conv -> decoder -> clamp to [-1, 1]

ResNet blocks (GroupNorm, SiLU, 3x3 convolution), self-attention at some levels and in the middle,
stride-2 convolution down, nearest neighbour up. Parameter names are upstream's. No training losses,
no dropout.

Shapes: B images, S image side, L tokens, C channels, P side of the feature map and last token map.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from varptq.errors import InputError
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder
from varptq.models.scales import Scales
from varptq.models.var.pyramid import TokenPyramid

NORM_GROUPS = 32
NORM_EPS = 1e-6
IMAGE_CHANNELS = 3
# Largest feature map of the decoder in copies of it that live at a time.
FEATURES = 6


@dataclass(frozen=True)
class VQVAEArch:
    """Everything the tensors of a checkpoint say about the VQVAE (docs/method.md section 1)."""

    ch: int
    """Channels of the first convolution."""
    ch_mult: tuple[int, ...]
    """Channels of each level over `ch`, full resolution first; all levels but the last halve it."""
    num_res_blocks: int
    """ResNet blocks per encoder level; a decoder level has one more."""
    code_dim: int
    """Cvae, width of a codebook entry."""
    codebook_size: int
    """V."""
    num_phi: int
    """J, phi convolutions of the token pyramid."""
    attn_levels: tuple[int, ...]
    """Levels whose ResNet blocks are each followed by self-attention."""
    mid_attn: bool
    """Self-attention between the two ResNet blocks of the middle."""
    quant_kernel: int = 3
    """Kernel side of quant_conv and post_quant_conv."""
    hit_scales: int = 0
    """Rows of the bookkeeping buffer `ema_vocab_hit_SV`; 0 where the file has none."""

    @property
    def downsampling(self) -> int:
        """Image side / feature side."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, dtype=torch.float32)


def _conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, dtype=torch.float32)


class ResBlock(nn.Module):
    """x + conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))); a 1x1 shortcut where the channels change."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(channels_in), _conv3(channels_in, channels_out)
        self.norm2, self.conv2 = _norm(channels_out), _conv3(channels_out, channels_out)
        same = channels_in == channels_out
        self.nin_shortcut = (
            nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, dtype=torch.float32)
        )

    def forward(self, x_BCSS: Tensor) -> Tensor:
        # Nested and in place for the same reason as `Level.steps`.
        branch = self.conv2(F.silu(self.norm2(self._first(x_BCSS)), inplace=True))
        return self.nin_shortcut(x_BCSS) + branch

    def _first(self, x_BCSS: Tensor) -> Tensor:
        return self.conv1(F.silu(self.norm1(x_BCSS), inplace=True))


class SpatialAttention(nn.Module):
    """x + proj_out(attention over all positions), one head as wide as the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, dtype=torch.float32)
        self.proj_out = nn.Conv2d(channels, channels, 1, dtype=torch.float32)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        channels, height, width = x_BCSS.shape[1:]
        qkv = self.qkv(self.norm(x_BCSS)).unflatten(1, (3, 1, channels)).flatten(-2)
        q_B1LC, k_B1LC, v_B1LC = qkv.transpose(-1, -2).unbind(1)
        h_B1LC = F.scaled_dot_product_attention(q_B1LC, k_B1LC, v_B1LC)
        h_BCSS = h_B1LC.squeeze(1).transpose(1, 2).unflatten(2, (height, width))
        return x_BCSS + self.proj_out(h_BCSS)


class Downsample(nn.Module):
    """Half the side: zeros in one column right and one row below, then a stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, dtype=torch.float32)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.conv(F.pad(x_BCSS, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the side: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.conv(F.interpolate(x_BCSS, scale_factor=2.0, mode="nearest"))


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

    def __init__(self, arch: VQVAEArch, index: int) -> None:
        before, after = (arch.ch, *arch.channels)[index], arch.channels[index]
        super().__init__(before, after, arch.num_res_blocks, index in arch.attn_levels)
        is_last = index == len(arch.channels) - 1
        self.downsample = nn.Identity() if is_last else Downsample(after)

    def steps(self) -> Iterator[nn.Module]:
        yield from super().steps()
        yield self.downsample


class UpLevel(Level):
    """A decoder level: its blocks, then twice the side unless it is at full resolution."""

    def __init__(self, arch: VQVAEArch, index: int) -> None:
        after, before = (*arch.channels, arch.channels[-1])[index : index + 2]
        super().__init__(before, after, arch.num_res_blocks + 1, index in arch.attn_levels)
        self.upsample = Upsample(after) if index > 0 else nn.Identity()

    def steps(self) -> Iterator[nn.Module]:
        yield from super().steps()
        yield self.upsample


class Middle(nn.Module):
    """ResNet block, self-attention (if any), ResNet block at the lowest resolution."""

    def __init__(self, arch: VQVAEArch) -> None:
        super().__init__()
        channels = arch.channels[-1]
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels) if arch.mid_attn else nn.Identity()
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x_BCSS: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x_BCSS)))


class Encoder(nn.Module):
    """Images (B, 3, S, S) -> (B, Cvae, P, P)."""

    def __init__(self, arch: VQVAEArch) -> None:
        super().__init__()
        self.conv_in = _conv3(IMAGE_CHANNELS, arch.ch)
        self.down = nn.ModuleList(DownLevel(arch, i) for i in range(len(arch.ch_mult)))
        self.mid = Middle(arch)
        self.norm_out = _norm(arch.channels[-1])
        self.conv_out = _conv3(arch.channels[-1], arch.code_dim)

    def forward(self, images_B3SS: Tensor) -> Tensor:
        x_BCSS = self.conv_in(images_B3SS)
        for level in self.down:
            for step in cast(Level, level).steps():
                x_BCSS = step(x_BCSS)
        return self.conv_out(F.silu(self.norm_out(self.mid(x_BCSS)), inplace=True))


class Decoder(nn.Module):
    """(B, Cvae, P, P) -> images (B, 3, S, S), not clamped. `up.0`, full resolution, runs last."""

    def __init__(self, arch: VQVAEArch) -> None:
        super().__init__()
        self.conv_in = _conv3(arch.code_dim, arch.channels[-1])
        self.mid = Middle(arch)
        self.up = nn.ModuleList(UpLevel(arch, i) for i in range(len(arch.ch_mult)))
        self.norm_out = _norm(arch.channels[0])
        self.conv_out = _conv3(arch.channels[0], IMAGE_CHANNELS)

    def forward(self, z_BCPP: Tensor) -> Tensor:
        x_BCSS = self.mid(self.conv_in(z_BCPP))
        for level in reversed(list(self.up)):
            for step in cast(Level, level).steps():
                x_BCSS = step(x_BCSS)
        return self.conv_out(F.silu(self.norm_out(x_BCSS), inplace=True))


class VQVAE(Autoencoder):
    """Images in [-1, 1] to token ids and back. dtype and device are those of the parameters."""

    ENCODING = ("encoder", "quant_conv")
    DECODING = ("post_quant_conv", "decoder")

    def __init__(self, arch: VQVAEArch, scales: Scales) -> None:
        super().__init__()
        self.arch = arch
        self.encoder, self.decoder = Encoder(arch), Decoder(arch)
        self.quantize = TokenPyramid(
            scales, arch.codebook_size, arch.code_dim, arch.num_phi, arch.hit_scales
        )
        kernel, dim = arch.quant_kernel, arch.code_dim
        self.quant_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, dtype=torch.float32)
        self.post_quant_conv = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, dtype=torch.float32)

    @property
    def scales(self) -> Scales:
        return self.quantize.scales

    @property
    def alphabet(self) -> Alphabet:
        return self.quantize.alphabet

    @property
    def device(self) -> torch.device:
        return self.quantize.embedding.weight.device

    @property
    def image_size(self) -> int:
        """Side of the images in pixels: last side times the downsampling of the encoder."""
        return self.scales.last_side * self.arch.downsampling

    def features(self, images_B3SS: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> features (B, Cvae, P, P) before quantization.

        Raises `InputError` for another shape or an integer dtype.
        """
        side, shape = self.image_size, tuple(images_B3SS.shape)
        if len(shape) != 4 or shape[1:] != (IMAGE_CHANNELS, side, side):
            raise InputError(
                f"images have shape {shape}: expected (images, {IMAGE_CHANNELS}, {side}, {side})"
            )
        if not images_B3SS.is_floating_point():
            raise InputError(f"images are {images_B3SS.dtype}: expected floating point in [-1, 1]")
        return self.quant_conv(self.encoder(images_B3SS.to(self.quant_conv.weight.dtype)))

    @torch.no_grad()
    def encode(self, images_B3SS: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> ids (B, L) int64. Raises as `features` does."""
        return self.quantize.encode(self.features(images_B3SS))

    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat (B, Cvae, P, P) -> images (B, 3, S, S), clamped to [-1, 1]."""
        # The decoder may have been cast by itself.
        z_BCPP = f_hat.to(self.post_quant_conv.weight.dtype)
        return self.decoder(self.post_quant_conv(z_BCPP)).clamp(-1, 1)

    def codebook(self) -> Tensor:
        return self.quantize.embedding.weight

    def upsamplings(self) -> list[nn.Module]:
        return [module for module in self.decoder.modules() if isinstance(module, Upsample)]

    def decoder_bytes(self) -> int:
        itemsize = self.quantize.embedding.weight.itemsize
        return FEATURES * self.image_size**2 * self.arch.ch * itemsize

    def zeros(self, batch: int) -> Tensor:
        return self.quantize.zeros(batch)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.quantize.embed(tokens)

    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        return self.quantize.add_scale(f_hat, h_BlC, scale)

    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        return self.quantize.next_input(f_hat, scale)

    @torch.no_grad()
    def randomize(self, generator: torch.Generator) -> None:
        """Fill the parameters with a fresh model's values (for benchmarks and tests).

        Kernels and codebook are normal with variance 1 / fan-in, norms the identity, biases 0.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = parameter[0].numel() ** -0.5
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                values.normal_(0.0, std, generator=generator)
                parameter.copy_(values)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
