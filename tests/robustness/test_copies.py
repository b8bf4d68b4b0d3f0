"""A pipeline that is copied, sent to another process, or used by several threads at once draws the
same images. What a forked or spawned process draws is in test_fork.py."""

from __future__ import annotations

import copy
import os
import pickle
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

import varptq
from varptq import Pipeline, QuantConfig
from varptq.errors import ArtifactError
from varptq.models.generate import Output
from varptq.native import room

RUNTIMES = ("simulated", "reference", "cpu")
DRAWING = 2
SECONDS = 60
PICTURE = Image.new("RGB", (32, 32), "red")


@pytest.fixture(scope="module")
def pipes(
    make_tiny: Callable[..., Pipeline], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Pipeline]:
    folder = tmp_path_factory.mktemp("copies") / "artifact"
    model = make_tiny(depth=1)
    varptq.save(varptq.quantize(model, QuantConfig.preset("w4a4"), method="rtn"), folder)
    return {"float": model, **{name: varptq.load(folder, runtime=name) for name in RUNTIMES}}


def drawn(pipe: Pipeline, seed: int = 5) -> Output:
    return varptq.generate(pipe, [0, 3], seed=seed)


def same(one: Output, other: Output) -> bool:
    assert one.images is not None and other.images is not None
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.images, other.images)


def places(pipe: Pipeline) -> set[int]:
    state = (*pipe.var.state_dict().values(), *pipe.vae.state_dict().values())
    return {tensor.data_ptr() for tensor in state if tensor.numel()}


def test_a_deep_copy_draws_the_same_and_shares_nothing(
    pipes: dict[str, Pipeline], counted: Callable[[], None]
) -> None:
    for name, pipe in pipes.items():
        counted()
        expected, copied = drawn(pipe), copy.deepcopy(pipe)
        assert same(drawn(copied), expected), name
        assert not places(copied) & places(pipe), name
        for tensor in copied.var.state_dict().values():
            tensor.zero_()
        assert same(drawn(pipe), expected), name


def test_a_pickled_pipeline_draws_the_same(
    pipes: dict[str, Pipeline], counted: Callable[[], None]
) -> None:
    """As `multiprocessing` sends one. An edit also runs the image encoder, which an integer runtime
    leaves on the mapped file."""
    for name, pipe in pipes.items():
        counted()
        sent = pickle.loads(pickle.dumps(pipe))
        assert same(drawn(sent), drawn(pipe)), name
        edited = [varptq.edit(one, PICTURE, box=(0, 0, 0.5, 1)).tokens for one in (pipe, sent)]
        assert torch.equal(*edited), name


def test_a_copy_still_notices_that_its_file_has_changed(
    pipes: dict[str, Pipeline], tmp_path: Path
) -> None:
    """A shallow copy reads the same mapping; a deep one has its own tensors and goes on."""
    varptq.save(pipes["simulated"], tmp_path / "artifact")
    loaded = varptq.load(tmp_path / "artifact", runtime="cpu")
    deep = copy.deepcopy(loaded)
    (file,) = (tmp_path / "artifact").glob("*.safetensors")
    with file.open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ArtifactError, match="changed while"):
        varptq.edit(copy.copy(loaded), PICTURE, box=(0, 0, 0.5, 1))
    varptq.edit(deep, PICTURE, box=(0, 0, 0.5, 1))


@pytest.mark.slow
def test_threads_share_a_pipeline(pipes: dict[str, Pipeline], counted: Callable[[], None]) -> None:
    for name, pipe in pipes.items():
        counted()
        alone = [drawn(pipe, seed) for seed in range(DRAWING)]
        with ThreadPoolExecutor(DRAWING) as threads:
            together = list(threads.map(lambda seed, p=pipe: drawn(p, seed), range(DRAWING)))
        assert all(map(same, together, alone)), name


def in_child(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(SECONDS)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_large_maps_of_a_forked_child_are_its_own(counted: Callable[[], None]) -> None:
    """A decoder keeps the memory of its maps; a child that took it must not write its parent's."""
    kept, shape = room.Room(), (room.LEAST_BYTES,)
    kept.empty(shape).fill_(1)
    counted()
    assert in_child(lambda: kept.empty(shape).fill_(2)) == 0
    assert bool((kept.empty(shape) == 1).all())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_a_map_is_taken_leaves_no_lock_behind(counted: Callable[[], None]) -> None:
    counted()
    with room._lock:
        assert in_child(lambda: room.Room().empty((room.LEAST_BYTES,))) == 0
