"""The transformer written a second time from its formulas: float64, one dense mask, no modules.

    x += attn(LN(x) (1 + scale1) + shift1) gamma1;   x += ffn(LN(x) (1 + scale2) + shift2) gamma2
A query at scale i sees a key at scale j where j <= i. Slow, for tiny models; it shares no code with
the package but the names of the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from varptq.models.pipeline import Pipeline
from varptq.models.var.transformer import VAR


@dataclass
class Trace:
    """logits (B, L, V); per block probabilities (B, H, L, L) and values (B, H, L, c); and input and
    output of every piece of the model by its name. All float64."""

    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    probabilities: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    pieces: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def both_rows(pipe: Pipeline, labels_B: Any, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and inputs of the conditional rows, then of the unconditional ones."""
    labels_2B = pipe.prompts(labels_B).guided().labels_B
    return labels_2B, pipe.vae.teacher_inputs(ids_BL).repeat(2, 1, 1)


def trace(var: VAR, labels_B: Tensor, inputs_BlC: Tensor) -> Trace:
    """One teacher-forced pass with everything in between."""
    w = {name: t.double() for name, t in var.state_dict().items()}
    arch, found = var.arch, Trace()
    level = torch.tensor([k for k, n in enumerate(arch.scales.lengths) for _ in range(n)])
    sees_LL = level[:, None] >= level[None, :]

    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
        found.pieces[name] = (x, y)
        return y

    def ada(name: str, count: int) -> Tensor:
        vectors = linear(f"{name}.1", condition / (1 + (-condition).exp()))
        return vectors.view(len(labels_B), 1, count, arch.width)

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale) + shift

    def attention(name: str, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], arch.num_heads, arch.width // arch.num_heads)
        bias = (w[f"{name}.q_bias"], torch.zeros_like(w[f"{name}.q_bias"]), w[f"{name}.v_bias"])
        parts = (linear(f"{name}.mat_qkv", x) + torch.cat(bias)).chunk(3, dim=-1)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in parts)
        if arch.l2_norm:
            q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            q = q * w[f"{name}.scale_mul_1H11"].clamp(max=math.log(100)).exp()
        else:
            q = q * 0.25 / math.sqrt(shape[-1])
        weights = (q @ k.transpose(-1, -2)).exp() * sees_LL
        found.probabilities.append(weights / weights.sum(-1, keepdim=True))
        found.values.append(v)
        mixed = (found.probabilities[-1] @ v).transpose(1, 2).reshape(x.shape)
        y = linear(f"{name}.proj", mixed)
        found.pieces[name] = (x, y)
        return y

    def ffn(name: str, x: Tensor) -> Tensor:
        h = linear(f"{name}.fc1", x)
        gelu = 0.5 * h * (1 + (math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)).tanh())
        y = linear(f"{name}.fc2", gelu)
        found.pieces[name] = (x, y)
        return y

    condition = w["class_emb.weight"][labels_B]
    first = arch.scales.lengths[0]
    start = condition[:, None] + w["pos_start"]
    x = torch.cat((start.expand(-1, first, -1), linear("word_embed", inputs_BlC.double())), dim=1)
    x = x + w["pos_1LC"] + w["lvl_embed.weight"][level]
    shared = ada("shared_ada_lin", 6) if arch.shared_adaln else None
    for i in range(arch.depth):
        name = f"blocks.{i}"
        vectors = ada(f"{name}.ada_lin", 6) if shared is None else shared + w[f"{name}.ada_gss"]
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
        x = x + attention(f"{name}.attn", norm(x, scale1, shift1)) * gamma1
        x = x + ffn(f"{name}.ffn", norm(x, scale2, shift2)) * gamma2
    scale, shift = ada("head_nm.ada_lin", 2).unbind(2)
    found.logits = linear("head", norm(x, scale, shift))
    return found
