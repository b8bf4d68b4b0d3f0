"""What each technique is worth, on the demo model and on a twin of it with outlier channels.

    python -m benchmarks.quality.quality4bit [--runs 2 3 ...] [--models demo twin] [--seeds 0 1 2]

The runs, nearest rounding unless said (docs/quality.md tells what came out):
    1 attribution   2 centring   3 rotation   4 the fc2 input   5 smoothing   6 attention policies
    7 price list of widths   8 rounding   12 finals against the baselines
    13 the presets that users choose from, GPTQ, on 512 images that nothing was chosen on, on the
    integers of runtime cpu   14 the same, tuned   15 the same with the paper's parts
Appends one line per measurement to results/quality4bit.jsonl and skips what is there, so it can be
stopped and started. KL is from the float model's guided next-token distributions, unfiltered,
teacher-forced on images it generated itself from seeds no calibration uses. Runs 8 and 12 also
sample images with common random numbers, with calibration seed 0: their Frechet distance to the
float model's in 64 features of the VQVAE's encoder (mean of its 16 channels in each quarter of the
image).
`quality_report.py` makes docs/tables/quality4bit.md from the file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

import varptq
from benchmarks.common import fpqvar, orbitquant
from benchmarks.common.held_out import HELD_OUT_SEED
from benchmarks.common.kl_judge import Judge, on_integers
from benchmarks.common.quality4bit_rows import (
    FINER,
    GROUPED,
    HEAD_4,
    LAST,
    LAST_RUNS,
    MODELS,
    NAME,
    OFFERED,
    PARTS_LAST,
    TUNABLE,
    TUNED_LAST,
    WITH_PARTS,
    config_of,
    head,
)
from benchmarks.common.results import append_line, read_lines
from benchmarks.common.twin import with_outliers
from varptq.analyze.bench import Bench
from varptq.analyze.sensitivity import put_back_groups
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import InputError, VarptqError
from varptq.models.pipeline import Pipeline
from varptq.models.var.transformer import VAR
from varptq.quant.config import InputTransform, LayerRule, QuantConfig, TensorSpec
from varptq.quant.describe import bops_account
from varptq.quant.presets import FC2

IMAGES, SEEDS = 24, (0, 1, 2)
NEAREST = CalibrationConfig(num_samples=24, steps=0)
CLOSED_FORM = CalibrationConfig.preset("fast").replace(num_samples=64)
LEARNED = CalibrationConfig.preset("standard")
CONVERGED = CalibrationConfig(num_samples=128, steps=200)
TUNED = CLOSED_FORM.replace(tune_steps=150)
# Runs of nearest rounding that the twin takes part in, besides the finals; runs that sample images.
BOTH = (2, 3, 5)
SAMPLING = (8, 12)
# KL of a twin to its model above this is not the rounding of float32.
PRESERVED = 1e-6
ATTRIBUTED = 16
PRESETS = (FINER, "w4a8+groups", "w6a6", "w8a8")
LAST_SEED, LAST_IMAGES = 77_000, 512


# A model with quantizers that are not ours, from a seed and the samples of that seed.
Baseline = Callable[[Pipeline, CalibrationSet, int], Pipeline]


class Entry(NamedTuple):
    """One row of a run, measured on `models` with calibration `seeds`. Where there is a `baseline`,
    `config` is only what its bits are counted by."""

    label: str
    config: QuantConfig
    method: str = "rtn"
    seeds: tuple[int, ...] = (0,)
    calibration: CalibrationConfig = NEAREST
    models: tuple[str, ...] = MODELS
    baseline: Baseline | None = None


def check_twin(pipe: Pipeline, twin: Pipeline, test: CalibrationSet) -> float:
    """KL of the twin on a few images. Raises `InputError` where its function is not the model's."""
    few = test.first(4)
    found = Judge(pipe, few).kl(twin)["kl"]
    if not found < PRESERVED:
        raise InputError(
            f"twin of {pipe.name}: KL {found:g}, expected below {PRESERVED:g}; it does not compute "
            "the same"
        )
    return found


def uniform(config: QuantConfig, bits: int) -> QuantConfig:
    assert config.attention is not None
    rule = TensorSpec(num_bits=bits, type="uniform")
    return config.replace(attention=config.attention.replace(probability=rule))


def transform(config: QuantConfig, targets: str = "*", **changes: Any) -> QuantConfig:
    """Other transforms of the inputs of matching layers."""
    own = config.linear.input_transform or InputTransform()
    return config.with_rules(LayerRule(targets=targets, input_transform=own.replace(**changes)))


