"""The threshold theta of shift-and-sum: the smallest that costs at most a share alpha of the
network.

Key j with attention mass abar_j has N_j = 2^n copies, n = clamp(ceil(log2(abar_j / theta)), 0, m)
with m = `max_order`. With E = sum over heads and keys of (N_j - 1), a mean over the batch, a block
costs at one scale
    H l_q l_k 16 (means) + H l_k 16 + H l_k 4 (orders) + 16 c E + l_q E (additions)
    + l_q c E b_p b_v (the longer product).
E(theta) = #[abar > theta] + 2 #[abar > 2 theta] + 4 #[abar > 4 theta] for the paper's order 3, so
one sort of abar serves every theta.

Cross-attention costs the same with the T tokens of a row's text for l_k, so its copies and those of
self-attention are bought from one budget, with one theta; the network's account is then that of a
prompt of their mean length. abar is measured with the quantized model.
Source: docs/method.md section 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from varptq.calibrate.run import Run
from varptq.calibrate.samples import CalibrationSet
from varptq.errors import ConfigError, NonFiniteError
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening, read
from varptq.models.seams import USUAL_TEXT, Span, block_of, mixes_of
from varptq.models.transformer import Transformer
from varptq.quant.attention import QuantMix
from varptq.quant.bops import FLOAT_BITS
from varptq.quant.config import MAX_ORDER
from varptq.quant.describe import bops_account
from varptq.quant.find import set_theta
from varptq.quant.shift_sum import orders, token_scores
from varptq.work import Piece

# Bit widths that the paper counts for the bookkeeping of shift-and-sum.
MEAN_BITS, DIVISION_BITS, ORDER_BITS, SHIFT_BITS = 16, 16, 4, 16

ThetaStatus = Literal["ok", "off", "over_budget", "budget_not_reached"]


@dataclass(frozen=True)
class AttentionMass:
    """abar (B, H, l_k) of one block at one scale: the softmax averaged over its queries.

    H * l_k masses per row of the batch; `num_queries` is l_q, the bits are those of the product,
    and `max_order` is the highest order of this block. text: the keys are those of a text; rows
    with texts of this length are `share` of all.
    """

    block: int
    scale: int
    num_queries: int
    abar_BHl: Tensor
    head_dim: int
    probability_bits: int
    value_bits: int
    max_order: int = MAX_ORDER
    text: bool = False
    share: float = 1.0

    @property
    def fixed_bops(self) -> int:
        """Cost that does not depend on theta: finding the orders."""
        _, heads, keys = self.abar_BHl.shape
        means = heads * self.num_queries * keys * MEAN_BITS
        return means + heads * keys * (DIVISION_BITS + ORDER_BITS)

    @property
    def bops_per_copy(self) -> int:
        """Cost of one extra copy of one key of one head."""
        product = self.num_queries * self.head_dim * self.probability_bits * self.value_bits
        return self.head_dim * SHIFT_BITS + self.num_queries + product


@dataclass(frozen=True)
class CopyStat:
    """The effect of theta on one attention at one scale, averaged over rows and heads.

    `duplicated` of `keys` cached tokens have more than one copy; a token has `mean_copies` copies.
    keys of texts: the mean length, rounded.
    """

    block: int
    scale: int
    keys: int
    duplicated: float
    mean_copies: float


@dataclass(frozen=True)
class ThetaResult:
    """The threshold found, what it costs, and where the copies go.

    status: "ok"; "over_budget" - even theta = 1 costs more than the budget; "budget_not_reached" -
    even the smallest theta of the grid stays within it; "off" - nothing to duplicate (max_order 0,
    or no attention given). copies: of self-attention, text_copies: of cross-attention.
    """

    theta: float
    status: ThetaStatus
    overhead: float
    budget: float
    total: int
    alpha: float
    copies: tuple[CopyStat, ...]
    text_copies: tuple[CopyStat, ...] = ()

    @property
    def fraction(self) -> float:
        """Overhead as a share of the network's BOPs; at most alpha unless over budget."""
        return self.overhead / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = {**asdict(self), "fraction": self.fraction}
        if not self.text_copies:
            del found["text_copies"]
        return found


