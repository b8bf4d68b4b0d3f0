"""README.md of an artifact: a model card made from its own facts, with metadata as the Hugging Face
hub reads it.

`save` writes one without a repository and an evaluation, `push` one with both. The same facts give
the same text. Its last line, which pages do not show, tells whether somebody has edited it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from varptq.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from varptq.artifact.schema import Document
from varptq.artifact.sizes import VAE, KindSize, total
from varptq.models.class_names import title_of
from varptq.models.families import family
from varptq.models.presets import PRESETS
from varptq.readable import megabytes

CARD_FILE, PICTURE_FILE = "README.md", "samples.png"
HERE = "path/to/this/folder"
RANDOM = "random"
SHOWN_CLASSES, SEAL_DIGITS = 10, 16
ALT = "above: images of the float model; below: of this one, from the same noise"
TEXT = "a red kettle on a stove"
NO_LICENCE = (
    "not known: that of the model it was made from, which has to be added here before it is passed "
    "on"
)


@dataclass(frozen=True)
class Quality:
    """What an evaluation found, as it is to be read: rows of a metric, its value, and the float
    model's or ""; `how`: a sentence about what was measured; `picture`: whether samples go along.
    """

    rows: Sequence[tuple[str, str, str]]
    how: str
    picture: bool = False


def card(document: Document, name: str = HERE, quality: Quality | None = None) -> str:
    """The text. name: what `varptq.load` is to be called with."""
    title = f"# {_cell(document.name)}, quantized: {_cell(document.varptq.config.name)}"
    parts = [_metadata(document), title, _summary(document), _table(document)]
    if quality is not None:
        parts.append(_measured(quality))
    parts += [_use(document, name), _files(quality)]
    text = "\n\n".join(parts)
    return f"{text}\n\n{_seal(text)}\n"


def titles(document: Document) -> list[str]:
    """Classes without their synonyms, or the texts that a model comes with."""
    texts = family(document.architecture.family).reads_texts
    return [name if texts else title_of(name) for name in document.class_names]


def is_edited(text: str) -> bool:
    """Whether a card is not as some version of varptq wrote it."""
    body, _, seal = text.rstrip("\n").rpartition("\n\n")
    return seal != _seal(body)


def _seal(text: str) -> str:
    return f"<!-- varptq {hashlib.sha256(text.encode()).hexdigest()[:SEAL_DIGITS]} -->"


def _metadata(document: Document) -> str:
    row = family(document.architecture.family)
    values: dict[str, Any] = {
        "library_name": "varptq",
        "tags": ["varptq", "quantized", "image-generation", row.name],
    }
    if row.reads_texts:
        values["pipeline_tag"] = "text-to-image"
    preset = None if _is_random(document) else PRESETS.get(document.name)
    if preset is not None and preset.licence:
        values["license"] = preset.licence.lower()
    if preset is not None and preset.repo:
        values |= {"base_model": preset.repo, "base_model_relation": "quantized"}
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _is_random(document: Document) -> bool:
    return any(source.startswith(RANDOM) for source in document.sources.values())


def _summary(document: Document) -> str:
    draws = "from texts" if family(document.architecture.family).reads_texts else "of classes"
    return (
        f"A model of the family {document.architecture.family!r}, which draws images {draws}, with "
        "its weights as packed integers. It runs without the checkpoint it was made from."
    )


def _table(document: Document) -> str:
    recipe = document.varptq
    kinds = {kind: _size(values) for kind, values in document.sizes.items()}
    decoder = kinds.pop(VAE, KindSize())
    transformer = total(kinds)
    packed = total({kind: size for kind, size in kinds.items() if size.grid_bytes})
    whole, full = transformer + decoder, (transformer + decoder).float32_bytes
    samples = recipe.calibration.get("num_samples")
    images = f", {samples} calibration images" if samples else ""
    rows = [
        ("source", _source(document)),
        ("licence", _licence(document)),
        (
            "config, method",
            f"`{recipe.config.name}`, `{recipe.method}`{images}, seed {recipe.seed}",
        ),
        ("size", f"{megabytes(whole.bytes)}; {megabytes(full)} in float32"),
        (
            "transformer",
            f"{megabytes(transformer.bytes)} of {megabytes(transformer.float32_bytes)}",
        ),
        ("autoencoder", f"{megabytes(decoder.bytes)} of {megabytes(decoder.float32_bytes)}"),
    ]
    if packed.elements:
        bits = f"{packed.bits_per_element:.2f} bits each, with scales and zero points"
        rows.append(("quantized weights", bits))
    if not family(document.architecture.family).reads_texts and document.class_names:
        rows.append(("classes", _classes(titles(document))))
    rows += [(f"SHA-256 of {part}", f"`{source}`") for part, source in document.sources.items()]
    rows.append(("made by", f"varptq {document.varptq_version}"))
    return _as_table(("", ""), rows)


def _size(values: Mapping[str, int]) -> KindSize:
    return KindSize(values["elements"], values["bytes"], values["grid_bytes"])


def _source(document: Document) -> str:
    name = f"`{_cell(document.name)}`"
    if _is_random(document):
        return f"{name}, random weights: for trials of size and speed, its images show nothing"
    preset = PRESETS.get(document.name)
    if preset is None:
        return f"{name}, a checkpoint"
    return f"{name}, of `{preset.repo}`" if preset.repo else f"{name}, which comes with varptq"


def _licence(document: Document) -> str:
    if _is_random(document):
        return "none is needed for random weights"
    preset = PRESETS.get(document.name)
    if preset is None or preset.licence is None:
        return NO_LICENCE
    return f"{preset.licence}, that of the model it was made from"


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN_CLASSES])
    more = ", ..." if len(names) > SHOWN_CLASSES else ""
    return _cell(f"{len(names)}: {shown}{more}")


def _measured(quality: Quality) -> str:
    columns = ("metric", "this model", "float model")
    parts = ["## Quality", _as_table(columns, quality.rows), _cell(quality.how)]
    if quality.picture:
        parts.append(f"![{ALT}]({PICTURE_FILE})")
    return "\n\n".join(parts)


def _use(document: Document, name: str) -> str:
    asked: list[object] = [*titles(document)[:1]]
    if not asked:
        asked = [TEXT if family(document.architecture.family).reads_texts else 0]
    lines = (
        "```python",
        "import varptq",
        f"pipe = varptq.load({_quoted(name)})  # on integers where this machine can",
        f"images = varptq.generate(pipe, {_quoted(asked)}, seed=0).images  # (1, 3, H, W), 0 to 1",
        "```",
    )
    return "\n".join(("## Use", "", "After `pip install varptq`:", "", *lines))


def _quoted(value: object) -> str:
    """As Python reads it, with double quotes."""
    return json.dumps(value, ensure_ascii=False)


def _files(quality: Quality | None) -> str:
    picture = f"; `{PICTURE_FILE}` shows images" if quality is not None and quality.picture else ""
    return (
        f"`{WEIGHTS_FILE}` holds the packed tensors, `{CONFIG_FILE}` every setting, the sizes and "
        f"the report of the calibration{picture}."
    )


def _as_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """One line that no name of a model or of a class can turn into markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
