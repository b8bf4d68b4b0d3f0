"""Settings of calibration, with presets. The numbers of the released code are the preset
"released"."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from varptq.errors import ConfigError
from varptq.models.sampling import SamplingSettings
from varptq.settings import Settings


class CalibrationConfig(Settings):
    """How a model is calibrated (docs/method.md sections 3 to 5).

    num_samples: self-generated images, one class each, classes without replacement while they last.
    steps: reconstruction steps per unit; 0 keeps nearest rounding. batch_size: rows (an image has
    two, conditional and unconditional) per step. learning_rate: Adam's, on alpha; None
    takes 0.3 up to 200 steps and less, by the square root, for longer runs. forward: "hard"
    trains the codes that will be deployed, straight through; "soft" trains fractional ones, which
    `regularizer` (lambda, with beta falling from beta_start to beta_end) drives to 0 or 1.
    budget: alpha, the share of bit operations shift-and-sum may add. theta_grid: points of the
    theta search. theta_samples: images theta is measured on. memory_gb: recorded activations above
    this go to bfloat16, and then to a memory-mapped file in `spool_dir` (default: the system's
    temporary folder).
    """

    num_samples: int = Field(default=256, ge=1)
    steps: int = Field(default=2000, ge=0)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    forward: Literal["hard", "soft"] = "hard"
    regularizer: float = Field(default=0.0, ge=0)
    beta_start: float = Field(default=20.0, gt=0)
    beta_end: float = Field(default=2.0, gt=0)
    budget: float = Field(default=0.01, ge=0)
    theta_grid: int = Field(default=10_000, ge=2)
    theta_samples: int = Field(default=8, ge=1)
    sampling: SamplingSettings = SamplingSettings()
    memory_gb: float = Field(default=8.0, gt=0)
    spool_dir: str | None = None

    @property
    def rate(self) -> float:
        """The learning rate in use, by what the demo model asks for at 200 and 1000 steps."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.3 * min(1.0, math.sqrt(200 / max(self.steps, 1)))

    @classmethod
    def preset(cls, name: str) -> Self:
        """ "default", "released" (the authors' settings) or "fast" (a short calibration for
        trials)."""
        if name not in PRESETS:
            raise ConfigError(f"calibration preset {name!r}: unknown, known: {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name])


PRESETS: dict[str, dict[str, object]] = {
    "default": {},
    "released": {
        "steps": 5000,
        "learning_rate": 1e-4,
        "forward": "soft",
        "regularizer": 1e-5,
        "theta_samples": 1,
    },
    "fast": {"num_samples": 64, "steps": 200},
}
