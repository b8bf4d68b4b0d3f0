"""Artifacts by their name on the hub: the same model as from the folder, one commit, one line for
what is none or is broken."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.hub_server import TOKEN, Client
from varptq.artifact.remote import place_of
from varptq.hub import Repo

LOAD = """
import hashlib, os, sys, warnings
import varptq
from varptq.models.state_file import networks_sha256
warnings.simplefilter("ignore")
def told(name, **settings):
    try:
        pipe = varptq.load(name, runtime="simulated")
        print(pipe.seed, networks_sha256(pipe.var, pipe.vae), flush=True)
    except varptq.VarptqError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_of_that_name_wins(tmp_path: Path) -> None:
    assert place_of("org/name@v1") == Repo("org/name", "v1")
    assert place_of(Path("org/name")) == Path("org/name")
    assert place_of("missing") == Path("missing")
    (tmp_path / "name").mkdir()
    own = f"{tmp_path.name}/name"
    assert place_of(own) == Repo(own)


def test_it_is_the_model_of_the_folder(hub: Client, pristine: Path, tmp_path: Path) -> None:
    repository = hub.hub.add("org/name", files(pristine) | {"notes.txt": b"of nobody's business"})
    first = repository.branches["main"]
    repository.commit({"config.json": b"{}"})
    repository.branches["v1"] = first
    names = ("org/name@v1", f"org/name@{first}", str(pristine))
    found = hub.python(LOAD + "".join(f"told({name!r})\n" for name in names))
    assert found[0].startswith("0 ") and len(set(found)) == 1
    # One download for both names, of the commit that was read first, and of two files alone.
    assert len(hub.hub.ranges()) == 1
    asked = [path for _, path, _ in hub.hub.asked if path.endswith("model.safetensors")]
    assert set(asked) == {f"/org/name/resolve/{first}/model.safetensors"}
    kept = hub.home / "hub/models--org--name/snapshots"
    assert {path.name for path in kept.rglob("*") if path.is_file()} == set(files(pristine)) - {
        "README.md"
    }
    # A folder of that name is taken without asking.
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name@v1").symlink_to(pristine)
    hub.hub.asked.clear()
    here = f"import os\nos.chdir({str(tmp_path)!r})\n"
    assert hub.python(LOAD + here + "told('org/name@v1')") == found[:1]
    assert not hub.hub.asked


def test_what_is_no_artifact_is_one_line(hub: Client, pristine: Path) -> None:
    whole = files(pristine)
    newer = json.dumps(json.loads(whole["config.json"]) | {"format_version": 99}).encode()
    hub.hub.add("org/pictures", {"cat.png": b"cat"})
    hub.hub.add("org/other", {"config.json": b'{"model_type": "t5"}'})
    half = hub.hub.add("org/half", {"config.json": whole["config.json"]}).branches["main"]
    hub.hub.add("org/newer", whole | {"config.json": newer})
    weights = whole["model.safetensors"]
    hub.hub.add("org/short", whole | {"model.safetensors": weights[:-1]})
    hub.hub.add("org/wrong", whole | {"model.safetensors": weights[:-1] + b"?"})
    hub.hub.add("org/private", whole, private=True)
    cases = {
        "org/pictures": "ArtifactError: org/pictures: holds no config.json; check the name and the "
        "revision; not an artifact of varptq",
        "org/other": "ArtifactError: org/other: config.json: format_version is None, expected 2; "
        "not an artifact of varptq",
        "org/half": f"ArtifactError: org/half@{half}: holds no model.safetensors",
        "org/newer": "ArtifactError: org/newer: config.json: format_version 99, this varptq reads",
        "org/short": f"ArtifactError: org/short: model.safetensors has {len(weights) - 1} bytes, "
        f"config.json says {len(weights)}; it was broken when it was pushed",
        "org/wrong": "ArtifactError: org/wrong: model.safetensors is not the file of config.json",
        "org/private": "HubError: org/private: no such repository, or a private one",
    }
    found = hub.python(LOAD + "".join(f"told({name!r})\n" for name in cases))
    for line, expected in zip(found, cases.values(), strict=True):
        assert line.startswith(expected), line
    assert not hub.hub.ranges()  # all of them before anything large was fetched
    opened = hub.python(LOAD + "told('org/private')", token=TOKEN)
    assert opened[0].startswith("0 ")


def test_a_file_that_was_damaged_in_the_cache(hub: Client, pristine: Path) -> None:
    """The line names what to delete, and after that it is fetched again."""
    hub.hub.add("org/name", files(pristine))
    load = LOAD + "told('org/name')"
    whole = hub.python(load)
    (blob,) = (path for path in hub.blobs() if len(path.name) == 64)
    content = blob.read_bytes()
    blob.write_bytes(content[:-1] + b"?")
    (line,) = hub.python(load, HF_HUB_OFFLINE="1")
    assert line.endswith(
        "SHA-256 is not that of config.json; damaged in the hub's cache, delete "
        f"{blob} and run again"
    )
    blob.unlink()
    assert hub.python(load) == whole
