"""The ways to an image that are timed on a GPU, made from the one block of a model.

Float ones are bfloat16 with torch's scaled_dot_product_attention; compiled, everything between two
caches is one graph, for all scales. Other libraries replace the Linear layers of the blocks by
their 8-bit ones (int8 inputs with a scale per row, int8 weights with a scale per output) in the
same float model. Ours are nearest rounding, whose time is that of any rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.gpu.models import deepened
from benchmarks.common.runtime_variants import CompiledLinear, simulated
from varptq.models.blocks import Attention, Block
from varptq.models.pipeline import Pipeline
from varptq.models.seams import LayerCache, Span, TokenLinear
from varptq.runtime.convert import on_integers
from varptq.runtime.cuda.kernels import CudaKernels
from varptq.runtime.decoder import decode_in

PRESETS = ("w8a8", "w4a8", "w4a4")
# Graphs of one function: one token a row is another than several, and two models two more.
VERSIONS = 16
# cuBLAS wants more than 16.
LEAST_ROWS = 32
# What installs a library that is not there.
INSTALL = {
    "torchao": "pip install torchao",
    "gemlite": "pip install gemlite",
    "comfy_kitchen": "pip install comfy-kitchen",
}
MakeLinear = Callable[[nn.Linear], nn.Module]


class Variant(NamedTuple):
    """`build` makes the pipeline on its device."""

    name: str
    build: Callable[[], Pipeline]


class NotInstalledError(Exception):
    """A library that is measured only where it is; the message says how to get it."""


class SdpaAttention(nn.Module):
    """An `Attention` in float whose scores, softmax and product are one call of torch."""

    def __init__(self, inner: Attention) -> None:
        super().__init__()
        self.inner = inner
        self.new_cache = inner.new_cache

    def forward(self, x_BLC: Tensor, spans: list[Span], cache: LayerCache) -> Tensor:
        q_BHlc, k_BHlc, v_BHlc = self.inner._qkv(x_BLC, spans)
        out_BHlc = sdpa(q_BHlc, *cache.append(k_BHlc, v_BHlc))
        return self.inner.proj(out_BHlc.transpose(1, 2).flatten(2), spans)


def sdpa(q_BHlc: Tensor, k_BHLc: Tensor, v_BHLc: Tensor) -> Tensor:
    """A step of generation sees all keys there are."""
    return F.scaled_dot_product_attention(q_BHlc, k_BHLc, v_BHLc, scale=1.0)


def before_cache(block: Block, x_BLC: Tensor, ada_B16C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the new tokens."""
    _, _, scale, _, shift, _ = ada_B16C.unbind(2)
    return block.attn._qkv(block.norm1(x_BLC, scale, shift), [])


def behind_cache(block: Block, x_BLC: Tensor, ada_B16C: Tensor, out_BHlc: Tensor) -> Tensor:
    """The output of the block, from that of the attention before its projection."""
    gamma1, gamma2, _, scale, _, shift = ada_B16C.unbind(2)
    x_BLC = x_BLC + block.attn.proj(out_BHlc.transpose(1, 2).flatten(2)) * gamma1
    return x_BLC + block.ffn(block.norm2(x_BLC, scale, shift), []) * gamma2


class CompiledBlock(nn.Module):
    """A `Block` as two graphs of torch.compile around its cache and torch's attention."""

    def __init__(self, block: Block, compiled: tuple[Callable[..., Any], ...]) -> None:
        super().__init__()
        self.inner, self.attn = block, block.attn
        self.modulation = block.modulation
        self.before, self.behind = compiled

    def forward(
        self, x_BLC: Tensor, ada_B16C: Tensor, spans: list[Span], cache: LayerCache
    ) -> Tensor:
        q_BHlc, k_BHlc, v_BHlc = self.before(self.inner, x_BLC, ada_B16C)
        out_BHlc = sdpa(q_BHlc, *cache.append(k_BHlc, v_BHlc))
        return self.behind(self.inner, x_BLC, ada_B16C, out_BHlc)


