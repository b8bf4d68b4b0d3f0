"""Float checkpoints of Infinity: names as we have them, architectures read off tensors, strictness.

    block_chunks.I.module.J.sa.*  or  blocks.i.sa.*    ->  blocks.i.attn.*, and ca.* -> cross.*
    text_proj_for_sos.ca.*, text_proj_for_ca.*         ->  text_pool.*, text_proj.*
    *.conv.weight, *.norm.weight of the autoencoder    ->  *.weight

Every tensor of the model must be there and fit. What is in a file besides is left out with a
warning; variants of the model that were never released are refused by name. Size, rotary positions
and the way in which the level embedding is added are not in the tensors: they are those of all
released models. Every failure is one `CheckpointError` naming the tensor.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from varptq.errors import CheckpointError
from varptq.models.convolutions import NORM_GROUPS, OTHER_GROUPS
from varptq.models.infinity.bsqvae import BSQVAEArch
from varptq.models.infinity.pyramid import PATCH
from varptq.models.infinity.schedules import SIZES, schedule
from varptq.models.infinity.transformer import BIT, InfinityArch
from varptq.models.rotary import QUANTUM
from varptq.models.tensors import conv_fields, count_of, shape_of

WHAT, VAE = "Infinity", "BSQ-VAE"
# What the model is used at unless somebody says otherwise.
USUAL_SIZE = "1M"
# Names of ignored tensors in a warning.
SHOWN = 20

CHUNK = re.compile(r"block_chunks\.(\d+)\.(?:module\.)?(\d+)\.(.+)")
BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
# Beginnings of names in a block and outside of one, theirs and ours.
IN_BLOCK = {"sa.": "attn.", "ca.": "cross.", "ca_norm.": "cross_norm."}
OUTSIDE = {
    "text_proj_for_sos.ca.mat_q": "text_pool.query_1Hc",
    "text_proj_for_sos.ca.": "text_pool.",
    "text_proj_for_ca.": "text_proj.",
}
# Names that only a model of another kind has, and what it is.
VARIANTS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"blocks\.\d+\.ffn\.fcg\."), "a gated feed-forward (SwiGLU)"),
    (re.compile(r"norm0_ve\."), "a norm of the inputs"),
    (re.compile(r"head\.\d+\."), "a head of several layers"),
    (re.compile(r"blocks\.\d+\.ada_lin\."), "an AdaLN layer per block"),
)
GAMMA = re.compile(r"blocks\.\d+\.(?:cross|ca)_gamma$")
WRAPPED = re.compile(r"\.(?:conv|norm)\.(weight|bias)$")
# A convolution of this name is one without a wrapper.
RESIZING = re.compile(r"(?:down|up)sample\.conv\.(?:weight|bias)$")
# Bookkeeping of the quantizer, which has no parameters.
BOOKKEEPING = ("quantizer.", "quantize.")


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors under our names and in our shapes, zero biases of keys filled in.

    Raises `CheckpointError` for chunks of several lengths and for variants that were not released.
    """
    found: dict[str, Tensor] = {}
    per_chunk = _blocks_per_chunk(state)
    for name, tensor in state.items():
        plain = _own_name(name, per_chunk)
        if plain.endswith("attn.scale_mul_1H11"):
            tensor = tensor.reshape(1, -1, 1, 1)
        found[plain] = tensor
    _refuse_variants(found)
    for name, tensor in list(found.items()):
        if name.endswith(".v_bias"):
            zeros = name.removesuffix("v_bias") + "zero_k_bias"
            found.setdefault(zeros, torch.zeros_like(tensor))
    return found


def _blocks_per_chunk(state: Iterable[str]) -> int:
    """How many blocks a chunk has; 0 where there are no chunks."""
    places = {(int(m[1]), int(m[2])) for name in state if (m := CHUNK.fullmatch(name))}
    if not places:
        return 0
    chunks, length = (1 + max(place[axis] for place in places) for axis in (0, 1))
    missing = {(i, j) for i in range(chunks) for j in range(length)} - places
    if missing:
        i, j = min(missing)
        raise CheckpointError(
            f"{WHAT}: tensors block_chunks.{i}.module.{j}.* are missing, expected {chunks} chunks "
            f"of {length} blocks each"
        )
    return length


def _own_name(name: str, per_chunk: int) -> str:
    if match := CHUNK.fullmatch(name):
        number, rest = int(match[1]) * per_chunk + int(match[2]), match[3]
    elif match := BLOCK.fullmatch(name):
        number, rest = int(match[1]), match[2]
    else:
        return _renamed(name, OUTSIDE)
    return f"blocks.{number}.{_renamed(rest, IN_BLOCK)}"


def _renamed(name: str, beginnings: Mapping[str, str]) -> str:
    for theirs, ours in beginnings.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _refuse_variants(state: Mapping[str, Tensor]) -> None:
    for name in state:
        for pattern, what in VARIANTS:
            if pattern.match(name):
                raise CheckpointError(
                    f"{WHAT}: tensor {name!r} belongs to {what}, which no released model has and "
                    "this reader does not know"
                )
        if name.endswith("cross_norm.weight") and f"{name[:-6]}bias" not in state:
            raise CheckpointError(
                f"{WHAT}: tensor {name!r} has no bias beside it, so it belongs to an RMS norm "
                "before cross-attention, which no released model has and this reader does not know"
            )


