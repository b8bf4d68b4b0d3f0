"""Float checkpoints: infer the architecture from the tensors, load them strictly.

    file -> read_state -> dict of finite tensors -> infer_var / infer_vqvae -> module -> load_strict

Names and shapes of the tensors fix everything (docs/method.md section 1); no argument is needed.
Every failure is one `CheckpointError` naming the tensor. `state_file.py` reads the files and
`presets.py` finds them by name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from varptq.errors import CheckpointError
from varptq.models import tensors
from varptq.models.blocks import MLP_RATIO
from varptq.models.convolutions import NORM_GROUPS
from varptq.models.scales import Scales
from varptq.models.state_file import MASK, file_sha256, read_state, source_sha256
from varptq.models.tensors import conv_fields, count_of, shape_of
from varptq.models.var.transformer import VARArch
from varptq.models.var.vqvae import VQVAEArch

__all__ = [
    "check_pair",
    "completed",
    "file_sha256",
    "infer_var",
    "infer_vqvae",
    "load_strict",
    "read_state",
    "source_sha256",
]

DEFAULT_HEAD_WIDTH = 64


LEVELS, KEY_BIAS = "lvl_1L", "attn.zero_k_bias"


def completed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer's tensors with the buffers that follow from the others, where a file leaves
    them out: `lvl_1L` from the attention mask, and the zeros that stand for the bias of keys.

    Raises `CheckpointError` where nothing says how tokens are dealt to scales.
    """
    state = dict(state)
    if LEVELS not in state and "pos_1LC" in state:
        mask = state.get(MASK)
        if mask is None or mask.ndim != 4 or mask.shape[-1] != mask.shape[-2]:
            raise CheckpointError(
                f"VAR: tensor {LEVELS!r} is missing, and without {MASK!r} nothing says which scale "
                f"a token is of: add {LEVELS!r} (1, L) to the file, for each token the number of "
                "its scale, 0 1 1 1 1 2 ..."
            )
        # A token sees the keys of its own and of coarser scales: their number tells scales apart.
        num_seen_L = (mask[0, 0] == 0).sum(-1)
        state[LEVELS] = torch.unique(num_seen_L, return_inverse=True)[1].view(1, -1)
    for name, bias in list(state.items()):
        zeros = name.removesuffix("attn.v_bias") + KEY_BIAS
        if name.endswith("attn.v_bias") and zeros not in state:
            state[zeros] = torch.zeros_like(bias)
    return state


def infer_vqvae(state: Mapping[str, Tensor]) -> VQVAEArch:
    """Architecture of a VQVAE from its tensors. Raises `CheckpointError` if they are not one's."""
    codebook_size, code_dim = shape_of(state, "quantize.embedding.weight", "VQVAE", (None, None))
    kernel = shape_of(state, "quant_conv.weight", "VQVAE", (code_dim, code_dim, None, None))[-1]
    hits = state.get("quantize.ema_vocab_hit_SV")
    fields = conv_fields(state, "VQVAE", NORM_GROUPS)
    levels = range(len(fields["ch_mult"]))
    return VQVAEArch(
        **fields,
        code_dim=code_dim,
        codebook_size=codebook_size,
        num_phi=count_of(state, "quantize.quant_resi.qresi_ls.", "VQVAE"),
        attn_levels=tuple(i for i in levels if f"encoder.down.{i}.attn.0.qkv.weight" in state),
        mid_attn="encoder.mid.attn_1.qkv.weight" in state,
        quant_kernel=kernel,
        hit_scales=0 if hits is None else len(hits),
    )


