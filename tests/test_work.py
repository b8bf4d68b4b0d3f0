"""Runs that are killed and go on: the same bytes, whatever was there; locks; what starts over."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.calibration_process import CONFIG, QUANT
from varptq.artifact import save
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.distributed import Ranks
from varptq.errors import ConfigError, OutputError
from varptq.models.pipeline import Pipeline
from varptq.progress import silent
from varptq.quant.pipeline import QuantizedPipeline
from varptq.work import Piece, Work

TESTS = Path(__file__).parent
PROCESS = TESTS / "helpers" / "calibration_process.py"
PATHS = f"{TESTS.parent / 'src'}:{TESTS}"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "PATH": "/usr/bin:/bin"}
# Of the tiny model: three batches of images, the set, theta twice, nine units.
PIECES = 3 + 1 + 2 + 9


class KilledError(BaseException):
    """What no handler of ours catches."""


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(pipe: Pipeline, work: Work | None = None, seed: int = 0) -> QuantizedPipeline:
    return quantize(pipe, QUANT, calibration=CONFIG, seed=seed, work=work)


@pytest.fixture(scope="module")
def whole(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of a run that nothing disturbed, without a folder."""
    folder = tmp_path_factory.mktemp("whole") / "artifact"
    save(run(tiny), folder)
    return content(folder)


@pytest.mark.slow
@pytest.mark.parametrize("after", [True, False])
def test_a_run_killed_at_any_piece_ends_in_the_same_bytes(
    tiny: Pipeline,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: bool,
) -> None:
    """One folder, killed at its first new piece again and again, before or after it is written:
    every attempt but the last dies, and each makes exactly one step."""
    write = Work.write

    def die(self: Work, name: str, piece: Piece) -> None:
        if after:
            write(self, name, piece)
            raise KilledError
        if len(made) == attempts:
            raise KilledError
        made.append(name)
        write(self, name, piece)

    made: list[str] = []
    attempts = 0
    while True:
        with monkeypatch.context() as patch, Work(tmp_path / "work") as work:
            patch.setattr(Work, "write", die)
            try:
                model = run(tiny, work)
                break
            except KilledError:
                attempts += 1
        assert attempts <= PIECES
    assert attempts == (PIECES if after else len(made))
    save(model, tmp_path / "artifact")
    assert content(tmp_path / "artifact") == whole


@pytest.mark.slow
def test_processes_killed_outright_go_on(
    whole: dict[str, bytes], tmp_path: Path, warm: Path
) -> None:
    """SIGKILL in real processes at random points, before the units and among them: six pieces come
    before the first unit."""
    points = torch.randint(2, 6, (3,), generator=torch.Generator().manual_seed(0)).tolist()
    for lines in [*points, None]:
        command = [str(warm / "python"), str(PROCESS), str(tmp_path / "artifact"), "0"]
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            if lines is None:
                process.communicate(timeout=120)
                assert process.returncode == 0
                continue
            for _ in range(lines):
                assert process.stdout.readline()
            process.kill()
            process.stdout.read()  # to its end, which is that of the process
    assert content(tmp_path / "artifact") == whole


@pytest.mark.slow
def test_damaged_pieces_are_made_again(
    tiny: Pipeline, whole: dict[str, bytes], tmp_path: Path
) -> None:
    with Work(tmp_path / "work") as work:
        run(tiny, work)
        pieces = sorted((tmp_path / "work").glob("*.safetensors"))
        assert len(pieces) == PIECES - 3  # the batches are used up
        for index, path in enumerate(pieces):
            path.write_bytes([b"", b"x" * 50, path.read_bytes()[:-7]][index % 3])
    with Work(tmp_path / "work") as work:
        save(run(tiny, work), tmp_path / "artifact")
    assert content(tmp_path / "artifact") == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": 1}, "was of seed 1, not 0"),
        (
            {"calibration": CONFIG.replace(steps=2)},
            "was of calibration {'steps': 2}, not {'steps': 3}",
        ),
        ({"method": "rtn+shift"}, "was of method 'rtn+shift', not 'sas'"),
    ],
)
def test_another_setting_starts_over_and_says_so(
    tiny: Pipeline, whole: dict[str, bytes], tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    said: list[str] = []

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        if stage == "work folder" and done:
            said.append(info)

    for options in (change, {}, {}):
        with Work(tmp_path / "work") as work:
            settings = {"calibration": CONFIG, "seed": 0, **options}
            model = quantize(tiny, QUANT, progress=listen, work=work, **settings)  # pyright: ignore
    folder = tmp_path / "work"
    assert said[0] == f"{folder}: new" and said[1] == f"{folder}: starts over, {reason}"
    assert said[2] == f"{folder}: continues, {PIECES - 3} pieces are finished"
    save(model, tmp_path / "artifact")
    assert content(tmp_path / "artifact") == whole


def test_other_weights_and_threads_start_over(
    make_tiny: Callable[..., Pipeline], tmp_path: Path
) -> None:
    """Told apart by the tensors, whatever the model calls itself."""
    for pipe, threads, pieces in ((0, 1, 0), (1, 1, 0), (1, 2, 0), (1, 2, 1)):
        torch.set_num_threads(threads)
        try:
            with Work(tmp_path / "work") as work:
                quantize(make_tiny(seed=pipe), QUANT, method="rtn", calibration=CONFIG, work=work)
                assert work.has("mark") == bool(pieces)
                work.write("mark", Piece())
        finally:
            torch.set_num_threads(1)


def test_a_second_process_is_refused(tmp_path: Path, warm: Path) -> None:
    with Work(tmp_path / "work") as work:
        work.begin({"a": 1}, silent)
        code = "import sys\nfrom varptq.work import Work\nWork(sys.argv[1]).__enter__()"
        command = [str(warm / "python"), "-c", code, str(tmp_path / "work")]
        ran = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert ran.returncode == 1
        with pytest.raises(OutputError, match=r"work: process \d+ is working there; wait for it"):
            Work(tmp_path / "work").__enter__()
    assert "OutputError" in ran.stderr
    Work(tmp_path / "work").__enter__().__exit__(None, None, None)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be made"):
        Work(tmp_path / "file" / "work").__enter__()


def test_several_processes_need_a_folder() -> None:
    with pytest.raises(ConfigError, match="none given to 2 processes"):
        Work(None, Ranks(0, 2))


def test_a_folder_where_nothing_was_begun_goes(tmp_path: Path) -> None:
    with Work(tmp_path / "a" / "work"):
        assert (tmp_path / "a" / "work").is_dir()
    assert not (tmp_path / "a" / "work").exists()


def test_efforts_are_presets() -> None:
    assert CalibrationConfig.preset("fast").rounding == "gptq"
