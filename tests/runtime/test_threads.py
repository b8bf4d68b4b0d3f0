"""Numbers of threads that make no sense: refused where one names them, cut to the cores below."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.cli_calls import run
from varptq.cli.common import usable_cores
from varptq.native import binding
from varptq.native.linear import linear, pack
from varptq.native.quantize import quantize


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_the_command_line_refuses_what_is_no_number_of_threads(count: str) -> None:
    ran = run("--threads", count, "info", "demo")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1 and "--threads" in ran.err


@pytest.mark.parametrize("count", [1, usable_cores(), 4096])
def test_more_threads_than_cores_are_as_many_as_cores(count: int) -> None:
    document = json.loads(run("--threads", count, "info", "--runtime", "--json").out)
    assert document["threads"] == min(count, usable_cores())


def test_torch_refuses_no_threads() -> None:
    with pytest.raises(RuntimeError, match="positive"):
        torch.set_num_threads(0)


@pytest.mark.native
@pytest.mark.skipif(binding.core() is None, reason=binding.reason())
def test_the_native_core_takes_no_more_than_there_are_cores() -> None:
    assert binding.usable_threads(1) == 1
    assert binding.usable_threads(4096) == binding.usable_threads(usable_cores()) <= usable_cores()
    # A number it is never given by torch.
    assert binding.usable_threads(0) == binding.usable_threads(-3) == 1
    g = torch.Generator().manual_seed(0)
    weight = pack(
        torch.randint(0, 256, (130, 192), generator=g, dtype=torch.uint8),
        *(torch.ones(130, 1), torch.zeros(130, 1)),
        num_bits=8,
    )
    x = torch.randn(37, 192, generator=g)
    torch.set_num_threads(1)
    expected = linear(quantize(x, num_bits=8), weight)
    torch.set_num_threads(300)
    assert torch.equal(linear(quantize(x, num_bits=8), weight), expected)


@pytest.mark.native
@pytest.mark.skipif(
    binding.core() is None or not hasattr(os, "sched_setaffinity"), reason="no affinity to set"
)
def test_cores_taken_from_the_process_are_not_counted(warm: Path) -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from varptq.native import binding; print(binding.usable_threads(8))"
    )
    done = subprocess.run([str(warm / "python"), "-c", program], capture_output=True, check=True)
    assert done.stdout.strip() == b"1"