def fc2(config: QuantConfig, kind: str, how: InputTransform | None) -> QuantConfig:
    assert config.linear.input is not None
    spec = config.linear.input.replace(type=kind)
    return config.with_rules(LayerRule(targets=FC2, input=spec, input_transform=how))


def rows() -> dict[int, list[Entry]]:
    """Every row of every run."""
    P = QuantConfig.preset
    ours = P(GROUPED)
    bare = "w4a4+paper+p8+io8+token"
    both = InputTransform(center=True, hadamard=128)
    runs = {
        2: [(n, P(n)) for n in (bare, f"{bare}+center", f"{bare}+smooth+center")],
        3: [(n, P(n)) for n in (f"{bare}+rotate", f"{bare}+center+rotate")]
        + [(f"{GROUPED}, blocks of 64", transform(ours, hadamard=64))],
        4: [
            ("fc2 sign-split", fc2(ours, "sign_split", None)),
            ("fc2 asymmetric", fc2(ours, "affine", None)),
            ("fc2 centred", fc2(ours, "affine", InputTransform(center=True))),
            ("fc2 centred and rotated", fc2(ours, "affine", both)),
        ],
        5: [(GROUPED, ours), ("w4a4+paper+smooth", P("w4a4+paper+smooth"))],
        6: [(n, P(n)) for n in (f"{GROUPED}+segment", f"{GROUPED}+renorm")]
        + [(f"{GROUPED}, log2 probabilities", ours.replace(attention=log2(ours)))],
        7: [
            ("probabilities 6 bits", uniform(ours, 6)),
            ("q, k 6 bits", P(f"{GROUPED}+qk6")),
            ("v 6 bits", P(f"{GROUPED}+v6")),
            ("q, k, v 6 bits", P(f"{GROUPED}+qk6+v6")),
            ("q, k, v 8 bits", P(f"{GROUPED}+qk8+v8")),
            ("groups of 32", P(f"{GROUPED}+g32")),
            ("head weight 8 bits", head(ours, 8)),
        ],
    }
    found = {
        run: [
            Entry(label, config, models=MODELS if run in BOTH else ("demo",))
            for label, config in rows
        ]
        for run, rows in runs.items()
    }
    found[6].append(Entry(f"{GROUPED}, copies", ours, "rtn+shift", models=("demo",)))
    closed = {name: P(name) for name in ("w4a4+paper", GROUPED, *PRESETS)}
    closed[HEAD_4] = config_of(HEAD_4)
    found[8] = [
        Entry(f"{name}, gptq", config, "gptq", SEEDS, CLOSED_FORM)
        for name, config in closed.items()
    ]
    for name in (GROUPED, FINER):
        learned = Entry(f"{name}, gptq+adaround", P(name), "brecq", (0,), LEARNED, ("demo",))
        found[8].append(learned)
    found[12] = finals()
    found[LAST] = [Entry(name, P(name), "gptq", SEEDS, CLOSED_FORM) for name in OFFERED]
    found[PARTS_LAST] = [
        Entry(f"{name}, {part}", P(name), f"gptq+{part}", SEEDS, CLOSED_FORM)
        for name, part in WITH_PARTS
    ]
    found[TUNED_LAST] = [Entry(f"{n}, tuned", P(n), "gptq", SEEDS, TUNED) for n in TUNABLE]
    return found


def finals() -> list[Entry]:
    """The presets, to nearest, and what they are held against."""

    def final(label: str, **more: Any) -> Entry:
        return Entry(label, config_of(label), **more)

    return [
        *(
            final(f"{width} released", method="rtn+shift", seeds=SEEDS)
            for width in ("w4a4", "w4a8", "w6a6", "w8a8")
        ),
        final("fpqvar", seeds=SEEDS, baseline=by_fpqvar),
        *(
            final(label, seeds=SEEDS, baseline=by_orbitquant(widths))
            for label, widths in orbitquant.WIDTHS.items()
        ),
        final("rtn"),
        final("litevar"),
        final("brecq", method="brecq", calibration=CONVERGED, models=("demo",)),
        final("sas", method="sas", calibration=CONVERGED),
        *(final(name, seeds=SEEDS) for name in (GROUPED, *PRESETS, HEAD_4)),
    ]


def by_fpqvar(pipe: Pipeline, samples: CalibrationSet, _: int) -> Pipeline:
    return fpqvar.fpqvar(pipe, samples)


def by_orbitquant(widths: tuple[int, int]) -> Baseline:
    def made(pipe: Pipeline, _: CalibrationSet, seed: int) -> Pipeline:
        return orbitquant.orbitquant(pipe, widths, seed)

    return made


