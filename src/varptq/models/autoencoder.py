"""The contract of an autoencoder: what everything above `models` may ask of it.

    f_hat_0 = zeros;   f_hat_{k+1} = add_scale(f_hat_k, embed(tokens_k), k);
    image = decode_features(f_hat_K)

Shapes: B images, H and W their height and width, L tokens, l tokens of one scale, C code width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from varptq.errors import InputError
from varptq.models.alphabet import Alphabet
from varptq.models.convolutions import IMAGE_CHANNELS
from varptq.models.scales import Scales, Size


class Pyramid:
    """The residual sum of token maps: four operations of a family, and what follows from them."""

    @property
    @abstractmethod
    def scales(self) -> Scales: ...

    @property
    @abstractmethod
    def alphabet(self) -> Alphabet: ...

    @abstractmethod
    def zeros(self, batch: int) -> Tensor:
        """f_hat before the first scale."""

    @abstractmethod
    def embed(self, tokens: Tensor) -> Tensor:
        """int64 tokens (B, l) or (B, l, draws) -> embeddings (B, l, C)."""

    @abstractmethod
    def add_scale(self, f_hat: Tensor, h_BlC: Tensor, scale: int) -> Tensor:
        """f_hat with the token embeddings (B, l, C) of `scale` added; a new tensor."""

    @abstractmethod
    def next_input(self, f_hat: Tensor, scale: int) -> Tensor:
        """f_hat after `scale` -> the transformer's input tokens of the next scale, (B, l, C)."""

    def accumulate(self, tokens: Tensor) -> Tensor:
        """Tokens of the first whole scales, or all -> f_hat. Raises `InputError` for tokens that
        are not integers of the alphabet or do not fill whole scales."""
        f_hat = self.zeros(len(tokens))
        for scale, part in enumerate(self.scales.slices()[: self._whole_scales(tokens)]):
            f_hat = self.add_scale(f_hat, self.embed(tokens[:, part]), scale)
        return f_hat

    def teacher_inputs(self, tokens: Tensor) -> Tensor:
        """Tokens of all scales -> the transformer's input tokens of scales 1..K-1, (B, L - l_0, C).

        Raises `InputError` as `accumulate` does, and for fewer than K scales.
        """
        if self._whole_scales(tokens) != self.scales.num_scales:
            raise InputError(
                f"token ids cover {tokens.shape[1]} tokens: expected all {self.scales.num_tokens}"
            )
        f_hat, inputs = self.zeros(len(tokens)), []
        for scale, part in enumerate(self.scales.slices()[:-1]):
            f_hat = self.add_scale(f_hat, self.embed(tokens[:, part]), scale)
            inputs.append(self.next_input(f_hat, scale))
        if not inputs:
            return self.embed(tokens[:, :0])
        return torch.cat(inputs, dim=1)

    def _whole_scales(self, tokens: Tensor) -> int:
        """Number of scales that the tokens fill, after checking shape, dtype and range."""
        ends, alphabet = self.scales.ends, self.alphabet
        length = tokens.shape[1] if tokens.dim() > 1 else 0
        if tuple(tokens.shape) != alphabet.shape(len(tokens), length) or length not in ends:
            raise InputError(
                f"token ids have shape {tuple(tokens.shape)}: expected (images, tokens), tokens "
                f"one of {ends}, whole scales of sides {self.scales}"
            )
        if tokens.dtype not in (torch.int64, torch.int32):
            raise InputError(f"token ids are {tokens.dtype}: expected torch.int64")
        if tokens.numel():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= alphabet.size:
                raise InputError(
                    f"token ids range over {low}..{high}: expected 0..{alphabet.size - 1}"
                )
        return ends.index(length) + 1


class Autoencoder(nn.Module, Pyramid):
    """Images to tokens and back, over a schedule of scales. Only it knows what f_hat looks like.

    ENCODING, DECODING: names of the submodules that are needed only to encode, and only to decode,
    an image.
    """

    ENCODING: ClassVar[tuple[str, ...]] = ()
    DECODING: ClassVar[tuple[str, ...]] = ()
    arch: Any

    def over(self, scales: Scales) -> Self:
        """This network over another schedule: a second object around the same modules and tensors.

        Raises `InputError` where it knows its own only."""
        if scales != self.scales:
            raise InputError(
                f"sides {scales}: this autoencoder knows its own only, {self.scales}; leave the "
                "size out"
            )
        return self

    @property
    @abstractmethod
    def image_size(self) -> Size:
        """Height and width of the images in pixels."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def decode_features(self, f_hat: Tensor) -> Tensor:
        """f_hat -> images (B, 3, H, W), clamped to [-1, 1]."""

    @abstractmethod
    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> tokens. Raises `InputError` for another shape."""

    def codebook(self) -> Tensor | None:
        """(V, C) embeddings of the symbols where a token is one of them, for `more_smooth`."""
        return None

    def upsamplings(self) -> Sequence[nn.Module]:
        """The modules of the decoder that enlarge maps."""
        return ()

    def decoder_bytes(self) -> int:
        """Approximate bytes of the feature maps that are alive while one image is decoded; 0 if
        unknown."""
        return 0

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens -> images (B, 3, H, W), clamped to [-1, 1]. Tokens of the first whole scales give
        the image so far. Raises `InputError` for tokens that cannot be used."""
        return self.decode_features(self.accumulate(tokens))


def checked_images(images_B3HW: Tensor, size: Size) -> Tensor:
    """The images themselves. Raises `InputError` for another shape or an integer dtype."""
    shape, expected = tuple(images_B3HW.shape), (IMAGE_CHANNELS, *size)
    if len(shape) != 4 or shape[1:] != expected:
        raise InputError(
            f"images have shape {shape}: expected (images, {', '.join(map(str, expected))})"
        )
    if not images_B3HW.is_floating_point():
        raise InputError(f"images are {images_B3HW.dtype}: expected floating point in [-1, 1]")
    return images_B3HW
