"""benchmarks/speed/gpu.py: every part runs dry, none is lost, and its page says what was found."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.common.gpu import images, kernels, models, page, variants
from benchmarks.common.results import read_document
from benchmarks.speed import gpu as script
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline
from varptq.runtime.cuda import gemm

PARTS = tuple(script.SHARES)
# Dry, all models have the same shapes, and each part starts a process.
DRY = tuple(name for name in PARTS if not name.endswith("d30"))


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "SHARES", {name: script.SHARES[name] for name in DRY})
    path = tmp_path / "gpu.json"
    document = script.measure(60.0, True, path)
    assert json.loads(path.read_text()) == document
    parts = document["parts"]
    assert list(parts) == list(DRY)
    assert not [name for name, found in parts.items() if "why not" in found]
    assert parts["tests"]["passed"] > 0 and not parts["tests"]["failed"]
    for model in models.MODELS[:1]:
        ((_, rows),) = parts[f"kernels {model}"]["presets"].items()
        assert {name.split()[0] for name in rows} == {"quantize", "linear", "append", "attention"}
        assert all(row.get("equal", True) and row["largest"] < 1e-5 for row in rows.values())
        found = parts[f"images {model}"]["variants"]
        for name, row in found.items():
            library = row.get("why not", "")
            assert library.startswith("not installed: pip install") or row["batch 1"]["rounds"] == 1
            assert not library or name.partition(" ")[0] in ("torchao", "comfy-kitchen", "gemlite")
            assert row.get("same tokens", True)
        assert len(found) == 2 * len({name.removesuffix(", CUDA graphs") for name in found})
    lines = page.page_of(document, DRY, models.MODELS[:1])
    assert lines[0].startswith("A dry run") and "| w8a8 | linear |" in "\n".join(lines)
    assert sum(line.startswith("| bf16 SDPA |") for line in lines) == 1


@pytest.mark.slow
def test_a_kernel_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gemm.linear
    one = models.one_block("var-d16", dry=True)

    def wrong(*args: Any, **options: Any) -> torch.Tensor:
        return right(*args, **options) + 1

    monkeypatch.setattr(gemm, "linear", wrong)
    found = dict(next_of_each(one))
    assert found["quantize"]["equal"] and not found["linear"]["equal"]


def next_of_each(one: Pipeline) -> Any:
    rows = kernels.check(one, "w8a8", "cuda" if torch.cuda.is_available() else "cpu")
    return ((name.partition(" ")[0], row) for (name, row), _ in zip(rows, range(2), strict=False))


def test_the_page_is_what_the_script_makes_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    written = tmp_path / "page.md"
    written.write_text(script.PAGE.read_text().replace("- `tests`", "- tests"))
    expected = script.PAGE.read_text()
    monkeypatch.setattr(script, "PAGE", written)
    script.write_page()
    assert written.read_text() == expected
    if read_document(script.NAME)["device"] == "none":
        assert "Not measured: no GPU" in expected


def test_without_a_gpu_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit) as stopped:
        script.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("no GPU: torch ") and "--dry-run" in said and said.count("\n") == 1


def test_what_is_not_reached_is_written_as_such(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "gpu.json"
    seen: list[Any] = []

    def first_only(name: str, seconds: float, dry: bool) -> dict[str, Any]:
        seen.append((name, dry))
        time.sleep(0.5)
        return {"passed": 3, "failed": ["test_x"], "skipped": 1, "seconds": 2.0}

    monkeypatch.setattr(script, "part", first_only)
    monkeypatch.setattr(script, "SHARES", {**dict.fromkeys(PARTS, 1.0), "tests": 1e6})
    script.measure((script.LEAST + 0.4) / 60, True, path)
    assert seen == [("tests", True)]
    document = json.loads(path.read_text())
    assert document["parts"]["images var-d30"] == {"why not": page.NOT_REACHED}
    lines = page.page_of(document, PARTS, models.MODELS)
    assert "- `tests`: 3 passed, 1 failed, 1 skipped; failed test_x; 2 s" in lines
    assert "- `images var-d30`: not reached" in lines


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    seek = 'while [ "$1" != --json ]; do shift; done'
    program.write_text(f"#!/bin/sh\n{seek}\necho '{{\"passed\": 1}}' > $2\nsleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(script, "GRACE", 0.0)
    found = script.part("tests", 2.0, True)
    assert (found["passed"], found["why not"]) == (1, "stopped after 2 s")
    program.write_text("#!/bin/sh\necho some lines >&2\necho the reason >&2\nexit 3\n")
    assert script.part("tests", 60.0, True)["why not"] == "ended by itself: the reason"


def test_a_variant_that_takes_too_long_or_fails_is_named() -> None:
    def slow() -> Pipeline:
        while True:
            time.sleep(0.01)

    def wrapped() -> Pipeline:
        try:
            return slow()
        except images.OutOfTimeError as error:
            raise ValueError("of a library") from error

    def broken() -> Pipeline:
        raise RuntimeError("no kernel image\nand a long story")

    def why(build: Callable[[], Pipeline], seconds: float) -> str:
        found: dict[str, Any] = {}
        made = variants.Variant("x", build)
        assert images._prepared(made, "cpu", images.Limit(seconds), (1,), found) == {}
        return found["x"]["why not"]

    for build in (slow, wrapped):
        assert why(build, 0.05) == "not reached: more than 0 s to be made"
    assert why(broken, 60.0) == "RuntimeError: no kernel image"


def test_graphs_that_draw_other_tokens_are_named(tiny: Pipeline) -> None:
    """And those that fail leave the variant itself in place."""
    found: dict[str, Any] = {}
    made = variants.Variant("x", lambda: copy.deepcopy(tiny))
    plain, graphs = images._prepared(made, "cpu", images.Limit(60.0), (1, 2), found).values()
    assert found["x, CUDA graphs"]["same tokens"]
    assert [first.tokens.shape[0] for first in plain.first.values()] == [1, 2]
    graphs.first[2] = graphs.first[2]._replace(tokens=plain.first[2].tokens + 1)
    assert not images._same(plain.first, graphs.first)

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("cannot be recorded")

    monkey = pytest.MonkeyPatch()
    with monkey.context() as patched:
        patched.setattr(images, "called_again", fails)
        assert list(images._prepared(made, "cpu", images.Limit(60.0), (1,), found)) == ["x"]
    assert found["x, CUDA graphs"] == {"why not": "RuntimeError: cannot be recorded"}
    assert "why not" not in found["x"]


def test_a_library_that_is_missing_says_how_to_get_it(tiny: Pipeline) -> None:
    def missing(_: Any) -> Any:
        raise ModuleNotFoundError("No module", name="gemlite.helper")

    with pytest.raises(variants.NotInstalledError, match="not installed: pip install gemlite"):
        variants.with_library(copy.deepcopy(tiny), "gemlite", missing)
    with pytest.raises(ModuleNotFoundError):
        variants.with_library(copy.deepcopy(tiny), "torchao", missing)


def test_rows_that_are_too_few_are_filled_up() -> None:
    linear = torch.nn.Linear(3, 2)
    for tokens in (1, 40):
        x = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(0))
        seen: list[int] = []
        linear.register_forward_hook(lambda *call: seen.append(len(call[1][0])))  # noqa: B023
        torch.testing.assert_close(variants.PaddedLinear(linear)(x), linear(x))
        assert seen[0] == max(variants.LEAST_ROWS, 2 * tokens)


def test_float_variants_are_the_same_model(tiny: Pipeline) -> None:
    expected = generate(tiny, [0, 3], seed=1, decode=False).tokens
    fast = variants.with_sdpa(copy.deepcopy(tiny))
    assert torch.equal(generate(fast, [0, 3], seed=1, decode=False).tokens, expected)
    blocks = copy.deepcopy(tiny)
    plain = (variants.before_cache, variants.behind_cache)
    blocks.var.blocks = torch.nn.ModuleList(
        variants.CompiledBlock(block, plain) for block in blocks.var.blocks
    )
    assert torch.equal(generate(blocks, [0, 3], seed=1, decode=False).tokens, expected)
