"""The ways to an image that runtime_cpu.py compares, made from one set of random weights, and what
one image takes by part.

Float variants: "eager" computes AdaLN at every scale as upstream does, in float32 and under bf16
autocast; "prepacked" has oneDNN's own weight layout and AdaLN once per image; "torchao int8" is its
dynamic quantization of the same bf16 model, each Linear compiled. A CPU without bfloat16 products
is measured in float32 alone. Ours are nearest rounding, whose
time is that of any rounding, with the image decoder in 8 bits as the presets have it.

Parts: `linears` (ours: with norm, GELU and quantization, which are fused into them), `attention`
without its projections, `text` (the same over a text, where there is one), `sampling` (guidance,
filters, draw), `rest` of the transformer's loop, `decoder` from ids to pixels.
"""

from __future__ import annotations

import copy
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.bfloat16 import has_bfloat16
from varptq.models.blocks import Attention
from varptq.models.cross import CrossAttention
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.models.sampling import Sampler
from varptq.models.seams import Stage
from varptq.models.var.transformer import VAR, Condition
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert, convert_autoencoder
from varptq.quant.find import release_float_weights
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.attention import IntAttention, IntCrossAttention
from varptq.runtime.convert import on_integers
from varptq.runtime.cpu import cpu_kernels
from varptq.runtime.decoder import decode_in
from varptq.runtime.layers import IntLinear

PARTS = ("linears", "attention", "sampling", "rest", "decoder")
Seconds = dict[str, float]
Variant = Callable[[int], Seconds]


