"""The trainer of the demo model, as processes on tiny images: what it writes, going on after a
kill, and its mistakes. Its parts are held against definitions written out."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import varptq
from varptq.models.state_file import read_state

# One worker for the whole file: the model is trained once.
pytestmark = pytest.mark.xdist_group("train-demo")

REPOSITORY = Path(__file__).parents[2]
FOLDER = REPOSITORY / "examples" / "train_demo"
Command = Callable[..., tuple[int, str, str]]
FILES = ("vae_demo.safetensors", "var_demo.safetensors")
# The smallest that norms of 32 groups allow: 8 x 8 images, tokens of sides 1, 2 and 4.
TINY: dict[str, Any] = {
    "sides": [1, 2, 4],
    "vqvae": {
        "ch_mult": [1, 1],
        "num_res_blocks": 1,
        "code_dim": 8,
        "codebook_size": 16,
        "restart_every": 4,
        "schedule": {"steps": 9, "batch": 6, "learning_rate": 4e-3, "warmup": 3, "save_every": 2},
    },
    "var": {
        "width": 128,
        "depth": 2,
        "num_heads": 2,
        "schedule": {"steps": 9, "batch": 6, "learning_rate": 4e-3, "warmup": 3, "save_every": 2},
    },
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 13 training and 5 test images each, of a colour of their own with noise."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, count in (("train", 13), ("test", 5)):
        for colour, name in enumerate(("ant", "bee", "cat")):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 80, (8, 8, 3), dtype=np.uint8)
                image[..., colour] += 160
                Image.fromarray(image).save(folder / part / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture
def train(
    parts: dict[str, ModuleType],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[int, str, str]]:
    """The command within this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), "--threads", "1"])
        code = parts["train"].main()
        return code, *capsys.readouterr()

    return run


Process = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def process(warm: Path) -> Process:
    """The command in a process of its own."""

    def start(*words: object) -> subprocess.Popen[str]:
        program = [warm / "python", FOLDER / "train.py", *words, "--threads", 1]
        return subprocess.Popen(list(map(str, program)), stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="module")
