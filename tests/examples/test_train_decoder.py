"""The decoder trained on: what its file keeps, going on after a stop, who learns from what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import varptq

DEMO = varptq.models.presets.ASSETS / "demo"
SMALL: dict[str, Any] = {
    "widths": [4, 8],
    "schedule": {"steps": 4, "batch": 2, "learning_rate": 1e-3, "warmup": 1, "save_every": 2},
}
FILE = "vae_demo.safetensors"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 test images in the binary format."""
    folder = tmp_path_factory.mktemp("cifar")
    random = np.random.default_rng(0)
    for name, count in [(f"data_batch_{i}", 5) for i in range(1, 6)] + [("test_batch", 8)]:
        rows = random.integers(0, 256, (count, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        rows.tofile(folder / f"{name}.bin")
    return folder


@pytest.fixture
def train(
    parts: dict[str, ModuleType],
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:
    def run(out: Path, recipe: dict[str, Any]) -> tuple[int, str, str]:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(recipe))
        words = ["--var", DEMO / "var_demo.safetensors", "--vae", DEMO / FILE, "--data", images]
        words += ["--out", out, "--recipe", path, "--threads", 1]
        monkeypatch.setattr(sys, "argv", ["decoder.py", *map(str, words)])
        code = parts["decoder"].main()
        return code, *capsys.readouterr()

    return run


@pytest.mark.slow
def test_only_the_decoder_changes(train: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, error = train(out, SMALL)
    assert code == 0, error
    before, after = load_file(DEMO / FILE), load_file(out / FILE)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    pipe = varptq.load_model(var=DEMO / "var_demo.safetensors", vae=out / FILE)
    assert varptq.generate(pipe, [3], seed=0).images is not None
    record = json.loads((out / "record.json").read_text())
    assert record["measures"] == json.loads(text) and record["losses"]["decoder"][-1][0] == 4
    assert record["measures"]["before"] != record["measures"]["after"]
    code, _, error = train(out, {**SMALL, "adversarial": 2.0})
    assert code == 2 and "is the state of another recipe" in error.splitlines()[-1]


@pytest.mark.slow
def test_a_state_is_gone_on_with(
    parts: dict[str, ModuleType], train: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its first state by an exception, as a kill between two steps would."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(whole, SMALL)[0] == 0
    stage = parts["decoder_stage"].stage

    def stopping(*arguments: Any) -> Any:
        made = stage(*arguments)
        loss = made.loss

        def stop(step: int) -> torch.Tensor:
            if step == 3:
                raise KeyboardInterrupt
            return loss(step)

        made.loss = stop
        return made

    with monkeypatch.context() as patch:
        patch.setattr(parts["decoder_stage"], "stage", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(cut, SMALL)
    assert torch.load(cut / "decoder.state.pt", weights_only=True)["step"] == 2
    assert not (cut / FILE).exists()
    assert train(cut, SMALL)[0] == 0
    assert (cut / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_each_side_learns_from_its_own_terms(parts: dict[str, ModuleType]) -> None:
    module = parts["decoder_stage"]
    recipe = parts["recipe"].DecoderRecipe.from_dict({**SMALL, "adversarial": 2.0, "bf16": False})
    vqvae = varptq.load_model("demo").vae
    pair = module.build(recipe, vqvae, torch.device("cpu"))
    draws = torch.Generator().manual_seed(0)
    real, fake = (torch.rand(2, 3, 32, 32, generator=draws).requires_grad_() for _ in range(2))
    weights = list(pair.discriminator.parameters())
    realism = module._realism(pair, real, fake, recipe.matching)
    assert all(
        part is None
        for part in torch.autograd.grad(realism, weights, allow_unused=True, retain_graph=True)
    )
    assert torch.autograd.grad(realism, fake)[0].abs().sum() > 0
    judged = module._judge(pair, real, fake.detach())
    found = torch.autograd.grad(judged, weights)
    # That of the last bias is the difference of two counts, which may be none.
    assert all(part.abs().sum() > 0 for part in found if part.dim() > 1)
    # The encoder and the codebook stay.
    assert not any(
        p.requires_grad for p in (*vqvae.encoder.parameters(), *vqvae.quantize.parameters())
    )


def test_the_adversarial_gradient_has_the_length_that_is_asked_for(
    parts: dict[str, ModuleType], images: Path, tmp_path: Path
) -> None:
    """That of the loss at the rebuilt image is the distance's plus one of this length."""
    module = parts["decoder_stage"]
    dataset = parts["data"].load(images, tmp_path / "images.npz", 32)
    vqvae = varptq.load_model("demo").vae
    ids_2NL = torch.zeros(2, len(dataset.train.labels), 130, dtype=torch.int64)
    gradients = []
    for adversarial in (0.0, 0.5, 2.0):
        given = {**SMALL, "adversarial": adversarial, "bf16": False}
        recipe = parts["recipe"].DecoderRecipe.from_dict(given)
        pair = module.build(recipe, vqvae, torch.device("cpu"))
        made = module.stage(recipe, pair, vqvae, ids_2NL, dataset.train, torch.device("cpu"), {})
        seen: list[torch.Tensor] = []
        handle = pair.decoder.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1]))
        loss = made.loss(0)
        handle.remove()
        gradients.append(torch.autograd.grad(loss, seen[0])[0])
    distance, half, double = gradients
    for found, share in ((half, 0.5), (double, 2.0)):
        assert float((found - distance).norm() / distance.norm()) == pytest.approx(share, rel=1e-4)
