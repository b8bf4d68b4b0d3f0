"""What can be opened: what lies under the folders, by its key, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varptq.errors import InputError
from varptq.web.catalogue import MAX_DEPTH, Catalogue, Entry, Kind
from varptq.web.loaded import LoadedModels, about, class_choices

ALL = tuple(Kind)


def artifact(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def keys(catalogue: Catalogue, *kinds: Kind) -> list[str]:
    return [entry.key for entry in catalogue.entries(*(kinds or ALL))]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one of each, among things that are none, beside a secret one."""
    root = tmp_path / "root"
    artifact(root / "deep" / "w4a4")
    artifact(tmp_path / "secret")
    (root / "half").mkdir()
    (root / "half" / "config.json").write_text("{}")
    (root / "report").mkdir()
    (root / "report" / "report.html").write_text("<p>")
    (root / "analysis").mkdir()
    (root / "analysis" / "analysis.json").write_text("{}")
    (root / "pair").mkdir()
    for name in ("var_d2.pth", "VAR3.safetensors", "vae.pth", "optimizer.pth", "var.txt"):
        (root / "pair" / name).write_text("x")
    return root


def test_everything_under_a_folder_is_found_by_its_kind(root: Path) -> None:
    catalogue = Catalogue([root])
    assert keys(catalogue, Kind.artifact) == ["root/deep/w4a4"]
    assert keys(catalogue, Kind.report) == ["root/report"]
    assert keys(catalogue, Kind.analysis) == ["root/analysis"]
    floats = catalogue.entries(Kind.float)
    assert [e.key for e in floats] == ["demo", "root/pair/VAR3.safetensors", "root/pair/var_d2.pth"]
    assert floats[2].files == (root / "pair" / "var_d2.pth", root / "pair" / "vae.pth")
    assert catalogue.find("root/deep/w4a4", Kind.artifact).files == (root / "deep" / "w4a4",)


def test_what_is_made_later_is_found_and_what_is_gone_is_not(root: Path) -> None:
    catalogue = Catalogue([root])
    new = artifact(root / "new")
    assert catalogue.find("root/new", *ALL).files == (new,)
    (new / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not in the folders"):
        catalogue.find("root/new", *ALL)


@pytest.mark.parametrize(
    "key",
    [
        *("../secret", "root/../secret", "root/deep/../../../secret", "/etc/passwd", "root/half"),
        *("root\\deep\\w4a4", "root/deep/w4a4/", "ROOT/deep/w4a4", "root/deep/w4a4\0", "."),
        *("", None, 3, [], {"path": "x"}, ["root/deep/w4a4"], "~", "file:///etc/passwd"),
    ],
)
def test_no_other_key_opens_anything(root: Path, key: object) -> None:
    with pytest.raises(InputError, match=r"choose one from the list$"):
        Catalogue([root]).find(key, *ALL)


@given(st.text(alphabet="./\\ro tsecdpw4a\0~", max_size=24))
def test_whatever_is_asked_for_lies_under_the_folder(
    tmp_path_factory: pytest.TempPathFactory, key: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "asked"
    if not folder.exists():
        artifact(folder / "root" / "deep" / "w4a4")
        artifact(folder / "secret")
    catalogue = Catalogue([folder / "root"])
    listed = keys(catalogue, Kind.artifact)
    try:
        found = catalogue.find(key, Kind.artifact)
    except InputError:
        assert key not in listed
    else:
        assert found.files[0].is_relative_to(folder / "root")


def test_symbolic_links_lead_nowhere_outside(root: Path, tmp_path: Path) -> None:
    (root / "linked").symlink_to(tmp_path / "secret")
    crooked = root / "crooked"
    crooked.mkdir()
    for name in ("config.json", "model.safetensors"):
        (crooked / name).symlink_to(tmp_path / "secret" / name)
    (root / "loop").symlink_to(root)
    assert keys(Catalogue([root]), Kind.artifact) == ["root/deep/w4a4"]


def test_hidden_and_very_deep_folders_are_left_out(root: Path) -> None:
    artifact(root / ".varptq-0.staging")
    artifact(root / "/".join("abcdefgh"[: MAX_DEPTH + 1]))
    assert keys(Catalogue([root]), Kind.artifact) == ["root/deep/w4a4"]


def test_names_of_folders_are_told_apart(tmp_path: Path) -> None:
    folders = [artifact(tmp_path / place) for place in ("a/demo", "b/demo", "c/x", "d/x")]
    catalogue = Catalogue([*folders, folders[0]])
    assert keys(catalogue, Kind.artifact) == ["./demo", "./demo-2", "x", "x-2"]
    assert catalogue.find("x-2", Kind.artifact).files == (folders[3],)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Catalogue([tmp_path / "missing"])


def test_models_are_loaded_once_and_the_longest_unused_goes(models: Path) -> None:
    catalogue, loaded = Catalogue([models]), LoadedModels(capacity=2)
    small, made, demo = (
        catalogue.find(key, Kind.float, Kind.artifact)
        for key in ("models/small/var.safetensors", "models/w4a4", "demo")
    )
    first = loaded.get(small)
    assert loaded.get(small) is first
    assert len(loaded.get(made).pool()) == len(first.pool())
    loaded.get(small)
    loaded.get(demo)
    assert loaded.get(small) is first
    before = loaded.get(made)
    (models / "w4a4" / "config.json").touch()
    assert loaded.get(made) is not before


def test_classes_are_known_before_a_model_is_loaded(models: Path) -> None:
    catalogue = Catalogue([models])
    entries = catalogue.entries(Kind.float, Kind.artifact)
    of = {entry.key: class_choices(about(entry)) for entry in entries}
    assert of["demo"][3] == "cat" and len(of["demo"]) == 10
    assert of["models/w4a4"] == ["ant", "bee", "cat", "dog", "eel"]
    assert of["models/small/var.safetensors"] == []
    assert class_choices(about(Entry("var-d16", Kind.float)))[-1] == "999"