def log2(config: QuantConfig) -> Any:
    assert config.attention is not None
    return config.attention.replace(
        probability=TensorSpec(num_bits=4, type="log2"), renormalize=True
    )


def bops(var: VAR, entry: Entry, what: str = "total") -> float:
    """Relative to the paper's assignment at 4 bits."""
    base = bops_account(var, QuantConfig.preset("w4a4+paper")).total
    return getattr(bops_account(var, entry.config), what) / base


class Workshop:
    """The two models, what they are measured on, and the lines that are there."""

    def __init__(self, images: int, seed: int = HELD_OUT_SEED) -> None:
        self.pipe = varptq.load_model("demo")
        config = CalibrationConfig(num_samples=images)
        test = calibration_set(self.pipe, config, seed=seed, resampled=False)
        self.judge, self.images = Judge(self.pipe, test), images
        self.models = {"demo": self.pipe, "twin": with_outliers(self.pipe)}
        self.twin_kl = check_twin(self.pipe, self.models["twin"], test)

    @cache  # noqa: B019
    def samples(self, seed: int) -> CalibrationSet:
        return calibration_set(self.pipe, NEAREST, seed=seed, resampled=False)

    def measure(self, run: int, model: str, entry: Entry, seed: int) -> dict[str, Any]:
        pipe, started = self.models[model], time.monotonic()
        theta = None
        if entry.baseline is not None:
            quantized = entry.baseline(pipe, self.samples(seed), seed)
        else:
            result = varptq.quantize(
                pipe, entry.config, method=entry.method, calibration=entry.calibration, seed=seed
            )
            quantized, theta = result, result.theta
            if run in LAST_RUNS:
                quantized = on_integers(result)
        line = {
            "run": run,
            "model": model,
            "label": entry.label,
            "method": entry.method,
            "seed": seed,
            "images": self.images,
            "bops": bops(self.pipe.var, entry),
            "bops_int8": bops(self.pipe.var, entry, "on_int8"),
            "theta": theta,
            **self.judge.kl(quantized),
        }
        if run in SAMPLING and seed == 0:
            line["fd"] = self.judge.distance(quantized)
        return line | {"seconds": round(time.monotonic() - started, 1)}


def attribution(work: Workshop) -> list[dict[str, Any]]:
    """Run 1: one group of tensors put back to float, in the released assignment and in ours. The
    bench of `varptq analyze`, which does not smooth."""
    test = work.judge.test
    bench = Bench(work.pipe, test.prompts[:ATTRIBUTED], test.tokens[:ATTRIBUTED])
    lines = []
    for label in ("w4a4+paper+released", GROUPED):
        config = QuantConfig.preset(label)
        put_back = {n: found.kl for n, found in put_back_groups(bench, config).items()}
        line = {"run": 1, "model": "demo", "label": label, "seed": 0}
        lines.append(line | {"kl": bench.kl(config).kl, "put_back": put_back})
    return lines


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line[name] for name in ("run", "model", "label", "seed"))


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[1, *sorted(rows())])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--images", type=int, default=IMAGES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    @cache
    def shop(run: int) -> Workshop:
        last = run in LAST_RUNS
        work = Workshop(LAST_IMAGES, LAST_SEED) if last else Workshop(arguments.images)
        say(f"twin: KL {work.twin_kl:.1e} to its model")
        return work

    try:
        measure_all(arguments, shop, say)
    except VarptqError as error:
        raise SystemExit(f"error: {error}") from None


def measure_all(
    arguments: argparse.Namespace, shop: Callable[[int], Workshop], say: Callable[[str], None]
) -> None:
    """Every line that was asked for and is not there."""
    there = {key(line) for line in read_lines(NAME)}
    if 1 in arguments.runs and not any(line["run"] == 1 for line in read_lines(NAME)):
        for line in attribution(shop(1)):
            append_line(NAME, line)
    asked = [
        (run, model, entry, seed)
        for run in arguments.runs
        for seed in SEEDS
        for entry in rows().get(run, [])
        for model in MODELS
        if seed in arguments.seeds and seed in entry.seeds
        if model in arguments.models and model in entry.models
    ]
    for run, model, entry, seed in asked:
        if (run, model, entry.label, seed) not in there:
            line = shop(run).measure(run, model, entry, seed)
            append_line(NAME, line)
            say(f"{run} {model} {entry.label}: kl {line['kl']:.4f}, {line['bops']:.3f}x")


if __name__ == "__main__":
    main()