class GemliteLinear(nn.Module):
    """gemlite's Triton product of int8 by int8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        from gemlite.helper import A8W8_int8_dynamic

        device = str(linear.weight.device)
        made = A8W8_int8_dynamic(device=device, dtype=torch.bfloat16)
        self.inner = made.from_linear(linear, del_orig=False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.inner(x.contiguous())


class KitchenLinear(nn.Module):
    """comfy-kitchen's fused int8 Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        import comfy_kitchen

        self.call = comfy_kitchen.int8_linear
        self.weight, self.scale = comfy_kitchen.quantize_int8_rowwise(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return self.call(x, self.weight, self.scale, self.bias, out_dtype=x.dtype)


class PaddedLinear(nn.Module):
    """A Linear that gets rows of zeros where there are fewer than cuBLAS multiplies in int8."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        padded = F.pad(rows, (0, 0, 0, max(0, LEAST_ROWS - len(rows))))
        return self.inner(padded)[: len(rows)].unflatten(0, x.shape[:-1])


def torchao_linear(linear: nn.Linear) -> nn.Module:
    """torchao's dynamic int8, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    config = Int8DynamicActivationInt8WeightConfig()
    return PaddedLinear(CompiledLinear(linear, lambda m: quantize_(m, config)))


def variants(
    one: Pipeline, depth: int, device: str, presets: tuple[str, ...] = PRESETS
) -> list[Variant]:
    """What matters most comes first, since time may run out."""

    def ours(preset: str) -> Pipeline:
        made = decode_in(on_integers(simulated(one, preset), CudaKernels()), torch.bfloat16)
        return deepened(made, depth).to(device=device)

    def library(module: str, make: MakeLinear) -> Callable[[], Pipeline]:
        return lambda: with_library(_float(one, depth, device), module, make)

    return [
        Variant("bf16 SDPA", lambda: with_sdpa(_float(one, depth, device))),
        *(Variant(preset, lambda preset=preset: ours(preset)) for preset in presets),
        Variant("bf16 SDPA, compiled", lambda: with_graphs(_float(one, depth, device))),
        Variant("torchao int8", library("torchao", torchao_linear)),
        Variant("comfy-kitchen int8", library("comfy_kitchen", KitchenLinear)),
        Variant("gemlite int8", library("gemlite", GemliteLinear)),
    ]


def _float(one: Pipeline, depth: int, device: str) -> Pipeline:
    """A bfloat16 copy with all blocks."""
    var, vae = copy.deepcopy(one.var), copy.deepcopy(one.vae)
    pipe = Pipeline(var, vae, one.name, one.class_names, family=one.family)
    return deepened(pipe.to(dtype=torch.bfloat16), depth).to(device=device)


def with_sdpa(pipe: Pipeline) -> Pipeline:
    for block in _blocks(pipe):
        block.attn = SdpaAttention(block.attn)
    return pipe


def with_graphs(pipe: Pipeline) -> Pipeline:
    """Compiled once for all blocks of a model; without a GPU the graphs are made, no code."""
    from torch._dynamo import config  # two seconds that only this takes

    config.recompile_limit = max(config.recompile_limit, VERSIONS)
    backend = "inductor" if pipe.device.type == "cuda" else "eager"
    compiled = tuple(
        torch.compile(f, dynamic=True, backend=backend) for f in (before_cache, behind_cache)
    )
    var: Any = pipe.var
    var.blocks = nn.ModuleList(CompiledBlock(block, compiled) for block in var.blocks)
    return pipe


def with_library(pipe: Pipeline, module: str, make: MakeLinear) -> Pipeline:
    """The Linears over tokens of the blocks by another library's. Raises `NotInstalledError`."""
    try:
        for block in _blocks(pipe):
            for name, linear in list(block.named_modules()):
                if isinstance(linear, TokenLinear):
                    parent, _, child = name.rpartition(".")
                    setattr(block.get_submodule(parent), child, make(linear))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module:
            raise
        raise NotInstalledError(f"not installed: {INSTALL[module]}") from None
    return with_sdpa(pipe)


def _blocks(pipe: Pipeline) -> Any:
    return pipe.var.get_submodule("blocks")