def choose_theta(run: Run) -> None:
    """Step: measure attention on the quantized model as it is now, choose theta and set it."""
    stage = "theta after reconstruction" if "units" in run.report else "theta"
    samples = run.samples
    run.progress(stage, 0, 1)
    found = run.once(stage.replace(" ", "-"), lambda: _found(run, samples)).facts
    run.theta = theta_of(found)
    set_theta(run.quantized, run.theta)
    run.report["theta"] = found
    run.progress(stage, 1, 1, f"theta {found['theta']:.4f}, {found['status']}")


def theta_of(found: Mapping[str, Any]) -> float | None:
    """Of a `ThetaResult` as plain values. A budget below the price of finding the orders buys no
    copies: shift-and-sum is off."""
    return None if found["status"] in ("over_budget", "off") else found["theta"]


def _found(run: Run, samples: CalibrationSet) -> Piece:
    settings = run.calibration
    masses = measure_attention(run.pipe, run.quantized, samples, settings.theta_samples)
    text = text_length(masses)
    total = bops_account(run.pipe.var, run.config, text or USUAL_TEXT).total
    found = search_theta(masses, total, settings.budget, settings.theta_grid).to_dict()
    return Piece(facts=found if text is None else {**found, "text_tokens": text})


def text_length(entries: Iterable[AttentionMass]) -> int | None:
    """Mean length of the texts that were read, rounded; None where there are none."""
    texts = [entry for entry in entries if entry.text]
    if not texts:
        return None
    tokens = sum(entry.share * entry.abar_BHl.shape[-1] for entry in texts)
    return round(tokens / sum(entry.share for entry in texts))


def theta_grid(num_grid: int) -> Tensor:
    """(G,) float32: linspace(1/G, 1, G)."""
    return torch.linspace(1 / num_grid, 1, num_grid, dtype=torch.float32, device="cpu")


def overhead_curve(entries: Iterable[AttentionMass], thetas_G: Tensor) -> Tensor:
    """BOPs of shift-and-sum at every theta, non-increasing in theta: (G,) -> (G,) float64, CPU.

    abar is compared in float32, as the quantizer does. Raises `NonFiniteError`, naming the block
    and scale, for attention that is not finite.
    """
    curve = torch.zeros(len(thetas_G), dtype=torch.float64, device="cpu")
    for entry in entries:
        mass = entry.abar_BHl.float().flatten().sort().values
        # NaN and inf sort to the end.
        if not mass[-1].isfinite():
            raise NonFiniteError(
                f"attention of block {entry.block} {'over the text ' if entry.text else ''}"
                f"at scale {entry.scale}: NaN or infinity, "
                "expected finite probabilities; check the weights and quantization ranges"
            )
        extra = torch.zeros_like(curve)
        for m in range(entry.max_order):
            # Scaling by a power of two is exact, so this is ceil(log2(abar / theta)) > m.
            threshold = (thetas_G.float() * 2**m).to(mass.device)
            above = mass.numel() - torch.searchsorted(mass, threshold, right=True)
            extra += above.cpu().double() * 2**m
        cost = entry.fixed_bops + entry.bops_per_copy * extra / len(entry.abar_BHl)
        curve += entry.share * cost
    return curve


