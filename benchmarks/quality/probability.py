"""Rules for attention probabilities: what each loses on random attention and on the demo model.

    python -m benchmarks.quality.probability

Writes results/probability.json and, between markers, docs/tables/probability.md.
Random attention: q and k uniform on the unit sphere of 64 dimensions, p = softmax(scale q k), 680
keys (256 x 256 images) and 2240 (512 x 512); values Gaussian, alone or with a common offset of two
deviations. Demo: the float model's own p and v on held-out images. "error" is the energy of p^ v -
p v over that of p v, "mass" the mean sum of a row of p^; "keys" is exp(entropy), the number of keys
a row effectively attends to. log sqrt2 halves the steps of log2 and is tried here only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import varptq
from benchmarks.common.held_out import held_out
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import write_document
from varptq.models.pipeline import Pipeline
from varptq.models.reading import listening, read
from varptq.models.seams import Mix, Span
from varptq.quant.config import TensorSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.uniform import row_max

WIDTH, QUERIES, IMAGES = 64, 64, 4
KEYS, TEMPERATURES = (680, 2240), (4, 12, 24, 48)
Rule = Callable[[Tensor], Tensor]


def library_rule(kind: str, bits: int) -> Rule:
    spec = TensorSpec.from_dict({"num_bits": bits, "type": kind})
    return lambda p: QUANTIZERS[kind].fake(p, spec)


def log_sqrt2(p: Tensor, bits: int = 5) -> Tensor:
    """Powers of the square root of two below the row maximum, 0 from 2^bits steps on."""
    top = row_max(p)
    code = (-2 * (p / top + 1e-20).log2()).round()
    return torch.where(code < 2**bits, top * torch.exp2(-code / 2), 0.0)


def renormalised(rule: Rule) -> Rule:
    def after(p: Tensor) -> Tensor:
        p_hat = rule(p)
        return p_hat / p_hat.sum(-1, keepdim=True)

    return after


RULES: dict[str, Rule] = {
    "log2, 4 bits": library_rule("log2", 4),
    "log2, 4 bits, renormalised": renormalised(library_rule("log2", 4)),
    "log sqrt2, 5 bits": log_sqrt2,
    "uniform, 4 bits": library_rule("uniform", 4),
    "uniform, 6 bits": library_rule("uniform", 6),
    "uniform, 8 bits": library_rule("uniform", 8),
    "uniform, 8 bits, renormalised": renormalised(library_rule("uniform", 8)),
}


def judge(p: Tensor, v: Tensor) -> dict[str, Any]:
    """Error and row sum of every rule for p (..., l, L) and v (..., L, c)."""
    p, v = p.double(), v.double()
    exact = p @ v
    found: dict[str, Any] = {"keys": float(effective_keys(p).mean())}
    for name, rule in RULES.items():
        p_hat = rule(p)
        error = (p_hat @ v - exact).square().sum() / exact.square().sum()
        found[name] = {"error": float(error), "mass": float(p_hat.sum(-1).mean())}
    return found


def effective_keys(p: Tensor) -> Tensor:
    return (-(p * p.clamp(min=1e-300).log()).sum(-1)).exp()


def random_attention(keys: int, scale: float, offset: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(keys)

    def sphere(rows: int) -> Tensor:
        x = torch.randn(rows, WIDTH, generator=generator)
        return x / x.norm(dim=-1, keepdim=True)

    p = (scale * sphere(QUERIES) @ sphere(keys).T).softmax(-1)
    v = torch.randn(keys, WIDTH, generator=generator)
    return judge(p, v + offset * torch.randn(WIDTH, generator=generator))


@torch.no_grad()
def demo_attention(pipe: Pipeline) -> list[dict[str, Any]]:
    """One entry per scale, all blocks and heads together."""
    test = held_out(pipe)
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(pipe.scales.num_scales)]

    def keep(_: int, p_BHlL: Tensor, v_BHLc: Tensor, span: Span) -> None:
        seen[span.scale].append((p_BHlL, v_BHLc))

    mixes = [module for module in pipe.var.modules() if isinstance(module, Mix)]
    with listening(dict(enumerate(mixes)), keep):
        read(pipe, test.prompts[:IMAGES], test.tokens[:IMAGES])
    return [judge(*(torch.cat(part) for part in zip(*pairs, strict=True))) for pairs in seen]


def table(names: list[str], found: list[dict[str, Any]], what: str) -> list[str]:
    """A row per rule, a column per case."""
    rows = [f"| {what} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows.append(f"| keys attended to | {' | '.join(format(x['keys'], '.0f') for x in found)} |")
    digits = ".2g" if what == "error" else ".3f"
    for rule in RULES:
        cells = [format(x[rule][what], digits) for x in found]
        rows.append(f"| {rule} | {' | '.join(cells)} |")
    return [*rows, ""]


def reading(demo: list[dict[str, Any]]) -> str:
    """How much of log2's error is mass, in its own numbers."""
    last = demo[-1]
    plain, renormal = (last[n]["error"] for n in ("log2, 4 bits", "log2, 4 bits, renormalised"))
    times = plain / last["uniform, 8 bits"]["error"]
    return (
        f"At the demo model's last scale a row of log2 probabilities sums to "
        f"{last['log2, 4 bits']['mass']:.3f}; renormalising takes {1 - renormal / plain:.0%} of "
        f"its error away, uniform 8-bit codes all but one part in {times:.0f}."
    )


def main() -> None:
    torch.set_num_threads(1)
    cases = [
        (keys, scale, offset) for offset in (0.0, 2.0) for keys in KEYS for scale in TEMPERATURES
    ]
    random = {f"{k} keys, scale {s}, offset {o:g}": random_attention(k, s, o) for k, s, o in cases}
    demo = demo_attention(varptq.load_model("demo"))
    document = {"random": random, "demo": demo}
    write_document("probability", document)
    lines = ["Demo model, by scale:", ""]
    scales = [f"scale {k + 1}" for k in range(len(demo))]
    lines += table(scales, demo, "error") + table(scales, demo, "mass") + [reading(demo), ""]
    for offset in (0.0, 2.0):
        chosen = {
            (k, s): random[f"{k} keys, scale {s}, offset {offset:g}"]
            for k, s, o in cases
            if o == offset
        }
        lines += [f"Random attention, values with a common offset of {offset:g} deviations:", ""]
        lines += table([f"{k}, {s}" for k, s in chosen], list(chosen.values()), "error")
    replace(DOCS / "tables/probability.md", "probability", lines)


if __name__ == "__main__":
    main()
