"""A bench: one model whose tensors are quantized one by one, and the float logits to compare with.

    KL(config) = mean over tokens of KL(float || quantized) of the guided next-token distributions

Float logits are computed once. The model is converted once; going from one config to the next
rebuilds only those seams whose spec differs, so a measurement costs one forward pass. Weights are
rounded to nearest, nothing is learned here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varptq.calibrate.means import center_inputs
from varptq.calibrate.run import give_rounded
from varptq.calibrate.samples import CalibrationSet
from varptq.errors import InputError
from varptq.evaluate.tokens import DEFAULT_BATCH
from varptq.models.cross import Mixes
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits, kl_divergence
from varptq.models.sampling import SamplingSettings
from varptq.models.seams import Mix, SeamLinear, block_of
from varptq.models.transformer import Transformer
from varptq.quant.bops import CROSS
from varptq.quant.config import (
    AttentionSpec,
    LayerRule,
    LinearSpec,
    QuantConfig,
    TensorSpec,
)
from varptq.quant.convert import REGISTRY, convert
from varptq.quant.find import quant_linears, set_theta
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.quantizers import ATTENTION_OPERANDS, LINEAR_OPERANDS

NOTHING = AttentionSpec(query=None, key=None, probability=None, value=None)
FLOAT = QuantConfig(name="float", linear=LinearSpec(weight=None, input=None), attention=None)


class Site(NamedTuple):
    """A tensor that can be quantized: an operand of a Linear or of an attention module. text: it is
    part of an attention over a text, or reads one."""

    layer: str
    operand: str
    text: bool = False

    @property
    def kind(self) -> str:
        """The same name in every block, "fc2 input" or "key", and outside of them, "head
        weight"."""
        kind = CROSS if self.text else ""
        if self.operand in ATTENTION_OPERANDS:
            return f"{kind}{self.operand}"
        words = [word for word in self.layer.split(".") if not word.isdigit()]
        if self.block is not None:
            return f"{kind}{words[-1]} {self.operand}"
        # Layers of what reads a text have numbers where others have names.
        return f"{self.layer if self.text else '.'.join(words)} {self.operand}"

    @property
    def block(self) -> int | None:
        """Index of the transformer block, None outside of them."""
        return block_of(self.layer)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {"layer": self.layer, "operand": self.operand}
        return {**named, "kind": self.kind, "block": self.block}


class Divergence(NamedTuple):
    """Mean KL in nats per token, over all tokens and over those of each scale, coarse to fine."""

    kl: float
    kl_per_scale: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kl": self.kl, "kl_per_scale": list(self.kl_per_scale)}


def sites(var: Transformer) -> list[Site]:
    """Every tensor a config can quantize, in model order."""
    found: list[Site] = []
    texts = Mixes.of(var).text
    for name, module in var.named_modules():
        parent = name.rpartition(".")[0]
        if isinstance(module, SeamLinear):
            text = parent in texts or module.reads == "text"
            found += [Site(name, operand, text) for operand in LINEAR_OPERANDS]
        elif isinstance(module, Mix):
            found += [Site(parent, operand, parent in texts) for operand in ATTENTION_OPERANDS]
    return found


def spec_of(config: QuantConfig, site: Site) -> TensorSpec | None:
    """How `config` stores the tensor; None is float."""
    if site.operand in LINEAR_OPERANDS:
        return getattr(config.linear_for(site.layer), site.operand)
    return getattr(config.attention_for(site.layer) or NOTHING, site.operand)


def stripped(config: QuantConfig) -> QuantConfig:
    """`config` with every tensor in float; policies and transforms stay, so that one tensor given
    back its spec is quantized as it is in `config`."""
    rules = []
    for rule in config.rules:
        said = rule.model_fields_set & {*LINEAR_OPERANDS, "attention"}
        floats = {name: _emptied(rule.attention) if name == "attention" else None for name in said}
        rules.append(rule.replace(**floats))
    return config.replace(
        name=f"{config.name} in float",
        linear=config.linear.replace(weight=None, input=None),
        attention=_emptied(config.attention),
        rules=tuple(rules),
    )


def _emptied(spec: AttentionSpec | None) -> AttentionSpec | None:
    return spec and spec.replace(**dict.fromkeys(ATTENTION_OPERANDS))


