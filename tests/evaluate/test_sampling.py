"""Sets of samples: a stopped run goes on to the same bytes, and other tools can read the export."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from varptq.calibrate.quantize import quantize
from varptq.errors import InputError, OutputError
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.sampling import SampleSet, model_sha256, sample_set
from varptq.models.generate import generate
from varptq.models.pipeline import Pipeline, load_model
from varptq.models.prompts import balanced
from varptq.models.sampling import SamplingSettings
from varptq.pictures import to_pixels
from varptq.quant.config import QuantConfig
from varptq.quant.find import quant_linears

SRC = Path(__file__).parents[2] / "src"
SETTINGS = SamplingSettings(cfg=2, top_k=20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def sampled(pipe: Pipeline, folder: Path, count: int, shard: int = 3, batch: int = 2) -> SampleSet:
    return sample_set(
        pipe, folder, count=count, seed=5, settings=SETTINGS, batch=batch, shard_size=shard
    )


@pytest.fixture
def seven(tiny: Pipeline, tmp_path: Path) -> SampleSet:
    """Shards of 3, 3 and 1."""
    return sampled(tiny, tmp_path / "seven", 7)


@pytest.mark.parametrize(("count", "shard", "batch"), [(1, 1, 1), (7, 3, 2), (13, 5, 16)])
def test_images_are_those_of_the_generator(
    tiny: Pipeline, tmp_path: Path, count: int, shard: int, batch: int
) -> None:
    samples = sampled(tiny, tmp_path / "set", count, shard, batch)
    labels, tokens = samples.head(count)
    assert torch.equal(labels, balanced(tiny.var.arch.num_classes, count, 5))
    expected = generate(tiny, labels, seed=5, batch_size=count, **SETTINGS.to_dict())
    assert expected.images is not None
    assert torch.equal(tokens, expected.tokens)
    images = np.concatenate([part.images for part in samples.shards()])
    # Another batch sums in another order, so a value may round to its neighbour.
    assert np.abs(images.astype(int) - to_pixels(expected.images)).max() <= 1
    assert [part.first for part in samples.shards()] == list(range(0, count, shard))


def test_any_classes_in_a_row_are_different() -> None:
    labels = balanced(5, 13, seed=0).tolist()
    assert all(len(set(labels[i : i + 5])) == 5 for i in range(8))
    assert labels != sorted(labels) and labels[:7] == balanced(5, 7, seed=0).tolist()
    assert labels != balanced(5, 13, seed=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("lost", [("00000.npz",), ("00001.npz",), ("00001.npz", "00002.npz")])
def test_lost_shards_come_back_the_same(
    tiny: Pipeline, seven: SampleSet, lost: tuple[str, ...]
) -> None:
    before = contents(seven.folder)
    for name in lost:
        (seven.folder / name).unlink()
    (seven.folder / ".varptq-0123.tmp").write_bytes(b"half of a shard")
    sampled(tiny, seven.folder, 7)
    assert contents(seven.folder) == before


@pytest.mark.slow
def test_a_set_grows_and_shrinks(tiny: Pipeline, seven: SampleSet, tmp_path: Path) -> None:
    direct = sampled(tiny, tmp_path / "direct", 11)
    grown = sampled(tiny, seven.folder, 11)
    assert contents(grown.folder) == contents(direct.folder)
    assert grown.sha256() == direct.sha256()
    fewer = sampled(tiny, seven.folder, 4)
    assert contents(fewer.folder) == contents(direct.folder)
    assert len(fewer) == sum(len(part.images) for part in fewer.shards()) == 4


def test_progress_begins_with_what_is_there(tiny: Pipeline, seven: SampleSet) -> None:
    (seven.folder / "00001.npz").unlink()
    calls: list[tuple[int, int]] = []

    def listen(stage: str, done: int, total: int, info: str = "") -> None:
        assert stage == "samples of tiny"
        calls.append((done, total))

    sample_set(
        tiny,
        seven.folder,
        count=7,
        seed=5,
        settings=SETTINGS,
        batch=2,
        shard_size=3,
        progress=listen,
    )
    assert calls == [(4, 7), (4, 7), (6, 7), (7, 7)]


SCRIPT = """
import sys, torch, varptq
from varptq.evaluate.sampling import sample_set
torch.set_num_threads(1)
sample_set(varptq.load_model("demo"), sys.argv[1], count=20, seed=3, batch=3, shard_size=4)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(tmp_path: Path, warm: Path) -> None:
    call = [str(warm / "python"), "-c", SCRIPT, str(tmp_path / "killed")]
    process = subprocess.Popen(call, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "00001.npz").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until nobody is left who could write
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "00004.npz").exists()
    subprocess.run(call, check=True)
    sample_set(load_model("demo"), tmp_path / "direct", count=20, seed=3, batch=3, shard_size=4)
    assert contents(tmp_path / "killed") == contents(tmp_path / "direct")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed 5, not 6"),
        ({"settings": SETTINGS.replace(cfg=3)}, "sampling {'cfg': 2.0}, not {'cfg': 3.0}"),
        ({"settings": SETTINGS.replace(top_p=0.5)}, "not {'top_p': 0.5}"),
        ({"shard_size": 4}, "shard_size 3, not 4"),
    ],
)
def test_samples_of_other_settings_are_not_mixed(
    tiny: Pipeline, seven: SampleSet, change: dict[str, object], named: str
) -> None:
    before = contents(seven.folder)
    asked = {"count": 7, "seed": 5, "settings": SETTINGS, "shard_size": 3, **change}
    with pytest.raises(OutputError, match="choose another folder or force") as error:
        sample_set(tiny, seven.folder, **asked)
    assert named in str(error.value) and contents(seven.folder) == before
    sample_set(tiny, seven.folder, force=True, **asked)
    assert contents(seven.folder) != before


