"""Runtime cuda on tensors that stay: the same images, and on a GPU the graphs themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import varptq
from helpers.tape import Again, Watched
from varptq import QuantConfig
from varptq.models.generate import generate
from varptq.models.graphs import Graphs
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import on_integers
from varptq.runtime.cuda.kernels import CudaKernels, ints

MakeTiny = Callable[..., Pipeline]
LABELS = [0, 3]
GUIDED = {"cfg": [1.0, 2.0], "guided_scales": 1}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def made(make_tiny: MakeTiny, config: str, device: str) -> QuantizedPipeline:
    """One block, two scales; segments and orders where the config has them."""
    tiny = make_tiny(depth=1, scales=Scales((1, 2)))
    method = "sas" if "segment" in config else "rtn"
    calibration = varptq.CalibrationConfig(num_samples=2, steps=1, tune_steps=0)
    quantized = varptq.quantize(
        tiny, QuantConfig.preset(config), method=method, calibration=calibration
    )
    return on_integers(quantized, CudaKernels()).to(device=device)


@pytest.mark.slow
def test_images_are_the_same(make_tiny: MakeTiny, device: str) -> None:
    """Nor does what is recorded wait for a number."""
    pipe = made(make_tiny, "w4a4+groups+segment", device)
    recorders: list[Again] = []

    def make(where: torch.device) -> Again:
        recorders.append(Watched(where))
        return recorders[-1]

    pipe.graphs = Graphs(make)
    expected = generate(pipe, LABELS[:1], seed=1, decode=False, **GUIDED).tokens
    for _ in range(2):
        found = generate(pipe, LABELS[:1], seed=1, decode=False, cuda_graphs=True, **GUIDED).tokens
        assert torch.equal(found, expected)
    # All rows at the first scale, the asked ones at the second, and the condition of either.
    assert (recorders[0].recorded, recorders[0].runs) == (4, 8)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("config", [None, "w8a8", "w4a4", "w4a4+groups+segment"])
def test_graphs_give_the_same_images(make_tiny: MakeTiny, config: str | None, device: str) -> None:
    if config is None:
        pipe: Pipeline = make_tiny().to(device=device)
        guided = {"cfg": [1.0, 1.5, 2.0], "guided_scales": 2}
    else:
        pipe, guided = made(make_tiny, config, device), GUIDED
    for options in ({}, guided, {"cfg": 0.0}, {}):
        for seed in (1, 2):
            plain, fast = (
                generate(pipe, LABELS, seed=seed, cuda_graphs=graphs, **options).tokens
                for graphs in (False, True)
            )
            assert torch.equal(plain, fast)


def test_numbers_come_to_the_device_once(device: str) -> None:
    assert ints((3, 5), torch.device(device)) is ints((3, 5), torch.device(device))
    assert ints((3, 5), torch.device(device)).tolist() == [3, 5]
