"""Tables of docs/benchmarks.md and docs/tables/runtime.md, one set for each class of CPU.

python -m benchmarks.speed.runtime_report

runtime_cpu.py made the results on one machine of each class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common.linear_shapes import MOST_BYTES
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import read_document
from benchmarks.common.runtime_variants import PARTS

# Results of a class of CPU each.
CLASSES = (
    "runtime_cpu",
    "runtime_cpu_emerald_rapids",
    "runtime_cpu_ice_lake",
    "runtime_cpu_zen_3",
)
PAGE, DETAILS = DOCS / "benchmarks.md", DOCS / "tables" / "runtime.md"
FLOATS = {"float32": "fp32", "bfloat16": "bf16"}
# The Linear whose row counts are shown one by one.
SHOWN = "fc1"
SCHEMES = ("W8A8", "W6A6", "W4A8", "W4A4")
Document = dict[str, Any]


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def head(*cells: object) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def headline(document: Document) -> Iterator[str]:
    columns = list(document["ratios"])
    yield from head("ratio", "must", "aim", *columns)
    for name, target in document["targets"].items():
        found = (document["ratios"][column].get(name) for column in columns)
        cells = ("" if value is None else f"{value:.2f}x" for value in found)
        yield row(name, f"{target['must']}x", f"{target['aim']}x", *cells)


def seconds(case: Document) -> Iterator[str]:
    yield f"**Batch {case['batch']}, {case['threads']} thread(s)**, seconds:"
    yield ""
    yield from head("variant", *PARTS, "total")
    for name, parts in case["seconds"].items():
        yield row(name, *(f"{parts[part]:.2f}" for part in PARTS), f"{sum(parts.values()):.2f}")
    yield ""
    presets = list(case["ratios"])
    yield from head("ratio", *presets)
    for name in next(iter(case["ratios"].values())):
        yield row(name, *(f"{case['ratios'][preset][name]:.2f}x" for preset in presets))
    for part, name in (
        ("linears", "floor of the linears"),
        ("decoder", "all products of the decoder, at the peak"),
    ):
        cells = []
        for preset in presets:
            floor = case["floors"][preset][part]
            cells.append(f"{floor:.2f} s, {floor / case['seconds'][preset][part]:.0%} of its time")
        yield row(name, *cells)


def linears(found: Document) -> Iterator[str]:
    yield (
        f"{found['threads']} thread(s), {found['isa']}, {found['peak_gops']:.0f} Gop/s a thread "
        "at the peak:"
    )
    yield ""
    floats = {
        name: short for name, short in FLOATS.items() if name in found["timings"][0]["seconds"]
    }
    other, short = list(floats.items())[-1]
    yield from head(
        *("layer", "rows", *(f"{name} ms" for name in floats.values())),
        *(f"{scheme} ms (over {short}; of floor)" for scheme in SCHEMES),
    )
    for timing in found["timings"]:
        if timing["layer"] not in (SHOWN, "image"):
            continue
        taken, cells = timing["seconds"], []
        for scheme in SCHEMES:
            mine = taken[scheme]
            gain, share = taken[other] / mine, timing["floor"][scheme] / mine
            cells.append(f"{mine * 1e3:.2f} ({gain:.2f}x; {share:.0%})")
        plain = (f"{taken[name] * 1e3:.2f}" for name in floats)
        label = "whole image" if timing["layer"] == "image" else timing["layer"]
        yield row(label, timing["rows"] or "all", *plain, *cells)


def attention(found: Document) -> Iterator[str]:
    yield from head(
        *("rows", "policy", "bits", "theta", "ours ms", "SDPA alone ms"),
        "SDPA, unit vectors and cache ms",
    )
    for case in found["attention"]:
        ms = {name: value * 1e3 for name, value in case["total"].items()}
        gains = (f"{ms[name]:.1f} ({ms[name] / ms['native']:.2f}x)" for name in ("sdpa", "torch"))
        names = (case[name] for name in ("rows", "policy", "bits", "theta"))
        yield row(*names, f"{ms['native']:.1f}", *gains)
    yield ""
    for name in ("sampler, 256 tokens", "token map"):
        mine, torch = (found[name][key] * 1e3 for key in ("native", "torch"))
        yield f"- {name}: ours {mine:.2f} ms, torch {torch:.2f} ms."


def memory(found: list[Document]) -> Iterator[str]:
    yield from head("artifact", "after imports", "loaded", "one image", "at most", "loading, s")
    for case in found:
        peaks = (f"{value / 1e9:.2f}" for value in case["peaks"].values())
        load = f"{case['seconds']['load']:.1f}" if "seconds" in case else ""
        yield row(case["preset"], *peaks, f"{MOST_BYTES[case['preset']] / 1e9:.2f}", load)


def summary(document: Document) -> Iterator[str]:
    """Of one class of CPU: ratios beside targets, an image by parts, memory."""
    target = {"amx": "with AMX", "avx2": "with VNNI, which this one has not"}
    meant = target.get(document["isa"], "without AMX")
    capped = f"capped at {document['onednn']}" if document["onednn"] else "not capped"
    yield f"### {document['machine']}"
    yield ""
    yield (
        f"Native core on {document['isa']}, torch {document['torch']} on {document['cpu']}, oneDNN "
        f"{capped}. Targets of CPUs {meant}; of one image, whole-image ratios at W8A8."
    )
    yield ""
    yield from headline(document)
    for case in document["cases"]:
        yield ""
        yield from seconds(case)
    yield ""
    yield "Peak of a process that loads the artifact and makes one image, GB; mapped pages of the"
    yield "file and of torch's libraries count:"
    yield ""
    yield from memory(document["memory"])


def details(document: Document) -> Iterator[str]:
    """Of one class of CPU: Linears by rows, attention, sampler, token map."""
    yield f"## {document['machine']}"
    yield ""
    yield "One Linear at every row count measured, and the sum over an image's layers and scales;"
    yield "quantization included, floats prepacked."
    for found in document["linears"].values():
        yield ""
        yield from linears(found)
    yield ""
    yield "All ten scales of one layer's attention, one thread; ours with unit vectors, codes and"
    yield "cache:"
    yield ""
    yield from attention(document["attention"])


def report(documents: list[Document]) -> None:
    """Write both sections."""
    for page, part in ((PAGE, summary), (DETAILS, details)):
        lines: list[str] = []
        for document in documents:
            lines += [*part(document), ""]
        replace(page, "runtime", lines[:-1])


if __name__ == "__main__":
    report([read_document(name) for name in CLASSES])
