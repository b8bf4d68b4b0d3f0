"""What most studies of quality share: the images that models are judged on, and one calibration.

The images are the float model's own, of a seed that no calibration uses.
"""

from __future__ import annotations

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.models.pipeline import Pipeline

HELD_OUT_SEED, HELD_OUT_IMAGES = 1_000_003, 100
CALIBRATION = CalibrationConfig(num_samples=128, steps=200)


def held_out(pipe: Pipeline) -> CalibrationSet:
    config = CalibrationConfig(num_samples=HELD_OUT_IMAGES)
    return calibration_set(pipe, config, seed=HELD_OUT_SEED, resampled=False)
