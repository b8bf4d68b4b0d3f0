"""The nodes for ComfyUI: what each gives, and a workflow in a ComfyUI without a browser."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import varptq
from varptq import Pipeline
from varptq.errors import InputError

ROOT = Path(__file__).parents[2]
PACK = ROOT / "integrations" / "comfyui"
# Where a checkout of ComfyUI is, and the Python that has what it needs.
CHECKOUT, PYTHON = os.environ.get("VARPTQ_COMFYUI"), os.environ.get("VARPTQ_COMFYUI_PYTHON")
SECONDS = 300


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """As ComfyUI imports a folder of nodes."""
    spec = importlib.util.spec_from_file_location("varptq_nodes", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_node_says_what_it_takes_and_gives(nodes: ModuleType) -> None:
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        said = node.INPUT_TYPES()["required"]
        function = getattr(node, node.FUNCTION)
        assert [*said] == [name for name in function.__annotations__ if name != "return"]
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)


def test_a_model_is_an_artifact_or_a_preset(
    nodes: ModuleType, tiny: Pipeline, tmp_path: Path
) -> None:
    made = varptq.quantize(tiny, varptq.QuantConfig.preset("w8a8"), method="rtn")
    varptq.save(made, tmp_path / "artifact")
    load = nodes.Load().load
    (loaded,) = load(str(tmp_path / "artifact"), "simulated", "cpu")
    assert loaded.runtime == "simulated"
    assert load("demo", "auto", "cpu")[0].name == "demo"
    with pytest.raises(InputError, match="float model"):
        load("demo", "cpu", "cpu")


def test_images_are_those_of_generate(nodes: ModuleType, tiny: Pipeline) -> None:
    (images,) = nodes.Generate().generate(tiny, " bee ", 5, 3, -1.0)
    expected = varptq.generate(tiny, ["bee"] * 3, seed=5).images
    assert expected is not None
    assert images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(images, expected.permute(0, 2, 3, 1))
    (unguided,) = nodes.Generate().generate(tiny, "1", 2**63 - 1, 1, 0.0)
    found = varptq.generate(tiny, [1], seed=2**63 - 1, cfg=0.0).images
    assert found is not None and torch.equal(unguided, found.permute(0, 2, 3, 1))


@pytest.mark.parametrize("channels", [3, 4])
def test_what_the_mask_leaves_out_stays(nodes: ModuleType, tiny: Pipeline, channels: int) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(2, 40, 36, channels, generator=g)
    masks = torch.zeros(2, 40, 36)
    masks[0, :, :12], masks[1, :, 24:] = 1, 1
    (made,) = nodes.Inpaint().inpaint(tiny, images, masks, "bee", 5, -1.0)
    assert made.shape == (2, 40, 36, 3) and made.dtype == torch.float32
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    before = images[..., :3].mul(255).round().div(255)
    changed = (made - before).abs().amax(-1) > 1e-6
    assert changed[0, :, :12].any() and changed[1, :, 24:].any()
    assert not changed[0, :, 24:].any() and not changed[1, :, :12].any()
    # A mask for all, without a batch, and nothing asked for.
    (one,) = nodes.Inpaint().inpaint(tiny, images, masks[0], "", 5, -1.0)
    assert one.shape == made.shape
    with pytest.raises(InputError, match="3 for 2 images"):
        nodes.Inpaint().inpaint(tiny, images, torch.zeros(3, 40, 36), "", 5, -1.0)


def asked(address: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(address, data)) as answer:
        return json.load(answer)


@pytest.fixture
def comfyui(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a ComfyUI that has the pack, and the folder it works in."""
    if CHECKOUT is None:
        pytest.skip("VARPTQ_COMFYUI names no checkout of ComfyUI")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "varptq").symlink_to(PACK)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.html").write_text("none")
    options = ["--cpu", "--disable-api-nodes", "--listen", "127.0.0.1", "--port", str(port)]
    folders = ["--base-directory", str(tmp_path), "--front-end-root", str(tmp_path / "pages")]
    database = ["--database-url", "sqlite:///:memory:"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON or sys.executable, "main.py", *options, *folders, *database],
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS
        try:
            while True:
                assert process.poll() is None and time.monotonic() < end, (
                    tmp_path / "log"
                ).read_text()
                try:
                    asked(f"{address}/system_stats")
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.2)
            yield address, tmp_path
        finally:
            process.kill()
            process.wait()


def workflow(width: int, height: int) -> dict[str, Any]:
    """Two images, saved; and both with their left half made anew."""

    def node(kind: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    whole, half = {"width": width, "height": height}, {"width": width // 2, "height": height}
    drawn = {"model": ["load", 0], "prompt": "ship", "seed": 5, "cfg": -1.0}
    place = {"x": 0, "y": 0, "operation": "add"}
    return {
        "load": node("VarptqLoad", source="demo", runtime="auto", device="cpu"),
        "draw": node("VarptqGenerate", **drawn, count=2),
        "none": node("SolidMask", value=0.0, **whole),
        "left": node("SolidMask", value=1.0, **half),
        "mask": node("MaskComposite", destination=["none", 0], source=["left", 0], **place),
        "paint": node("VarptqInpaint", **drawn, image=["draw", 0], mask=["mask", 0]),
        "drawn": node("SaveImage", images=["draw", 0], filename_prefix="drawn"),
        "painted": node("SaveImage", images=["paint", 0], filename_prefix="painted"),
    }


def saved(images_BHWC: Tensor) -> list[Any]:
    """What ComfyUI writes of images: cut to integers, not rounded."""
    return [np.asarray(image).clip(0, 255).astype(np.uint8) for image in 255.0 * images_BHWC]


@pytest.mark.slow
def test_a_workflow_in_comfyui(comfyui: tuple[str, Path], nodes: ModuleType) -> None:
    address, folder = comfyui
    model = varptq.load_model("demo")
    (drawn,) = nodes.Generate().generate(model, "ship", 5, 2, -1.0)
    _, height, width, _ = drawn.shape
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    (painted,) = nodes.Inpaint().inpaint(model, drawn, mask, "ship", 5, -1.0)

    key = asked(f"{address}/prompt", {"prompt": workflow(width, height)})["prompt_id"]
    end = time.monotonic() + SECONDS
    while not (history := asked(f"{address}/history/{key}")):
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.2)
    assert history[key]["status"]["status_str"] == "success", history
    for name, images in {"drawn": drawn, "painted": painted}.items():
        files = sorted((folder / "output").glob(f"{name}_*.png"))
        assert len(files) == 2
        for path, expected in zip(files, saved(images), strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), expected), path.name
