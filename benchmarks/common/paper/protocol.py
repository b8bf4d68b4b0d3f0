"""How the paper measures, and checks of it before the hours: one line each.

    images    50 of each of 1000 classes, guidance 1.5, top-k 900, top-p 0.96, as 8-bit pixels
    FID, IS   the suite of ADM: its resize, its file of statistics, images in shuffled order

What would make a number wrong is refused. What makes it another number than the paper's, and was
asked for, is said, and kept with the result.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.common.judges import INCEPTION
from benchmarks.common.paper.instruments import NETWORK
from benchmarks.common.paper.job import BOX, SETTINGS, Job
from benchmarks.common.paper.rows import CLASS, COLUMNS, EDITS, IMAGES, PAINTING, TEXTS, Row
from varptq.errors import InputError, VarptqError
from varptq.evaluate.image_files import ImageFiles
from varptq.evaluate.preflight import Instruments, plan
from varptq.evaluate.references import PLAIN_RESIZE
from varptq.evaluate.sampling import SampleSet, shard_path
from varptq.models.families import family
from varptq.models.meta import on_meta
from varptq.models.pipeline import Pipeline
from varptq.models.presets import preset
from varptq.models.prompts import balanced
from varptq.models.scales import Size
from varptq.pictures import Pixels

COUNT, CLASSES = 50_000, 1000
# What the sampler must come to, beside the settings that are given to it.
CFG, TOP_K, TOP_P = 1.5, 900, 0.96
JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
# Images of the trial of files; sorted by class as no file may be.
TRIED = 16
Status = Literal["ok", "differs", "refused"]


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line. kind: of the rows that it is about, None for all."""

    name: str
    status: Status
    text: str
    kind: str | None = None

    def __str__(self) -> str:
        return f"{self.status:8} {self.name}: {self.text}"


def findings(job: Job, rows: Sequence[Row], tools: Instruments) -> Iterator[Finding]:
    """Every check that these rows need, as it is done."""
    kinds = {row.kind for row in rows}
    for model in dict.fromkeys(row.model for row in rows):
        yield tried("weights", lambda model=model: f"{model}: {job.source.check(model)}")
    ofclasses = [row.model for row in rows if row.kind != TEXTS]
    if ofclasses:
        layout = layout_of(job, ofclasses[0])
        yield guidance(layout)
        yield from of_classes(job, kinds, tools, layout)
    if TEXTS in kinds:
        yield from (tried(suite.name, suite.described) for suite in job.suites)
    yield disk(job, rows)


def of_classes(
    job: Job, kinds: Collection[str], tools: Instruments, layout: Pipeline
) -> Iterator[Finding]:
    """What rows of these kinds need, whose models draw classes."""
    if IMAGES in kinds:
        yield from (replace(one, kind=IMAGES) for one in of_images(job, tools, layout))
    if set(kinds) & set(EDITS):
        yield originals(tools, job.edits, layout)
    if set(kinds) & set(PAINTING):
        yield present("LPIPS", tools.lpips, "--lpips FILE, or its file in VARPTQ_WEIGHTS")
    if CLASS in kinds:
        yield present("CLIP", tools.clip, "--clip MODEL, a folder or a name on the hub")


def of_images(job: Job, tools: Instruments, layout: Pipeline) -> Iterator[Finding]:
    """What FID and the Inception Score need."""
    yield labels(layout, job.count, job.seed)
    yield number(job.count)
    yield from files(job.out, layout.vae.image_size)
    yield network(tools)
    yield reference(tools)
    yield tried("metrics", lambda: possible(layout, tools, job.count))


def checked(
    job: Job, rows: Sequence[Row], tools: Instruments, say: Callable[[str], None]
) -> list[Finding]:
    """Says every finding; returns those that differ from the paper. Raises `InputError` where one
    was refused."""
    found = []
    for finding in findings(job, rows, tools):
        say(str(finding))
        found.append(finding)
    refused = [finding for finding in found if finding.status == "refused"]
    if refused:
        more = f" (and {len(refused) - 1} more refused)" if len(refused) > 1 else ""
        raise InputError(f"{refused[0].name}: {refused[0].text}{more}")
    return [finding for finding in found if finding.status == "differs"]


