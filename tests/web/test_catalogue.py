"""What can be opened: what lies under the folders, by its key, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from varptq.errors import InputError
from varptq.web.catalogue import MAX_DEPTH, Catalogue, Entry, Kind
from varptq.web.loaded import LoadedModels, class_choices, unloaded

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
    assert [e.key for e in floats] == [
        "demo",
        "demo-text",
        "root/pair/VAR3.safetensors",
        "root/pair/var_d2.pth",
    ]
    assert floats[3].files == (root / "pair" / "var_d2.pth", root / "pair" / "vae.pth")
    assert catalogue.find("root/deep/w4a4", Kind.artifact).files == (root / "deep" / "w4a4",)


def test_each_family_has_names_of_its_own_for_files(tmp_path: Path) -> None:
    names = ("Infinity_2b_reg.pth", "infinity_vae_d32reg.pth", "infinity_notes.txt", "var_d16.pth")
    for folder, present in {"all": names, "alone": names[::2], "vae": names[1:3]}.items():
        (tmp_path / folder).mkdir()
        for name in present:
            (tmp_path / folder / name).write_text("x")
    (tmp_path / "plain").mkdir()
    for name in ("infinity_a.safetensors", "vae_a.safetensors"):
        (tmp_path / "plain" / name).write_text("x")
    found = [entry.files for entry in Catalogue([tmp_path]).entries(Kind.float) if entry.files]
    # VAR's file has no autoencoder beside it, as the one there is Infinity's.
    assert found == [
        tuple(tmp_path / "all" / name for name in names[:2]),
        tuple(
            tmp_path / "plain" / name for name in ("infinity_a.safetensors", "vae_a.safetensors")
        ),
    ]


def test_a_model_of_texts_from_files_is_known_by_its_tensors(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "golden" / "data_infinity" / "weights"
    entries = {entry.key: entry for entry in Catalogue([folder]).entries(Kind.float)}
    known = LoadedModels().about(entries["weights/infinity_a.safetensors"])
    assert known.texts and dict(known.sizes)


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


def test_an_artifact_of_the_hub_has_its_name_there(root: Path, tmp_path: Path) -> None:
    """Its files are links to the contents of its own repository in the cache, and no others."""
    storage = tmp_path / "models--org--w4a4"
    snapshot = storage / "snapshots" / ("0" * 40)
    for folder in (snapshot, storage / "blobs"):
        folder.mkdir(parents=True)
    for file in (root / "deep" / "w4a4").iterdir():
        blob = storage / "blobs" / f"{file.name} content"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    assert keys(Catalogue([snapshot, root]), Kind.artifact) == ["org/w4a4", "root/deep/w4a4"]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(root / "deep" / "w4a4" / "config.json")
    assert keys(Catalogue([snapshot]), Kind.artifact) == []


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
    catalogue, loaded = Catalogue([models]), LoadedModels()
    entries = catalogue.entries(Kind.float, Kind.artifact)
    of = {entry.key: class_choices(loaded.about(entry)) for entry in entries}
    assert of["demo"][3] == "cat" and len(of["demo"]) == 10
    assert of["models/w4a4"] == ["ant", "bee", "cat", "dog", "eel"]
    assert of["models/small/var.safetensors"] == ["0", "1", "2", "3", "4"]  # this one is loaded
    assert class_choices(unloaded(Entry("var-d16", Kind.float)))[-1] == "toilet tissue"


def test_what_a_model_is_asked_for_is_known_before_it_is_loaded() -> None:
    of = {name: unloaded(Entry(name, Kind.float)) for name in ("demo", "infinity-2b")}
    assert (of["demo"].texts, of["demo"].sizes) == (False, ())
    text = of["infinity-2b"]
    assert text.texts and text.size == (1024, 1024) and class_choices(text) == []
    assert dict(text.sizes)["256 x 256"] == "0.06M" and len(text.sizes) == 60
    assert (text.sampling.cfg, text.sampling.top_k) == (3, 0)