def with_specs(config: QuantConfig, specs: Mapping[Site, TensorSpec | None]) -> QuantConfig:
    """`config` with other specs for single tensors, as one more rule per layer."""
    layers: dict[str, dict[str, TensorSpec | None]] = {}
    for site, spec in specs.items():
        layers.setdefault(site.layer, {})[site.operand] = spec
    rules = []
    for layer, operands in layers.items():
        if operands.keys() <= set(LINEAR_OPERANDS):
            rules.append(LayerRule(targets=layer).replace(**operands))
        else:
            attention = (config.attention_for(layer) or NOTHING).replace(**operands)
            rules.append(LayerRule(targets=layer, attention=attention))
    return config.with_rules(*rules)


class Bench:
    """Measures configs of one float pipeline on given tokens.

    Prompts, or what makes some, and their tokens are read teacher-forced by both models, best
    images the float model generated itself. The pipeline given is left as it is. Raises
    `InputError` for a quantized pipeline, `NonFiniteError` for weights with NaN or infinity.
    """

    def __init__(
        self,
        pipe: Pipeline,
        prompts: Any,
        tokens: Tensor,
        *,
        sampling: SamplingSettings | None = None,
        batch_size: int = DEFAULT_BATCH,
    ) -> None:
        if isinstance(pipe, QuantizedPipeline):
            raise InputError(f"model {pipe.name!r}: already quantized; give the float model")
        self.samples = CalibrationSet(pipe.prompts(prompts), tokens.to(pipe.device))
        self.batch_size, self.source = batch_size, pipe
        self.sampling = pipe.filled(sampling)
        self._pipe = replace(pipe, var=convert(pipe.var, FLOAT))
        self._seams = {n: m for n, m in self._pipe.var.named_modules() if type(m) in REGISTRY}
        self._config = FLOAT
        self._float_logits = self._logits()

    @property
    def var(self) -> Transformer:
        """The model as the last config left it."""
        return self._pipe.var

    def configure(self, config: QuantConfig, theta: float | None = None) -> Transformer:
        """Quantize as `config` says, with shift-and-sum at `theta`; returns the model.

        Means of centred inputs are measured on the bench's own images. Raises `ConfigError` for
        a group size that does not divide a layer.
        """
        centred = False
        for name, module in self._seams.items():
            if _seam_spec(config, name, module) != _seam_spec(self._config, name, module):
                parent, _, child = name.rpartition(".")
                seam = REGISTRY[type(module)](module, config, name, self._pipe.scales)
                setattr(self.var.get_submodule(parent), child, seam)
                centred |= isinstance(seam, QuantLinear) and seam.centred
        if centred:
            center_inputs(self.source, self.var, self.samples)
        set_theta(self.var, theta)
        self._config = config
        return self.var

    def kl(
        self,
        config: QuantConfig,
        theta: float | None = None,
        *,
        rounded: Mapping[str, Tensor] | None = None,
    ) -> Divergence:
        """Configure and measure. rounded: codes and scales of weights in place of the nearest
        (`calibrate.run.rounded_of`), for the layers of it whose weight `config` quantizes."""
        self.configure(config, theta)
        if rounded is not None:
            for name, layer in quant_linears(self.var).items():
                if layer.weight_bits and f"{name}.codes" in rounded:
                    give_rounded(layer, rounded)
        sums_K = torch.zeros(self._pipe.scales.num_scales, dtype=torch.float64, device="cpu")
        for floats, quantized in zip(self._float_logits, self._logits(), strict=True):
            for scale, (p_BlV, q_BlV) in enumerate(zip(floats, quantized, strict=True)):
                sums_K[scale] += kl_divergence(p_BlV, q_BlV).sum().cpu()
        tokens_K = len(self.samples.prompts) * torch.tensor(
            self._pipe.scales.lengths, dtype=torch.int64, device="cpu"
        )
        per_scale = (sums_K / tokens_K).tolist()
        return Divergence(float(sums_K.sum() / tokens_K.sum()), tuple(per_scale))

    @torch.no_grad()
    def _logits(self) -> list[list[Tensor]]:
        """Guided logits (b, l, V) of the model as it is, per batch and scale."""
        cfg, tau = self.sampling.cfg, self.sampling.tau
        return [
            [logits for _, logits in guided_logits(self._pipe, prompts, tokens, cfg, tau)]
            for prompts, tokens in self.samples.batches(self.batch_size)
        ]


def _seam_spec(
    config: QuantConfig, name: str, module: nn.Module
) -> LinearSpec | AttentionSpec | None:
    if isinstance(module, SeamLinear):
        return config.linear_for(name)
    return config.attention_for(name.rpartition(".")[0])