@pytest.mark.slow
def test_samples_of_another_model_are_not_mixed(
    tiny: Pipeline, tiny_no_l2: Pipeline, seven: SampleSet
) -> None:
    with pytest.raises(OutputError, match="model_sha256"):
        sampled(tiny_no_l2, seven.folder, 7)
    (seven.folder / "samples.json").write_text("{")
    with pytest.raises(OutputError, match="cannot be compared"):
        sampled(tiny, seven.folder, 7)
    (seven.folder / "samples.json").unlink()
    with pytest.raises(OutputError, match="of another run"):
        sampled(tiny_no_l2, seven.folder, 7)


@pytest.mark.slow
def test_force_leaves_other_files_alone(
    tiny_no_l2: Pipeline, seven: SampleSet, tmp_path: Path
) -> None:
    (seven.folder / "notes.npz").write_text("mine")
    other = sample_set(tiny_no_l2, seven.folder, count=2, force=True)
    assert sorted(contents(other.folder)) == ["00000.npz", "notes.npz", "samples.json"]


@pytest.mark.slow
def test_what_decides_the_images_decides_the_fingerprint(tiny: Pipeline) -> None:
    quantized = quantize(tiny, QuantConfig.preset("w4a4+paper"), method="rtn")
    found = [model_sha256(tiny), model_sha256(quantized)]
    quantized.theta = 0.5
    found.append(model_sha256(quantized))
    quant_linears(quantized.var)["head"].scale.mul_(2)
    found.append(model_sha256(quantized))
    assert len(set(found)) == 4
    assert model_sha256(tiny) == found[0]


@pytest.mark.slow
def test_a_damaged_shard_is_made_again(tiny: Pipeline, seven: SampleSet) -> None:
    before = contents(seven.folder)
    path = seven.folder / "00001.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"00001\.npz: cannot be read .*; delete it"):
        list(seven.shards())
    sampled(tiny, seven.folder, 7)
    assert contents(seven.folder) == before


@pytest.mark.parametrize("name", ["count", "batch", "shard_size"])
def test_numbers_below_one_are_refused(tiny: Pipeline, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} 0: must be at least 1"):
        sample_set(tiny, tmp_path, **{"count": 1, name: 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_digest_does_not_see_shards(tiny: Pipeline, seven: SampleSet, tmp_path: Path) -> None:
    # Batches of one: then every image is summed in the same order.
    first, second = (sampled(tiny, tmp_path / str(n), 7, shard=n, batch=1) for n in (2, 5))
    assert first.sha256() == second.sha256() != sampled(tiny, tmp_path / "six", 6).sha256()


def test_the_npz_is_a_fixed_shuffle_that_adm_reads(seven: SampleSet, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        seven.export_npz(tmp_path / "new" / name)
    assert (tmp_path / "new/a.npz").read_bytes() == (tmp_path / "new/b.npz").read_bytes()
    images = np.concatenate([part.images for part in seven.shards()])
    with np.load(tmp_path / "new/a.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        shuffled, labels = arrays["arr_0"], arrays["arr_1"]
    assert (shuffled.dtype, shuffled.shape) == (np.uint8, images.shape)
    pairs = sorted((image.tobytes(), label) for image, label in zip(shuffled, labels, strict=True))
    wanted = zip(images, seven.head(7)[0].tolist(), strict=True)
    assert pairs == sorted((image.tobytes(), label) for image, label in wanted)
    assert (shuffled != images).any()
    assert len(list((tmp_path / "new").iterdir())) == 2
    files = ImageFiles.open(tmp_path / "new/a.npz")
    assert (files.count, files.warning) == (7, None)
    assert (np.concatenate(list(files.batches(3))) == shuffled).all()


@pytest.mark.slow
def test_the_png_folder_holds_this_set_and_no_other(
    tiny: Pipeline, seven: SampleSet, tmp_path: Path
) -> None:
    seven.export_png(tmp_path / "png")
    assert len(list((tmp_path / "png").iterdir())) == 7
    sampled(tiny, seven.folder, 4).export_png(tmp_path / "png")
    files = ImageFiles.open(tmp_path / "png")
    images = np.concatenate([part.images for part in seven.shards()])[:4]
    assert files.count == 4 and (np.concatenate(list(files.batches(3))) == images).all()
    with pytest.raises(OutputError, match=r"holds no 000000\.png"):
        seven.export_png(seven.folder)
