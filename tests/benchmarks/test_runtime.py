"""The scripts of the runtime benchmarks: what they compare computes the same, parts add up, ratios
have the names of the targets, and the report takes what the runs write."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common import runtime_variants as variants
from benchmarks.speed import runtime_cpu, runtime_report
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.native import binding
from varptq.runtime.convert import on_integers
from varptq.runtime.reference import ReferenceKernels

needs_core = pytest.mark.skipif(binding.core() is None, reason=binding.reason())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokens(pipe: Pipeline) -> torch.Tensor:
    return generate(pipe, [0, 1], seed=0, decode=False).tokens


def test_upstreams_order_and_packed_weights_are_the_same_model(tiny: Pipeline) -> None:
    expected = tokens(tiny)
    eager = variants.eager(tiny)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    eager.var.blocks[0].ada_lin.register_forward_hook(count)
    assert torch.equal(tokens(eager), expected)
    assert calls == tiny.scales.num_scales
    packed = variants.with_linears(
        tiny, "prepacked", lambda m: variants.PrepackedLinear(m, torch.float32)
    )
    assert not [m for m in packed.var.modules() if type(m).__name__ == "TokenLinear"]
    assert torch.equal(tokens(packed), expected)
    assert torch.equal(tokens(tiny), expected)


def test_parts_add_up_to_the_whole(tiny: Pipeline) -> None:
    """Every part takes time, and attention is counted without its projections."""
    quantized = variants.simulated(tiny, "w8a8")
    for pipe in (variants.eager(tiny), on_integers(quantized, ReferenceKernels()), quantized):
        run = variants.variant(pipe)
        run(2)
        started = time.process_time()
        seconds = run(2)
        spent = time.process_time() - started
        assert set(seconds) == set(variants.PARTS)
        assert min(seconds.values()) > 0
        assert 0.5 * spent < sum(seconds.values()) <= spent


def test_torchao_is_measured_or_its_absence_has_a_reason(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    reason = variants.torchao_variant(tiny)
    assert isinstance(reason, str) and "torchao cannot be imported" in reason


def document_of(seconds: dict[str, dict[str, float]]) -> dict[str, Any]:
    """What a run writes, from made-up times."""
    presets = runtime_cpu.PRESETS
    floors = {preset: {"linears": 0.1, "decoder": 0.2} for preset in presets}
    case = {"batch": 1, "threads": 1, "seconds": seconds, "floors": floors}
    case["ratios"] = {preset: runtime_cpu.ratios(seconds, preset) for preset in presets}
    schemes = runtime_report.SCHEMES
    timing = {
        "seconds": dict.fromkeys(("float32", "bfloat16", *schemes), 1.0),
        "floor": dict.fromkeys(schemes, 0.5),
    }
    linears = {
        "isa": "avx2",
        "threads": 1,
        "peak_gops": 5.0,
        "ratios": {f"{s} over {f}": 2.0 for s in schemes for f in ("float32", "bfloat16")},
        "timings": [{"layer": name, "rows": 0, **timing} for name in ("fc1", "qkv", "image")],
    }
    both = {"native": 0.1, "torch": 0.2}
    one = {"rows": 2, "policy": "token", "bits": 8, "theta": None, "total": both | {"sdpa": 0.3}}
    attention = {"ratio": 3.0, "attention": [one], "sampler, 256 tokens": both, "token map": both}
    peaks = {"imports": 2e8, "loaded": 8e8, "one image": 9e8}
    memory = [{"preset": "w8a8", "seconds": {"load": 1.24}, "peaks": peaks}]
    document = {
        **runtime_cpu.begun(None, False, False),
        **{"machine": "made up", "batches": [1], "cases": [case]},
        **{"linears": {"1": linears}, "attention": attention, "memory": memory},
    }
    document["ratios"] = {"threads 1": runtime_cpu.table(document, 1)}
    document["targets"] = {name: {"must": 1.0, "aim": 2.0} for name in runtime_cpu.TARGETS}
    return document


@needs_core
@pytest.mark.native
def test_ratios_have_the_names_of_the_targets_and_the_report_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = variants.PARTS
    names = ("eager fp32", "eager bf16 autocast", "prepacked bf16", "simulated")
    names = (*names, *runtime_cpu.PRESETS)
    seconds = {name: dict.fromkeys(parts, 1.0 + i) for i, name in enumerate(names)}
    document = document_of(seconds)
    assert set(document["ratios"]["threads 1"]) == set(runtime_cpu.TARGETS)
    assert document["ratios"]["threads 1"]["whole image over our own simulated path"] == 4 / 5
    pages = [tmp_path / "page.md", tmp_path / "details.md"]
    for page in pages:
        page.write_text("before\n<!-- runtime: begin -->\nold\n<!-- runtime: end -->\nafter\n")
    monkeypatch.setattr(runtime_report, "PAGE", pages[0])
    monkeypatch.setattr(runtime_report, "DETAILS", pages[1])
    # The second one has no bfloat16.
    plain = copy.deepcopy(document) | {"machine": "another"}
    for timing in plain["linears"]["1"]["timings"]:
        timing["seconds"] = {k: v for k, v in timing["seconds"].items() if k != "bfloat16"}
    del plain["ratios"]["threads 1"]["whole image over eager bf16 autocast"]
    runtime_report.report([document, plain])
    text, details = (page.read_text() for page in pages)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert text.count("| whole image over our own simulated path | 1.0x | 2.0x | 0.80x |") == 2
    assert "| whole image over eager bf16 autocast | 1.0x | 2.0x |  |" in text
    assert "| w8a8 | 0.20 | 0.80 | 0.90 | 0.80 | 1.2 |" in text
    assert "| fc1 | all | 1000.00 | 1000.00 | 1000.00 (1.00x; 50%)" in details
    assert "W8A8 ms (over fp32; of floor)" in details.partition("## another")[2]


@needs_core
@pytest.mark.native
def test_a_run_is_resumed_on_the_same_machine_only(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    new = runtime_cpu.begun(path, True, False)
    assert new["cases"] == []
    path.write_text(runtime_cpu.json.dumps({**new, "cases": [1]}))
    assert runtime_cpu.begun(path, True, False)["cases"] == [1]
    assert runtime_cpu.begun(path, False, False)["cases"] == []
    with pytest.raises(SystemExit, match="made with another quick; leave --resume out"):
        runtime_cpu.begun(path, True, True)
