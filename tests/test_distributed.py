"""Several processes: how work is dealt, and real torchrun jobs that end in the same bytes."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import varptq
from helpers.calibration_process import CONFIG, QUANT
from helpers.cli_calls import succeed
from helpers.evaluation_process import document
from varptq.artifact import save
from varptq.calibrate.quantize import quantize
from varptq.distributed import Ranks, local_device
from varptq.evaluate.sampling import SampleSet, sample_set
from varptq.models.pipeline import Pipeline
from varptq.work import Piece, Work

TESTS = Path(__file__).parent
PROCESS = TESTS / "helpers" / "calibration_process.py"
EVALUATION = TESTS / "helpers" / "evaluation_process.py"
PATHS = f"{TESTS.parent / 'src'}:{TESTS}"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "PATH": "/usr/bin:/bin"}


@given(st.lists(st.integers(1, 50), max_size=9), st.integers(1, 5))
def test_shares_are_disjoint_whole_and_even(costs: list[int], size: int) -> None:
    named = {f"unit {index}": float(cost) for index, cost in enumerate(costs)}
    shares = [Ranks(rank, size).share_by_cost(named) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(named)
    assert all(share == [name for name in named if name in share] for share in shares)
    longest = max(sum(named[name] for name in share) for share in shares)
    # Graham's bound for any list schedule, with the two lower bounds of the best one.
    assert longest <= sum(costs) / size + max(costs, default=0)
    even = [Ranks(rank, size).share(list(named)) for rank in range(size)]
    assert sorted(name for share in even for name in share) == sorted(named)
    assert max(map(len, even)) - min(map(len, even)) <= 1


def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [local_device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda", "cuda:3"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [local_device(name) for name in ("cpu", "cuda", "cuda:3")] == ["cpu", "cuda:2", "cuda:3"]


def test_one_process_is_alone() -> None:
    assert Ranks.from_environment() == Ranks(0, 1)
    Ranks().barrier()


@pytest.mark.parametrize("size", [2, 3])
def test_shards_of_samples_are_those_of_one_process(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Each process makes its share; together they make the folder one would."""
    one = sample_set(tiny, tmp_path / "one", count=11, shard_size=3)
    meeting = threading.Barrier(size)
    monkeypatch.setattr(Ranks, "barrier", lambda self: self.size > 1 and meeting.wait(60))

    def make(rank: int) -> SampleSet:
        several = tmp_path / "several"
        return sample_set(tiny, several, count=11, shard_size=3, ranks=Ranks(rank, size))

    with ThreadPoolExecutor(size) as threads:
        made = list(threads.map(make, range(size)))
    assert [samples.sha256() for samples in made] == [one.sha256()] * size
    for path in one.folder.iterdir():
        assert (tmp_path / "several" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_measured_parts_add_up_to_the_same_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Every metric, of two sets of samples and real images: all processes return the bytes that one
    without a folder does, and each has measured something."""
    (tmp_path / "one").mkdir()
    alone = document(tmp_path / "one", Ranks(), Work())
    assert set(json.loads(alone)["metrics"]) >= {"kl", "psnr", "fid2fp", "fid", "is", "recall"}
    meeting = threading.Barrier(size)
    monkeypatch.setattr(Ranks, "barrier", lambda self: self.size > 1 and meeting.wait(60))
    writers: dict[str, set[int]] = {}

    class Listening(Work):
        def write(self, name: str, piece: Piece) -> None:
            super().write(name, piece)
            writers.setdefault(name.rstrip("0123456789"), set()).add(self.ranks.rank)

    def make(rank: int) -> str:
        torch.set_num_threads(1)
        ranks = Ranks(rank, size)
        with Listening(tmp_path / "several" / "work", ranks) as work:
            return document(tmp_path / "several", ranks, work)

    with ThreadPoolExecutor(size) as threads:
        made = list(threads.map(make, range(size)))
    assert made == [alone] * size
    shared = {name: ranks for name, ranks in writers.items() if name.endswith("-")}
    assert len(shared) == 5  # tokens, images, and the features of three sets
    assert all(ranks == set(range(size)) for ranks in shared.values())


@pytest.fixture
def torchrun(warm: Path) -> Callable[..., str]:
    """`torchrun`, and the processes that it starts, from a Python that has torch imported."""
    python = str(warm / "python")

    def run(processes: int, *words: object, restarts: int = 0) -> str:
        options = ("--standalone", f"--nproc-per-node={processes}", f"--max-restarts={restarts}")
        ran = subprocess.run(
            [python, "-m", "torch.distributed.run", *options, *map(str, words)],
            env={**ENVIRONMENT, "PYTHON_EXEC": python},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr[-2000:]
        return ran.stdout

    return run


@pytest.mark.slow
def test_any_number_of_processes_and_deaths_give_the_same_bytes(
    tiny: Pipeline, tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    save(quantize(tiny, QUANT, calibration=CONFIG, seed=0), tmp_path / "alone")
    for processes, die in ((1, ()), (2, ("--die",)), (3, ())):
        out = tmp_path / f"with-{processes}" / "artifact"
        out.parent.mkdir()
        said = torchrun(processes, PROCESS, out, 0, *die, restarts=1)
        for path in (tmp_path / "alone").iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), (processes, path.name)
        written = [line.split("wrote ")[1] for line in said.splitlines() if "wrote" in line]
        # What was finished before the death is not made again.
        assert len(written) == len(set(written)), written
        ranks = {line.split()[1] for line in said.splitlines() if "wrote unit" in line}
        assert ranks == {str(rank) for rank in range(processes)}


@pytest.mark.slow
def test_evaluation_by_any_number_of_processes_and_deaths(
    tmp_path: Path, torchrun: Callable[..., str]
) -> None:
    """Shards and documents are those of this process alone, byte for byte; what was finished before
    a death is not redone."""
    alone = tmp_path / "1" / "out"
    alone.mkdir(parents=True)
    expected = document(alone, Ranks(), Work()).encode()
    for processes, deaths in ((2, 2), (3, 0)):
        folder = tmp_path / str(processes) / "out"
        folder.mkdir(parents=True)
        said = torchrun(processes, EVALUATION, folder, *["--die"] * bool(deaths), restarts=deaths)
        written = [line.split("wrote ")[1] for line in said.splitlines() if "wrote" in line]
        assert len(written) == len(set(written)), written
        assert not (folder / "work").exists()
        shards = sorted(path.relative_to(folder) for path in folder.rglob("*.npz"))
        assert len(shards) == 2 * 12
        for shard in shards:
            assert (folder / shard).read_bytes() == (alone / shard).read_bytes()
        documents = [path.read_bytes() for path in folder.glob("document-*.json")]
        assert documents == [expected] * processes


@pytest.mark.slow
def test_the_command_line_under_torchrun(tmp_path: Path, torchrun: Callable[..., str]) -> None:
    """quantize and evaluate of the demo model by two processes, against this one alone."""
    quick = ("--samples", 2, "--steps", 1, "--config", "w4a4+paper", "--method", "brecq")
    measured = ("--count", 4, "--seed", 1, "--metrics", "kl,top1,psnr,ssim,token_agreement")
    for processes in (1, 2):
        out, results = tmp_path / f"with-{processes}", tmp_path / f"results-{processes}"
        for words in (
            ("quantize", "demo", *quick, "--out", out),
            ("evaluate", out, *measured, "--out", results),
        ):
            if processes == 1:
                succeed(*words)
            else:
                torchrun(processes, "-m", "varptq", *words)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "with-1" / name).read_bytes() == (
            tmp_path / "with-2" / name
        ).read_bytes()
    left = [path.name for path in tmp_path.iterdir()]
    assert sorted(left) == ["results-1", "results-2", "with-1", "with-2"]
    first, second = (tmp_path / f"results-{n}" / "metrics.json" for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    assert varptq.load(tmp_path / "with-2", runtime="simulated").name == "demo"
