"""Attention on codes, sampler and token map of the native core against torch in float32.

    python -m benchmarks.speed.native_attention [--quick] [--json FILE]

Shapes of VAR-d16 at 256 px (16 heads of 64, ten scales, 680 tokens, 4096 codes), one thread,
alternating, best of the repeats in CPU time of the thread, which other programs disturb least. The
native side includes unit vectors, quantization and the entry into the cache; torch's is shown
without them (`sdpa`: scaled_dot_product_attention alone on a cache that is full already) and with.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from varptq.models.sampling import filter_logits, guided, image_randoms, sample_ids
from varptq.native import binding
from varptq.native.attention import AttentionCache, AttentionScheme, attend
from varptq.native.phi import add_phi
from varptq.native.sampler import sample

SIDES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
HEADS, WIDTH, VOCABULARY = 16, 64, 4096
CASES = (("token", 8, None), ("segment", 8, None), ("token", 4, 0.01))


def seconds(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def alternating(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Best time of each, run in turns."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(repeats):
        for name, function in functions.items():
            best[name] = min(best[name], seconds(function))
    return best


def attention(rows: int, policy: Any, bits: int, theta: float | None, repeats: int) -> Any:
    ends = tuple(int(e) for e in torch.tensor(SIDES).square().cumsum(0))
    scheme = AttentionScheme(HEADS, WIDTH, ends, policy, bits, bits, bits, 8, l2_norm=True)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(rows, ends[-1], 3 * HEADS * WIDTH, generator=g)
    bias, factor = torch.zeros(HEADS * WIDTH), torch.full((HEADS,), 4.0)
    cache = AttentionCache(scheme, rows)
    keys, values = torch.empty(2, rows, HEADS, ends[-1], WIDTH)

    def split(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part + 0).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.normalize(q, dim=-1) * 4, F.normalize(k, dim=-1), v

    scales = []
    for start, end in pairwise((0, *ends)):
        part = qkv[:, start:end].contiguous()
        q = split(part)[0]

        def native(part: Tensor = part, start: int = start, end: int = end) -> None:
            cache.length = start
            options = {"query_bias_C": bias, "value_bias_C": bias, "query_factor_H": factor}
            span = (slice(0, end - start), tuple(e for e in ends if e <= end))
            attend(scheme, part, cache, [span], theta=theta, **options)

        def sdpa(q: Tensor = q, end: int = end) -> Tensor:
            k, v = keys[:, :, :end], values[:, :, :end]
            return F.scaled_dot_product_attention(q, k, v, scale=1.0)

        def whole(part: Tensor = part, start: int = start, end: int = end) -> Tensor:
            q, k, v = split(part)
            keys[:, :, start:end], values[:, :, start:end] = k, v
            return sdpa(q, end).transpose(1, 2).flatten(2)

        whole()
        scales.append(alternating({"native": native, "sdpa": sdpa, "torch": whole}, repeats))
    total = {name: sum(scale[name] for scale in scales) for name in scales[0]}
    case = {"rows": rows, "policy": policy, "bits": bits, "theta": theta}
    return {**case, "total": total, "scales": scales}


def sampling(repeats: int) -> dict[str, float]:
    """256 tokens of one image, both guidance halves."""
    logits = 3 * torch.randn(2, 256, VOCABULARY, generator=torch.Generator().manual_seed(0))
    chosen = {"top_k": 900, "top_p": 0.96}

    def native() -> None:
        uniform = image_randoms(0, [0])[0].uniform(256, VOCABULARY)
        sample(logits, guidance=1.5, uniform_BlV=uniform[None], **chosen)

    def from_torch() -> None:
        sample_ids(filter_logits(guided(logits, 1.5), **chosen), image_randoms(0, [0]))

    return alternating({"native": native, "torch": from_torch}, repeats)


def token_map(repeats: int) -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    f_hat, h = torch.randn(2, 1, 32, 16, 16, generator=g)
    weight, bias = torch.randn(32, 32, 3, 3, generator=g), torch.randn(32, generator=g)
    functions = {
        "native": lambda: add_phi(f_hat, h, weight, bias),
        "torch": lambda: f_hat + 0.5 * h + 0.5 * F.conv2d(h, weight, bias, padding=1),
    }
    return alternating(functions, 20 * repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rows only, few repeats")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    if binding.core() is None:
        raise SystemExit(binding.reason())
    torch.set_num_threads(1)
    repeats = 3 if options.quick else 7
    sizes = (2,) if options.quick else (2, 16)
    print(f"instruction set {binding.isa()}, milliseconds for all ten scales of one layer")
    found: dict[str, Any] = {"isa": binding.isa(), "attention": []}
    for rows in sizes:
        for policy, bits, theta in CASES:
            case = attention(rows, policy, bits, theta, repeats)
            found["attention"].append(case)
            ms = {name: 1e3 * value for name, value in case["total"].items()}
            print(
                f"{rows:3} rows, {policy}, {bits} bits, theta {theta}: native {ms['native']:.1f}, "
                f"sdpa {ms['sdpa']:.1f} ({ms['sdpa'] / ms['native']:.2f}x), with unit vectors and "
                f"cache {ms['torch']:.1f} ({ms['torch'] / ms['native']:.2f}x)"
            )
    # The first case is that of the preset w8a8, two rows being one image with guidance.
    first = found["attention"][0]["total"]
    found["ratio"] = first["sdpa"] / first["native"]
    found["ratio with unit vectors and cache"] = first["torch"] / first["native"]
    for name, function in (("sampler, 256 tokens", sampling), ("token map", token_map)):
        best = found[name] = function(repeats)
        print(f"{name}: native {1e3 * best['native']:.3f} ms, torch {1e3 * best['torch']:.3f} ms")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