def search_theta(
    entries: Sequence[AttentionMass],
    total_bops: int,
    alpha: float = 0.01,
    num_grid: int = 10_000,
) -> ThetaResult:
    """The smallest theta of the grid whose overhead is <= alpha * total_bops.

    Entries of all blocks and scales share one theta; those with max_order 0 do not count. A budget
    that cannot be met or filled is a `ThetaResult.status`, not an error. Raises `ConfigError` on
    alpha or num_grid out of range and `NonFiniteError` on attention that is not finite.
    """
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ConfigError(f"alpha {alpha}: expected a finite share of the BOPs, at least 0")
    if num_grid < 1:
        raise ConfigError(f"num_grid {num_grid}: expected at least 1")
    budget = alpha * total_bops
    entries = [entry for entry in entries if entry.max_order]
    if not entries:
        return ThetaResult(1.0, "off", 0.0, budget, total_bops, alpha, ())
    thetas = theta_grid(num_grid)
    curve = overhead_curve(entries, thetas)
    num_over = int((curve > budget).sum())
    status: ThetaStatus = "ok"
    if num_over == 0:
        status = "budget_not_reached"
    elif num_over == num_grid:
        status, num_over = "over_budget", num_grid - 1
    theta = float(thetas[num_over])
    copies = [copy_stats([e for e in entries if e.text == text], theta) for text in (False, True)]
    return ThetaResult(theta, status, float(curve[num_over]), budget, total_bops, alpha, *copies)


def copy_stats(entries: Sequence[AttentionMass], theta: float) -> tuple[CopyStat, ...]:
    """Per block and scale, over all lengths of texts."""
    places: dict[tuple[int, int], list[AttentionMass]] = {}
    for entry in entries:
        places.setdefault((entry.block, entry.scale), []).append(entry)
    return tuple(
        _mean([copy_stat(entry, theta) for entry in found], [entry.share for entry in found])
        for found in places.values()
    )


def _mean(stats: Sequence[CopyStat], shares: Sequence[float]) -> CopyStat:
    if len(stats) == 1:
        return stats[0]

    def mean(name: str) -> float:
        values = (getattr(stat, name) for stat in stats)
        pairs = zip(values, shares, strict=True)
        return sum(value * share for value, share in pairs) / sum(shares)

    keys, duplicated = round(mean("keys")), mean("duplicated")
    return CopyStat(stats[0].block, stats[0].scale, keys, duplicated, mean("mean_copies"))


def copy_stat(entry: AttentionMass, theta: float) -> CopyStat:
    """Duplicated tokens and mean copies of one block and scale at `theta`."""
    order = orders(entry.abar_BHl.float(), theta, entry.max_order)
    keys = order.shape[-1]
    duplicated = float((order > 0).float().mean()) * keys
    return CopyStat(
        entry.block, entry.scale, keys, duplicated, float(torch.exp2(order.float()).mean())
    )


@torch.no_grad()
def measure_attention(
    pipe: Pipeline, quantized: Transformer, samples: CalibrationSet, count: int
) -> list[AttentionMass]:
    """Attention of the quantized model averaged over queries, per block and scale, on `count`
    samples.

    Both conditional and unconditional rows count; probabilities are taken before they are
    quantized. Cross-attention has one entry for each length of text.
    """
    wanted = {
        name: mix
        for name, mix in mixes_of(quantized).items()
        if isinstance(mix, QuantMix) and mix.spec.value is not None
    }
    masses: list[AttentionMass] = []
    part = samples.first(count)
    rows = len(part.prompts.guided())

    def keep(name: str, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> None:
        spec = wanted[name].spec
        probability, value = spec.probability, spec.value
        masses.append(
            AttentionMass(
                block=block_of(name) or 0,
                scale=span.scale,
                num_queries=p_BHlL.shape[-2],
                abar_BHl=token_scores(p_BHlL).cpu(),
                head_dim=v_BHLc.shape[-1],
                probability_bits=probability.num_bits if probability else FLOAT_BITS,
                value_bits=value.num_bits if value else FLOAT_BITS,
                max_order=spec.max_order,
                text=span.of_text,
                share=len(p_BHlL) / rows,
            )
        )

    with listening(wanted, keep):
        read(replace(pipe, var=quantized), part.prompts, part.tokens)
    return masses