def layout_of(job: Job, model: str) -> Pipeline:
    """A model without values: what its numbers say, before any weights are read."""
    published = preset(job.source.stands_for(model))
    row, archs = family(published.family), job.source.archs(published)
    with on_meta():
        networks = row.build(*archs)
    return Pipeline(*networks, published.name, tuple(published.class_names or ()), family=row.name)


def guidance(layout: Pipeline) -> Finding:
    """What the sampler will make of the settings."""
    plan, name = layout.plan(SETTINGS), "sampling"
    ramp, entries = plan.strengths, layout.alphabet.size
    expected = tuple(CFG * layout.scales.ratio(k) for k in range(len(ramp)))
    plain = set(plan.taus) == {1.0} and plan.temperature == 1 and not plan.more_smooth
    text = (
        f"cfg {ramp[-1]:g} from {ramp[0]:g} at the first scale, top-k {plan.top_k} of {entries:,} "
        f"entries, top-p {plan.top_p:g}, {'no' if plain else 'with'} temperature or smoothing"
    )
    if ramp != expected or not plain or (plan.top_k, plan.top_p) != (TOP_K, TOP_P):
        wanted = f"a ramp from 0 to {CFG}, top-k {TOP_K}, top-p {TOP_P}, neither of the others"
        return Finding(name, "refused", f"{text}; expected {wanted}")
    return Finding(name, "ok" if entries > plan.top_k else "differs", text)


def labels(layout: Pipeline, count: int, seed: int) -> Finding:
    """The classes of the images, as they will be drawn."""
    classes = len(layout.pool())
    counts = Counter(balanced(classes, count, seed).tolist())
    each = sorted({counts[label] for label in range(classes)})
    if len(each) == 1:
        same = classes == CLASSES
        text = f"{count:,} images, {each[0]} of each of {classes:,} classes"
        return Finding("labels", "ok" if same else "differs", text)
    text = f"{count:,} images are {each[0]} to {each[-1]} of each of {classes:,} classes"
    if count < classes:
        return Finding("labels", "differs", text)
    hint = f"give a --count that {classes:,} divides"
    return Finding("labels", "refused", f"{text}, so they are not balanced; {hint}")


def number(count: int) -> Finding:
    if count == COUNT:
        return Finding("images", "ok", f"{count:,} a row")
    text = f"{count:,} a row, {COUNT:,} in the paper: FID falls as the number grows"
    return Finding("images", "differs", text)


def files(folder: Path, size: Size) -> Iterator[Finding]:
    """A few images, sorted by class, written as PNG and as the suite's npz and read again."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".trial-", dir=folder) as trial:
        place = Path(trial)
        images = np.random.default_rng(0).integers(0, 256, (TRIED, *size, 3), dtype=np.uint8)
        samples = _sample_set(place, images)
        samples.export_png(place / "png")
        samples.export_npz(place / "all.npz")
        back = np.concatenate(list(ImageFiles.open(place / "png").batches(TRIED)))
        same = np.array_equal(back, images)
        what = "give the 8-bit pixels back bit by bit" if same else "change pixels on this machine"
        yield Finding("PNG", "ok" if same else "refused", f"files {what}")
        found = ImageFiles.open(place / "all.npz")
        whole = {x.tobytes() for part in found.batches(TRIED) for x in part}
        shuffled = found.warning is None and whole == {image.tobytes() for image in images}
        what = (
            "shuffled, labels with them" if shuffled else f"not as they should be, {found.warning}"
        )
        yield Finding(
            "npz", "ok" if shuffled else "refused", f"images of the suite's file are {what}"
        )


def _sample_set(folder: Path, images: Pixels) -> SampleSet:
    """One shard, whose classes rise."""
    identity = {"shard_size": len(images), "sampling": SETTINGS.to_dict()}
    rising = np.arange(len(images), dtype=np.int64)
    np.savez(shard_path(folder, 0), images=images, labels=rising, tokens=rising[:, None])
    return SampleSet(folder, len(images), identity)


def network(tools: Instruments) -> Finding:
    found, name = tools.network, "network"
    if found is None:
        return present(name, found, f"--network {NETWORK}:FILE, or {INCEPTION} in VARPTQ_WEIGHTS")
    if found.name == NETWORK:
        return Finding(name, "ok", f"{found.name}, which resizes as the suite does")
    return Finding(name, "differs", f"{found.name}; published values are of {NETWORK}")


def reference(tools: Instruments) -> Finding:
    """Whether FID will be taken to the statistics that the paper's are taken to."""
    found, name = tools.reference, "reference"
    if found is None:
        return present(name, found, "--reference FILE, the suite's npz of ImageNet at 256 x 256")
    what = f"{found.path.name}, {found.count:,} images"
    if "pooled" not in found.moments:
        lossy = [path for path in found.files if path.suffix.lower() in JPEG]
        more = f", {len(lossy):,} of them JPEG, whose blocks count as features" if lossy else ""
        text = f"{what} without mu and sigma{more}; the suite's are of all training images"
        return Finding(name, "differs", text)
    if "spatial" in found.moments and tools.network and tools.network.name == PLAIN_RESIZE:
        text = f"{what}, statistics of the suite, but network {PLAIN_RESIZE} resizes otherwise"
        return Finding(name, "refused", f"{text}; take {NETWORK}")
    return Finding(name, "ok", f"mu and sigma of {what} beside them; FID is taken to the former")