class PrepackedLinear(nn.Module):
    """A Linear on oneDNN's packed weights, float32 in and out."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        weight = linear.weight.detach().to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        y = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(F.linear, dynamic=True)


class CompiledLinear(nn.Module):
    """torchao's dynamic int8 Linear under torch.compile: one graph for all shapes."""

    def __init__(self, linear: nn.Linear, quantize: Callable[[nn.Module], object]) -> None:
        super().__init__()
        holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features).bfloat16())
        holder.to(linear.weight.device)
        holder[0].load_state_dict(linear.state_dict(), strict=False)
        if linear.bias is None:
            nn.init.zeros_(holder[0].bias)
        quantize(holder)
        self.inner = holder[0].requires_grad_(False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = _compiled()(rows, self.inner.weight, self.inner.bias)
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


class EveryScale(VAR):
    """AdaLN computed anew at every scale, as upstream's blocks do."""

    def stages(self, condition: Condition) -> list[Stage]:
        fresh = super().stages

        def again(index: int) -> Callable[..., Tensor]:
            return lambda *call: fresh(condition)[index].run(*call)

        return [stage._replace(run=again(i)) for i, stage in enumerate(fresh(condition))]


class TimedSampler:
    """Hands on to a sampler and adds up what drawing takes."""

    def __init__(self, inner: Sampler, add: Callable[[float], None], clock: Any) -> None:
        self.inner, self.add, self.clock = inner, add, clock

    def draw(self, *args: Any, **options: Any) -> Any:
        started = self.clock()
        drawn = self.inner.draw(*args, **options)
        self.add(self.clock() - started)
        return drawn

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Stopwatch:
    """Adds up the seconds of modules by part, sampling too; a Linear inside an attention counts as
    a Linear."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(float)
        self.started: dict[nn.Module, float] = {}
        self.clock = time.perf_counter

    def watch(self, pipe: Pipeline) -> None:
        linear = (nn.Linear, QuantLinear, IntLinear, PrepackedLinear, CompiledLinear)
        for module in pipe.var.modules():
            part = "linears" if isinstance(module, linear) else attention_part(module)
            if part is not None:
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(self._stopped(part))
        sampler: Any = TimedSampler(pipe.sampler, self._sampled, lambda: self.clock())
        pipe.sampler = sampler

    def _sampled(self, seconds: float) -> None:
        self.seconds["sampling"] += seconds

    def _start(self, module: nn.Module, _: Any) -> None:
        self.started[module] = self.clock()

    def _stopped(self, part: str) -> Callable[..., None]:
        def stop(module: nn.Module, *_: Any) -> None:
            taken = self.clock() - self.started.pop(module)
            self.seconds[part] += taken
            if part == "linears":
                for around in filter(None, map(attention_part, self.started)):
                    self.seconds[around] -= taken

        return stop


def attention_part(module: nn.Module) -> str | None:
    """Of an attention; None for other modules."""
    if isinstance(module, CrossAttention | IntCrossAttention):
        return "text"
    return "attention" if isinstance(module, Attention | IntAttention) else None


def variant(pipe: Pipeline, *, autocast: bool = False) -> Variant:
    """One batch of images; seconds by part. With one thread the clock is the process's CPU time,
    which other programs disturb least."""
    watch = Stopwatch()
    watch.watch(pipe)

    def run(batch: int) -> Seconds:
        labels = [pipe.var.arch.num_classes // 5] * batch
        watch.clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        watch.seconds.clear()
        clock = watch.clock
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            started = clock()
            tokens = generate(pipe, labels, seed=0, batch_size=batch, decode=False).tokens
            between = clock()
            with torch.inference_mode():
                pipe.vae.decode_features(pipe.vae.quantize.accumulate(tokens))
            ended = clock()
        found = {part: watch.seconds[part] for part in PARTS[:-2]}
        found["rest"] = between - started - sum(found.values())
        return found | {"decoder": ended - between}

    return run


def _shared(pipe: Pipeline, name: str) -> Pipeline:
    """A copy of the modules around the same weights."""
    tensors = (*pipe.var.parameters(), *pipe.var.buffers(), *pipe.vae.parameters())
    shared = {id(t): t for t in (*tensors, *pipe.vae.buffers())}
    var, vae = copy.deepcopy(pipe.var, shared), copy.deepcopy(pipe.vae, shared)
    return Pipeline(var, vae, name, pipe.class_names)


def eager(pipe: Pipeline) -> Pipeline:
    """Upstream's order of work."""
    found = _shared(pipe, "eager")
    found.var.__class__ = EveryScale
    return found


def with_linears(pipe: Pipeline, name: str, make: Callable[[nn.Linear], nn.Module]) -> Pipeline:
    found = _shared(pipe, name)
    for path, module in list(found.var.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = path.rpartition(".")
            setattr(found.var.get_submodule(parent), child, make(module))
    return found


def simulated(pipe: Pipeline, preset: str) -> QuantizedPipeline:
    """Nearest rounding without calibration."""
    config = QuantConfig.preset(preset)
    var = convert(pipe.var, config).requires_grad_(False)
    release_float_weights(var)
    return QuantizedPipeline(
        var,
        convert_autoencoder(copy.deepcopy(pipe.vae), config).requires_grad_(False),
        preset,
        pipe.class_names,
        family=pipe.family,
        config=config,
        method="rtn",
    )


def integers(pipe: Pipeline, preset: str, decoder: torch.dtype = torch.float32) -> Pipeline:
    """A preset on the native core; decoder: the type of what it leaves in float."""
    return decode_in(on_integers(simulated(pipe, preset), cpu_kernels()), decoder)


def torchao_variant(pipe: Pipeline) -> Variant | str:
    """torchao's dynamic int8 on the prepacked variant's model, or why there is none."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except Exception as error:  # whatever a torchao of another torch raises
        return f"torchao cannot be imported ({type(error).__name__})"
    config = Int8DynamicActivationInt8WeightConfig()
    found = with_linears(
        pipe, "torchao", lambda linear: CompiledLinear(linear, lambda m: quantize_(m, config))
    )
    return variant(found, autocast=True)


def variants(pipe: Pipeline, presets: tuple[str, ...], *, quick: bool) -> dict[str, Variant]:
    """Every way to an image; what is missing is said. `quick`: those that the targets name."""
    found = {"eager fp32": variant(eager(pipe))}
    if has_bfloat16():
        found["eager bf16 autocast"] = variant(eager(pipe), autocast=True)
        found["prepacked bf16"] = variant(prepacked(pipe, torch.bfloat16), autocast=True)
    if not (quick and has_bfloat16()):
        found["prepacked fp32"] = variant(prepacked(pipe, torch.float32))
    if has_bfloat16() and not quick:
        made = torchao_variant(pipe)
        if isinstance(made, str):
            print(f"without torchao int8: {made}")
        else:
            found["torchao int8"] = made
    for preset in presets:
        found[preset] = variant(integers(pipe, preset))
        if preset == presets[0]:
            # A model of its own: the other one shares tensors with `ours`.
            found["simulated"] = variant(simulated(pipe, preset))
    return found


def prepacked(pipe: Pipeline, dtype: torch.dtype) -> Pipeline:
    """oneDNN's weights, packed beforehand."""
    return with_linears(pipe, "prepacked", lambda linear: PrepackedLinear(linear, dtype))
