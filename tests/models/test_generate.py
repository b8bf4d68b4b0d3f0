"""Generation: against a loop without a cache, randomness per image, forced tokens, arguments."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.artifact import save
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.errors import ConfigError, InputError, VarptqError
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits, listening
from varptq.models.sampling import filter_logits, gumbel_noise, image_randoms, smooth_embedding
from varptq.models.scales import Scales
from varptq.models.seams import LayerCache
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import set_theta
from varptq.quant.pipeline import QuantizedPipeline
from varptq.runtime import load

LABELS = [0, 3, 1, 4, 2]
# Cached and uncached float32 logits, and those of other batch sizes, differ by summation order.
LOGITS = 1e-4


def tokens(pipe: Pipeline, labels: Any = LABELS, **options: Any) -> Tensor:
    return generate(pipe, labels, decode=False, **options).tokens


def plain_loop(
    pipe: Pipeline,
    labels: Tensor,
    seed: int,
    cfg: float,
    top_k: int,
    top_p: float,
    temperature: float,
) -> Tensor:
    """Every scale from a whole teacher-forced pass, guidance by its formula: no cache, no batch."""
    scales, rows = pipe.scales, []
    for image, label in enumerate(labels.tolist()):
        ids = torch.zeros(1, scales.num_tokens, dtype=torch.int64)
        stream = image_randoms(seed, [image])
        for scale, part in enumerate(scales.slices()):
            inputs = pipe.vae.teacher_inputs(ids)
            given_class = pipe.var(torch.tensor([label]), inputs)[:, part]
            without = pipe.var(torch.tensor([pipe.var.arch.num_classes]), inputs)[:, part]
            t = cfg * scale / max(scales.num_scales - 1, 1)
            logits = filter_logits((1 + t) * given_class - t * without, top_k, top_p)
            noise = gumbel_noise(stream, part.stop - part.start, logits.shape[-1], pipe.device)
            ids[:, part] = (logits / temperature + noise).argmax(-1)
        rows.append(ids)
    return torch.cat(rows)


@pytest.mark.parametrize("cfg", [0.0, 1.5])
@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(0, 0.0, 1.0), (7, 0.9, 0.7)])
def test_tokens_equal_a_plain_loop(
    any_tiny: Pipeline, cfg: float, top_k: int, top_p: float, temperature: float
) -> None:
    options = dict(seed=3, cfg=cfg, top_k=top_k, top_p=top_p, temperature=temperature)
    expected = plain_loop(any_tiny, torch.tensor(LABELS), **options)
    assert torch.equal(tokens(any_tiny, **options), expected)


def test_guidance_zero_computes_no_unconditional_rows(tiny: Pipeline) -> None:
    rows: list[int] = []
    hook = tiny.var.class_emb.register_forward_hook(lambda *call: rows.append(len(call[2])))
    try:
        for cfg in (0.0, 1.5):
            tokens(tiny, cfg=cfg)
    finally:
        hook.remove()
    assert rows == [5, 10]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", "reference", "cpu"])
def test_no_unconditional_rows_behind_the_guided_scales(
    kind: str, tiny: Pipeline, tmp_path: Path
) -> None:
    """The logits are those of a guidance too small to count, to the last bit on integers."""
    pipe = tiny
    if kind != "float":
        settings = CalibrationConfig(num_samples=2)
        config = QuantConfig.preset("w8a8")
        save(quantize(tiny, config, method="rtn", calibration=settings), tmp_path / "artifact")
        pipe = load(tmp_path / "artifact", runtime=kind)
    rows: list[int] = []
    block = {"": pipe.var.get_submodule("blocks.0")}

    def logits(**options: Any) -> list[Tensor]:
        rows.clear()
        found: list[Tensor] = []
        options |= {"top_k": 0, "top_p": 0, "on_scale": lambda e: found.append(e.logits_BlV)}
        with listening(block, lambda _, x, *rest: rows.append(len(x))):
            tokens(pipe, **options)
        return found

    tolerance = LOGITS if kind == "float" else 0
    everywhere = logits(cfg=2.0)
    for guided, expected in ((0, [5, 5, 5]), (1, [5, 5, 5]), (2, [10, 10, 5]), (3, [10, 10, 10])):
        strengths = [0.0, 1.0, 2.0][:guided] + [1e-30] * (3 - guided)
        both = logits(cfg=strengths)
        assert rows == [10, 10, 10]
        alone = logits(cfg=2.0, guided_scales=guided)
        assert rows == expected
        for one, other in zip(alone, both, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
        assert guided == 3 or not torch.equal(alone[2], everywhere[2])


def test_draws_depend_on_seed_and_index_only(tiny: Pipeline) -> None:
    whole = generate(tiny, LABELS, seed=7, batch_size=5)
    for batch_size in (1, 2, 3, 16):
        cut = generate(tiny, LABELS, seed=7, batch_size=batch_size)
        assert torch.equal(cut.tokens, whole.tokens)
        torch.testing.assert_close(cut.images, whole.images, rtol=0, atol=LOGITS)
    for image in (4, 0, 2):  # one at a time, in another order
        alone = tokens(tiny, LABELS[image : image + 1], seed=7, first_index=image)
        assert torch.equal(alone, whole.tokens[image : image + 1])
    assert not torch.equal(tokens(tiny, seed=8), whole.tokens)
    assert not torch.equal(tokens(tiny, seed=7, first_index=1), whole.tokens)


def test_images_of_one_class_differ(tiny: Pipeline) -> None:
    found = tokens(tiny, [2] * 8)
    assert len({tuple(row) for row in found.tolist()}) == 8


def test_smoothing_feeds_mixtures_and_keeps_images_apart(tiny: Pipeline) -> None:
    smooth = generate(tiny, LABELS, seed=1, more_smooth=True, batch_size=5)
    plain = generate(tiny, LABELS, seed=1)
    assert torch.equal(smooth.tokens[:, :1], plain.tokens[:, :1])  # same noise, nothing fed yet
    assert not torch.equal(smooth.images, plain.images)
    cut = generate(tiny, LABELS, seed=1, more_smooth=True, batch_size=2)
    assert torch.equal(cut.tokens, smooth.tokens)
    torch.testing.assert_close(cut.images, smooth.images, rtol=0, atol=LOGITS)


def test_the_mixture_of_smoothing_enters_the_sum(tiny: Pipeline) -> None:
    """f_hat after the first scale, from the filtered logits and the second draw of the stream."""
    events: list[ScaleEvent] = []
    generate(tiny, [1], seed=5, more_smooth=True, decode=False, on_scale=events.append)
    stream = image_randoms(5, [0])
    gumbel_noise(stream, 1, 32, tiny.device)  # the draw of the ids
    noise = gumbel_noise(stream, 1, 32, tiny.device)
    book = tiny.vae.quantize.embedding.weight
    mixed = smooth_embedding(events[0].logits_BlV, noise, book, ratio=0.0)
    f_hat = tiny.vae.quantize.add_scale(tiny.vae.quantize.zeros(1), mixed, 0)
    torch.testing.assert_close(events[0].f_hat, f_hat)


@settings(max_examples=15)
@given(st.integers(0, 2**14 - 1), st.booleans(), st.integers(0, 3))
def test_forced_positions_are_honoured_and_leave_the_noise_alone(
    tiny: Pipeline, mask: int, more_smooth: bool, seed: int
) -> None:
    free = tokens(tiny, seed=seed, more_smooth=more_smooth)
    keep_L = torch.tensor([bool(mask >> i & 1) for i in range(14)])
    forced = torch.where(keep_L, (free + 1) % 32, -1)
    mixed = tokens(tiny, seed=seed, more_smooth=more_smooth, forced=forced)
    assert torch.equal(mixed[:, keep_L], forced[:, keep_L])
    # Until a forced token changes the context, the free ones are drawn as without any.
    start = next((p.start for p in tiny.scales.slices() if keep_L[p].any()), 14)
    stop = next((end for end in tiny.scales.ends if end > start), 14)
    before_L = ~keep_L & (torch.arange(14) < stop)
    assert torch.equal(mixed[:, before_L], free[:, before_L])


def test_forcing_what_was_drawn_changes_nothing(tiny: Pipeline) -> None:
    drawn = generate(tiny, LABELS, seed=2)
    ids = drawn.tokens.clone()
    ids[:, 5] = -1
    for forced in (drawn.tokens, ids, ids.int()):
        again = generate(tiny, LABELS, seed=2, forced=forced)
        assert torch.equal(again.tokens, drawn.tokens) and again.tokens.dtype == torch.int64
        torch.testing.assert_close(again.images, drawn.images)


def test_forced_tokens_decide_the_image_under_smoothing(tiny: Pipeline) -> None:
    ids = tokens(tiny)
    output = generate(tiny, LABELS, seed=9, more_smooth=True, forced=ids)
    torch.testing.assert_close(output.images, tiny.vae.decode(ids) / 2 + 0.5)


def test_images_are_the_decoded_tokens(tiny: Pipeline) -> None:
    output = generate(tiny, LABELS)
    side = tiny.vae.image_size[0]
    assert output.images is not None and output.images.shape == (5, 3, side, side)
    assert output.images.dtype == torch.float32
    assert output.images.min() >= 0 and output.images.max() <= 1
    torch.testing.assert_close(output.images, tiny.vae.decode(output.tokens) / 2 + 0.5)
    assert generate(tiny, LABELS, decode=False).images is None


def test_top_k_one_is_greedy_whatever_the_noise(tiny: Pipeline) -> None:
    first = tokens(tiny, top_k=1, seed=0)
    for options in (dict(seed=1), dict(temperature=50.0), dict(first_index=9)):
        assert torch.equal(tokens(tiny, top_k=1, **options), first)
    logits = torch.cat([x for _, x in guided_logits(tiny, torch.tensor(LABELS), first, 1.5)], 1)
    assert torch.equal(logits.argmax(-1), first)


def test_temperature_moves_the_first_token_from_greedy_to_uniform(tiny: Pipeline) -> None:
    """Top-p off; the first scale has one token, whose distribution is softmax(logits / T)."""
    draws, keep = [1] * 400, dict(top_k=0, top_p=0.0, batch_size=400)
    labels = torch.tensor([1])
    logits = tiny.var(labels, tiny.vae.teacher_inputs(torch.zeros(1, 14, dtype=torch.int64)))[0, 0]
    for temperature in (0.01, 0.5, 1.0, 100.0):
        counts = Counter(tokens(tiny, draws, temperature=temperature, **keep)[:, 0].tolist())
        expected = (logits / temperature).softmax(-1)
        drawn = torch.tensor([counts[v] / 400 for v in range(32)])
        # The mean distance of 400 draws is below sqrt(V / n) = 0.28.
        assert float((drawn - expected).abs().sum()) < 0.45, temperature


def test_on_scale_sees_filtered_logits_ids_and_the_sum(tiny: Pipeline) -> None:
    events: list[ScaleEvent] = []
    output = generate(tiny, LABELS, top_k=4, top_p=0, batch_size=2, on_scale=events.append)
    assert [(e.rows.start, e.rows.stop, e.scale) for e in events] == [
        (start, stop, scale) for start, stop in ((0, 2), (2, 4), (4, 5)) for scale in range(3)
    ]
    for event in events:
        part = tiny.scales.slices()[event.scale]
        assert torch.equal(event.ids_Bl, output.tokens[event.rows, part])
        kept = event.logits_BlV > -torch.inf
        assert event.logits_BlV.dtype == torch.float32 and (kept.sum(-1) == 4).all()
        assert kept.gather(-1, event.ids_Bl.unsqueeze(-1)).all()
    last = torch.cat([e.f_hat for e in events if e.scale == 2])
    torch.testing.assert_close(last, tiny.vae.quantize.accumulate(output.tokens))


def test_teacher_forced_logits_are_those_of_generation(any_tiny: Pipeline) -> None:
    events: list[ScaleEvent] = []
    ids = tokens(any_tiny, cfg=4.0, top_k=0, top_p=0, on_scale=events.append)
    parts = list(guided_logits(any_tiny, torch.tensor(LABELS), ids, 4.0))
    assert [scale for scale, _ in parts] == [0, 1, 2]
    for event, (_, logits) in zip(events, parts, strict=True):
        torch.testing.assert_close(event.logits_BlV, logits, rtol=0, atol=10 * LOGITS)


def test_each_adaln_layer_runs_once_per_batch_of_images(any_tiny: Pipeline) -> None:
    calls: Counter[str] = Counter()
    layers = {n: m for n, m in any_tiny.var.named_modules() if n.endswith("ada_lin.1")}
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, layer in layers.items()
    ]
    try:
        tokens(any_tiny, batch_size=5)
        assert calls == dict.fromkeys(layers, 1)
        tokens(any_tiny, batch_size=2)
        assert calls == dict.fromkeys(layers, 4)
    finally:
        for hook in hooks:
            hook.remove()


def test_the_cache_keeps_its_storage_over_all_scales(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[int]] = {}
    append = LayerCache.append

    def watched(self: LayerCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = append(self, k, v)
        seen.setdefault(id(self), set()).update((keys.data_ptr(), values.data_ptr()))
        return keys, values

    monkeypatch.setattr(LayerCache, "append", watched)
    tokens(tiny)
    assert len(seen) == tiny.var.arch.depth
    assert all(len(pointers) == 2 for pointers in seen.values())


def test_generation_leaves_global_random_states_alone(tiny: Pipeline) -> None:
    def states() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    generate(tiny, LABELS, more_smooth=True)
    assert states() == before


def test_generation_keeps_the_model_and_the_grad_mode(make_tiny: Callable[..., Pipeline]) -> None:
    """Also for a model that wants gradients; what comes back can be used in autograd."""
    pipe = make_tiny()
    pipe.var.requires_grad_(True)
    before = {n: t.clone() for n, t in pipe.var.state_dict().items()}
    output = generate(pipe, LABELS)
    assert torch.is_grad_enabled()
    assert output.images is not None and not output.images.requires_grad
    scale = torch.ones((), requires_grad=True)
    (output.images * scale).sum().backward()
    assert all(torch.equal(t, before[n]) for n, t in pipe.var.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in pipe.var.parameters())


@pytest.mark.parametrize("sides", [(1,), (3,), (2, 2)])
def test_other_schedules(make_tiny: Callable[..., Pipeline], sides: tuple[int, ...]) -> None:
    pipe = make_tiny(scales=Scales(sides), depth=1)
    options = dict(seed=1, cfg=1.5, top_k=9, top_p=0.9, temperature=1.0)
    expected = plain_loop(pipe, torch.tensor(LABELS), **options)
    output = generate(pipe, LABELS, **options)
    assert torch.equal(output.tokens, expected)
    assert output.images is not None and output.images.shape[-1] == 2 * sides[-1]
    assert torch.equal(tokens(pipe, more_smooth=True), tokens(pipe, more_smooth=True, batch_size=1))


def test_one_scale_is_never_guided(make_tiny: Callable[..., Pipeline]) -> None:
    """t = cfg * 0 at the first scale."""
    pipe = make_tiny(scales=Scales((3,)), depth=1)
    assert torch.equal(tokens(pipe, cfg=0.0), tokens(pipe, cfg=9.0))


def test_bfloat16(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny().to(dtype=torch.bfloat16)
    for more_smooth in (False, True):
        output = generate(pipe, LABELS, more_smooth=more_smooth)
        assert output.images is not None and output.images.dtype == torch.float32
        assert output.images.isfinite().all()
        assert torch.equal(tokens(pipe, more_smooth=more_smooth), output.tokens)


def test_a_quantized_model_generates_alike(tiny: Pipeline) -> None:
    # 8 bits: an activation that other float sums round the other way must not decide a token.
    config = QuantConfig.preset("w8a8+paper+p8")
    var = convert(tiny.var, config)
    set_theta(var, 0.05)
    pipe = QuantizedPipeline(var, tiny.vae, "tiny", config=config, method="rtn")
    whole = tokens(pipe, cfg=0.0)
    assert torch.equal(tokens(pipe, cfg=0.0, batch_size=1), whole)
    assert float((tokens(tiny, cfg=0.0) == whole).float().mean()) > 0.7


def test_progress_counts_images_from_zero_to_all(tiny: Pipeline) -> None:
    seen: list[tuple[str, int, int]] = []
    tokens(
        tiny,
        batch_size=2,
        progress=lambda stage, done, total, info="": seen.append((stage, done, total)),
    )
    assert seen == [("generate", done, 5) for done in (0, 2, 4, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(labels=[]), "labels: empty"),
        (dict(labels=[0, 5]), "class 5: not in 0..4"),
        (dict(labels=["9" * 5000]), "class 9{500}: not in 0..4"),
        (dict(labels=np.array(3)), "labels: 3, expected a list"),
        (dict(batch_size=0), "batch_size 0: must be at least 1"),
        (dict(batch_size=-3), "batch_size -3"),
        (dict(batch_size=1.5), "batch_size 1.5: expected a whole number"),
        (dict(streams=[0, 1]), "stream 0: expected two whole numbers"),
        (dict(streams=[(0, 1), (0, 1.5)]), r"stream \(0, 1.5\): expected two whole numbers"),
        (dict(forced=[[0] * 14] * 2), "forced: a list, expected a tensor"),
        (dict(forced=torch.zeros(1, 14).long()), r"forced: shape \(1, 14\), expected \(2, 14\)"),
        (dict(forced=torch.zeros(2, 13).long()), r"forced: shape \(2, 13\), expected \(2, 14\)"),
        (dict(forced=torch.zeros(14).long()), r"forced: shape \(14,\)"),
        (
            dict(forced=torch.full((2, 14), 32)),
            r"forced: ids 32..32, expected -1 \(free\) or 0..31",
        ),
        (dict(forced=torch.full((2, 14), -2)), r"forced: ids -2..-2"),
        (dict(forced=torch.zeros(2, 14)), r"forced: torch.float32, expected torch.int64"),
        (dict(forced=torch.ones(2, 14).bool()), r"forced: torch.bool, expected torch.int64"),
        (dict(cfg=-1.0), "cfg is -1.0"),
        (dict(guided_scales=4), "guided_scales 4: expected 0 to 3, the model's scales"),
        (dict(guided_scales=-1), "guided_scales is -1"),
        (dict(cfg=float("nan")), "cfg"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=1.5), "top_p is 1.5"),
        (dict(temperature=0.0), "temperature is 0.0"),
    ],
)
def test_unusable_arguments_are_named(
    tiny: Pipeline, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(VarptqError, match=message) as caught:
        tokens(tiny, **{"labels": [0, 1], **options})
    assert isinstance(caught.value, InputError | ConfigError)
    assert "\n" not in str(caught.value)