def infer_infinity(state: Mapping[str, Tensor]) -> InfinityArch:
    """Architecture from tensors under our names. Raises `CheckpointError` if they are not one's."""
    longest, channels = shape_of(state, "cfg_uncond", WHAT, (None, None))
    width = shape_of(state, "pos_start", WHAT, (1, 1, None))[-1]
    bits = shape_of(state, "word_embed.weight", WHAT, (width, None))[1]
    rows = shape_of(state, "head.weight", WHAT, (None, width))[0]
    if rows != BIT * bits:
        raise CheckpointError(
            f"{WHAT}: tensor 'head.weight' has {rows} rows, expected {BIT * bits}, two for each of "
            f"{bits} bits; a model with a row per index is not known here"
        )
    depth = count_of(state, "blocks.", WHAT)
    hidden = shape_of(state, "blocks.0.ffn.fc1.weight", WHAT, (None, width))[0]
    for i in range(depth):
        # The large tensors of every block, so that a module is never larger than its file suggests.
        shape_of(state, f"blocks.{i}.attn.mat_qkv.weight", WHAT, (3 * width, width))
        shape_of(state, f"blocks.{i}.cross.mat_kv.weight", WHAT, (2 * width, width))
        shape_of(state, f"blocks.{i}.ffn.fc1.weight", WHAT, (hidden, width))
    heads = shape_of(state, "blocks.0.attn.scale_mul_1H11", WHAT, (1, None, 1, 1))[1]
    if width % heads or width // heads % QUANTUM:
        raise CheckpointError(
            f"{WHAT}: width {width} in {heads} heads, expected heads of a multiple of {QUANTUM} "
            "channels, which rotary positions need"
        )
    pool = shape_of(state, "text_pool.query_1Hc", WHAT, (1, None, None))
    if pool[1] * pool[2] != width:
        raise CheckpointError(
            f"{WHAT}: tensor 'text_pool.query_1Hc' (text_proj_for_sos.ca.mat_q) has shape {pool}, "
            f"expected heads that make up the width, {width}"
        )
    return InfinityArch(
        depth=depth,
        width=width,
        num_heads=heads,
        ffn_width=hidden,
        token_bits=bits,
        text_channels=channels,
        text_maxlen=longest,
        pool_heads=pool[1],
        levels=shape_of(state, "lvl_embed.weight", WHAT, (None, width))[0],
        scales=schedule(SIZES[USUAL_SIZE]),
    )


def plain_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's tensors without the wrappers around convolutions and norms, and without the
    quantizer's bookkeeping."""
    return {
        name if RESIZING.search(name) else WRAPPED.sub(r".\1", name): tensor
        for name, tensor in state.items()
        if not name.startswith(BOOKKEEPING)
    }


def infer_bsqvae(state: Mapping[str, Tensor], token_bits: int) -> BSQVAEArch:
    """Architecture from tensors under plain names, beside a transformer of so many bits a token.

    Raises `CheckpointError` if they are not one's, or if the two do not belong together."""
    if "quant_conv.weight" in state:
        raise CheckpointError(
            f"{VAE}: tensor 'quant_conv.weight' is a VQVAE's, which belongs to a VAR: give the "
            "autoencoder that this Infinity was trained with"
        )
    fields = conv_fields(state, VAE, NORM_GROUPS, OTHER_GROUPS)
    bits = shape_of(state, "decoder.conv_in.weight", VAE, (None, None, 3, 3))[1]
    if token_bits not in (bits, PATCH**2 * bits):
        raise CheckpointError(
            f"{WHAT} and {VAE} do not belong together: a token has {token_bits} bits, expected the "
            f"{bits} of the autoencoder, or {PATCH**2 * bits} in patches; give the pair that was "
            "trained together"
        )
    return BSQVAEArch(**fields, code_dim=bits, patchify=token_bits != bits)


def known_only(state: Mapping[str, Tensor], known: Iterable[str], what: str) -> dict[str, Tensor]:
    """The tensors that the model has; warns of the others."""
    known = set(known)
    others = sorted(name for name in state if name not in known)
    gammas = [name for name in others if GAMMA.match(name)]
    if gammas:
        warnings.warn(
            f"{what}: {len(gammas)} tensors such as {gammas[0]!r} scale the cross-attention in "
            "some versions of the model, and are ignored as in the released code",
            stacklevel=2,
        )
    left = [name for name in others if name not in set(gammas)]
    if left:
        shown = ", ".join(left[:SHOWN]) + (", ..." if len(left) > SHOWN else "")
        warnings.warn(f"{what}: ignored {len(left)} tensors: {shown}", stacklevel=2)
    return {name: tensor for name, tensor in state.items() if name in known}
