"""What `varptq evaluate` found, as a model card quotes it: figures, and a picture of pairs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varptq.cli.evaluate import METRICS_NAME, SAMPLES_NAME
from varptq.errors import InputError

if TYPE_CHECKING:
    from varptq.artifact.card import Quality
    from varptq.artifact.schema import Document
    from varptq.evaluate.sampling import SampleSet

# Facts that the metrics and the artifact have in common if they are of one model.
SHARED = ("config", "method", "seed", "calibration")
# Pixels across a picture, and pairs on it.
WIDTH, PAIRS = 1400, 8


def quoted(folder: Path, document: Document) -> tuple[Quality, bytes | None]:
    """The figures of the evaluation in `folder`, and a PNG file of samples where it has them.

    Raises `InputError` for a folder without readable metrics, and for those of another model than
    the artifact's.
    """
    from varptq.artifact.card import Quality

    path = folder / METRICS_NAME
    found = _read(path)
    try:
        _check(path, found["model"], document)
        rows = _rows(found)
        picture = _picture(folder / SAMPLES_NAME, found, document)
        return Quality(rows, _how(found), picture is not None), picture
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: not the metrics of this version ({error!r:.80}); evaluate again"
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "no JSON"
        raise InputError(
            f"{path}: cannot be read ({reason}); give the --out of varptq evaluate"
        ) from None


def _check(path: Path, model: dict[str, Any], document: Document) -> None:
    ours = document.varptq.to_dict() | {"sources": document.sources}
    for name in ("sources", *SHARED):
        if model[name] != ours[name]:
            raise InputError(
                f"{path}: of another model than the artifact, their {name} differ; evaluate this "
                "one"
            )


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    from varptq.evaluate.catalogue import METRICS, titled

    network, of_float = found["settings"]["network"], found["float_metrics"]
    return [
        (
            titled(name, network),
            METRICS[name].written(value),
            METRICS[name].written(of_float[name]) if name in of_float else "",
        )
        for name, value in found["metrics"].items()
        if name in METRICS
    ]


def _how(found: dict[str, Any]) -> str:
    from varptq.evaluate.catalogue import sources

    settings, sampling = found["settings"], found["settings"]["sampling"]
    drawn = ", ".join(f"{name} {sampling[name]}" for name in ("cfg", "top_k", "top_p"))
    beside = f" beside those of {found['compared_with']}" if found["compared_with"] else ""
    text = f"From {settings['count']} images{beside}, seed {settings['seed']}, {drawn}."
    return f"{text} {source}." if (source := sources(found)) else text


def _picture(folder: Path, found: dict[str, Any], document: Document) -> bytes | None:
    """The float model's images above those of this one, a column a prompt."""
    from varptq.evaluate.report import choose_pairs
    from varptq.pictures import VISIBLE_SIDE, Block, Row, sheet

    count = found["settings"]["count"]
    samples = _samples(folder / "quantized", count)
    if samples is None:
        return None
    names = _titles(samples, document)
    chosen = choose_pairs(samples, _samples(folder / "float", count), names)
    columns = list({pair.title or place: pair for place, pair in enumerate(chosen)}.values())
    side = max(VISIBLE_SIDE, *columns[0].image.shape[:2])
    blocks = []
    for pair in columns[: max(1, min(PAIRS, WIDTH // side))]:
        above = [] if pair.above is None else [Row(pair.above[None])]
        blocks.append(Block([*above, Row(pair.image[None])], pair.title))
    buffer = io.BytesIO()
    sheet(blocks, across=len(blocks)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _samples(folder: Path, count: int) -> SampleSet | None:
    from varptq.evaluate.sampling import MANIFEST, SampleSet

    path = folder / MANIFEST
    return SampleSet(folder, count, _read(path)) if path.is_file() else None


def _titles(samples: SampleSet, document: Document) -> list[str]:
    """Names by label; "" where images were drawn for prompts that the artifact does not know."""
    from varptq.artifact.card import titles
    from varptq.evaluate.sampling import PROMPTS

    labels, _ = samples.head(len(samples))
    wanted = int(labels.max()) + 1
    names = titles(document)
    known = PROMPTS not in samples.identity and len(names) >= wanted
    return names if known else [""] * wanted
