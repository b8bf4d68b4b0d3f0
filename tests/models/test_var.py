"""The transformer: against its formulas, causality, the cached loop, one scale, odd schedules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.var_oracle import trace
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import LayerCache, run_stages, spans_of
from varptq.models.var.transformer import VAR, randomize

# float32 against float64: the models are two blocks deep, logits are of the order of 10.
LOGITS = 1e-4
SCHEDULES = [(1,), (3,), (1, 3), (2, 2, 5), (1, 2, 3)]  # one scale, no side 1, a repeated side


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(pipe: Pipeline, batch: int, seed: int = 0) -> Tensor:
    """Random token embeddings of scales 1..K-1."""
    later = pipe.scales.num_tokens - pipe.scales.lengths[0]
    return noise(batch, later, pipe.var.arch.code_dim, seed=seed)


def all_labels(pipe: Pipeline) -> Tensor:
    """Every class, and the unconditional row."""
    return torch.arange(pipe.var.arch.num_classes + 1)


def test_logits_follow_the_formulas(any_tiny: Pipeline) -> None:
    labels = all_labels(any_tiny)
    inputs = inputs_of(any_tiny, len(labels))
    logits = any_tiny.var(labels, inputs)
    arch = any_tiny.var.arch
    assert logits.dtype == torch.float32
    assert logits.shape == (len(labels), arch.scales.num_tokens, arch.codebook_size)
    expected = trace(any_tiny.var, labels, inputs).logits
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("sides", SCHEDULES)
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_any_schedule_follows_the_formulas(
    make_tiny: Callable[..., Pipeline], sides: tuple[int, ...], shared_adaln: bool
) -> None:
    pipe = make_tiny(scales=Scales(sides), depth=1, shared_adaln=shared_adaln)
    labels = torch.tensor([0, pipe.var.arch.num_classes, 4])
    inputs = inputs_of(pipe, 3)
    expected = trace(pipe.var, labels, inputs).logits
    torch.testing.assert_close(pipe.var(labels, inputs).double(), expected, rtol=0, atol=LOGITS)


def test_the_attention_temperature_is_capped(make_tiny: Callable[..., Pipeline]) -> None:
    """A learned log scale above log 100 counts as log 100."""
    pipe = make_tiny(depth=1)
    pipe.var.blocks[0].attn.scale_mul_1H11[0, 0] = 5.0
    labels, inputs = torch.tensor([0]), inputs_of(pipe, 1)
    capped = pipe.var(labels, inputs)
    expected = trace(pipe.var, labels, inputs).logits
    # A temperature of 100 amplifies the rounding of the scores as much.
    torch.testing.assert_close(capped.double(), expected, rtol=0, atol=100 * LOGITS)
    pipe.var.blocks[0].attn.scale_mul_1H11[0, 0] = 6.0
    assert torch.equal(pipe.var(labels, inputs), capped)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scale=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_position_depends_on_its_own_and_coarser_scales_only(
    any_tiny: Pipeline, scale: int, seed: int
) -> None:
    labels = torch.tensor([1, 4])
    inputs = inputs_of(any_tiny, 2)
    part, first = any_tiny.scales.slices()[scale], any_tiny.scales.lengths[0]
    changed = inputs.clone()
    changed[:, part.start - first : part.stop - first] += noise(1, 1, inputs.shape[-1], seed=seed)
    before, after = any_tiny.var(labels, inputs), any_tiny.var(labels, changed)
    assert torch.equal(before[:, : part.start], after[:, : part.start])
    moved_BL = (before - after).abs().amax(-1) > 0
    assert moved_BL[:, part.start :].all()  # own scale and all finer ones do depend on it


def test_rows_do_not_see_each_other(tiny: Pipeline) -> None:
    labels, inputs = torch.tensor([0, 3]), inputs_of(tiny, 2)
    alone = tiny.var(labels[1:], inputs[1:])
    torch.testing.assert_close(tiny.var(labels, inputs)[1:], alone, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("batch", [1, 3])
def test_scale_by_scale_equals_one_pass(
    make_tiny: Callable[..., Pipeline], any_tiny: Pipeline, batch: int
) -> None:
    arch = any_tiny.var.arch
    pipe = make_tiny(shared_adaln=arch.shared_adaln, l2_norm=arch.l2_norm)
    var, scales = pipe.var.double(), pipe.scales
    labels, inputs = torch.arange(batch), inputs_of(pipe, batch).double()
    whole = var(labels, inputs)
    condition, cache = var.condition(labels), var.new_cache(batch)
    stages = var.stages(condition)
    for scale, part in enumerate(scales.slices()):
        spans = spans_of(scales, scale, scale + 1)
        if scale == 0:
            x = var.embed_first(condition)
        else:
            first = scales.lengths[0]
            own = inputs[:, part.start - first : part.stop - first]
            x = var.embed_inputs(own, spans)
        logits = run_stages(stages, x, spans, cache)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, whole[:, part], rtol=1e-6, atol=1e-6)


def test_the_cache_is_preallocated_and_written_in_place(tiny: Pipeline) -> None:
    layers = tiny.var.new_cache(3)
    arch = tiny.var.arch
    assert len(layers) == arch.depth
    shape = (3, arch.num_heads, arch.scales.num_tokens, arch.head_width)
    assert all(layer.keys.shape == layer.values.shape == shape for layer in layers)
    assert len({layer.keys.data_ptr() for layer in layers}) == arch.depth
    layer, written = layers[0], []
    for length in arch.scales.lengths:
        new = noise(3, arch.num_heads, length, arch.head_width, seed=length)
        written.append(new)
        keys, values = layer.append(new, -new)
        assert keys.data_ptr() == layer.keys.data_ptr()
        assert values.data_ptr() == layer.values.data_ptr()
        assert torch.equal(keys, torch.cat(written, dim=2)) and torch.equal(values, -keys)
    assert layer.length == arch.scales.num_tokens


def test_spans_cover_every_query_once_and_see_a_growing_prefix() -> None:
    scales = Scales((1, 3, 2))
    queries = [i for span in spans_of(scales) for i in range(*span.queries.indices(99))]
    assert queries == list(range(14))
    assert [span.keys for span in spans_of(scales)] == [1, 10, 14]


def test_an_overfull_cache_is_a_loud_error(tiny: Pipeline) -> None:
    layer = LayerCache(torch.empty(1, 1, 3, 4), torch.empty(1, 1, 3, 4))
    layer.append(noise(1, 1, 2, 4), noise(1, 1, 2, 4))
    with pytest.raises(RuntimeError):
        layer.append(noise(1, 1, 2, 4), noise(1, 1, 2, 4))


def test_bfloat16_stays_close_and_answers_in_float32(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny()
    labels, inputs = all_labels(pipe), inputs_of(pipe, pipe.var.arch.num_classes + 1)
    expected = pipe.var(labels, inputs)
    logits = pipe.to(dtype=torch.bfloat16).var(labels, inputs)
    assert logits.dtype == torch.float32
    # bf16 keeps 8 bits; two blocks add up to about 1%.
    assert float((logits - expected).norm() / expected.norm()) < 0.03


def test_random_weights_are_a_function_of_the_seed(tiny: Pipeline) -> None:
    states = []
    for seed in (0, 0, 1):
        model = VAR(tiny.var.arch)
        randomize(model, torch.Generator().manual_seed(seed))
        states.append(model.state_dict())
    same, other = ({n: torch.equal(t, s[n]) for n, t in states[0].items()} for s in states[1:])
    assert all(same.values())
    assert {n for n, equal in other.items() if equal} == {
        "lvl_1L",
        *(f"blocks.{i}.attn.{n}" for i in range(2) for n in ("zero_k_bias", "scale_mul_1H11")),
    }
