"""What benchmarks/speed/infinity_cpu.py compares is one model; its table says what was found."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.speed import infinity_cpu as script
from helpers.infinity_states import PRESET
from varptq.models.presets import PRESETS
from varptq.native import binding


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, script.MODEL, PRESET)
    monkeypatch.setattr(script, "TEXT_TOKENS", 3)


def test_the_variants_are_one_model() -> None:
    wide = script.build(2, "0.06M", torch.float32)
    narrow = script.in_dtype(wide, torch.bfloat16)
    assert len(wide.var.get_submodule("blocks")._modules) == 2
    assert wide.scales == narrow.scales == wide.var.schedule("0.06M")
    pairs = zip(wide.var.parameters(), narrow.var.parameters(), strict=True)
    assert all(torch.equal(a.bfloat16(), b) for a, b in pairs)


def test_the_page_is_what_the_script_makes_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text().replace(" transformer s ", " "))
    expected = script.PAGE.read_text()
    monkeypatch.setattr(script, "PAGE", page)
    script.write_page()
    assert page.read_text() == expected


@pytest.mark.skipif(binding.core() is None, reason=binding.reason())
def test_every_part_takes_time_and_stands_in_the_table() -> None:
    options = Namespace(depth=1, size="0.06M", rounds=1)
    times = script.measure(options, ("w4a4",))
    assert list(times) == ["w4a4", "eager bf16", "eager fp32"]
    assert all(own[part] > 0 for own in times.values() for part in script.PARTS)
    peaks = {name: {"loaded": 10**9, "one image": 2 * 10**9} for name in times}
    head, _, first, *_ = script.report(times, peaks)
    assert first.startswith("| w4a4 | ") and first.endswith("| 1.00 | 2.00 |")
    assert first.count("|") == head.count("|")
