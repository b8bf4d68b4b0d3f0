"""Pieces of pages: no stranger's text becomes HTML; losses are read off a real calibration."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.quantize import quantize
from varptq.errors import InputError
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig
from varptq.web import measuring, parts
from varptq.web.jobs import Job, State
from varptq.web.losses import Losses

HOSTILE = '<img src=x onerror="alert(1)">&amp;'
STEPS = 7


def test_strange_names_are_escaped_wherever_they_stand() -> None:
    job = Job(HOSTILE, HOSTILE, lambda job: None, stage=HOSTILE, info=HOSTILE, done=1, total=3)
    pages = [parts.status(job, 2)]
    for state in State:
        job.state = state
        pages += [parts.status(job, 0), parts.queue([job])]
    pages += [
        parts.facts([(HOSTILE, HOSTILE)]),
        parts.note(HOSTILE),
        parts.heading(HOSTILE),
        parts.curves({HOSTILE: [(0, 1.0), (1, 0.5)]}),
        parts.strip([np.zeros((3, 3, 3), np.uint8)], HOSTILE),
        parts.pictures({HOSTILE: b"x"}),
    ]
    for page in pages:
        assert "<img src=x" not in page and 'onerror="' not in page


def test_a_report_runs_in_a_frame_that_may_do_nothing() -> None:
    frame = parts.page_frame("<script>alert('1')</script>\"", HOSTILE)
    assert 'sandbox=""' in frame and "<script>" not in frame


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"config": 3}', '{"config": {"name": "a"}, "suggestion": []}']
)
def test_an_analysis_of_another_version_has_no_facts(content: str, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.results_tab import suggested

    (tmp_path / "analysis.json").write_text(content)
    assert suggested(tmp_path / "analysis.json") == []


def test_units_say_which_codes_they_kept_and_at_what_loss() -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.quantize_tab import units_of

    units = [
        {"name": "a", "kept": "learned", "loss_nearest": 4.0, "loss_hard": 1.0, "loss_gptq": 2.0},
        {"name": "b", "kept": "gptq", "loss_nearest": 4.0, "loss_hard": 3.0, "loss_gptq": 2.0},
        {"name": "c", "kept": "nearest", "loss_nearest": 4.0, "loss_hard": 5.0, "loss_gptq": None},
    ]
    assert units_of(SimpleNamespace(report={"units": units})) == {
        "a": "4 to 1, learned",
        "b": "4 to 2, gptq",
        "c": "4 to 4, nearest",
    }
    assert units_of(SimpleNamespace(report={})) == {}


@pytest.mark.parametrize("loss", [0.0, 1e-40, 1.0, 1e30])
def test_a_curve_of_equal_losses_is_a_flat_line(loss: float) -> None:
    assert "nan" not in parts.curves({"unit": [(0, loss), (1, loss), (2, loss)]})


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=700))
def test_thinning_keeps_the_mean_of_every_group_and_the_last_step(values: list[float]) -> None:
    points = list(enumerate(values))
    thin = parts.thinned(points)
    assert len(thin) <= parts.CURVE_POINTS and thin[-1][0] == points[-1][0]
    assert all(min(values) - 1e-9 <= loss <= max(values) * (1 + 1e-9) + 1e-9 for _, loss in thin)


def test_losses_of_every_unit_are_read_off_the_progress(tiny: Pipeline) -> None:
    losses = Losses(STEPS)
    calibration = CalibrationConfig(num_samples=2, steps=STEPS, theta_grid=50, theta_samples=1)
    made = quantize(
        tiny,
        QuantConfig.preset("w4a4"),
        method="brecq",
        calibration=calibration,
        progress=lambda stage, done, total, info="": losses.note(stage, done, info),
    )
    units = {unit["name"]: unit for unit in made.report["units"]}
    curves = losses.curves()
    assert list(curves) == list(units)
    for name, points in curves.items():
        assert [step for step, _ in points] == list(range(STEPS + 1)), name
        # Shown with four digits.
        assert points[0][1] == pytest.approx(units[name]["loss_nearest"], rel=1e-3)


def test_other_stages_are_no_losses() -> None:
    losses = Losses(2)
    for call in (("generate", 1, "a, loss 1"), ("reconstruct", 1, "a"), ("reconstruct", 0, "")):
        losses.note(*call)
    assert losses.curves() == {}


def test_a_mask_is_what_was_painted_on_any_layer() -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.files import painted

    strokes = np.zeros((4, 6, 4), np.uint8)
    strokes[1, 2] = (255, 100, 0, 200)
    strokes[3, 5] = (255, 100, 0, 1)
    layer, empty = Image.fromarray(strokes), Image.new("RGBA", (6, 4))
    canvas = {"background": None, "layers": [empty, layer], "composite": None}
    mask = painted(canvas, (12, 8))
    assert mask is not None and mask.mode == "L"
    expected = np.zeros((8, 12), np.uint8)
    expected[2:4, 4:6] = expected[6:8, 10:12] = 255
    np.testing.assert_array_equal(np.asarray(mask), expected)
    assert painted({**canvas, "layers": [empty]}, (12, 8)) is None
    assert painted(None, (3, 3)) is None


def test_an_upload_is_named_without_its_place(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.files import picture

    file = tmp_path / "photo.png"
    file.write_bytes(b"no picture")
    with pytest.raises(InputError) as refused:
        picture(str(file))
    assert "image photo.png: " in str(refused.value) and str(tmp_path) not in str(refused.value)
    with pytest.raises(InputError, match="upload a JPEG"):
        picture(None)


def test_the_canvas_shows_any_picture_at_a_handy_size() -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.edit_tab import CANVAS, on_canvas

    for size in ((1, 1), (32, 32), (3000, 2), (2, 3000), (640, 480)):
        width, height = on_canvas(Image.new("RGB", size)).size
        assert CANVAS[0] <= max(width, height) <= CANVAS[1] and min(width, height) >= 1


@given(st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.booleans()))
def test_a_whole_number_is_one_or_is_refused(value: object) -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    from varptq.web.studio import whole

    try:
        number = whole("seed", value, 0, 9)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert type(number) is int and 0 <= number <= 9 and number == value


def test_a_zip_of_an_artifact_holds_its_files(models: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the studio needs gradio: varptq[web]")
    import zipfile

    from varptq.web.files import offer

    component = SimpleNamespace(GRADIO_CACHE=str(tmp_path), temp_files=set())
    path = offer(component, models / "w4a4")
    with zipfile.ZipFile(io.BytesIO(Path(path).read_bytes())) as archive:
        names = ("README.md", "config.json", "model.safetensors")
        assert archive.namelist() == [f"w4a4/{name}" for name in names]
        weights = (models / "w4a4" / "model.safetensors").read_bytes()
        assert archive.read("w4a4/model.safetensors") == weights
    assert component.temp_files == {path}


def test_reading_a_log_leaves_the_place_where_it_is_written() -> None:
    with tempfile.TemporaryFile() as log:
        os.write(log.fileno(), "half done\rmore: 50 °".encode())
        os.lseek(log.fileno(), 9, os.SEEK_SET)  # as if the process were about to write here
        assert measuring._last_line(log) == "more: 50 °"
        assert os.lseek(log.fileno(), 0, os.SEEK_CUR) == 9
