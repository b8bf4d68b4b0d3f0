"""Infinity's checkpoint files: both layouts of names, every wrapper, one line for every misfit."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.checkpoint_states import assert_same, one_line, var_state
from helpers.checkpoint_states import vae_state as vqvae_state
from helpers.infinity_states import ARCH, PRESET, VAE_ARCH, State, sized, states, theirs, wrapped
from varptq.errors import CheckpointError
from varptq.models.infinity.checkpoint import SHOWN, infer_infinity, own_names
from varptq.models.infinity.schedules import schedule
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.presets import PRESETS


@pytest.fixture(autouse=True)
def _no_warning():
    """What is ignored without a reason would warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def write(folder: Path, var: Any, vae: Any) -> tuple[Path, Path]:
    paths = folder / "var.pth", folder / "vae.pth"
    for path, content in zip(paths, (var, vae), strict=True):
        torch.save(content, path)
    return paths


def load(folder: Path, var: Any, vae: Any) -> Pipeline:
    paths = write(folder, var, vae)
    return load_model(var=paths[0], vae=paths[1])


def check(pipe: Pipeline, var: State, vae: State) -> None:
    assert pipe.family == "infinity"
    assert pipe.var.arch == dataclasses.replace(ARCH, scales=schedule(13))
    assert pipe.vae.arch == VAE_ARCH and pipe.vae.scales == pipe.var.scales
    assert_same(dict(sorted(pipe.var.state_dict().items())), dict(sorted(var.items())))
    assert_same(dict(sorted(pipe.vae.state_dict().items())), dict(sorted(vae.items())))


@pytest.mark.parametrize("per_chunk", [0, 1, 2, 4])
def test_both_layouts_of_blocks(per_chunk: int, tmp_path: Path) -> None:
    var, vae = states()
    check(load(tmp_path, theirs(var, per_chunk), wrapped(vae)), var, vae)


def test_what_files_leave_out_or_write_otherwise(tmp_path: Path) -> None:
    var, vae = states()
    shorter = {n: t for n, t in theirs(var, 2).items() if "zero_k_bias" not in n}
    for name, tensor in shorter.items():
        if name.endswith("scale_mul_1H11"):
            shorter[name] = tensor.reshape(1, 1, -1, 1)
    check(load(tmp_path, shorter, vae), var, vae)


def test_files_of_trainers_and_programs(tmp_path: Path) -> None:
    var, vae = states()
    named = theirs(var, 2)
    moments = {"state": {name: tensor for name, tensor in named.items()}}
    content = {"epoch": 3, "trainer": {"gpt_fsdp": named, "gpt_opt": moments}}
    leftovers = {"vae": wrapped(vae), "vae_ema": wrapped(vae), "disc": {"a": torch.ones(1)}}
    check(load(tmp_path, content, leftovers), var, vae)
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in named.items()}
    check(load(tmp_path, {"state_dict": compiled}, {"vae": vae}), var, vae)


