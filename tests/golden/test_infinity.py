"""Parity of Infinity's transformer with the reference: text, blocks, positions, both ways through
the model, guidance, and a sampled run with the reference's noise."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from golden.infinity_cases import (
    GUIDED,
    HIDDEN,
    IMAGE,
    PROBABILITY,
    SUM,
    TABLE,
    Case,
    Steps,
    close,
)
from varptq.models.generate import generate
from varptq.models.rotary import positions, rotary
from varptq.models.sampling import filter_logits
from varptq.models.seams import consumers_of, run_stages, spans_of
from varptq.quant import folds

# A pixel may fall on the other side of an integer where it is cut off.
CUT = 1


@pytest.fixture(scope="module")
def case(golden_infinity: Golden, case_file: str) -> Case:
    return Case.load(golden_infinity, case_file)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def in_rows(case: Case, groups: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Texts of groups, (R, T, C) each, one row of the batch after the other: (sum, C)."""
    rows = {int(i): text for rows, texts in groups for i, text in zip(rows, texts, strict=True)}
    return torch.cat([rows[i] for i in sorted(rows)])


def test_architecture_is_read_off_the_tensors(case: Case) -> None:
    arch, data = case.var.arch, case.data
    for name in ("depth", "width", "num_heads", "head_width", "ffn_width", "token_bits"):
        theirs = {"head_width": "head_dim", "ffn_width": "ffn_hidden"}.get(name, name)
        assert getattr(arch, name) == data[theirs], name
    for name in ("text_channels", "text_maxlen", "pool_heads"):
        assert getattr(arch, name) == data[name], name
    assert case.vae.arch.code_dim == data["latent_bits"]
    assert case.vae.arch.patchify == bool(data["patchify"])
    assert case.vae.arch.downsampling == data["vae_patch"]


def test_folds_leave_the_reference_s_numbers(case: Case) -> None:
    """Diagonals over a factor of four in every place that takes one."""
    var, generator = copy.deepcopy(case.var), torch.Generator().manual_seed(0)
    for place in {id(fold): fold for fold in var.folds().values()}.values():
        width = consumers_of(place)[0].in_features
        folds.scale(place, 4 ** torch.rand(width, generator=generator))
    logits = var(case.prompts.guided(), case.both_rows)
    close(logits, case.data["tf_logits"], GUIDED)


def test_rotary_positions(case: Case) -> None:
    data = case.data
    assert torch.equal(positions(case.var.scales), torch.from_numpy(data["rope_pos"]))
    tables = rotary(case.var.scales, case.var.arch.head_width, case.var.device)
    close(tables.cos_Lp, data["rope_cos"], TABLE)
    close(tables.sin_Lp, data["rope_sin"], TABLE)


def test_text_side(case: Case) -> None:
    var, data, rows = case.var, case.data, case.prompts.guided()
    normed = [
        var.text_norm(var.cfg_uncond[: row.length] if row.features_TD is None else row.features_TD)
        for row in rows.rows
    ]
    close(torch.cat(normed), data["mid.text_norm"], HIDDEN)
    condition = var.condition(rows)
    close(in_rows(case, [tuple(group) for group in condition.text]), data["mid.text_kv"], HIDDEN)
    close(condition.pooled_BC, data["mid.pool"], HIDDEN)
    close(condition.shared_B16C.squeeze(1), data["mid.shared_ada"], HIDDEN)
    head_ada = var.head_nm.modulation(condition.pooled_BC).squeeze(1)
    close(head_ada, data["mid.head_ada"], HIDDEN)


