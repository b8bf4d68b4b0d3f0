"""The paper's experiments: every table, row by row, in one command.

    python benchmarks/paper.py --reference FILE --network inception-adm:FILE [--rows GLOB ...]
    python benchmarks/paper.py --plan [--rows GLOB ...]     # hours and disk per row, here
    python benchmarks/paper.py --dry-run [--rows GLOB ...]  # every row, on a small random model
    python benchmarks/paper.py --report                     # docs/paper.md, of what is there
    torchrun --nproc-per-node 8 benchmarks/paper.py --device cuda ...

Rows are TABLE/MODEL/WIDTH/METHOD, such as main/var-d16/w4a4/sas+litevar: the paper's methods with
the authors' schedule, our presets as `varptq quantize` makes them, the float model. Before the
hours the protocol is checked, a line for each trap. A row that is measured is a line of
results/paper.jsonl and is skipped from then on; one that was killed goes on where it was. Weights
come from the hub, or from --weights DIR under their published names. Of Infinity the pictures are
made, and the numbers of the suites' own programs read from scores.json beside them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common.paper.bench import Bench
from benchmarks.common.paper.instruments import SCORES, Files, brightness, from_file
from benchmarks.common.paper.job import Job, Suite
from benchmarks.common.paper.models import Published, Random, Shape, Source
from benchmarks.common.paper.page import by_key, write_page
from benchmarks.common.paper.plan import Parts, Planner
from benchmarks.common.paper.protocol import COUNT, at_once, checked, layout_of
from benchmarks.common.paper.rows import Row, picked, rows
from benchmarks.common.results import RESULTS, append_line, read_lines
from varptq.cli import failures
from varptq.distributed import Ranks, local_device
from varptq.errors import InputError
from varptq.models.generate import DEFAULT_BATCH
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.prompt_files import BUNDLED
from varptq.progress import RichProgress, silent

# Of the results, and of the section of the page.
NAME = "paper"
EDITS = 1000
# Of a dry run, where no others are given.
TRIAL_BLOCKS, TRIAL_IMAGES, TRIAL_SAMPLES, TRIAL_STEPS, TRIAL_PROMPTS = 2, 8, 4, 2, 2
USER_ERROR, INTERRUPTED = 2, 130
# Of the table of a plan, in a log file too.
WIDE = 120
HEAD = ("row", "calibration", "images", "measuring", "hours", "GB kept", "GB of images")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, path = parser.add_argument, Path
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="time one step of everything and add up")
    what.add_argument("--dry-run", action="store_true", help="every row on random weights")
    what.add_argument("--report", action="store_true", help="only write the page")
    add("--rows", nargs="+", default=[], metavar="GLOB", help="of their names; default: all")
    add("--weights", type=path, metavar="DIR", help="checkpoints under their published names")
    add("--reference", type=path, help="the ADM suite's npz of ImageNet at 256 x 256")
    add("--network", metavar="KIND:FILE", help="the FID Inception, with its classification layer")
    add("--lpips", type=path, help="LPIPS weights, .safetensors")
    add("--clip", metavar="MODEL", help="CLIP: a folder, or a name on the hub")
    add("--encoder", metavar="DIR", help="T5, in place of the published text encoder")
    add("--geneval", type=path, metavar="FILE", help="prompts of GenEval, .jsonl")
    add("--imagereward", type=path, metavar="FILE", help="prompts of ImageReward, .json")
    add("--out", type=path, help="artifacts and images; default: out/paper, out/paper-dry-run")
    add("--results", type=path, metavar="DIR", help="of paper.jsonl; of a dry run, --out")
    add("--count", type=int, help=f"images of a row; default: {COUNT}, of a dry run 8")
    add("--edits", type=int, help=f"real images that are edited; default: {EDITS}, of a dry run 8")
    add("--samples", type=int, help="calibration images, in place of a row's own number")
    add("--steps", type=int, help="steps of learned rounding, in place of a row's own number")
    add("--seed", type=int, default=0)
    add("--keep", action="store_true", help="leave the images of rows that are measured")
    add("--batch-size", type=int, default=DEFAULT_BATCH)
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--threads", type=int, help="of each process; default: torch's own number")
    shape = parser.add_argument_group("shapes of the random models of --plan and --dry-run")
    shape.add_argument("--blocks", type=int, help="default: all for a plan, 2 for a dry run")
    shape.add_argument("--width", type=int, help="of a token")
    shape.add_argument("--sides", metavar="1,2,3", help="of the token maps")
    shape.add_argument("--channels", type=int, help="of the autoencoder, times its levels")
    return parser.parse_args(arguments)


def shape_of(asked: argparse.Namespace) -> Shape:
    """As given. Raises `InputError` for numbers that no model has."""
    sides = None
    if asked.sides is not None:
        words = asked.sides.split(",")
        if not all(word.strip().isdecimal() for word in words):
            raise InputError(f"sides {asked.sides!r}: expected numbers with commas, as in 1,2,3")
        sides = tuple(map(int, words))
    for name in ("blocks", "width", "channels", "count", "edits", "samples", "batch_size"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')} {value}: must be at least 1")
    blocks = TRIAL_BLOCKS if asked.dry_run and asked.blocks is None else asked.blocks
    return Shape(blocks, asked.width, sides, asked.channels)


def job_of(asked: argparse.Namespace, files: Files, ranks: Ranks) -> Job:
    """Settings of a run, of a dry run, or of a plan."""
    shape, trial = shape_of(asked), asked.dry_run
    if not (trial or asked.plan) and shape != Shape():
        raise InputError("blocks, width, sides, channels: for --plan and --dry-run; leave them out")
    device = local_device(asked.device)
    placement = {"device": str(checked_device(device)), "dtype": asked.dtype}
    checked_dtype(asked.dtype)
    source: Source = Published(asked.weights, asked.encoder, **placement)
    if trial or asked.plan:
        source = Random(shape, stands_in=trial, **placement)
    prompts, most = (BUNDLED, TRIAL_PROMPTS) if trial else (None, None)
    suites = (
        Suite("image_reward", "imagereward", "--imagereward", 100, 10, asked.imagereward, most),
        Suite("geneval", "geneval", "--geneval", 553, 4, asked.geneval, most),
    )
    return Job(
        asked.out or Path("out/paper-dry-run" if trial else "out/paper"),
        source,
        asked.count or (TRIAL_IMAGES if trial else COUNT),
        asked.edits or (TRIAL_IMAGES if trial else EDITS),
        asked.seed,
        TRIAL_SAMPLES if trial and asked.samples is None else asked.samples,
        TRIAL_STEPS if trial and asked.steps is None else asked.steps,
        tuple(suite.or_from(prompts) for suite in suites),
        files.names(),
        asked.batch_size,
        **placement,
        # Rows of a dry run are of one model, whose images the next one finds.
        keep=asked.keep or trial,
        ranks=ranks,
    )


def done(job: Job, row: Row, results: Path) -> bool:
    line = by_key(read_lines(NAME, results)).get(row.key)
    return line is not None and line["settings"] == job.settings(row)


def plan(job: Job, shape: Shape, chosen: Sequence[Row], files: Files) -> None:
    """Print what each row takes, and all of them."""
    planner = Planner(job, shape, files.load(job.device).network)
    table = Table(title="hours on this machine, and GB of disk", title_justify="left")
    for head in HEAD:
        table.add_column(head, justify="left" if head == "row" else "right", no_wrap=True)
    with RichProgress() as progress:
        planner.time(chosen, progress if job.ranks.first else silent)
    found = [planner.row(row) for row in chosen]
    total = Parts(*map(sum, zip(*found, strict=True)))
    for name, parts in (*((r.name, p) for r, p in zip(chosen, found, strict=True)), ("all", total)):
        hours = (parts.calibration, parts.images, parts.measuring, parts.hours)
        gigabytes = (parts.kept / 1e9, parts.samples / 1e9)
        table.add_row(name, *(f"{h:.2f}" for h in hours), *(f"{g:.2f}" for g in gigabytes))
    if not job.ranks.first:
        return
    Console(width=WIDE, markup=False, highlight=False).print(table)
    images = {row: parts.samples for row, parts in zip(chosen, found, strict=True)}
    peak = total.kept + at_once(job, chosen, images)
    print(f"{job.ranks.size} processes; at most {peak / 1e9:.1f} GB at once in {job.out}")
    for note in planner.notes:
        print(note)


def run(job: Job, chosen: Sequence[Row], files: Files, results: Path, *, trial: bool) -> None:
    """Check the protocol, then measure the rows that have no result of these settings yet."""
    left = [row for row in chosen if not done(job, row, results)]
    job.ranks.barrier()
    say = print if job.ranks.first else lambda *_: None
    say(f"{len(chosen)} rows, {len(chosen) - len(left)} of them measured already")
    if not left:
        return
    job.out.mkdir(parents=True, exist_ok=True)
    if trial:
        size = layout_of(job, chosen[0].model).vae.image_size
        tools = files.or_stand_ins(job.out, size, job.edits, job.device)
    else:
        tools = files.load(job.device)
    findings = checked(job, left, tools, say)
    with RichProgress() as progress:
        shown = progress if job.ranks.first else silent
        bench = Bench(job, tools, brightness if trial else from_file, shown)
        for row in left:
            if done(job, row, results):
                # The same measurement under another name was made meanwhile.
                continue
            job.ranks.barrier()
            found = bench.measure(row)
            if found is None:
                say(f"{row.name}: pictures are in {bench.folder(row)}; put {SCORES} beside them")
                continue
            differs = [one.name for one in findings if one.kind in (None, row.kind)]
            line = {"row": row.key, "settings": job.settings(row), "differs": differs, **found}
            if job.ranks.first:
                append_line(NAME, line, results)
            say(f"{row.name}: {line['values']}")
            bench.release(row)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parsed(arguments)
    if asked.report:
        write_page(NAME)
        return
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    ranks = Ranks.from_environment()
    files = Files.found(asked.network, asked.reference, asked.lpips, asked.clip)
    job, chosen = job_of(asked, files, ranks), picked(asked.rows, rows())
    if asked.plan:
        plan(job, shape_of(asked), chosen, files)
        return
    results = asked.results or (job.out if asked.dry_run else RESULTS)
    run(job, chosen, files, results, trial=asked.dry_run)
    if ranks.first and results == RESULTS:
        write_page(NAME)


def fail(text: str, code: int) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", INTERRUPTED)
    except Exception as error:
        if (told := failures.line(error, "evaluate")) is None:
            raise
        fail(told, USER_ERROR)
