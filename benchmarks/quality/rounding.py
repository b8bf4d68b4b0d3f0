"""Learned rounding: is what is trained what is deployed? Losses of two units by settings.

    python -m benchmarks.quality.rounding

Writes results/rounding.json and, between markers, docs/tables/rounding.md. W4A4 on
the demo model, 128 resampled images, 200 steps, theta fixed; losses on 64 rows.
"""

from __future__ import annotations

from typing import Any

import torch

import varptq
from benchmarks.common.held_out import CALIBRATION
from benchmarks.common.pages import DOCS, replace
from benchmarks.common.results import write_document
from varptq.calibrate.reconstruct import reconstruct_unit
from varptq.calibrate.record import Recorder
from varptq.calibrate.samples import calibration_set
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.find import set_theta

UNITS = ("blocks.1.attn", "blocks.1.ffn")
THETA = 0.0166
# forward, learning rate, lambda; the first is the released schedule.
SETTINGS = (
    ("soft", 1e-4, 1e-5),
    ("soft", 1e-2, 1e-3),
    ("soft", 0.1, 1e-3),
    ("soft", 0.3, 1e-3),
    ("soft", 0.3, 1e-2),
    ("hard", 0.03, 0.0),
    ("hard", 0.1, 0.0),
    ("hard", 0.3, 0.0),
    ("hard", 1.0, 0.0),
)


def measure() -> list[dict[str, Any]]:
    pipe = varptq.load_model("demo")
    samples = calibration_set(pipe, CALIBRATION, seed=0, resampled=True)
    lines = []
    for forward, rate, strength in SETTINGS:
        settings = {"forward": forward, "learning_rate": rate, "regularizer": strength}
        config = CALIBRATION.replace(**settings)
        model = convert(pipe.var, QuantConfig.preset("w4a4+paper"))
        set_theta(model, THETA)
        for unit in Recorder(pipe, model.get_submodule, samples, config).units():
            if unit.name in UNITS:
                report = reconstruct_unit(unit, config, seed=0)
                assert report is not None
                lines.append({**settings, **report.to_dict()})
                print(lines[-1], flush=True)
            if unit.name == UNITS[-1]:
                break
    return lines


def table(lines: list[dict[str, Any]]) -> list[str]:
    head = "| forward | learning rate | lambda | unit | nearest | soft | hard |"
    rows = [head, "|---|---|---|---|---|---|---|"]
    for x in lines:
        rows.append(
            f"| {x['forward']} | {x['learning_rate']:g} | {x['regularizer']:g} | {x['name']} "
            f"| {x['loss_nearest']:.2f} | {x['loss_soft']:.2f} | {x['loss_hard']:.2f} |"
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    lines = measure()
    write_document("rounding", lines)
    replace(DOCS / "tables/rounding.md", "rounding", table(lines))


if __name__ == "__main__":
    main()
