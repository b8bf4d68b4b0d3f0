"""Where the released quantizers' error comes from: put one thing back to float, or replace it.

    python -m benchmarks.quality.attribution [--seed N] [--threads N]

Writes results/attribution.json and, between markers, docs/tables/attribution.md. On the bundled
demo model, weights rounded to nearest, ranges as the released code takes them. theta is what
`varptq quantize --method rtn+shift` finds for the whole config and is kept for all rows. KL is from
the float model's guided next-token distributions, unfiltered, teacher-forced on images it generated
itself from seeds no calibration uses. `varptq analyze` does the same tensor by tensor.
"""

from __future__ import annotations

import argparse
import platform
import time
from typing import Any

import torch

import varptq
from benchmarks.common.held_out import HELD_OUT_SEED
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import write_document
from varptq.analyze.bench import Bench
from varptq.analyze.sensitivity import put_back_groups
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import calibration_set
from varptq.models.pipeline import Pipeline
from varptq.quant.config import QuantConfig, TensorSpec

WIDTHS = ("w8a8", "w6a6", "w4a8", "w4a4")
IMAGES = 40
THETA_SAMPLES = 8
# Every key has more attention than this, so every key gets all eight copies.
TINY_THETA = 1e-6
WHOLE = "everything quantized"


def with_uniform_probabilities(config: QuantConfig, bits: int) -> QuantConfig:
    assert config.attention is not None
    spec = TensorSpec(num_bits=bits, type="uniform")
    return config.replace(attention=config.attention.replace(probability=spec))


def find_theta(pipe: Pipeline, config: QuantConfig) -> float | None:
    calibration = CalibrationConfig(num_samples=THETA_SAMPLES, theta_samples=THETA_SAMPLES)
    return varptq.quantize(pipe, config, method="rtn+shift", calibration=calibration).theta


def column(pipe: Pipeline, bench: Bench, width: str) -> dict[str, Any]:
    """All rows of one width: theta, and KL by name of the row."""
    config = QuantConfig.preset(f"{width}+paper+released")
    theta = find_theta(pipe, config)
    activation_bits = int(width.partition("a")[2])
    rows = {WHOLE: bench.kl(config, theta)}
    for group, found in put_back_groups(bench, config, theta).items():
        rows[f"{group} in float"] = found
    for name, bits in (("8 bits", 8), ("activation width", activation_bits)):
        changed = with_uniform_probabilities(config, bits)
        rows[f"probabilities uniform, {name}"] = bench.kl(changed, theta)
    rows["no copies (theta 1)"] = bench.kl(config, 1.0)
    rows["eight copies of every token (theta 1e-6)"] = bench.kl(config, TINY_THETA)
    return {"theta": theta, "rows": {name: found.to_dict() for name, found in rows.items()}}


def table(columns: dict[str, Any]) -> list[str]:
    """KL of every row and width, the smallest in bold."""
    names = list(next(iter(columns.values()))["rows"])
    least = {w: min(row["kl"] for row in c["rows"].values()) for w, c in columns.items()}
    lines = [f"| | {' | '.join(w.upper() for w in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for width, found in columns.items():
            kl = found["rows"][name]["kl"]
            cells.append(f"**{kl:.4f}**" if kl == least[width] else f"{kl:.4f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    thetas = " | ".join(f"{found['theta']:.4f}" for found in columns.values())
    return [*lines, f"| theta | {thetas} |", ""]


def reading(columns: dict[str, Any]) -> str:
    """What the table says, with its own numbers."""
    shares = []
    for width, found in columns.items():
        rows = found["rows"]
        left = rows["probabilities in float"]["kl"] / rows[WHOLE]["kl"]
        shares.append(f"{1 - left:.0%} at {width.upper()}")
    return f"Of the KL the log2 rule of the probabilities accounts for {', '.join(shares)}."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the images")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    pipe = varptq.load_model("demo")
    test = calibration_set(
        pipe, CalibrationConfig(num_samples=IMAGES), seed=arguments.seed, resampled=False
    )
    bench = Bench(pipe, test.prompts, test.tokens)
    columns = {width: column(pipe, bench, width) for width in WIDTHS}
    document = {
        "images": IMAGES,
        "seed": arguments.seed,
        "cfg": bench.cfg,
        "columns": columns,
        "seconds": round(time.monotonic() - started, 1),
        "version": varptq.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    write_document("attribution", document)
    intro = f"{IMAGES} images, cfg {bench.cfg:g}; KL in nats per token, the smallest in bold."
    lines = [intro, "", *table(columns), reading(columns), ""]
    replace(DOCS / "tables/attribution.md", "attribution", lines)


if __name__ == "__main__":
    main()
