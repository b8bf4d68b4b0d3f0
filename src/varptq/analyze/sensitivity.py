"""What each tensor costs: quantized alone, and put back to float in a model quantized throughout.

    alone      KL of the float model with this one tensor at b bits
    put back   KL of the whole config without this one; its cost there is KL(config) - that

The two rank differently where errors mask each other. Probabilities are measured under every
type that serves them, since the error of log2 hardly depends on bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from varptq.analyze.bench import Bench, Divergence, Site, sites, spec_of, stripped, with_specs
from varptq.progress import Progress, silent
from varptq.quant.config import POLICIES, QuantConfig, TensorSpec
from varptq.quant.presets import CODEBOOK, from_bits, group_free
from varptq.quant.quantizers import ATTENTION_OPERANDS, MAX_BITS, QUANTIZERS, types_of

STAGE = "sensitivity"
GROUPS: dict[str, Callable[[Site], bool]] = {
    "weights": lambda site: site.operand == "weight",
    "Linear inputs": lambda site: site.operand == "input",
    "queries and keys": lambda site: site.operand in ("query", "key"),
    "probabilities": lambda site: site.operand == "probability",
    "values": lambda site: site.operand == "value",
}


@dataclass(frozen=True)
class Sensitivity:
    """One tensor under one quantizer. alone: by number of bits. put_back: None where the config
    keeps it in float or uses another rule."""

    site: Site
    type: str
    alone: dict[int, Divergence] = field(default_factory=dict)
    put_back: Divergence | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            **self.site.to_dict(),
            "type": self.type,
            "alone": {str(bits): found.to_dict() for bits, found in self.alone.items()},
            "put_back": self.put_back.to_dict() if self.put_back else None,
        }


def spec_at(config: QuantConfig, site: Site, bits: int, type_: str | None = None) -> TensorSpec:
    """The quantizer of a tensor at `bits`: the config's own where the width is the same, else the
    usual one for that width with the config's type and range rule, and in attention its strategy.
    A type that does not exist at `bits` gives way to the usual one.
    """
    own, usual = spec_of(config, site), spec_of(from_bits(bits, bits), site)
    assert usual is not None
    kind = type_ or (own or usual).type
    if bits not in QUANTIZERS[kind].widths:
        kind = usual.type
    if own is None:
        return _allowed(usual, config, site).replace(type=kind)
    if own.num_bits == bits:
        return own.replace(type=kind)
    if own.type == CODEBOOK:
        return group_free(bits, site.operand)
    strategy = {"strategy": own.strategy} if site.operand in ATTENTION_OPERANDS else {}
    return usual.replace(type=kind, range_rule=own.range_rule, **strategy)


def _allowed(usual: TensorSpec, config: QuantConfig, site: Site) -> TensorSpec:
    """`usual` with a strategy that the attention policy of the config allows."""
    attention = config.attention_for(site.layer)
    if attention is None or site.operand not in ("key", "value"):
        return usual
    strategies = POLICIES[attention.policy][site.operand == "value"]
    return usual if usual.strategy in strategies else usual.replace(strategy=strategies[-1])


def sensitivities(
    bench: Bench, config: QuantConfig, widths: Sequence[int], progress: Progress = silent
) -> list[Sensitivity]:
    """Every tensor of the model at every width, and put back to float; in model order."""
    rows = [(site, kind) for site in sites(bench.source.var) for kind in _types(config, site)]
    total, done = len(rows) * (len(widths) + 1), 0
    progress(STAGE, done, total)
    floats = stripped(config)
    found: list[Sensitivity] = []
    for site, kind in rows:
        alone: dict[int, Divergence] = {}
        for bits in widths:
            spec = spec_at(config, site, bits, kind)
            alone[bits] = bench.kl(with_specs(floats, {site: spec}))
            done += 1
            progress(STAGE, done, total, f"{site.layer} {site.operand}")
        own = spec_of(config, site)
        back = None
        if own is not None and own.type == kind:
            back = bench.kl(with_specs(config, {site: None}))
        done += 1
        progress(STAGE, done, total, f"{site.layer} {site.operand}")
        found.append(Sensitivity(site, kind, alone, back))
    return found


def put_back_groups(
    bench: Bench, config: QuantConfig, theta: float | None = None
) -> dict[str, Divergence]:
    """KL with all weights, all Linear inputs, ... put back to float, by name of the group."""
    found: dict[str, Divergence] = {}
    for name, belongs in GROUPS.items():
        group = [site for site in sites(bench.source.var) if belongs(site)]
        if any(spec_of(config, site) is not None for site in group):
            found[name] = bench.kl(with_specs(config, dict.fromkeys(group)), theta)
    return found


def _types(config: QuantConfig, site: Site) -> list[str]:
    own = (spec_of(config, site) or spec_at(config, site, MAX_BITS)).type
    if site.operand != "probability":
        return [own]
    return [own, *(name for name in types_of("probability") if name != own)]
