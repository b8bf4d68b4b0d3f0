"""Files of prompts: what is read, what is refused by line, the list that comes with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import varptq
from helpers.checkpoint_states import one_line
from helpers.infinity_states import features, prompts
from varptq.errors import InputError
from varptq.models.prompt_files import bundled_prompts, load_features, prompt_file
from varptq.models.texts import MAX_CHARACTERS, TextPrompts


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n  ein Hügel  \nline\u2028separator\n".encode())
    assert varptq.read_prompts(path) == ["a cat", "ein Hügel", "line\u2028separator"]
    (tmp_path / "one").write_text("no suffix, no line end")
    assert varptq.read_prompts(tmp_path / "one") == ["no suffix, no line end"]


def test_records_keep_what_a_benchmark_says(tmp_path: Path) -> None:
    geneval = [{"tag": "counting", "prompt": "three cats"}, {"tag": "colors", "prompt": "a cat"}]
    lines = tmp_path / "metadata.jsonl"
    lines.write_text("".join(json.dumps(record) + "\n" for record in geneval))
    found = prompt_file(lines)
    assert found.prompts == ["three cats", "a cat"] and found.records == geneval
    mjhq = tmp_path / "meta.json"
    mjhq.write_text(json.dumps({"f00": {"category": "art", "prompt": "a fox"}}))
    assert prompt_file(mjhq).records == [{"id": "f00", "category": "art", "prompt": "a fox"}]
    mjhq.write_text(json.dumps(["a fox", {"id": "x", "prompt": "a hen"}]))
    assert varptq.read_prompts(mjhq) == ["a fox", "a hen"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"a cat\n\na dog\n", "line 2: empty"),
        ("p.txt", b"a cat\n  \n", "line 2: empty"),
        ("p.txt", b"a cat\n" + b"x" * 10_000, "line 2: 'xxx"),
        ("p.txt", b"a cat\n\xff\xfe", "byte 6 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not valid JSON"),
        ("p.jsonl", b'{"text": "a"}\n', 'line 1: expected an object with a "prompt"'),
        ("p.jsonl", b'{"prompt": ""}\n', "line 1"),
        ("p.json", b'{"a": {"prompt": 3}}', "entry 0"),
        ("p.json", b"3", "holds a int"),
        ("p.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_lines_that_are_no_prompts(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        varptq.read_prompts(tmp_path / name)
    one_line(caught, str(tmp_path / name), words)


def test_files_that_are_none(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.txt", tmp_path, tmp_path / "nul\0.txt"):
        with pytest.raises(InputError) as caught:
            varptq.read_prompts(path)
        one_line(caught, "path" if "\0" in str(path) else str(path))
    with pytest.raises(InputError) as caught:
        TextPrompts.parse(["y" * (MAX_CHARACTERS + 1)], None)
    one_line(caught, "prompt 0", f"at most {MAX_CHARACTERS}")


def test_features_go_to_a_file_and_come_back(tmp_path: Path) -> None:
    asked = TextPrompts.of(features(3, 1, 2), ["a cat", None, "ein Hügel"])
    varptq.save_features(tmp_path / "f.safetensors", asked)
    found = varptq.read_prompts(tmp_path / "f.safetensors")
    assert isinstance(found, TextPrompts) and found.facts() == asked.facts()
    assert found.sha256() == asked.sha256() != prompts(3, 1).sha256()
    arrays = {"features": np.ones((3, 2), np.float32), "lengths": np.array([1, 2])}
    np.savez(tmp_path / "f.npz", texts=np.array(["a", ""]), **arrays)
    assert [row.text for row in load_features(tmp_path / "f.npz").rows] == ["a", None]
    assert prompt_file(tmp_path / "f.npz").records == [{"prompt": "a"}, {"prompt": "2 tokens"}]
    with pytest.raises(InputError, match="ask for nothing"):
        varptq.save_features(tmp_path / "g.safetensors", asked.nothing())


@pytest.mark.parametrize("texts", [b"[1, 2]", b"{", b'["a"]'])
def test_texts_that_do_not_fit(texts: bytes, tmp_path: Path) -> None:
    arrays = {
        "features": torch.ones(3, 2),
        "lengths": torch.tensor([1, 2]),
        "texts": torch.tensor(list(texts), dtype=torch.uint8),
    }
    save_file(arrays, tmp_path / "f.safetensors")
    with pytest.raises(InputError) as caught:
        load_features(tmp_path / "f.safetensors")
    one_line(caught, "f.safetensors", "texts")


def test_the_prompts_of_the_package() -> None:
    texts = bundled_prompts()
    assert len(texts) == len(set(texts)) == 256
    assert all(10 < len(text) < 80 and text == text.strip() for text in texts)
