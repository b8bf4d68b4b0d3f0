"""Integer runtimes against the simulated path and each other: layers, whole models, batches."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import varptq
from varptq import QuantConfig, artifact, generate
from varptq.calibrate.config import CalibrationConfig
from varptq.errors import InputError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import GatedSum, TokenLinear, spans_of
from varptq.native import binding
from varptq.quant.find import quant_linears
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import on_integers
from varptq.runtime.cpu import NativeKernels, cpu_kernels
from varptq.runtime.cpu_torch import TorchKernels
from varptq.runtime.kernels import InputRule, Kernels, Weight
from varptq.runtime.layers import GatedSumInPlace, IntLinear
from varptq.runtime.reference import ReferenceKernels

BOOKS = ("w4a4", "w2a8", "w3a5+proj8")
PRESETS = (
    *("w8a8", "w6a6", "w4a8", "w3a8", "w2a8", "w4a4", "best", "bops1"),
    *("w4a8+groups", "w4a4+groups", "w4a4+groups+qk6+v6+g32", "w4a4+groups+segment"),
)
# A sum of a few hundred float32 terms in another order.
ROUNDING = 2e-5
ALL_ROWS = slice(None)
native = pytest.mark.skipif(binding.core() is None, reason=f"no native core: {binding.reason()}")
KERNELS = [
    pytest.param(ReferenceKernels, id="reference"),
    pytest.param(TorchKernels, id="torch"),
    pytest.param(NativeKernels, id="native", marks=[native, pytest.mark.native]),
]
# The same without marks, for a test that quantizes once for all of them.
MADE_HERE = (ReferenceKernels, TorchKernels, *((NativeKernels,) if binding.core() else ()))
Make = Callable[[], Kernels]


def quantized(pipe: Pipeline, preset: str, method: str = "rtn") -> QuantizedPipeline:
    calibration = CalibrationConfig(num_samples=2, theta_samples=2, steps=0)
    return varptq.quantize(pipe, QuantConfig.preset(preset), method=method, calibration=calibration)


def inputs_of(pipe: Pipeline, width: int, tokens: bool) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    shape = (3, pipe.scales.num_tokens, width) if tokens else (3, width)
    x = torch.randn(shape, generator=generator)
    # One channel far out and rows of one sign, as activations have.
    x[..., 0] += 5.0
    x[0] = x[0].abs()
    return x


def compare_layers(pipe: QuantizedPipeline, kernels: Kernels, rows: slice = ALL_ROWS) -> None:
    """Equal inputs give equal codes and integers, so outputs differ by float rounding alone."""
    integers = on_integers(pipe, kernels)
    compared = 0
    for name, layer in quant_linears(pipe.var).items():
        other = integers.var.get_submodule(name)
        assert isinstance(other, IntLinear)
        if name.endswith("fc2"):  # takes the GELU with it, whose rounding may move a code
            continue
        sees_tokens = len(layer.means) > 1 if layer.centred else True
        spans = spans_of(pipe.scales) if sees_tokens else None
        x = inputs_of(pipe, layer.in_features, sees_tokens)[rows]
        expected, found = layer(x, spans), other(x, spans)
        tolerance = ROUNDING * float(expected.abs().max())
        assert_close = torch.testing.assert_close
        where = f"{name} on {type(kernels).__name__}"
        assert_close(
            found, expected, rtol=0, atol=tolerance, msg=lambda text, at=where: f"{at}: {text}"
        )
        compared += 1
    assert compared >= 3 * pipe.var.arch.depth + 2


def compare_logits(pipe: QuantizedPipeline, kernels: Kernels, labels: Tensor) -> None:
    """Teacher-forced logits of these kernels and of the reference, and what a code that flips at
    a float's last bit may move."""
    shape = (len(labels), pipe.scales.num_tokens)
    ids = torch.randint(32, shape, generator=torch.Generator().manual_seed(0))
    inputs = pipe.vae.teacher_inputs(ids)
    reference = on_integers(pipe, ReferenceKernels()).var(labels, inputs)
    spread = (on_integers(pipe, kernels).var(labels, inputs) - reference).abs()
    assert spread.median() < 1e-4 * reference.abs().max()
    assert spread.max() < 0.15 * reference.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_layer_by_layer(preset: str, any_tiny: Pipeline) -> None:
    pipe = quantized(any_tiny, preset)
    for make in MADE_HERE:
        compare_layers(pipe, make())


