"""`varptq push`: nothing leaves before --yes, everything goes in one commit, and what was sent can
be used by its name in every verb."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import varptq
from helpers.cli_calls import run, succeed
from helpers.hub_server import TOKEN, Client

FILES = ["README.md", "config.json", "model.safetensors", "samples.png"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in 4 bits, and an evaluation of it where `push` looks for one."""
    folder = tmp_path_factory.mktemp("push") / "w4a4"
    words = ("--method", "rtn", "--config", "w4a4", "--samples", 2)
    succeed("quantize", "demo", *words, "--out", folder)
    succeed("evaluate", folder, "--count", 3, "--metrics", "psnr", "--out", folder / "evaluation")
    return folder


@pytest.fixture
def other(artifact: Path, tmp_path: Path) -> Path:
    """The same artifact without an evaluation."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in FILES[:3]:
        (folder / name).write_bytes((artifact / name).read_bytes())
    return folder


def test_without_yes_it_is_shown_and_nothing_is_asked(artifact: Path, hub: Client) -> None:
    before = {path: path.read_bytes() for path in artifact.iterdir() if path.is_file()}
    shown = hub.varptq("push", artifact, "org/demo-w4a4@v1", token=TOKEN)
    assert shown.code == 0 and not hub.hub.asked
    assert all(name in shown.out for name in FILES)
    assert 'pipe = varptq.load("org/demo-w4a4@v1")' in shown.out
    assert shown.out.endswith("nothing was sent; the same command with --yes sends it\n")
    assert {path: path.read_bytes() for path in artifact.iterdir() if path.is_file()} == before
    document = succeed("push", artifact, "org/demo-w4a4", "--json").document
    assert sorted(document["files"]) == FILES
    assert (document["sent"], document["commit"]) == (False, None)
    assert document["files"]["model.safetensors"] == len(before[artifact / "model.safetensors"])
    assert (
        "| PSNR | " in document["card"] and "From 3 images beside those of demo" in document["card"]
    )


def test_what_is_sent_is_used_by_its_name(artifact: Path, hub: Client, tmp_path: Path) -> None:
    sent = hub.varptq("push", artifact, "org/demo", "--yes", "--private", "--json", token=TOKEN)
    assert sent.code == 0, sent.err
    assert not sent.err
    repository = hub.hub.repositories["org/demo"]
    assert repository.private and sent.document["commit"].endswith(repository.branches["main"])
    files = hub.hub.sent("org/demo")
    assert sorted(files.keys() - {".gitattributes"}) == FILES
    for name in ("config.json", "model.safetensors"):
        assert files[name] == (artifact / name).read_bytes()
    assert files["README.md"].decode() == sent.document["card"]
    (tmp_path / "samples.png").write_bytes(files["samples.png"])
    assert Image.open(tmp_path / "samples.png").format == "PNG"

    pushed = sum(path.startswith("/upload/") for _, path, _ in hub.hub.asked)
    again = hub.varptq("push", artifact, "org/demo@v2", "--yes", token=TOKEN)
    assert again.code == 0, again.err
    assert hub.hub.sent("org/demo", "v2").keys() == files.keys()
    assert sum(path.startswith("/upload/") for _, path, _ in hub.hub.asked) == pushed

    grids = [tmp_path / f"{name}.png" for name in ("near", "far")]
    drawn = ("--classes", "cat", "--out")
    succeed("generate", artifact, *drawn, grids[0])
    far = hub.varptq("generate", "org/demo@v2", *drawn, grids[1], token=TOKEN)
    assert far.code == 0, far.err
    assert grids[0].read_bytes() == grids[1].read_bytes()
    told = hub.varptq("info", "org/demo", "--json", token=TOKEN)
    assert told.document["sources"] == varptq.load_model("demo").sources
    words = ("org/demo", "--classes", "cat", "--out", tmp_path / "none.png")
    refused = hub.varptq("generate", *words)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert refused.err.startswith("error: org/demo: no such repository, or a private one")


def test_what_the_hub_refuses_is_one_line(other: Path, hub: Client) -> None:
    hub.hub.add("org/public", {"notes.txt": b""})
    cases: list[tuple[tuple[str, ...], str | None, str]] = [
        (("org/demo",), None, "org/demo: nothing is sent without a token; set HF_TOKEN"),
        (("others/demo",), TOKEN, "others/demo: your token does not allow it"),
        (("org/public", "--private"), TOKEN, "org/public: exists and is public, and --private"),
        (("org/demo",), "hf_of_yesterday", "org/demo: its token was refused"),
    ]
    for words, token, expected in cases:
        ran = hub.varptq("push", other, *words, "--yes", token=token)
        assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
        assert ran.err.startswith(f"error: {expected}"), ran.err
    assert set(hub.hub.repositories) == {"org/public"}
    assert list(hub.hub.sent("org/public")) == ["notes.txt"]


@pytest.mark.slow
def test_what_cannot_go_is_refused_first(artifact: Path, other: Path, tmp_path: Path) -> None:
    def refused(*words: object) -> str:
        ran = run("push", *words)
        assert (ran.code, ran.err.count("\n")) == (2, 1), ran.err
        return ran.err

    assert "repository 'demo': expected org/name" in refused(other, "demo")
    assert "no such folder" in refused(tmp_path / "none", "org/demo")
    assert "cannot be read" in refused(other, "org/demo", "--evaluation", tmp_path)
    metrics = artifact / "evaluation" / "metrics.json"
    found = json.loads(metrics.read_text())
    found["model"]["seed"] = 5
    (tmp_path / "metrics.json").write_text(json.dumps(found))
    assert "of another model than the artifact, their seed differ" in refused(
        other, "org/demo", "--evaluation", tmp_path
    )
    (tmp_path / "metrics.json").write_text("{}")
    assert "not the metrics of this version" in refused(other, "org/demo", "--evaluation", tmp_path)
    (other / "model.safetensors").write_bytes(b"")
    assert "model.safetensors: has 0 bytes" in refused(other, "org/demo")


@pytest.mark.slow
def test_a_card_of_ones_own_goes_as_it_is(artifact: Path, other: Path) -> None:
    mine = (other / "README.md").read_text() + "\nTrained on my own photos.\n"
    (other / "README.md").write_text(mine)
    assert succeed("push", other, "org/demo", "--json").document["card"] == mine
    ran = run("push", other, "org/demo", "--evaluation", artifact / "evaluation")
    assert ran.code == 2 and "was edited, so nothing is added to it" in ran.err
    (other / "README.md").unlink()
    assert "varptq.load" in succeed("push", other, "org/demo", "--json").document["card"]
