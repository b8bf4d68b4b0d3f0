"""benchmarks/paper.py: its rows, a dry run that goes on, its plan, and the page it writes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import varptq
from benchmarks import paper
from benchmarks.common.methods_rows import PRESET
from benchmarks.common.paper import instruments, job, page
from benchmarks.common.paper.bench import Bench
from benchmarks.common.paper.instruments import Colours
from benchmarks.common.paper.models import Random, Shape
from benchmarks.common.paper.plan import Planner
from benchmarks.common.paper.rows import COLUMNS, TABLES, TEXTS, Row, picked, rows
from benchmarks.common.results import append_line, read_lines
from varptq.calibrate.methods import Method
from varptq.distributed import Ranks
from varptq.errors import InputError
from varptq.evaluate.features import ModuleFeatures

ROOT = Path(__file__).parents[2]
SMALL = Shape(blocks=2, width=128, sides=(1, 2, 3), channels=32)
OPTIONS = ["--width", "128", "--sides", "1,2,3", "--channels", "32"]
# One row of each kind, and two of the table with images.
FEW = (
    *("main/var-d16/float", "main/var-d20/w4a4/sas", "class/*/float", "outpaint/*/brecq"),
    "infinity/*/float",
)


def dry_run(folder: Path, *words: str) -> list[dict[str, Any]]:
    paper.main(["--dry-run", *OPTIONS, "--out", str(folder), *words])
    return read_lines("paper", folder)


def command(warm: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The script as a process of its own."""
    program = [str(warm / "python"), *words]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, cwd=ROOT)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("paper")
    return folder, dry_run(folder, "--rows", *FEW)


def test_every_row_is_a_preset_a_method_and_a_cell() -> None:
    every = rows()
    # Per model a float row and four widths of four methods and a preset; two ablations of four;
    # three edits of a float row, three methods and a preset; of Infinity one method more.
    assert len(every) == len({row.name for row in every}) == 4 * 21 + 2 * 4 + 3 * 5 + 6
    assert len({row.key for row in every}) == len(every) - 4
    assert {row.table for row in every} == set(TABLES)
    for row in every:
        if row.paper is not None:
            assert len(row.paper) == len(COLUMNS[row.kind]), row.name
        elif not row.is_float:
            assert row.method == PRESET, row.name
        if not row.is_float:
            config = varptq.QuantConfig.preset(row.preset)
            assert (config.linear_for("blocks.0.ffn.fc2").weight is None) == (
                "litevar" in row.method
            )
            Method.parse(row.calibration_method)
            assert row.calibration(None, None).steps == (2000 if row.method == PRESET else 5000)


def test_rows_are_picked_by_patterns() -> None:
    every = rows()
    assert picked([], every) == every
    found = picked(["*/w4a6/sas", "class/*"], every)
    assert [row.name for row in found if row.table in ("main", "class")] == [
        *(f"main/var-d{depth}/w4a6/sas" for depth in (16, 20, 24, 30)),
        *(row.name for row in every if row.table == "class"),
    ]
    with pytest.raises(InputError, match=r"rows 'main/d16/\*': fits none of 113 rows"):
        picked(["main/*/float", "main/d16/*"], every)


def test_the_page_is_what_the_script_makes_of_the_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected, other = page.PAGE.read_text(), tmp_path / "page.md"
    other.write_text(expected.replace("not run |", "|"))
    monkeypatch.setattr(page, "PAGE", other)
    page.write_page(paper.NAME)
    assert other.read_text() == expected


@pytest.mark.slow
def test_a_cell_says_what_makes_it_another_number(ran: tuple[Path, Any]) -> None:
    lines = page.by_key(ran[1])
    row = Row("ablation", "var-d20", "w4a6", "sas")
    assert page.our_cell(row, lines) == "not run"
    found = copy.deepcopy(lines[Row("main", "var-d20", "w4a4", "sas").key])
    found |= {
        "row": row.key,
        "values": {"is": 200.04, "fid": 5.0, "fid2fp": 4.996},
        "differs": ["images"],
    }
    # The end of the ablation is the row of the main table.
    same = Row("main", "var-d20", "w4a6", "sas")
    for name in (row, same):
        assert page.our_cell(name, {row.key: found}) == "200.0 / 5.00 / 5.00 (8 images)"
    found["settings"]["count"], found["differs"] = 50_000, ["network"]
    assert page.our_cell(row, {row.key: found}) == "200.0 / 5.00 / 5.00 (network)"
    assert page.paper_cell(same) == "202.2 / 5.36 / 5.09"
    text = "\n".join(page.page({row.key: found}))
    assert text.count("200.0 / 5.00") == 2 and "1 of 109 measurements" in text


