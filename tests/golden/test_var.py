"""Parity of the float transformer with the reference: teacher-forced, cached, forced tokens, shared
AdaLN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from golden.conftest import Golden
from golden.recipe import recipe_state
from varptq.models.generate import ScaleEvent, generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.reading import guided_logits
from varptq.models.var import checkpoint
from varptq.models.var.transformer import VAR

# Float summation order is all that may differ (golden README, "Tolerances").
LOGITS, GUIDED, IMAGE = 1e-4, 3e-4, 1e-4


def load(golden: Golden, data: dict[str, np.ndarray]) -> Pipeline:
    return load_model(
        var=golden.path(str(data["var_file"])), vae=golden.path(str(data["vae_file"]))
    )


def error(ours: Tensor, theirs: np.ndarray) -> float:
    return float((ours.double() - torch.from_numpy(theirs).double()).abs().max())


def test_architecture_is_read_off_the_tensors(golden: Golden, a_file: str) -> None:
    data = golden.npz(a_file)
    arch = load(golden, data).var.arch
    assert arch.scales.plain() == list(data["patch_nums"])
    for name, key in [
        ("num_classes", "num_classes"),
        ("depth", "depth"),
        ("width", "width"),
        ("num_heads", "num_heads"),
        ("l2_norm", "attn_l2_norm"),
        ("shared_adaln", "shared_aln"),
        ("codebook_size", "V"),
        ("code_dim", "Cvae"),
    ]:
        assert getattr(arch, name) == data[key], name


def test_teacher_forced_logits(golden: Golden, a_file: str) -> None:
    data = golden.npz(a_file)
    pipe = load(golden, data)
    labels, inputs = torch.from_numpy(data["labels"]), torch.from_numpy(data["tf_inputs"])
    assert error(pipe.var(labels, inputs), data["tf_logits"]) <= LOGITS
    unconditional = torch.full_like(labels, pipe.var.arch.num_classes)
    assert error(pipe.var(unconditional, inputs), data["tf_logits_uncond"]) <= LOGITS


@pytest.mark.parametrize("batch_size", [1, 16])
def test_cached_generation_with_forced_tokens(golden: Golden, a_file: str, batch_size: int) -> None:
    data = golden.npz(a_file)
    pipe = load(golden, data)
    ids = torch.from_numpy(data["ids"])
    for index, cfg in enumerate(data["cfg_values"]):
        logits = torch.empty(data[f"guided_logits_{index}"].shape)
        f_hats = torch.empty(data["fhat"].shape)
        slices = pipe.scales.slices()

        def keep(
            event: ScaleEvent, logits: Tensor = logits, f_hats: Tensor = f_hats, slices=slices
        ) -> None:
            logits[event.rows, slices[event.scale]] = event.logits_BlV
            f_hats[event.scale, event.rows] = event.f_hat

        output = generate(
            pipe,
            data["labels"].tolist(),
            cfg=float(cfg),
            top_k=0,
            top_p=0,
            forced=ids,
            on_scale=keep,
            batch_size=batch_size,
        )
        assert error(logits, data[f"guided_logits_{index}"]) <= GUIDED
        assert error(f_hats, data["fhat"]) <= LOGITS
        assert output.images is not None
        assert error(output.images, data["image"]) <= IMAGE
        assert torch.equal(output.tokens, ids)


def test_both_ways_through_the_transformer_agree(golden: Golden, a_file: str) -> None:
    data = golden.npz(a_file)
    pipe = load(golden, data)
    labels, ids = torch.from_numpy(data["labels"]), torch.from_numpy(data["ids"])
    cfg = float(data["cfg_values"][0])
    parts = [logits for _, logits in guided_logits(pipe, labels, ids, cfg)]
    assert error(torch.cat(parts, dim=1), data["guided_logits_0"]) <= GUIDED


def test_forced_positions_reproduce_an_edit(golden: Golden, a_file: str) -> None:
    """Tokens mixed from a source and a candidate image give the reference's guided logits."""
    data = golden.npz(a_file)
    pipe = load(golden, data)
    mixed = torch.from_numpy(data["edit_mixed_ids"][:1])
    logits = torch.empty(data["edit_guided_logits"].shape)
    slices = pipe.scales.slices()

    def keep(event: ScaleEvent) -> None:
        logits[event.rows, slices[event.scale]] = event.logits_BlV

    generate(
        pipe,
        data["labels"][1:2].tolist(),
        cfg=float(data["edit_cfg"]),
        top_k=0,
        top_p=0,
        forced=mixed,
        on_scale=keep,
        decode=False,
    )
    # Guidance 3 amplifies float noise by 1 + 2t.
    assert error(logits, data["edit_guided_logits"]) <= 2 * GUIDED


@pytest.mark.slow
def test_real_width_by_recipe(golden: Golden) -> None:
    data = golden.npz("h_recipe_var.npz")
    vae_data = golden.npz(str(data["vae_file"]))
    del vae_data
    state = recipe_state(data)
    sides = torch.from_numpy(data["patch_nums"])
    state["lvl_1L"] = torch.repeat_interleave(torch.arange(len(sides)), sides**2).view(1, -1)
    for layer in range(int(data["depth"])):
        state[f"blocks.{layer}.attn.zero_k_bias"] = torch.zeros(int(data["width"]))
    model = VAR(checkpoint.infer_var(state)).eval()
    checkpoint.load_strict(model, state, "recipe")
    for row, name in enumerate(
        ["pos_start", "class_emb.weight", "blocks.0.attn.mat_qkv.weight", "head.weight"]
    ):
        np.testing.assert_array_equal(state[name].flatten()[:4].numpy(), data["check_values"][row])
    inputs = _recipe_inputs(golden, data)
    with torch.no_grad():
        logits = model(torch.from_numpy(data["labels"]), inputs)
    positions = torch.from_numpy(data["positions"])
    assert error(logits[:, positions], data["tf_logits"]) <= LOGITS
    assert error(logits.mean(-1), data["tf_logits_mean"]) <= LOGITS
    assert error(logits.abs().amax(-1), data["tf_logits_absmax"]) <= LOGITS


def _recipe_inputs(golden: Golden, data: dict[str, np.ndarray]) -> Tensor:
    """Teacher inputs of the recipe's ids under the recipe's VQVAE at the recipe's sides."""
    from varptq.models.scales import Scales
    from varptq.models.var.vqvae import VQVAE

    state = recipe_state(golden.npz(str(data["vae_file"])))
    num_scales = len(data["patch_nums"])
    vocabulary = state["quantize.embedding.weight"].shape[0]
    state.setdefault("quantize.ema_vocab_hit_SV", torch.zeros(num_scales, vocabulary))
    vae = VQVAE(checkpoint.infer_vqvae(state), Scales(data["patch_nums"])).eval()
    checkpoint.load_strict(vae, state, "recipe")
    with torch.no_grad():
        return vae.teacher_inputs(torch.from_numpy(data["ids"]))
