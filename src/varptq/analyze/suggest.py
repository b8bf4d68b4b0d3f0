"""Which tensors to keep at 8 bits under a budget: greedy by measured gain per extra byte or BOP.

    gain(tensor) = KL(it alone at its own width) - KL(it alone at 8 bits)

Gains are measured in the float model, where the errors of other tensors do not hide that of one:
measured in the quantized model they are so noisy that the choice gets worse on new images. The
quality of a choice is measured on the whole config after every step. A budget in bytes is spent on
weights, the only tensors that are stored; one in bit operations on all tensors. Probabilities
become uniform 8-bit codes, since their log2 rule gains nothing from more bits. Shift-and-sum is off
and costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from varptq import readable
from varptq.analyze.bench import (
    FLOAT,
    Bench,
    Divergence,
    Site,
    sites,
    spec_of,
    stripped,
    with_specs,
)
from varptq.analyze.sensitivity import Sensitivity, spec_at
from varptq.artifact.sizes import transformer_size
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import float_layout
from varptq.progress import Progress, silent
from varptq.quant.config import LayerRule, LinearSpec, QuantConfig, TensorSpec
from varptq.quant.convert import convert
from varptq.quant.describe import bops_account

GAINS, STEPS = "gains", "suggestion"
KEPT_BITS = 8


@dataclass(frozen=True)
class Budget:
    """At most `ratio` times the base config's bytes or BOPs, or at most `size` bytes."""

    unit: Literal["bytes", "bops"] = "bops"
    ratio: float | None = 1.1
    size: int | None = None

    def limit(self, base: int) -> int:
        """The most the mixed config may cost. Raises `InputError` if the base costs more."""
        limit = self.size
        if limit is None:
            assert self.ratio is not None
            if not (math.isfinite(self.ratio) and self.ratio >= 1):
                raise InputError(f"budget {self.ratio}: expected a ratio of at least 1")
            limit = int(self.ratio * base)
        if limit < base:
            raise InputError(
                f"budget {readable.megabytes(limit)}: the config itself takes "
                f"{readable.megabytes(base)}; give more"
            )
        return limit


class Prices:
    """What configs of one model cost: transformer bytes as an artifact stores them, and BOPs."""

    def __init__(self, pipe: Pipeline) -> None:
        meta = float_layout(pipe.var).to(pipe.dtype)
        self._pipe = replace(pipe, var=meta)
        self._linears = [site.layer for site in sites(meta) if site.operand == "weight"]
        self._added: dict[tuple[str, LinearSpec], int] = {}
        self._float_bytes = self._stored(FLOAT)

    def bytes(self, config: QuantConfig) -> int:
        """Codes, scales and zero points, and the float rest; without the VQVAE."""
        specs = [(name, config.linear_for(name)) for name in self._linears]
        return self._float_bytes + sum(self._difference(name, spec) for name, spec in specs)

    def bops(self, config: QuantConfig) -> int:
        """Bit operations per image without guidance."""
        return bops_account(self._pipe.var, config).total

    def of(self, config: QuantConfig, unit: str) -> int:
        return self.bytes(config) if unit == "bytes" else self.bops(config)

    def _difference(self, layer: str, spec: LinearSpec) -> int:
        # Layers are stored one by one, so their differences add up and are computed once each.
        if (layer, spec) not in self._added:
            rule = LayerRule(targets=layer).replace(**dict(spec))
            self._added[layer, spec] = self._stored(FLOAT.with_rules(rule)) - self._float_bytes
        return self._added[layer, spec]

    def _stored(self, config: QuantConfig) -> int:
        return transformer_size(replace(self._pipe, var=convert(self._pipe.var, config))).bytes


class Candidate(NamedTuple):
    """A tensor that 8 bits would change, its quantizer at 8 bits, and the gain in KL."""

    site: Site
    spec: TensorSpec
    gain: float


@dataclass(frozen=True)
class Pick:
    """One tensor raised to 8 bits, and the cost and KL of the config with it."""

    candidate: Candidate
    price: int
    divergence: Divergence

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        site, spec, gain = self.candidate
        return {
            **site.to_dict(),
            "spec": spec.to_dict(),
            "gain": gain,
            "price": self.price,
            **self.divergence.to_dict(),
        }