def test_teacher_forced_pass_and_what_is_within(case: Case) -> None:
    var, data = case.var, case.data
    condition = var.condition(case.prompts.guided())
    stages, spans = var.stages(condition), spans_of(var.scales)
    kept: dict[str, Tensor] = {"x0": var.embed(condition, case.both_rows)}
    block = var.blocks[0]
    handles = [
        getattr(block, name).register_forward_hook(
            lambda *arguments, key=key: kept.__setitem__(key, arguments[-1])
        )
        for name, key in (("attn", "sa0"), ("cross", "ca0"))
    ]
    kept["block0"] = stages[0].run(kept["x0"], spans, None)
    for handle in handles:
        handle.remove()
    kept["last"] = kept["block0"]
    for stage in stages[1 : var.arch.depth]:
        kept["last"] = stage.run(kept["last"], spans, None)
    chosen = torch.from_numpy(data["positions"])
    for name, found in kept.items():
        rows = found[[0, len(found) // 2]][:, chosen]
        close(rows, data[f"mid.{name}"], HIDDEN)
    logits = run_stages(stages[var.arch.depth :], kept["last"], spans)
    close(logits, data["tf_logits"], HIDDEN)
    close(var(case.prompts.guided(), case.both_rows), data["tf_logits"], HIDDEN)


def test_cached_pass_with_every_setting(case: Case) -> None:
    settings = case.settings()
    assert {"logits", "negative"} <= set(settings)
    for setting in settings:
        arguments = (case.data[f"{setting}.{name}"] for name in ("cfg", "tau", "insertion"))
        steps = Steps(case, case.asked(setting), *arguments)
        found = torch.cat(list(steps.forced(case.bits)), dim=1)
        close(found, case.data[f"{setting}.guided"], GUIDED)


def test_generation_with_forced_bits(case: Case) -> None:
    """Every setting, through the call that users make."""
    for setting in case.settings():
        data = {name: case.data[f"{setting}.{name}"].tolist() for name in ("cfg", "tau")}
        parts: list[Tensor] = []
        generate(
            case.pipe,
            case.asked(setting),
            cfg=tuple(data["cfg"]),
            tau=tuple(data["tau"]),
            top_k=0,
            top_p=0,
            guide_at=case.data[f"{setting}.insertion"].tolist(),
            forced=case.bits,
            on_scale=lambda event, parts=parts: parts.append(event.logits_BlV.clone()),
        )
        found = torch.cat([part.unflatten(1, (-1, case.var.alphabet.draws)) for part in parts], 1)
        close(found.flatten(2), case.data[f"{setting}.guided"], GUIDED)


def test_a_row_does_not_depend_on_the_texts_beside_it(case: Case) -> None:
    together = case.var(case.prompts.guided(), case.both_rows)
    for i in range(len(case.prompts)):
        inputs = torch.from_numpy(case.data["inputs"])[i : i + 1].repeat(2, 1, 1)
        alone = case.var(case.prompts[i : i + 1].guided(), inputs)
        expected = together[[i, i + len(case.prompts)]]
        torch.testing.assert_close(alone, expected, atol=HIDDEN, rtol=0.0)


def test_sampled_run_with_the_reference_noise(case: Case) -> None:
    data, alphabet, vae = case.data, case.var.alphabet, case.vae
    noise = torch.from_numpy(data["free.noise"]).flatten(1, 2)
    top_k, top_p = int(data["free.top_k"]), float(data["free.top_p"])
    steps = Steps(case, case.prompts, data["free.cfg"], data["free.tau"], [0])
    f_hat, bits, guided, p1 = vae.zeros(len(case.prompts)), [], [], []
    for scale, part in enumerate(case.var.scales.slices()):
        logits = steps.logits(scale, f_hat)
        probabilities = filter_logits(alphabet.by_draw(logits), top_k, top_p).softmax(-1)
        draws = slice(part.start * alphabet.draws, part.stop * alphabet.draws)
        tokens = alphabet.tokens((probabilities / noise[:, draws]).argmax(-1))
        f_hat = vae.add_scale(f_hat, vae.embed(tokens), scale)
        bits.append(tokens)
        guided.append(logits)
        p1.append(alphabet.tokens(probabilities[..., 1]))
    assert torch.equal(torch.cat(bits, 1), torch.from_numpy(data["free.bits"]).long())
    close(torch.cat(guided, 1), data["free.guided"], GUIDED)
    close(torch.cat(p1, 1), data["free.p1"], PROBABILITY)
    close(f_hat, data["free.codes"], SUM)
    image = vae.decode_features(f_hat)
    close(image, data["free.image"], IMAGE)
    pixels = ((image + 1) / 2 * 255).to(torch.uint8).permute(0, 2, 3, 1).flip(-1)
    difference = pixels.int() - torch.from_numpy(data["free.image_uint8_bgr"]).int()
    assert int(difference.abs().max()) <= CUT
