"""Prompts from files: texts, one a line; records with a text in each; features of an encoder.

    .txt                  a prompt a line, UTF-8
    .jsonl, .json         objects with a "prompt" (GenEval's metadata), or {id: object} (MJHQ's)
    .safetensors, .npz    features (sum of lengths, D), lengths, and texts where they are known

A file is read whole and refused whole, by line. Other suffixes are read as texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from varptq.errors import InputError
from varptq.files import write_atomic
from varptq.models.file_kinds import SAFETENSORS_SUFFIX, read_content
from varptq.models.text_files import lines_of, read_text
from varptq.models.texts import LENGTHS, MAX_CHARACTERS, TextPrompts, numbers

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "prompts.txt"
FEATURES, TEXTS, PROMPT = "features", "texts", "prompt"
NPZ, LINES, DOCUMENT = ".npz", ".jsonl", ".json"
FEATURE_SUFFIXES = (SAFETENSORS_SUFFIX, NPZ)


@dataclass(frozen=True)
class PromptFile:
    """prompts: strings, or features. records: what the file says of each, with its "prompt"."""

    prompts: list[str] | TextPrompts
    records: list[dict[str, Any]]


def read_prompts(path: str | Path) -> list[str] | TextPrompts:
    """The prompts of a file, as `generate`, `quantize`, `evaluate` and `analyze` take them: strings
    of a .txt, .jsonl or .json file, features of a .safetensors or .npz file. Raises `InputError`
    naming the line or array that cannot be used."""
    return prompt_file(path).prompts


def prompt_file(path: str | Path) -> PromptFile:
    """A file of prompts with what it says of each. Raises as `read_prompts` does."""
    path = Path(path)
    if path.suffix.lower() in FEATURE_SUFFIXES:
        features = load_features(path)
        return PromptFile(features, [{PROMPT: title} for title in features.titles()])
    records = list(_records(path, read_text(path, "prompts")))
    if not records:
        raise InputError(f"{path}: holds no prompts; write one a line")
    return PromptFile([record[PROMPT] for record in records], records)


@cache
def bundled_prompts() -> tuple[str, ...]:
    """The prompts that come with the package: short, of many subjects and styles, our own."""
    return tuple(BUNDLED.read_text(encoding="utf-8").splitlines())


def load_features(path: str | Path) -> TextPrompts:
    """Prompts from a .safetensors or .npz file of `features` (sum of lengths, D), `lengths` and
    maybe `texts`, as `save_features` writes it.

    Raises `InputError` for what is not such a file, `CheckpointError` for one that is damaged.
    """
    path = Path(path)
    is_npz = path.suffix.lower() != SAFETENSORS_SUFFIX
    content = _read_npz(path) if is_npz else read_content(path)
    if not {FEATURES, LENGTHS} <= set(content):
        raise InputError(f"{path}: holds {sorted(content)[:4]}, expected {FEATURES} and {LENGTHS}")
    features, counts = (numbers(content[name], f"{path}: {name}") for name in (FEATURES, LENGTHS))
    if counts.is_floating_point() or counts.is_complex():
        raise InputError(f"{path}: {LENGTHS} are {counts.dtype}, expected whole numbers")
    lengths = counts.flatten().tolist()
    ends = np.cumsum([0, *lengths]).tolist()
    if features.dim() != 2 or any(n < 1 for n in lengths) or ends[-1] != len(features):
        raise InputError(
            f"{path}: features of shape {tuple(features.shape)} in lengths of {ends[-1]} tokens in "
            f"all, expected (tokens, channels) and lengths of at least 1 that add up to the tokens"
        )
    try:
        rows = [features[start:end] for start, end in pairwise(ends)]
        return TextPrompts.of(rows, _texts(content))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def save_features(path: str | Path, prompts: TextPrompts) -> None:
    """Write prompts as a .safetensors file of features, for a machine without the text encoder.
    Raises `InputError` for prompts without features, `OutputError` if it cannot be written."""
    if not isinstance(prompts, TextPrompts):
        raise InputError(f"{path}: a {type(prompts).__name__}, expected prompts of texts")
    rows = [row.features_TD for row in prompts.rows if row.features_TD is not None]
    if len(rows) < len(prompts):
        raise InputError(f"{path}: some prompts ask for nothing, which has no features")
    texts = json.dumps([row.text for row in prompts.rows], ensure_ascii=False).encode()
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64, device="cpu")
    coded = torch.tensor(list(texts), dtype=torch.uint8, device="cpu")
    arrays = {FEATURES: torch.cat(rows), LENGTHS: lengths, TEXTS: coded}
    write_atomic(path, save(arrays))


def _texts(content: dict[str, Any]) -> list[str | None] | None:
    """Texts as an array of strings, or as the bytes of a JSON list, where strings cannot be."""
    if TEXTS not in content:
        return None
    stored = content[TEXTS]
    if not isinstance(stored, Tensor):
        return [str(text) or None for text in np.asarray(stored).flatten().tolist()]
    try:
        found = json.loads(bytes(stored.to(torch.uint8).flatten().tolist()))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(x, str | None) for x in found):
        raise InputError(f"{TEXTS}: no JSON list of strings, expected its bytes as uint8")
    return list(found)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except Exception as error:
        # numpy's errors for foreign and damaged files are of a dozen types.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{path}: cannot be read as features ({reason:.80}), expected .npz or .safetensors"
        ) from None


def _records(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """What the file says of every prompt."""
    lines = lines_of(text)
    suffix = path.suffix.lower()
    if suffix == DOCUMENT:
        yield from _of_document(path, _parsed(text, f"{path}"))
        return
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise InputError(f"{where}: empty, expected a prompt; delete the line")
        record = _parsed(line, where) if suffix == LINES else {PROMPT: line.strip()}
        yield _checked(record, where)


def _of_document(path: Path, content: Any) -> Iterator[dict[str, Any]]:
    """A list of records or texts, or records by their id."""
    if isinstance(content, dict):
        content = [
            {"id": name, **record} if isinstance(record, dict) else record
            for name, record in content.items()
        ]
    if not isinstance(content, list):
        raise InputError(f"{path}: holds a {type(content).__name__}, expected a list of prompts")
    for number, entry in enumerate(content):
        record = {PROMPT: entry} if isinstance(entry, str) else entry
        yield _checked(record, f"{path}, entry {number}")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({str(error).splitlines()[0]:.80})") from None


def _checked(record: Any, where: str) -> dict[str, Any]:
    prompt = record.get(PROMPT) if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f'{where}: expected an object with a "{PROMPT}" that is not empty')
    if len(prompt) > MAX_CHARACTERS:
        raise InputError(
            f"{where}: {prompt[:40]!r}... has {len(prompt)} characters, expected at most "
            f"{MAX_CHARACTERS}; shorten it"
        )
    return record
