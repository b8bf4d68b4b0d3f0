"""Infinity's schedules and rotary positions, and its real width by recipe."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from golden.conftest import Golden
from golden.infinity_cases import GUIDED, HIDDEN, SUM, TABLE, close, mixed_logits, texts
from golden.recipe import check_values, recipe_state
from varptq.models.infinity.checkpoint import infer_infinity, own_names
from varptq.models.infinity.pyramid import BitPyramid
from varptq.models.infinity.schedules import (
    PIXELS,
    SIZES,
    TEMPLATES,
    schedule,
    schedule_for,
    template_of,
)
from varptq.models.infinity.transformer import Infinity
from varptq.models.rotary import positions, rotary
from varptq.models.scales import Scales
from varptq.models.tensors import load_strict
from varptq.models.texts import TextPrompts


def test_the_table_of_schedules(golden_infinity: Golden) -> None:
    table = json.loads(golden_infinity.path("schedules.json").read_text())
    assert table["sizes"] == SIZES and table["stride"] == PIXELS
    assert [float(name) for name in table["order"]] == list(TEMPLATES)
    for name, maps in table["scales"].items():
        template = float(name)
        for size, count in SIZES.items():
            scales = schedule(count, template)
            assert [list(side) for side in scales.sides] == maps[:count]
            assert scales.grid == tuple(maps[-1])
            assert scales.num_tokens == table["tokens"][name][size]
            assert schedule_for(f"{size}:{name}") == scales
            height, width = (PIXELS * side for side in scales.last)
            assert schedule_for((height, width)) == scales
            assert template_of(height / width) == template


def test_positions_of_every_template(golden_infinity: Golden) -> None:
    data = golden_infinity.npz("rope_positions.npz")
    for template in TEMPLATES:
        scales = schedule(SIZES["1M"], template)
        found = positions(scales)
        name = f"{template:g}"
        for scale, (part, (height, width)) in enumerate(
            zip(scales.slices(), scales.sides, strict=True)
        ):
            rows, columns = found[part].unflatten(0, (height, width)).unbind(-1)
            for axis, ours in (("rows", rows[:, 0]), ("cols", columns[0])):
                theirs = data[f"{axis}.{name}"][scale]
                assert np.array_equal(ours.numpy(), theirs[: len(ours)])
                assert (theirs[len(ours) :] == -1).all()
            assert bool((rows == rows[:, :1]).all()) and bool((columns == columns[:1]).all())


@pytest.mark.slow
def test_real_width_by_recipe(golden_infinity: Golden, wide_file: str) -> None:
    data = golden_infinity.npz(wide_file)
    state = recipe_state(data)
    found = check_values(state, data["check_names"].tolist())
    np.testing.assert_array_equal(found, data["check_values"])
    state = own_names(state)
    var = Infinity(infer_infinity(state)).eval()
    load_strict(var, state, "recipe")
    whole = schedule(SIZES["1M"], float(data["template"]))
    var = var.over(Scales(data["scales"].tolist(), whole.last))
    chosen = torch.from_numpy(data["positions"])
    tables = rotary(var.scales, var.arch.head_width, var.device)
    close(tables.cos_Lp[chosen], data["rope_cos"], TABLE)
    close(tables.sin_Lp[chosen], data["rope_sin"], TABLE)
    latent_bits, patchify = int(data["latent_bits"]), bool(data["patchify"])
    pyramid = BitPyramid(var.scales, latent_bits, patchify, torch.ones(1))
    bits = torch.from_numpy(data["bits"]).long()
    codes = data["codes_ch0_3"]
    close(pyramid.accumulate(bits)[:, : codes.shape[1]], codes, SUM)
    inputs = pyramid.teacher_inputs(bits)
    close(inputs[:, chosen[1:] - 1], data["inputs"], SUM)
    prompts = TextPrompts.of(texts(data))
    with torch.no_grad():
        logits = var(prompts.guided(), inputs.repeat(2, 1, 1))
    close(logits[:, chosen], data["tf_logits"], HIDDEN)
    close(logits.mean(-1), data["tf_logits_mean"], HIDDEN)
    close(logits.abs().amax(-1), data["tf_logits_absmax"], HIDDEN)
    scale_of = var.scales.scale_of_L()[chosen]
    for place, scale in enumerate(scale_of.tolist()):
        cfg, tau = float(data["logits.cfg"][scale]), float(data["logits.tau"][scale])
        guided = mixed_logits(logits[:, chosen[place] : chosen[place] + 1], cfg, tau, [0])
        close(guided[:, 0], data["logits.guided"][:, place], GUIDED)
