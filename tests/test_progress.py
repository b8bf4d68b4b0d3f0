"""Progress goes to stderr: a bar per stage on a terminal, two plain lines per stage elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from varptq.progress import Progress, RichProgress, pace, rough, silent


def run_stage(progress: Progress, stage: str, total: int) -> None:
    for done in range(total + 1):
        progress(stage, done, total)


def on_terminal() -> tuple[RichProgress, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, force_interactive=True, width=100)
    return RichProgress(console), screen


def plain_lines(*calls: tuple[str, int, int]) -> list[str]:
    log = io.StringIO()
    with RichProgress(Console(file=log, force_terminal=False, width=30)) as progress:
        for stage, done, total in calls:
            progress(stage, done, total)
    return log.getvalue().splitlines()


def test_silent_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run_stage(silent, "samples", 3)
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_a_stage_has_two_lines_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RichProgress() as progress:
        run_stage(progress, "samples", 130)
        run_stage(progress, "blocks[3] [bold]", 1)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["samples"] * 2 + ["blocks[3] [bold]"] * 2
    assert lines[0] == "samples: 130 steps"
    assert lines[1].startswith("samples: done in ")


def test_a_plain_line_is_never_wrapped() -> None:
    name = "a stage with a name longer than the console is wide"
    assert plain_lines((name, 0, 5)) == [f"{name}: 5 steps"]


def test_a_stage_that_does_not_end_has_no_last_line() -> None:
    assert plain_lines(("samples", 0, 3), ("samples", 1, 3)) == ["samples: 3 steps"]


def test_an_empty_stage_starts_and_ends_at_once() -> None:
    lines = plain_lines(("samples", 0, 0))
    assert lines[0] == "samples: 0 steps"
    assert lines[1].startswith("samples: done in ")
    assert len(lines) == 2


def test_a_repeated_last_call_prints_no_second_end() -> None:
    assert len(plain_lines(("samples", 0, 1), ("samples", 1, 1), ("samples", 1, 1))) == 2


def test_a_stage_may_run_again_and_resume_in_the_middle() -> None:
    lines = plain_lines(("samples", 0, 2), ("samples", 2, 2), ("samples", 1, 2), ("samples", 2, 2))
    starts = [line for line in lines if line.endswith("steps")]
    assert starts == ["samples: 2 steps", "samples: 1 steps"]
    assert len(lines) == 4


def test_the_pace_of_a_resumed_stage_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 110.0))
    monkeypatch.setattr("varptq.progress.time.monotonic", lambda: next(clock))
    lines = plain_lines(("samples", 980, 1000), ("samples", 1000, 1000))
    assert lines[1] == "samples: done in 10.0 s, 2.0/s"


def test_a_sign_of_life_says_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 400.0, 400.0, 400.0))
    monkeypatch.setattr("varptq.progress.time.monotonic", lambda: next(clock))
    lines = plain_lines(("reconstruct", 0, 51), ("reconstruct", 3, 51))
    assert lines[1] == "reconstruct: 3 of 51 after 300.0 s, 100.0 s each, about 80 min left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5400, "1.5 h")]
)
def test_times_to_come_are_rough(seconds: float, text: str) -> None:
    assert rough(seconds) == text


def test_a_terminal_shows_one_bar_per_stage() -> None:
    progress, screen = on_terminal()
    with progress:
        run_stage(progress, "samples", 3)
        run_stage(progress, "blocks[3] [bold]", 7)
        progress("blocks[3] [bold]", 7, 7, "loss 0.25")
    last_frame = screen.getvalue().rsplit("\x1b[2K", maxsplit=2)
    shown = "".join(last_frame[-2:])
    assert "samples" in shown and "3/3" in shown
    assert "blocks[3] [bold]" in shown and "7/7" in shown and "loss 0.25" in shown


def test_a_terminal_restarts_the_bar_of_a_repeated_stage() -> None:
    progress, screen = on_terminal()
    with progress:
        run_stage(progress, "samples", 3)
        progress("samples", 0, 3)
    last_line = screen.getvalue().rsplit("\x1b[2K", maxsplit=1)[-1]
    pace_of_the_first_run = "/s"
    assert "0/3" in last_line and pace_of_the_first_run not in last_line


def test_an_exception_leaves_the_terminal_usable() -> None:
    progress, screen = on_terminal()
    with pytest.raises(KeyboardInterrupt), progress:
        progress("samples", 1, 3)
        raise KeyboardInterrupt
    show_cursor = "\x1b[?25h"
    assert show_cursor in screen.getvalue()


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, ""), (12.34, "12.3/s"), (1.0, "1.0/s"), (0.25, "4.0 s each")]
)
def test_pace_is_readable(rate: float, text: str) -> None:
    assert pace(rate) == text