@dataclass(frozen=True)
class Suggestion:
    """The picks in order; `config` has them all. `price`: of the base config. `limit`: of any."""

    unit: str
    price: int
    limit: int
    base: Divergence
    picks: tuple[Pick, ...]
    config: QuantConfig

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the config."""
        return {
            "unit": self.unit,
            "limit": self.limit,
            "price": self.price,
            **self.base.to_dict(),
            "picks": [pick.to_dict() for pick in self.picks],
        }


def suggest(
    bench: Bench,
    config: QuantConfig,
    measured: Iterable[Sensitivity],
    budget: Budget,
    progress: Progress = silent,
) -> Suggestion:
    """Raise tensors of `config` to 8 bits, highest gain per cost first, within the budget.

    Gains that `measured` does not hold are measured here. Raises `InputError` for a budget below
    what `config` costs.
    """
    prices = Prices(bench.source)
    price = prices.of(config, budget.unit)
    limit = budget.limit(price)
    found = candidates(bench, config, measured, budget.unit, progress)
    chosen = choose(config, found, prices, budget.unit, limit)
    base, picks = bench.kl(config), list[Pick]()
    raised = config
    progress(STEPS, 0, len(chosen))
    for count in range(1, len(chosen) + 1):
        raised = raised_config(config, chosen[:count])
        picks.append(Pick(chosen[count - 1], prices.of(raised, budget.unit), bench.kl(raised)))
        progress(STEPS, count, len(chosen), f"KL {picks[-1].divergence.kl:.4f}")
    final = raised.replace(name=f"{config.name}+mixed")
    return Suggestion(budget.unit, price, limit, base, tuple(picks), final)


def candidates(
    bench: Bench,
    config: QuantConfig,
    measured: Iterable[Sensitivity],
    unit: str,
    progress: Progress = silent,
) -> list[Candidate]:
    """The tensors that 8 bits would improve, in model order; float tensors stay float."""
    floats = stripped(config)
    known = {(row.site, row.type): row.alone for row in measured}
    found: list[Candidate] = []
    pairs = list(changes(bench, config, unit))
    progress(GAINS, 0, len(pairs))
    for done, (site, own, kept) in enumerate(pairs, 1):
        before, after = (
            known.get((site, spec.type), {}).get(spec.num_bits)
            or bench.kl(with_specs(floats, {site: spec}))
            for spec in (own, kept)
        )
        if before.kl > after.kl:
            found.append(Candidate(site, kept, before.kl - after.kl))
        progress(GAINS, done, len(pairs))
    return found


def changes(
    bench: Bench, config: QuantConfig, unit: str
) -> Iterable[tuple[Site, TensorSpec, TensorSpec]]:
    """(tensor, its quantizer, its quantizer at 8 bits) where the two differ."""
    for site in sites(bench.source.var):
        own = spec_of(config, site)
        if own is None or (unit == "bytes" and site.operand != "weight"):
            continue
        kind = "uniform" if site.operand == "probability" else own.type
        kept = spec_at(config, site, KEPT_BITS, kind)
        if kept != own:
            yield site, own, kept


def raised_config(config: QuantConfig, chosen: Iterable[Candidate]) -> QuantConfig:
    return with_specs(config, {candidate.site: candidate.spec for candidate in chosen})


def choose(
    config: QuantConfig, found: Iterable[Candidate], prices: Prices, unit: str, limit: int
) -> list[Candidate]:
    """Greedy: repeatedly the candidate with the highest gain per cost that still fits.

    A tensor's cost in BOPs grows when its partner in the product is raised, so rates only fall:
    the top of the heap is the best one if its rate has not changed.
    """
    chosen: list[Candidate] = []
    price = prices.of(config, unit)
    heap = [(-math.inf, order, candidate) for order, candidate in enumerate(found)]
    while heap:
        rank, order, candidate = heapq.heappop(heap)
        with_it = prices.of(raised_config(config, [*chosen, candidate]), unit)
        if with_it > limit:
            continue  # the remaining budget only shrinks
        cost = with_it - price
        now = -candidate.gain / cost if cost > 0 else -math.inf
        if now > rank:
            heapq.heappush(heap, (now, order, candidate))
        else:
            chosen.append(candidate)
            price = with_it
    return chosen