@pytest.mark.slow
@pytest.mark.parametrize("preset", BOOKS)
def test_codebooks_on_triton(preset: str, make_tiny: Callable[..., Pipeline]) -> None:
    """Layer by layer and, with attention, as a whole; interpreted, so on few tokens."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from varptq.runtime.cuda.kernels import CudaKernels

    pipe = quantized(make_tiny(depth=1, scales=Scales((1, 2))), preset)
    compare_layers(pipe, CudaKernels(), slice(2, 3))
    compare_logits(pipe, CudaKernels(), torch.tensor([4]))


@pytest.mark.slow
@native
@pytest.mark.native
@pytest.mark.parametrize("preset", PRESETS)
def test_two_runtimes_one_function(preset: str, tiny: Pipeline) -> None:
    pipe = quantized(tiny, preset, "rtn+shift" if preset == "w4a4+groups" else "rtn")
    compare_logits(pipe, NativeKernels(), torch.tensor([0, 4, 5]))


class Demo:
    """The demo model, images of it, and what it is quantized to: each preset once."""

    def __init__(self) -> None:
        self.pipe = varptq.load_model("demo")
        self.labels = torch.arange(2)
        self.ids = generate(self.pipe, self.labels, seed=5, decode=False).tokens
        self._made: dict[str, tuple[QuantizedPipeline, float]] = {}

    def kl(self, pipe: Pipeline) -> float:
        return token_fidelity(self.pipe, pipe, self.labels, self.ids).kl

    def simulated(self, preset: str) -> tuple[QuantizedPipeline, float]:
        """The quantized model and its KL to the float one."""
        if preset not in self._made:
            plain = quantized(self.pipe, preset)
            self._made[preset] = plain, self.kl(plain)
        return self._made[preset]


@pytest.mark.parametrize("make", KERNELS)
def test_keys_may_have_a_bias(make: Make, tiny: Pipeline) -> None:
    """VAR's have none, but a model whose inputs were moved has (`folds.shift_input`)."""
    moved = dataclasses.replace(tiny, var=copy.deepcopy(tiny.var))
    for block in moved.var.blocks:
        block.attn.zero_k_bias.normal_(generator=torch.Generator().manual_seed(0)).mul_(3)
    pipe = quantized(moved, "w8a8")
    labels = torch.tensor([0, 3])
    inputs = pipe.vae.teacher_inputs(generate(moved, labels, seed=1, decode=False).tokens)
    found = on_integers(pipe, make()).var(labels, inputs)
    expected, without = pipe.var(labels, inputs), quantized(tiny, "w8a8").var(labels, inputs)
    error = (found - expected).abs().median()
    assert error < 1e-3 * (without - expected).abs().median()


@pytest.fixture(scope="module")
def demo() -> Demo:
    return Demo()


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "best"])
def test_as_near_to_float_as_simulated(preset: str, make: Make, demo: Demo) -> None:
    """The same KL to the float model as the simulated path, within what another order of its float
    sums changes."""
    plain, simulated = demo.simulated(preset)
    found = demo.kl(on_integers(plain, make()))
    assert abs(found - simulated) < 0.15 * simulated


@pytest.mark.parametrize("make", [KERNELS[0], KERNELS[2]])
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
@pytest.mark.slow
def test_an_image_does_not_depend_on_its_batch(
    preset: str, make: Make, make_tiny: Callable[..., Pipeline]
) -> None:
    """Tokens of image (seed, i) for every batch size, split and number of threads."""
    pairs = [(1, 1), (1, 4), (2, 2), (2, 8), (3, 5)]
    if make is NativeKernels:  # which shares out rows by both
        pairs += [(1, 8), (2, 1), (2, 5), (3, 1), (3, 4)]
    pipe = on_integers(quantized(make_tiny(depth=1), preset), make())
    labels = [0, 1, 2, 3, 4, 0, 1, 2, 3]
    expected = generate(pipe, labels, seed=3, batch_size=9, decode=False).tokens
    before = torch.get_num_threads()
    try:
        for threads, batch in pairs:
            torch.set_num_threads(threads)
            found = generate(pipe, labels, seed=3, batch_size=batch, decode=False).tokens
            assert torch.equal(found, expected), (threads, batch)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            last = generate(pipe, labels[6:], seed=3, first_index=6, decode=False).tokens
            assert torch.equal(last, expected[6:])
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.native
@pytest.mark.xdist_group("demo")
def test_batches_of_the_demo_model(demo: Demo) -> None:
    pipe = on_integers(demo.simulated("w4a4")[0], NativeKernels())
    labels = [3, 1, 4, 1, 5, 9, 2]
    expected = generate(pipe, labels, seed=1, batch_size=7, decode=False).tokens
    for batch in (1, 3):
        assert torch.equal(
            generate(pipe, labels, seed=1, batch_size=batch, decode=False).tokens, expected
        )


