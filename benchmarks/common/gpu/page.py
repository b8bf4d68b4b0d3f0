"""The page of what a GPU showed: tests, kernels against the reference, images by variant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.common.gpu.timer import PARTS
from benchmarks.common.pages import table

NOT_REACHED = "not reached"
GB, MB = 1e9, 1e6
Found = dict[str, Any]


def page_of(document: Found, parts: tuple[str, ...], models: tuple[str, ...]) -> list[str]:
    """Lines of the section, with what was not reached."""
    found = {name: document["parts"].get(name, {"why not": NOT_REACHED}) for name in parts}
    lines = [_machine(document), ""]
    lines += [f"- `{name}`: {_summary(part)}" for name, part in found.items()]
    for model in models:
        rows = list(_kernel_rows(found[f"kernels {model}"].get("presets", {})))
        if rows:
            lines += ["", f"**Kernels at the shapes of {model}**, against runtime `reference`:", ""]
            lines += table(KERNEL_HEAD, rows)[:-1]
    for model in models:
        variants = found[f"images {model}"].get("variants", {})
        batches = dict.fromkeys(key for row in variants.values() for key in row if "batch" in key)
        for batch in batches:
            lines += ["", f"**Images of {model}, {batch}**, milliseconds:", ""]
            lines += table(IMAGE_HEAD, _image_rows(variants, batch))[:-1]
    return lines


def _machine(document: Found) -> str:
    if document["device"] == "none":
        what = "A dry run on the CPU" if document.get("dry run") else "Not measured: no GPU"
        return f"{what}, torch {document['torch']}."
    return (
        f"{document['device']}, compute capability {document['capability']}, "
        f"{document['memory, bytes'] / GB:.0f} GB, torch {document['torch']}, CUDA "
        f"{document['cuda']}; {document['minutes']:g} minutes in all."
    )


def _summary(part: Found) -> str:
    words: list[str] = []
    if "passed" in part:
        counts = f"{part['passed']} passed, {len(part['failed'])} failed"
        words.append(f"{counts}, {part['skipped']} skipped")
        words += [f"failed {name}" for name in part["failed"]]
    rows = [*part.get("presets", {}).values(), *part.get("variants", {}).values()]
    if rows:
        words.append(f"{sum('why not' not in row for row in rows)} of {len(rows)} rows")
    if "seconds" in part:
        words.append(f"{part['seconds']:.0f} s")
    if "why not" in part:
        words.append(part["why not"])
    return "; ".join(words)


KERNEL_HEAD = ["codes", "kernel", "shapes", "integers", "codes that differ", "floats, relative"]


def _kernel_rows(presets: Found) -> Iterable[list[str]]:
    """A row for each preset and kernel: the worst of its shapes."""
    for preset, shapes in presets.items():
        by_kernel: dict[str, list[Found]] = {}
        for name, row in shapes.items():
            if name != "why not":
                by_kernel.setdefault(name.partition(" ")[0], []).append(row)
        for kernel, rows in by_kernel.items():
            equal = [row["equal"] for row in rows if "equal" in row]
            differ = [row["differ"] for row in rows if "differ" in row]
            yield [
                preset,
                kernel,
                str(len(rows)),
                f"{sum(equal)} of {len(equal)} equal" if equal else "",
                f"{max(differ):.1e}" if differ else "",
                f"{max(row['largest'] for row in rows):.1e}",
            ]
        if "why not" in shapes:
            yield [preset, shapes["why not"], "", "", "", ""]


IMAGE_HEAD = ["variant", "image", *PARTS, "over the first", "weights, GB", "beside, MB"]


def _image_rows(variants: Found, batch: str) -> Iterable[list[str]]:
    """A row for each variant, the first being what the others are compared with."""
    first = next(iter(variants.values())).get(batch, {}).get("milliseconds")
    for name, row in variants.items():
        found = row.get(batch, {})
        if "milliseconds" not in found:
            yield [name, row.get("why not", NOT_REACHED), *[""] * (len(IMAGE_HEAD) - 2)]
            continue
        taken = found["milliseconds"]
        parts = [f"{found['parts'][part]:.1f}" for part in PARTS]
        ratio = f"{first / taken:.2f}x" if first else ""
        sizes = [f"{row['weights, bytes'] / GB:.2f}", f"{found['peak, bytes'] / MB:.0f}"]
        differs = "" if row.get("same tokens", True) else " (other tokens)"
        yield [name + differs, f"{taken:.1f}", *parts, ratio, *sizes]