def infer_var(state: Mapping[str, Tensor]) -> VARArch:
    """Architecture of a VAR transformer from its tensors.

    Sides come from `lvl_1L` (tokens per level), heads from `scale_mul_1H11` or else from a head
    width of 64. Raises `CheckpointError` if the tensors are not a VAR's.
    """
    scales = _scales(state)
    width = shape_of(state, "pos_1LC", "VAR", (1, scales.num_tokens, None))[-1]
    rows = shape_of(state, "class_emb.weight", "VAR", (None, width))[0]
    if rows < 2:
        raise CheckpointError(f"VAR: class_emb.weight has {rows} rows, expected classes + 1")
    depth = count_of(state, "blocks.", "VAR")
    for i in range(depth):
        # The large tensors of every block, so that a module is never larger than its file suggests.
        shape_of(state, f"blocks.{i}.attn.mat_qkv.weight", "VAR", (3 * width, width))
        shape_of(state, f"blocks.{i}.ffn.fc1.weight", "VAR", (MLP_RATIO * width, width))
    l2_norm = "blocks.0.attn.scale_mul_1H11" in state
    if l2_norm:
        heads = shape_of(state, "blocks.0.attn.scale_mul_1H11", "VAR", (1, None, 1, 1))[1]
    else:
        heads = max(width // DEFAULT_HEAD_WIDTH, 1)
    if heads == 0 or width % heads:
        raise CheckpointError(f"VAR: width {width} does not divide into {heads} heads")
    return VARArch(
        num_classes=rows - 1,
        depth=depth,
        width=width,
        num_heads=heads,
        scales=scales,
        codebook_size=shape_of(state, "head.weight", "VAR", (None, width))[0],
        code_dim=shape_of(state, "word_embed.weight", "VAR", (width, None))[1],
        l2_norm=l2_norm,
        shared_adaln="shared_ada_lin.1.weight" in state,
    )


def _scales(state: Mapping[str, Tensor]) -> Scales:
    """Sides from the number of tokens per level in `lvl_1L`, which must run 0, 1.. K-1 in order."""
    num_tokens = shape_of(state, "lvl_1L", "VAR", (1, None))[1]
    levels = state["lvl_1L"].flatten().long()
    counts = torch.unique_consecutive(levels, return_counts=True)[1].tolist()
    sides = [round(count**0.5) for count in counts]
    if [side * side for side in sides] != counts or not sides:
        raise CheckpointError(f"VAR: lvl_1L has {counts} tokens per level, expected squares")
    if levels.tolist() != [scale for scale, count in enumerate(counts) for _ in range(count)]:
        raise CheckpointError(
            f"VAR: lvl_1L does not number its {num_tokens} tokens 0, 1, 2.. scale by scale"
        )
    return Scales(sides)


def load_strict(module: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """`tensors.load_strict`. A stored attention mask must be the block-causal one of its `lvl_1L`
    and is then left out: the module needs none."""
    state = dict(state)
    if MASK in state and "lvl_1L" in state:
        _check_mask(state.pop(MASK), state["lvl_1L"], what)
    tensors.load_strict(module, state, what)


def _check_mask(mask_11LL: Tensor, lvl_1L: Tensor, what: str) -> None:
    """(1, 1, L, L), 0 where scale(query) >= scale(key) and -inf elsewhere."""
    if not mask_11LL.is_floating_point():
        raise CheckpointError(
            f"{what}: tensor {MASK!r} is {mask_11LL.dtype}, expected floating point"
        )
    levels = lvl_1L.flatten()
    sees_LL = levels.unsqueeze(1) >= levels.unsqueeze(0)
    expected_LL = mask_11LL.new_zeros(sees_LL.shape).masked_fill(~sees_LL, -torch.inf)
    if not torch.equal(mask_11LL, expected_LL[None, None]):
        raise CheckpointError(
            f"{what}: tensor {MASK!r} is not the block-causal mask of its lvl_1L "
            "(0 where scale(query) >= scale(key), else -inf)"
        )


def check_pair(var: VARArch, vae: VQVAEArch) -> None:
    """Raise `CheckpointError` unless the transformer's tokens fit the VQVAE's codebook."""
    for name, of_var, of_vae in (
        ("codebook size", var.codebook_size, vae.codebook_size),
        ("code width", var.code_dim, vae.code_dim),
    ):
        if of_var != of_vae:
            raise CheckpointError(
                f"VAR and VQVAE do not belong together: {name} is {of_var} in the VAR and {of_vae} "
                "in the VQVAE, give the pair that was trained together"
            )