def possible(layout: Pipeline, tools: Instruments, count: int) -> str:
    """The check of `evaluate` itself: sizes, widths, values of the statistics."""
    chosen, _ = plan(layout, layout, tools, COLUMNS[IMAGES], count)
    return f"{', '.join(chosen)} can be computed"


def originals(tools: Instruments, count: int, layout: Pipeline) -> Finding:
    found, name = tools.reference, "edits"
    there = found.count if found else 0
    if there < count:
        hint = "give --reference with as many images, or fewer --edits"
        return Finding(name, "refused", f"{there:,} real images, expected {count:,}; {hint}")
    size = layout.vae.image_size
    if found and found.size != size:
        text = f"real images of {found.size}, expected {size} as the model draws; resize them"
        return Finding(name, "refused", text)
    return Finding(name, "ok", f"{count:,} of {there:,} real images, box {BOX}")


def present(name: str, tool: object, remedy: str) -> Finding:
    if tool is None:
        return Finding(name, "refused", f"none given; give {remedy}")
    return Finding(name, "ok", "is there")


def disk(job: Job, rows: Sequence[Row]) -> Finding:
    """Room for the images that lie there at once."""
    layouts = {model: layout_of(job, model) for model in {row.model for row in rows}}
    needed = at_once(job, rows, {row: images_bytes(job, row, layouts[row.model]) for row in rows})
    free = shutil.disk_usage(job.out).free
    text = f"{needed / 1e9:.1f} GB of images at once in {job.out}, {free / 1e9:.1f} GB free"
    return Finding("disk", "ok" if needed < free else "refused", text)


def at_once(job: Job, rows: Sequence[Row], images: Mapping[Row, float]) -> float:
    """Bytes of images there are at most: those of every float model, and of one more row, or of
    all that are kept."""
    floats: dict[str, float] = {}
    for row in rows:
        if row.kind == IMAGES:
            # A plan counts none for a row that stands in a table before.
            floats[row.model] = max(images[row], floats.get(row.model, 0.0))
    own = [images[row] for row in rows if not row.is_float]
    texts = sum(images[row] for row in rows if row.kind == TEXTS)
    return sum(floats.values()) + texts + (sum(own) if job.keep else max(own, default=0.0))


def images_bytes(job: Job, row: Row, layout: Pipeline) -> int:
    """Of the images that a row leaves until it is measured, with their tokens; edits leave none."""
    if row.kind in EDITS:
        return 0
    height, width = layout.vae.image_size
    tokens = 8 * layout.scales.num_tokens * layout.alphabet.draws
    count = sum(suite.count for suite in job.suites) if row.kind == TEXTS else job.count
    return count * (3 * height * width + tokens)


def tried(name: str, call: Callable[[], str]) -> Finding:
    try:
        return Finding(name, "ok", call())
    except VarptqError as error:
        return Finding(name, "refused", str(error))