def sharded(folder: Path, named: State) -> Path:
    """Two shards and their index, which is returned."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for part in range(2):
        file = f"model-0000{part + 1}-of-00002.safetensors"
        shard = {name: t.contiguous() for i, (name, t) in enumerate(named.items()) if i % 2 == part}
        save_file(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_a_folder_of_shards(tmp_path: Path) -> None:
    var, vae = states()
    index = sharded(folder := tmp_path / "infinity_weights", theirs(var, 2))
    autoencoder = write(tmp_path, {}, {"vae": wrapped(vae)})[1]
    for path in (folder, index):
        check(load_model(var=path, vae=autoencoder), var, vae)
    small = load_model(var=folder, vae=autoencoder, dtype="bfloat16")
    assert {t.dtype for t in small.var.state_dict().values()} == {torch.bfloat16}


def test_optimizer_states_beside_the_weights(tmp_path: Path) -> None:
    var, vae = states()
    named = theirs(var, 2)
    autoencoder = write(tmp_path, {}, {"vae": wrapped(vae)})[1]
    index = sharded(tmp_path / "weights", named)
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}}, index.parent / "optimizer.pt")
    check(load_model(var=index.parent, vae=autoencoder), var, vae)
    (folder := tmp_path / "single").mkdir()
    torch.save(named, folder / "model.pth")
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pth")
    with pytest.raises(CheckpointError) as caught:
        load_model(var=folder, vae=autoencoder)
    one_line(caught, "holds 2 checkpoints (model.pth, optimizer.pth)", "give one")


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    var, vae = states()
    named = theirs(var, 2)
    autoencoder = write(tmp_path, {}, {"vae": wrapped(vae)})[1]
    index = sharded(tmp_path / "twice", named)
    text, name = index.read_text(), next(iter(named))
    other = json.dumps({name: "model-00002-of-00002.safetensors"})[1:-1]
    index.write_text(text.replace("}}", f", {other}}}}}"))
    with pytest.raises(CheckpointError) as caught:
        load_model(var=index, vae=autoencoder)
    one_line(caught, index.name, f"names '{name}' twice")
    index.write_text(text)
    (index.parent / "model-00002-of-00002.safetensors").unlink()
    for path in (index, index.parent):
        with pytest.raises(CheckpointError) as caught:
            load_model(var=path, vae=autoencoder)
        one_line(caught, "its shard model-00002-of-00002.safetensors is missing")


def test_a_preset_says_the_size_that_tensors_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    var, vae = states()
    files = map(str, write(tmp_path, theirs(var, 2), wrapped(vae)))
    entry = dataclasses.replace(
        PRESET, transformer_file=next(files), autoencoder_file=next(files), size="0.06M:2"
    )
    monkeypatch.setitem(PRESETS, "tiny", entry)
    pipe = load_model("tiny")
    assert pipe.scales == pipe.vae.scales == schedule(7, 2.0)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    var, vae = states()
    more = {**theirs(var, 2), "d_rope": torch.ones(3)}
    with pytest.warns(UserWarning, match="ignored 1 tensors: d_rope"):
        check(load(tmp_path, more, vae), var, vae)
    more = {**theirs(var, 2), **{f"head_ema.{i}": torch.ones(3) for i in range(30)}}
    with pytest.warns(UserWarning, match=r"ignored 30 tensors: head_ema.0, .*, \.\.\.") as said:
        check(load(tmp_path, more, vae), var, vae)
    assert str(said[0].message).count("head_ema") == SHOWN
    more = {**theirs(var), **{f"blocks.{i}.ca_gamma": torch.ones(1, 1, 32) for i in range(4)}}
    with pytest.warns(UserWarning, match=r"4 tensors such as 'blocks.0.ca_gamma' scale the cross"):
        check(load(tmp_path, more, vae), var, vae)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("block_chunks.1.module.0.ffn.fcg.weight", "SwiGLU"),
        ("norm0_ve.weight", "norm of the inputs"),
        ("head.0.weight", "several layers"),
        ("block_chunks.0.module.1.ada_lin.1.weight", "AdaLN layer per block"),
    ],
)
def test_variants_that_were_not_released(name: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        own_names({**theirs(states()[0], 2), name: torch.ones(2, 2)})
    one_line(caught, words, "no released model has")


def test_an_rms_norm_before_cross_attention() -> None:
    state = {n: t for n, t in theirs(states()[0]).items() if not n.endswith("ca_norm.bias")}
    with pytest.raises(CheckpointError) as caught:
        own_names(state)
    one_line(caught, "blocks.0.cross_norm.weight", "RMS norm")


def test_a_gap_in_the_chunks() -> None:
    state = theirs(states()[0], 2)
    gap = {n: t for n, t in state.items() if not n.startswith("block_chunks.1.module.1.")}
    with pytest.raises(CheckpointError) as caught:
        own_names(gap)
    one_line(caught, "block_chunks.1.module.1.*", "2 chunks of 2 blocks")


# Blocks like others, which a file that lacks a part of them would tell of in the same way.
ALIKE = ("blocks.1.", "blocks.2.", "mid.block_2.", ".block.1.")
# What a file may lack.
OPTIONAL = ("zero_k_bias", "cfg_uncond")


@pytest.mark.slow
def test_any_missing_tensor_is_named(tmp_path: Path) -> None:
    var, vae = states()
    paths = tmp_path / "var.safetensors", tmp_path / "vae.safetensors"
    for path, state in zip(paths, (theirs(var, 2), vae), strict=True):
        save_file(state, path)
    for path, state in zip(paths, (var, vae), strict=True):
        whole = path.read_bytes()
        for name in state:
            # Of blocks the first and the last: the others are read by the same lines.
            if any(part in name for part in (*ALIKE, *OPTIONAL, "blocks.1.", "blocks.2.")):
                continue
            left = {other: tensor for other, tensor in state.items() if other != name}
            save_file(left if state is vae else theirs(left, 2), path)
            with pytest.raises(CheckpointError) as caught:
                load_model(var=paths[0], vae=paths[1])
            assert "missing" in one_line(caught) or "no bias" in one_line(caught)
        path.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("pos_start", (1, 32), "pos_start"),
        ("head.weight", (2**16, 32), "two for each of 16 bits"),
        ("head.weight", (32, 31), "head.weight"),
        ("blocks.1.attn.mat_qkv.weight", (96, 31), "mat_qkv"),
        ("blocks.3.cross.mat_kv.weight", (64, 64), "cross.mat_kv"),
        ("blocks.0.attn.scale_mul_1H11", (1, 3, 1, 1), "in 3 heads"),
        ("blocks.0.attn.scale_mul_1H11", (1, 16, 1, 1), "multiple of 4 channels"),
        ("text_pool.query_1Hc", (1, 4, 9), "text_proj_for_sos.ca.mat_q"),
        ("lvl_embed.weight", (15, 31), "lvl_embed"),
        ("word_embed.weight", (32, 0), "word_embed"),
    ],
)
def test_impossible_tensors(name: str, shape: tuple[int, ...], words: str) -> None:
    state = {**states()[0], name: torch.zeros(shape)}
    with pytest.raises(CheckpointError) as caught:
        infer_infinity(state)
    one_line(caught, words)


@pytest.mark.slow
def test_a_pair_that_does_not_belong_together(tmp_path: Path) -> None:
    var, vae = states()
    other = states(vae_arch=dataclasses.replace(VAE_ARCH, code_dim=5))[1]
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, var, other)
    one_line(caught, "16 bits", "5 of the autoencoder", "20 in patches")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, var, vqvae_state())
    one_line(caught, "quant_conv.weight", "VQVAE")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, var, {**vae, "encoder.mid.attn_1.q.weight": torch.ones(2)})
    one_line(caught, "attn_1.q.weight", "unexpected")
    plain = states(sized(token_bits=4))[0]
    assert not load(tmp_path, plain, vae).vae.arch.patchify


def test_files_in_the_wrong_place(tmp_path: Path) -> None:
    var, vae = states()
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, vae, var)
    one_line(caught)
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, var, var)
    one_line(caught, "holds an Infinity transformer", "Give it as var=")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, var_state(), vae)
    one_line(caught, "VQVAE")
    twice = {"gpt_fsdp": var, "gpt_ema": {n: t + 1 for n, t in var.items()}}
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, {"trainer": twice}, vae)
    one_line(caught, "holds 2 of Infinity transformer", "trainer.gpt_ema")