def trained(
    images: Path, recipe: Path, process: Process, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("trained")
    started = process("--data", images, "--recipe", recipe, "--out", out)
    _, error = started.communicate(timeout=300)
    assert started.returncode == 0, error
    return out


@pytest.mark.slow
def test_the_files_are_a_model_and_a_record(trained: Path) -> None:
    pipe = varptq.load_model(var=trained / FILES[1], vae=trained / FILES[0])
    assert (pipe.var.arch.num_classes, pipe.scales.plain(), pipe.vae.image_size) == (
        3,
        [1, 2, 4],
        (8, 8),
    )
    output = varptq.generate(pipe, [0, 1, 2], seed=0)
    assert output.images is not None and output.images.shape == (3, 3, 8, 8)
    # Names that upstream's modules have beyond ours, so that it loads them strictly.
    state = read_state(trained / FILES[0], "vae")
    assert state["quantize.ema_vocab_hit_SV"].shape == (3, 16)
    record = json.loads((trained / "record.json").read_text())
    assert record["images"] == [39, 15]
    assert [losses[-1][0] for losses in record["losses"].values()] == [9, 9]
    measures = record["measures"]
    # Better than one grey for all images, and than guessing among 16 entries.
    assert measures["psnr"] > 8 and measures["test_loss"] < math.log(16)


@pytest.mark.slow
def test_the_mask_hides_finer_keys(trained: Path) -> None:
    from safetensors import safe_open

    with safe_open(trained / FILES[1], "pt") as file:
        mask = file.get_tensor("attn_bias_for_masking")
    assert mask.shape == (1, 1, 21, 21)
    scale = [0] * 1 + [1] * 4 + [2] * 16
    for query in range(21):
        for key in range(21):
            seen = scale[query] >= scale[key]
            assert mask[0, 0, query, key] == (0 if seen else -math.inf)


@pytest.mark.slow
def test_a_finished_run_is_only_read(
    train: Command, trained: Path, images: Path, recipe: Path
) -> None:
    before = [(trained / name).read_bytes() for name in FILES]
    states = [(trained / f"{name}.state.pt").stat().st_mtime_ns for name in ("vqvae", "var")]
    code, _, error = train("--data", images, "--recipe", recipe, "--out", trained)
    assert code == 0, error
    assert [(trained / name).read_bytes() for name in FILES] == before
    after = [(trained / f"{name}.state.pt").stat().st_mtime_ns for name in ("vqvae", "var")]
    assert after == states


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_weights(
    train: Command, process: Process, trained: Path, images: Path, recipe: Path, tmp_path: Path
) -> None:
    """Killed after the first state of each stage, every time gone on with in another process."""
    words = ("--data", images, "--recipe", recipe, "--out", tmp_path)
    for stage in ("vqvae", "var"):
        started = process(*words)
        state, deadline = tmp_path / f"{stage}.state.pt", time.monotonic() + 300
        while not state.exists():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        started.send_signal(signal.SIGKILL)
        started.communicate()
        assert started.returncode == -signal.SIGKILL
        assert torch.load(state, weights_only=True)["step"] < 9
    assert not (tmp_path / "record.json").exists()
    code, _, error = train(*words)
    assert code == 0, error
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


@pytest.mark.slow
def test_other_settings_do_not_go_on_with_a_state(
    train: Command, trained: Path, images: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**TINY, "seed": 1}))
    code, _, error = train("--data", images, "--recipe", path, "--out", trained)
    assert code == 2 and "is the state of another recipe" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sides": [1, 2, 8]}, "8 x 8, expected 16 x 16"),
        ({"vqvae": {**TINY["vqvae"], "perceptual": 1}}, "--lpips go together"),
        ({"speed": 3}, "unknown field 'speed'"),
        ({"var": {**TINY["var"], "schedule": {"steps": 0, "learning_rate": 1}}}, "steps is 0"),
    ],
    ids=["size", "perceptual", "unknown", "steps"],
)
def test_mistakes_are_one_line(
    train: Command, images: Path, tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**TINY, **change}))
    code, out, error = train("--data", images, "--recipe", path, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and expected in error and error.count("\n") == 1


def test_images_that_are_not_there(train: Command, tmp_path: Path) -> None:
    code, _, error = train("--data", tmp_path, "--out", tmp_path / "out")
    assert code == 2 and "no folders train/<class>" in error


def test_the_binary_version_is_read(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    rows = np.random.default_rng(1).integers(0, 256, (6, 3, 3073), dtype=np.uint8)
    rows[:, :, 0] %= 10
    rows[0, 0, 0] = 9
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, content in zip(names, rows, strict=True):
        content.tofile(tmp_path / name)
    dataset = parts["data"].load(tmp_path, tmp_path / "cache.npz", 32)
    assert dataset.num_classes == 10 and len(dataset.train.labels) == 15
    assert dataset.train.labels.tolist() == rows[:5, :, 0].flatten().tolist()
    pixel = dataset.train.pixels[4, 1, 2, 3]
    assert int(pixel) == rows[1, 1, 1 + 1024 + 2 * 32 + 3]
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(varptq.VarptqError, match=r"test_batch\.bin: not rows of 1 label"):
        parts["data"].load(tmp_path, tmp_path / "again.npz", 32)


def test_an_epoch_sees_every_image_once(parts: dict[str, ModuleType]) -> None:
    batches = parts["loop"].Batches(23, 5, 0, "stage")
    first = torch.cat([batches(step) for step in range(4)])
    second = torch.cat([batches(step) for step in range(4, 8)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 20
    assert first.tolist() != second.tolist()
    # Any step alone, as after a restart.
    assert parts["loop"].Batches(23, 5, 0, "stage")(6).tolist() == batches(6).tolist()


def test_the_learning_rate_warms_up_and_falls(parts: dict[str, ModuleType]) -> None:
    schedule = parts["recipe"].Schedule(steps=110, learning_rate=2.0, warmup=10, final=0.1)
    rate = [parts["loop"].learning_rate(schedule, step) for step in range(111)]
    assert rate[0] == 0.2 and rate[9] == rate[10] == 2.0
    assert rate[60] == pytest.approx((2.0 + 0.2) / 2) and rate[110] == pytest.approx(0.2)
    assert rate[10:] == sorted(rate[10:], reverse=True)


def test_training_tokens_are_those_of_encoding(parts: dict[str, ModuleType]) -> None:
    """The training pass sums the pyramid that `encode` and `accumulate` define."""
    recipe = parts["recipe"].Recipe.from_dict(TINY)
    vqvae = parts["vqvae_stage"].build(recipe, torch.device("cpu"))
    x = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = vqvae.features(x)
    f_hat, loss = parts["vqvae_stage"].quantized(vqvae.quantize, features, 0.25)
    expected = vqvae.quantize.accumulate(vqvae.encode(x))
    torch.testing.assert_close(f_hat, expected, rtol=0, atol=1e-5)
    # The image's gradient passes f_hat as if it were the features; the codebook has its own loss.
    grad = torch.autograd.grad(f_hat.sum(), features, retain_graph=True)[0]
    assert (grad == 1).all()
    assert torch.autograd.grad(loss, vqvae.quantize.embedding.weight)[0].abs().sum() > 0
    hits = vqvae.quantize.get_buffer("ema_vocab_hit_SV")
    share = 1 - parts["vqvae_stage"].HIT_DECAY
    assert hits.sum(1).tolist() == pytest.approx([3 * n * share for n in (1, 4, 16)])