# Runs


@pytest.mark.slow
def test_a_dry_run_measures_a_row_of_each_kind(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, lines = ran
    assert [line["row"] for line in lines] == [row.key for row in picked(FEW, rows())]
    for line in lines:
        kind = line["row"].split("/")[0]
        values = line["values"]
        assert tuple(values) == COLUMNS[kind]
        assert all(v is not None for n, v in values.items() if n != "fid2fp")
        expected = ["labels", "images", "network"] if kind == "images" else []
        assert line["differs"] == expected
        json.dumps(line, allow_nan=False)
    by_row = page.by_key(lines)
    quantized, plain = (
        by_row[key]["values"] for key in ("images/var-d20/w4a4/sas", "images/var-d16/float")
    )
    # Both are of the same stand-in, whose samples the quantized one changes.
    assert plain["fid2fp"] is None and quantized["fid2fp"] > 0
    assert quantized["fid"] != plain["fid"]
    pictures = sorted((folder / "infinity-125m").rglob("*.png"))
    assert len(pictures) == 2 * 10 + 2 * 4


@pytest.mark.slow
def test_what_is_measured_is_skipped_and_the_rest_goes_on(
    ran: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder, lines = ran
    before = (folder / "paper.jsonl").read_bytes()
    assert dry_run(folder, "--rows", *FEW) == lines
    assert "5 of them measured already" in capsys.readouterr().out
    # As after a kill in the last row but one: what was kept stays, its numbers come again.
    kept = b"".join(before.splitlines(keepends=True)[:3])
    (folder / "paper.jsonl").write_bytes(kept)
    again = dry_run(folder, "--rows", *FEW)
    assert (folder / "paper.jsonl").read_bytes().startswith(kept)
    assert [line["values"] for line in again] == [line["values"] for line in lines]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(Bench, "measure", full)
    with pytest.raises(OSError, match="No space left"):
        dry_run(folder, "--rows", *FEW, "--seed", "1")
    assert read_lines("paper", folder) == again
    assert dry_run(folder, "--rows", *FEW) == again


@pytest.mark.slow
def test_images_of_a_measured_row_are_removed(
    ran: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = shutil.copytree(ran[0], tmp_path / "copy")
    files = instruments.Files(None, None, None, None)
    words = ["--dry-run", *OPTIONS, "--out", str(folder)]
    asked = replace(paper.job_of(paper.parsed(words), files, Ranks()), keep=False)
    bench = Bench(asked, files.or_stand_ins(folder, (48, 48), 8, "cpu"), instruments.brightness)
    chosen = picked(["main/var-d16/float", "main/var-d20/w4a4/sas"], rows())
    for row in chosen:
        assert bench.measure(row) is not None
        bench.release(row)
    floats, quantized = map(bench.folder, chosen)
    assert (floats / "samples").is_dir()
    assert [path.name for path in quantized.iterdir()] == ["model"]


def test_scores_come_from_a_file(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in COLUMNS[TEXTS]}
    assert instruments.from_file(folders) is None
    place = tmp_path / instruments.SCORES
    place.write_text('{"image_reward": 0.5, "geneval": 1}')
    assert instruments.from_file(folders) == {"image_reward": 0.5, "geneval": 1.0}
    for text in ('{"geneval": 1}', "[]", "{", '{"image_reward": null, "geneval": 1}'):
        place.write_text(text)
        with pytest.raises(InputError, match="expected a JSON object with image_reward, geneval"):
            instruments.from_file(folders)


def test_a_line_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_line("some", {"row": 1}, tmp_path)
    with pytest.raises(TypeError):
        append_line("some", {"row": object()}, tmp_path)
    append_line("some", {"row": 2}, tmp_path)
    assert read_lines("some", tmp_path) == [{"row": 1}, {"row": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["some.jsonl"]


# Plan


def test_a_plan_counts_every_measurement_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job.Job(Path("nowhere"), Random(replace(SMALL, blocks=3), stands_in=False), 1000, 8)
    chosen = picked(["main/var-d16/w4a6/*", "ablation/var-d16/*", "inpaint/*/sas"], rows())

    def timed(_: Planner, row: Row, blocks: int) -> dict[str, float]:
        stored = 0.0 if row.is_float else 100.0 * blocks
        return {"draw": 2.0, "decode": 1.0, "record": 3.0, "bytes": stored}

    monkeypatch.setattr(Planner, "_at", timed)
    monkeypatch.setattr(Planner, "_rounding", lambda *_: {"step": 4.0, "solve": 5.0})
    network = ModuleFeatures(Colours(), "colours")
    plan = Planner(asked, replace(SMALL, blocks=3), network)
    parts = dict(zip((row.name for row in chosen), map(plan.row, chosen), strict=True))
    for name, part in parts.items():
        again = name in ("ablation/var-d16/w4a6/brecq", "ablation/var-d16/w4a6/sas")
        assert (part.hours == 0) == again, name
        assert (part.kept == 0) == again, name
    # 48 x 48 pixels and 14 tokens.
    first = parts["main/var-d16/w4a6/brecq"]
    assert first.samples == 1000 * (48 * 48 * 3 + 14 * 8)
    assert parts["inpaint/var-d30/w4a4/sas"].samples == 0
    # The first row makes the float model's images too; all blocks take room.
    assert first.images * 3600 == 1000 * (2 + 1) * 2 and first.kept == 300
    assert parts["main/var-d16/w4a6/sas"].images * 3600 == 1000 * (2 + 1)
    assert first.calibration * 3600 == 256 * 2 + 5000 * 4 + 256 * 3
    preset = parts["main/var-d16/w4a6/preset"].calibration
    # Three passes over the units, and three over the samples.
    assert preset * 3600 == 256 * 2 + 5 + 3 * 256 * 3 + 3 * 256 * 3
    two = replace(asked, ranks=Ranks(0, 2))
    shared = Planner(two, replace(SMALL, blocks=3), network).row(chosen[0])
    # All but the pass over the samples is shared.
    assert shared.calibration * 3600 == (256 * 2 + 5000 * 4) / 2 + 256 * 3
    assert shared.images == first.images / 2 and shared.samples == first.samples


def test_deeper_models_are_on_the_line_through_two_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job.Job(Path("nowhere"), Random(replace(SMALL, blocks=7), stands_in=False), 8, 8)
    plan = Planner(asked, SMALL, None)
    monkeypatch.setattr(plan, "_at", lambda _, blocks: {"draw": 5.0 + 3 * blocks, "decode": 4.0})
    assert plan.timed(rows()[0]) == {"draw": 26.0, "decode": 4.0}


# As people call it


def test_the_command_plans_and_refuses(warm: Path) -> None:
    words = ("benchmarks/paper.py", "--plan", *OPTIONS, "--blocks", "2", "--count", "1000")
    found = command(warm, *words, "--rows", "class/var-d30/w4a4/sas")
    assert found.returncode == 0, found.stderr
    assert "class/var-d30/w4a4/sas" in found.stdout and "GB at once" in found.stdout
    wrong = command(warm, "benchmarks/paper.py", "--rows", "main/d16/*")
    assert wrong.returncode == 2 and wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: rows 'main/d16/*': fits none of 113 rows")
    wrong = command(warm, "benchmarks/paper.py", "--blocks", "2")
    assert wrong.returncode == 2 and "for --plan and --dry-run" in wrong.stderr


@pytest.mark.slow
def test_processes_share_a_row(
    warm: Path, tmp_path: Path, ran: tuple[Path, list[dict[str, Any]]]
) -> None:
    # Images, and edits: what processes share otherwise is the same.
    shared = FEW[:2] + FEW[3:4]
    options = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = ("benchmarks/paper.py", "--dry-run", *OPTIONS, "--out", str(tmp_path))
    found = command(warm, *options, *words, "--rows", *shared)
    assert found.returncode == 0, found.stderr
    lines = read_lines("paper", tmp_path)
    alone = {line["row"]: line["values"] for line in ran[1]}
    assert [line["values"] for line in lines] == [alone[line["row"]] for line in lines]
    assert len(lines) == len(shared)
    assert {line["processes"] for line in lines} == {2}
    assert not list(tmp_path.rglob("work*"))


@pytest.mark.slow
def test_every_row_of_the_paper_runs(
    ran: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """On eight images each of VAR-d16 and Infinity-125M, cut to two narrow blocks."""
    lines = dry_run(shutil.copytree(ran[0], tmp_path / "copy"))
    assert {line["row"] for line in lines} == {row.key for row in rows()}
    assert all(line["settings"]["count"] in (8, [20, 8]) for line in lines)
