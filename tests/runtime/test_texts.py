"""Models that read texts on integers: rotary positions, cross-attention over texts of many lengths,
a norm with a gain. Against the simulated path, and image by image against every batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import varptq
from helpers.infinity_states import ARCH, PRESET, prompts
from varptq import QuantConfig, generate
from varptq.errors import InputError, NonFiniteError
from varptq.evaluate.tokens import token_fidelity
from varptq.models.pipeline import Pipeline
from varptq.models.presets import PRESETS
from varptq.models.scales import Scales
from varptq.models.seams import TokenLinear, spans_of
from varptq.native import binding
from varptq.quant.config import LayerRule
from varptq.quant.convert import convert
from varptq.quant.find import quant_linears, set_theta
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime.convert import on_integers, refusal
from varptq.runtime.cpu import NativeKernels
from varptq.runtime.cpu_torch import TorchKernels
from varptq.runtime.kernels import Kernels
from varptq.runtime.layers import DeferredLayerNorm, IntLinear, input_rule
from varptq.runtime.reference import ReferenceKernels

LENGTHS = (3, 5, 1, 3, 6)
# A sum of a few hundred float32 terms in another order.
ROUNDING = 2e-5
native = pytest.mark.skipif(binding.core() is None, reason=f"no native core: {binding.reason()}")
REFERENCE = pytest.param(ReferenceKernels, id="reference")
NATIVE = pytest.param(NativeKernels, id="native", marks=[native, pytest.mark.native])
KERNELS = [REFERENCE, pytest.param(TorchKernels, id="torch"), NATIVE]
Make = Callable[[], Kernels]
# Rectangles, and a schedule of more positions than the model's own.
SIZES = (None, Scales(((1, 1), (2, 5)), (4, 10)), Scales(((1, 1), (2, 1), (4, 3)), (8, 6)))


def built(**changes: int) -> Pipeline:
    with pytest.MonkeyPatch.context() as patch:
        arch = dataclasses.replace(ARCH, **changes)
        patch.setitem(PRESETS, "tiny", dataclasses.replace(PRESET, transformer_arch=arch))
        return varptq.build_model("tiny", seed=1)


@functools.cache
def tiny() -> Pipeline:
    """Cross-attention that chooses, and norms that do more than normalise."""
    pipe = built()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in pipe.var.state_dict().items():
        if "cross_norm" in name:
            tensor += 0.4 * torch.randn(tensor.shape, generator=generator)
        if name.endswith(("cross.mat_q.weight", "cross.mat_kv.weight", "cross.proj.weight")):
            tensor *= 4
    return pipe.drawing_for(prompts(*LENGTHS))


@functools.cache
def quantized(preset: str) -> QuantizedPipeline:
    settings = varptq.CalibrationConfig(num_samples=2)
    config = QuantConfig.preset(preset)
    return varptq.quantize(tiny(), config, method="rtn", calibration=settings)


def drawn(pipe: Pipeline, lengths: tuple[int, ...] = LENGTHS, **options: Any) -> list[Tensor]:
    """Guided and filtered logits of every scale and image, then tokens: (b, ...) each."""
    logits: dict[int, list[Tensor]] = {}

    def keep(event: Any) -> None:
        logits.setdefault(event.scale, []).append(event.logits_BlV.clone())

    asked = prompts(*LENGTHS)[options.get("first_index", 0) :][: len(lengths)]
    options = {"seed": 1, "cfg": 2.0, "decode": False, **options}
    out = generate(pipe, asked, on_scale=keep, **options)
    return [*(torch.cat(logits[k]) for k in sorted(logits)), out.tokens]


@pytest.mark.slow
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "w4a4+segment"])
def test_layer_by_layer(preset: str, make: Make) -> None:
    """Equal inputs give equal codes and integers, so outputs differ by float rounding alone."""
    pipe = quantized(preset)
    integers = on_integers(pipe, make())
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for name, layer in quant_linears(pipe.var).items():
        other = integers.var.get_submodule(name.replace("text_pool.", "text_pool.inner."))
        assert isinstance(other, IntLinear)
        if other.rule.gelu:  # whose rounding may move a code
            continue
        spans = spans_of(pipe.scales) if layer.centred and len(layer.means) > 1 else None
        shape = (3, pipe.scales.num_tokens, layer.in_features)
        x = torch.randn(shape, generator=generator)
        expected = layer(x, spans)
        tolerance = ROUNDING * float(expected.abs().max())
        torch.testing.assert_close(other(x, spans), expected, rtol=0, atol=tolerance)
        compared += 1
    assert compared == 6 * ARCH.depth + 7


@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "w4a4+paper"])
@pytest.mark.parametrize("bits", [16, 18, 20, 32, 56])
def test_inputs_of_as_many_channels_as_a_token_has_bits(bits: int, preset: str, make: Make) -> None:
    generator = torch.Generator().manual_seed(bits)
    embed = TokenLinear(bits, 40, kind="word_embed").requires_grad_(False)
    embed.weight.copy_(torch.randn(40, bits, generator=generator))
    layer = QuantLinear(embed, QuantConfig.preset(preset).linear_for("word_embed"), "word_embed")
    kernels, rule = make(), input_rule(layer)
    assert rule is not None
    if kernels.refuse_linear(rule):
        assert preset == "w4a4+paper"
        return
    x = torch.randn(3, 9, bits, generator=generator).sign() * bits**-0.5
    expected = layer(x)
    found = IntLinear(layer, kernels, rule)(x)
    tolerance = ROUNDING * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("preset", ["w8a8", "w6a6", "w4a8", "w4a4", "w4a4+segment", "w4a4+paper"])
def test_the_whole_model_agrees_with_the_simulated_one(preset: str, make: Make) -> None:
    """Teacher-forced logits for texts of four lengths, and what a code that flips at a float's last
    bit may move."""
    asked, pipe = prompts(*LENGTHS), quantized(preset)
    if preset.endswith("paper") and make is not ReferenceKernels:
        with pytest.raises(InputError, match=r"layer blocks\.0\.\w+: attention policy 'release'"):
            on_integers(pipe, make())
        return
    ids = generate(tiny(), asked, seed=2, decode=False).tokens
    inputs = tiny().vae.teacher_inputs(ids)
    found, expected = on_integers(pipe, make()).var(asked, inputs), pipe.var(asked, inputs)
    spread = (found - expected).abs() / expected.abs().max()
    assert spread.median() < 1e-5
    assert spread.max() < 0.15


@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
def test_shift_and_sum_agrees_with_the_simulated_one(make: Make) -> None:
    """Orders follow the attention to the text as they do that to the tokens."""
    asked, pipe = prompts(*LENGTHS), quantized("w4a4+groups")
    ids = generate(tiny(), asked, seed=2, decode=False).tokens
    inputs = tiny().vae.teacher_inputs(ids)
    set_theta(pipe.var, 0.1)
    try:
        found, expected = on_integers(pipe, make()).var(asked, inputs), pipe.var(asked, inputs)
        set_theta(pipe.var, None)
        without = pipe.var(asked, inputs)
    finally:
        set_theta(pipe.var, None)
    assert (found - expected).abs().median() < 1e-5 * expected.abs().max()
    assert (without - expected).abs().median() > 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_as_near_to_float_as_simulated(preset: str, make: Make) -> None:
    asked, pipe = prompts(*LENGTHS), quantized(preset)
    ids = generate(tiny(), asked, seed=5, decode=False).tokens
    simulated = token_fidelity(tiny(), pipe, asked, ids).kl
    found = token_fidelity(tiny(), on_integers(pipe, make()), asked, ids).kl
    assert abs(found - simulated) < 0.15 * simulated


@pytest.mark.slow
@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
@pytest.mark.parametrize("preset", ["w8a8", "w4a4"])
def test_an_image_does_not_depend_on_the_texts_beside_it(preset: str, make: Make) -> None:
    """Logits to the bit, and tokens, whatever the batch and the number of threads; three sizes."""
    pipe = on_integers(quantized(preset), make())
    before = torch.get_num_threads()
    try:
        for size in SIZES:
            expected = drawn(pipe, size=size)
            for batch, threads in ((1, 1), (3, 2)):
                torch.set_num_threads(threads)
                found = drawn(pipe, size=size, batch_size=batch)
                assert all(map(torch.equal, found, expected)), (size, batch)
            torch.set_num_threads(before)
            last = drawn(pipe, LENGTHS[3:], size=size, first_index=3)
            assert all(torch.equal(a, b[3:]) for a, b in zip(last, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
@pytest.mark.parametrize("places", [(-1,), (0, -2)])
def test_guidance_of_hidden_states_does_not_depend_on_the_batch(
    places: tuple[int, ...], make: Make
) -> None:
    pipe = on_integers(quantized("w4a4"), make())
    expected = drawn(pipe, guide_at=places)
    assert not torch.equal(expected[0], drawn(pipe)[0])
    for batch in (1, 3):
        found = drawn(pipe, guide_at=places, batch_size=batch)
        assert all(map(torch.equal, found, expected)), batch


@pytest.mark.slow
@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
@pytest.mark.parametrize("places", [(0,), (-1,), (0, -2)])
def test_scales_that_are_not_guided_read_the_asked_texts_alone(
    places: tuple[int, ...], make: Make
) -> None:
    """The logits are those of a guidance too small to count."""
    pipe = on_integers(quantized("w4a4"), make())
    some, count = {"guide_at": places, "top_k": 0, "top_p": 0.0}, pipe.scales.num_scales
    for guided in range(count):
        neutral = [2.0] * guided + [1 + 1e-15] * (count - guided)
        expected = drawn(pipe, cfg=neutral, **some)
        found = drawn(pipe, guided_scales=guided, **some)
        assert all(map(torch.equal, found, expected)), guided


@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
def test_what_is_made_of_a_text_does_not_depend_on_the_texts_beside_it(make: Make) -> None:
    """Texts so long that torch sums the products of several in another order than those of one."""
    asked = prompts(77, 77, 77)
    pipe = built(text_maxlen=77, depth=1).drawing_for(asked)
    settings = varptq.CalibrationConfig(num_samples=2)
    q = varptq.quantize(pipe, QuantConfig.preset("w8a8"), method="rtn", calibration=settings)
    q.var.get_submodule("text_pool").get_parameter("query_1Hc").mul_(100)
    var = on_integers(q, make()).var
    together = var.condition(asked)
    for row in range(len(asked)):
        alone = var.condition(asked[row : row + 1])
        for a, b in zip(together[:2], alone[:2], strict=True):
            assert torch.equal(a[row], b[0])
        assert torch.equal(together.text[0].text_RTC[row], alone.text[0].text_RTC[0])


@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
def test_scale_by_scale_is_the_whole_pass(make: Make) -> None:
    """Positions and cached codes do not depend on how many tokens come in a call."""
    asked, pipe = prompts(*LENGTHS), on_integers(quantized("w8a8"), make())
    ids = generate(tiny(), asked, seed=2, decode=False).tokens
    whole = pipe.alphabet.by_draw(pipe.var(asked, pipe.vae.teacher_inputs(ids)))
    steps: list[Tensor] = []
    generate(
        pipe,
        asked,
        forced=ids,
        **{"cfg": 1.0, "tau": 1.0, "top_p": 0.0, "decode": False},
        on_scale=lambda event: steps.append(event.logits_BlV.clone()),
    )
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)


FLOAT = {"weight": None, "input": None}
PARTLY = {
    "products in float": QuantConfig.preset("w8a8").replace(attention=None),
    "text in float": QuantConfig.preset("w8a8").with_rules(LayerRule(targets="text_*", **FLOAT)),
    "cross in float": QuantConfig.preset("w8a8").with_rules(
        LayerRule(targets="blocks.*.cross*", **FLOAT)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", list(PARTLY.values()), ids=list(PARTLY))
@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
def test_parts_in_float_do_not_depend_on_the_batch(config: QuantConfig, make: Make) -> None:
    settings = varptq.CalibrationConfig(num_samples=2)
    plain = varptq.quantize(tiny(), config, method="rtn", calibration=settings)
    pipe = on_integers(plain, make())
    expected = drawn(pipe)
    for batch in (1, 3):
        assert all(map(torch.equal, drawn(pipe, batch_size=batch), expected))
    simulated = drawn(plain)
    assert (expected[0] - simulated[0]).nan_to_num(0).abs().median() < 1e-4


@pytest.mark.parametrize("make", [REFERENCE, NATIVE])
def test_a_text_is_quantized_once_per_image(make: Make) -> None:
    """In every block, for every length there is, whatever the number of scales."""
    kernels: Any = make()
    shapes: list[tuple[int, int]] = []
    read = kernels.read

    def counted(kv_RTD: Tensor, rule: Any) -> Any:
        shapes.append((kv_RTD.shape[0], kv_RTD.shape[1]))
        return read(kv_RTD, rule)

    kernels.read = counted
    drawn(on_integers(quantized("w4a4"), kernels))
    # Guidance: each text and nothing at its length.
    assert shapes == [(2, 1), (4, 3), (2, 5), (2, 6)] * ARCH.depth


@pytest.mark.parametrize("runtime", ["reference", pytest.param("cpu", marks=native)])
def test_an_artifact_is_loaded_without_its_texts(runtime: str, tmp_path: Path) -> None:
    pipe = quantized("w4a4")
    saved = varptq.save(pipe, tmp_path / "model")
    stored = load_file(saved / "model.safetensors")
    assert not [name for name in stored if "collection" in name or "features" in name]
    loaded = varptq.load(saved, runtime=runtime)
    assert (loaded.runtime, loaded.family) == (runtime, "infinity")
    with pytest.raises(InputError, match="prompts: none to draw for"):
        loaded.pool()
    kernels = ReferenceKernels() if runtime == "reference" else NativeKernels()
    expected = drawn(on_integers(pipe, kernels), size=SIZES[1])
    assert all(map(torch.equal, drawn(loaded, size=SIZES[1]), expected))
    assert not quant_linears(loaded.var)
    norms = [m for m in loaded.var.modules() if isinstance(m, DeferredLayerNorm)]
    assert len(norms) == ARCH.depth


def test_other_runtimes_refuse_by_name() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from varptq.runtime.cuda.kernels import CudaKernels

    var = convert(tiny().var, QuantConfig.preset("w8a8"))
    reason = refusal(var, CudaKernels())
    assert reason == "layer blocks.0.attn: rotary positions and cross-attention have no kernels"
    assert varptq.runtime.resolve(var).name == ("cpu" if binding.core() else "simulated")


@pytest.mark.parametrize("make", KERNELS)
def test_what_is_not_finite_is_named(make: Make) -> None:
    pipe = on_integers(quantized("w8a8"), make())
    cross: Any = pipe.var.get_submodule("blocks.1.cross")
    cross.mat_kv.bias = torch.full_like(cross.mat_kv.bias, float("inf"))
    with pytest.raises(NonFiniteError, match=r"layer blocks\.1\.cross: "):
        drawn(pipe)
