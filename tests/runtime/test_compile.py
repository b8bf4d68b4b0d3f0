"""`torch.compile(pipe.var, fullgraph=True)`: one graph, the logits of the model itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import varptq
from helpers.infinity_states import VAE_ARCH, prompts, sized, states
from varptq import Pipeline, QuantConfig
from varptq.models.infinity.family import INFINITY_FAMILY
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
# Tokens of texts: two of one length, which are read together.
LENGTHS = (3, 2, 3)
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


@pytest.fixture(scope="module")
def text_model() -> Pipeline:
    """Width 128, on which the codes of integers apply."""
    arch = sized(depth=1, width=128, ffn_width=128, scales=Scales(((1, 1), (2, 2)), (6, 4)))
    networks = INFINITY_FAMILY.build(arch, VAE_ARCH)
    for network, state in zip(networks, states(arch), strict=True):
        network.load_state_dict(state, assign=True)
        network.eval().requires_grad_(False)
    return Pipeline(*networks, "tiny-text", family="infinity")


def of_texts(model: Pipeline, config: str) -> QuantizedPipeline:
    calibration = varptq.CalibrationConfig(num_samples=2)
    asked: dict[str, Any] = {"prompts": prompts(3, 2), "calibration": calibration}
    return varptq.quantize(model, QuantConfig.preset(config), method="rtn", **asked)


def inputs(pipe: Pipeline, count: int) -> tuple[Any, Tensor]:
    texts = pipe.var.READS_TEXTS
    asked: Any = prompts(*LENGTHS[:count]) if texts else torch.arange(count)
    given = asked if texts else asked.tolist()
    tokens = varptq.generate(pipe, given, seed=5, decode=False).tokens
    return asked, pipe.vae.teacher_inputs(tokens)


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
    check_operators(on_integers(made, NativeKernels()), ("quantize", "linear", "attend"))


def check_operators(pipe: Pipeline, names: tuple[str, ...]) -> None:
    """The logits of the graph, and torch's own check of an operator, on two calls of each."""
    calls: dict[str, list[Any]] = {name: [] for name in names}

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
        found: Any = torch.compile(pipe.var, fullgraph=True, backend=seen)(*given)
        assert torch.equal(found, pipe.var(*given))
    for name, arguments in calls.items():
        operator = getattr(operators, f"_{name}")
        for one in (arguments[0], arguments[-1]):
            torch.library.opcheck(operator, one, test_utils=CHECKS)


@pytest.mark.slow
def test_a_model_that_reads_texts_is_one_graph(text_model: Pipeline) -> None:
    """Texts of one length, then of two, which makes another graph."""
    check(text_model, "eager", counts=(1, 3))


@pytest.mark.slow
def test_a_simulated_model_that_reads_texts_is_one_graph(text_model: Pipeline) -> None:
    check(of_texts(text_model, "w8a8+paper"), "eager")


@native
def test_the_cpu_runtime_reads_texts_in_one_graph(text_model: Pipeline) -> None:
    pipe = on_integers(of_texts(text_model, "w8a8"), NativeKernels())
    check_operators(pipe, ("answer",))


@native
@pytest.mark.slow
def test_the_cpu_runtime_reads_texts_with_shapes_alone(text_model: Pipeline) -> None:
    check(on_integers(of_texts(text_model, "w4a4"), NativeKernels()), "aot_eager", counts=(3,))


@pytest.mark.slow
def test_inductor(make_tiny: Callable[..., Pipeline]) -> None:
    """Of the model on integers, in whose graph our operators stand among torch's; of the float one
    where there is no core."""
    pipe: Pipeline = make_tiny(depth=1, scales=Scales((2,)))
    if binding.core():
        made = varptq.quantize(pipe, QuantConfig.preset("w8a8"), method="rtn")
        pipe = on_integers(made, NativeKernels())
    check(pipe, "inductor", INDUCTOR_ERROR)
