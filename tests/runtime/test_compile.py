"""`torch.compile(pipe.var, fullgraph=True)`: one graph, the logits of the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import varptq
from varptq import Pipeline, QuantConfig
from varptq.models.scales import Scales
from varptq.native import binding
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime import compiled as operators
from varptq.runtime.convert import on_integers
from varptq.runtime.cpu import NativeKernels

# Codebooks, centred and rotated inputs; uniform steps in groups, signs apart, shift-and-sum.
CONFIGS = {"w4a4": "rtn", "w4a4+groups": "sas"}
# Of float sums that inductor adds in another order, in units of the largest logit.
INDUCTOR_ERROR = 1e-4
CHECKS = ("test_schema", "test_faketensor")
native = pytest.mark.skipif(binding.core() is None, reason=binding.reason())


@pytest.fixture(autouse=True)
def _no_graphs_kept() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def model(make_tiny: Callable[..., Pipeline]) -> Pipeline:
    return make_tiny(depth=1, scales=Scales((1, 2)))


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, model: Pipeline) -> QuantizedPipeline:
    calibration = varptq.CalibrationConfig(num_samples=2, steps=2, tune_steps=1)
    config = QuantConfig.preset(request.param)
    return varptq.quantize(model, config, method=CONFIGS[request.param], calibration=calibration)


def inputs(pipe: Pipeline, count: int) -> tuple[Tensor, Tensor]:
    labels = torch.arange(count)
    tokens = varptq.generate(pipe, labels.tolist(), seed=5, decode=False).tokens
    return labels, pipe.vae.teacher_inputs(tokens)


def check(
    pipe: Pipeline, backend: str, largest_error: float = 0.0, counts: tuple[int, ...] = (2,)
) -> None:
    """A second batch size compiles for sizes that are not known."""
    graph: Any = torch.compile(pipe.var, fullgraph=True, backend=backend)
    for count in counts:
        given = inputs(pipe, count)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found, expected = graph(*given), pipe.var(*given)
        assert found.dtype == expected.dtype == torch.float32
        error = float((found - expected).abs().max())
        assert error <= largest_error * float(expected.abs().max()), pipe.name


@pytest.mark.slow
def test_the_float_model_is_one_graph(model: Pipeline) -> None:
    check(model, "eager")


@pytest.mark.slow
def test_a_simulated_model_is_one_graph_and_refuses_what_is_not_finite(model: Pipeline) -> None:
    pipe = varptq.quantize(model, QuantConfig.preset("w8a8+paper"), method="rtn")
    check(pipe, "eager")
    labels, given = inputs(pipe, 2)
    graph: Any = torch.compile(pipe.var, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer word_embed: input holds NaN"):
        graph(labels, given.fill_(torch.nan))


@pytest.mark.slow
def test_each_kind_of_simulated_model_is_one_graph(made: QuantizedPipeline) -> None:
    check(made, "eager")


@pytest.mark.slow
@native
def test_the_cpu_runtime_is_one_graph(made: QuantizedPipeline) -> None:
    """Backend "aot_eager" runs the fakes, too, those of sizes that are not known among them."""
    check(on_integers(made, NativeKernels()), "aot_eager", counts=(2, 3))


@pytest.mark.slow
@native
def test_a_fake_tells_what_its_operator_gives(made: QuantizedPipeline) -> None:
    """torch's own check of an operator, on two calls of each."""
    pipe = on_integers(made, NativeKernels())
    calls: dict[str, list[Any]] = {name: [] for name in ("quantize", "linear", "attend")}

    def seen(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        class Recorded(torch.fx.Interpreter):
            def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
                _, _, name = str(target).partition("varptq.")
                if name in calls:
                    calls[name].append(args)
                return super().call_function(target, args, kwargs)

        return Recorded(graph).run

    given = inputs(pipe, 2)
    with torch.no_grad():
        torch.compile(pipe.var, fullgraph=True, backend=seen)(*given)
    for name, found in calls.items():
        operator = getattr(operators, f"_{name}")
        for arguments in (found[0], found[-1]):
            torch.library.opcheck(operator, arguments, test_utils=CHECKS)


@pytest.mark.slow
def test_inductor(make_tiny: Callable[..., Pipeline]) -> None:
    """Of the model on integers, in whose graph our operators stand among torch's; of the float one
    where there is no core."""
    pipe: Pipeline = make_tiny(depth=1, scales=Scales((2,)))
    if binding.core():
        made = varptq.quantize(pipe, QuantConfig.preset("w8a8"), method="rtn")
        pipe = on_integers(made, NativeKernels())
    check(pipe, "inductor", INDUCTOR_ERROR)