@pytest.mark.slow
@pytest.mark.parametrize("make", KERNELS[1:])
def test_the_same_tokens_are_the_same_image(make: Make, make_tiny: Callable[..., Pipeline]) -> None:
    """From token map to pixels, to the bit: codes of the decoder follow last bits of its input."""
    plain = quantized(make_tiny(depth=1, scales=Scales((1, 3, 7))), "w8a8")
    reference = on_integers(plain, ReferenceKernels())
    drawn = generate(reference, [0, 1, 2, 3], seed=0)
    found = generate(on_integers(plain, make()), [0, 1, 2, 3], forced=drawn.tokens)
    assert found.images is not None and drawn.images is not None
    assert torch.equal(found.images, drawn.images)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "words"),
    [("w8a8+paper", "policy"), ("w4a4+renorm", "renormal"), ("w4a4+paper", "policy")],
)
def test_what_the_cpu_lacks_is_refused_by_name(
    preset: str, words: str, tiny: Pipeline, tmp_path: Path
) -> None:
    saved = artifact.save(quantized(tiny, preset), tmp_path / "model")
    with pytest.raises(InputError, match=f"runtime 'cpu': layer .*{words}"):
        varptq.load(saved, runtime="cpu")
    assert varptq.load(saved, runtime="reference").runtime == "reference"
    assert varptq.load(saved, runtime="simulated").runtime == "simulated"


@pytest.mark.slow
def test_without_the_native_core(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything still runs, on torch's integer products, and says that it is slow."""
    saved = artifact.save(quantized(tiny, "w4a4"), tmp_path / "model")
    monkeypatch.setattr(binding, "core", lambda: None)
    monkeypatch.setattr(binding, "reason", lambda: "deleted")
    with pytest.warns(UserWarning, match="slow path: deleted"):
        pipe = varptq.load(saved, runtime="cpu")
    assert pipe.runtime == "cpu"
    tokens = generate(pipe, [1, 2], seed=0).tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(cpu_kernels(), TorchKernels)
    assert torch.equal(generate(pipe, [1], seed=0).tokens, tokens[:1])


@pytest.mark.parametrize("sides", [(1, 3), (1, 2, 3, 5)])
@native
@pytest.mark.native
def test_odd_token_maps(sides: tuple[int, ...], make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny(scales=Scales(sides))
    plain = quantized(pipe, "w8a8")
    ids = generate(pipe, [0, 1, 2], seed=0, decode=False).tokens
    inputs = pipe.vae.teacher_inputs(ids)
    labels = torch.tensor([0, 1, 2])
    expected = plain.var(labels, inputs)
    found = on_integers(plain, NativeKernels()).var(labels, inputs)
    assert (found - expected).abs().median() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("inputs", [1, 2, 3, 64, 130])
def test_products_of_torch_are_exact_at_every_width(inputs: int) -> None:
    rule = InputRule("", inputs, "affine", 8, "with_zero", None, None, True, None)
    g = torch.Generator().manual_seed(inputs)
    codes = torch.randint(256, (37, inputs), generator=g).to(torch.uint8)
    weight = Weight(codes, torch.ones(37, 1), torch.full((37, 1), 3.0), 8)
    x = torch.randn(1, 5, inputs, generator=g)
    found = [
        kernels.linear(
            kernels.quantize(x, rule, None, None), kernels.pack(weight, rule), None, None
        )
        for kernels in (ReferenceKernels(), TorchKernels())
    ]
    assert torch.equal(*found)


def test_what_a_branch_adds_takes_its_place() -> None:
    """The same bits as in float, in the memory of the branch; x stays."""
    g = torch.Generator().manual_seed(0)
    x_BLC, branch_BLC, gamma_B1C = (torch.randn(2, n, 7, generator=g) for n in (3, 3, 1))
    before = x_BLC.clone()
    for gamma in (gamma_B1C, None):
        own = branch_BLC.clone()
        found = GatedSumInPlace()(x_BLC, own, gamma)
        assert torch.equal(found, GatedSum()(x_BLC, branch_BLC, gamma))
        assert found.data_ptr() == own.data_ptr() and torch.equal(x_BLC, before)
    half = branch_BLC.bfloat16()
    assert torch.equal(GatedSumInPlace()(x_BLC, half), x_BLC + half)


def test_seams_are_all_replaced(tiny: Pipeline) -> None:
    """No simulated or float Linear is left where the config asks for codes."""
    pipe = on_integers(quantized(tiny, "w8a8"), ReferenceKernels())
    assert not quant_linears(pipe.var)
    assert not [m for m in pipe.var.modules() if isinstance(m, TokenLinear)]
