"""Settings of calibration, with presets; the preset "released" has those of the released code."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from varptq.errors import ConfigError
from varptq.models.sampling import SamplingSettings
from varptq.models.sampling_defaults import MAX_IMAGES
from varptq.quant.config import LinearSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.settings import Settings

# Where correcting targets was found to help: coarse weights that meet fine inputs.
MOST_WEIGHT_BITS, LEAST_INPUT_BITS = 3, 6
Rounding = Literal["nearest", "gptq", "adaround", "gptq+adaround"]


class CalibrationConfig(Settings):
    """How a model is calibrated (docs/method.md sections 3 to 5).

    num_samples: self-generated images of one class each; no class repeats before all were drawn.
    Where it is not given, a method may take fewer (`Method.samples`).
    rounding: how weights are rounded where a method reconstructs: "nearest"; "gptq", in closed form
    from second moments of the inputs (gptq.py); "adaround", learned in `steps` steps per unit; or
    "gptq+adaround", learned from the result of GPTQ. 0 steps learn nothing. patience: steps without
    gain after which a unit is annealed and ended early; None runs all steps. batch_size: rows (an
    image has two, conditional and unconditional) per step. learning_rate: of
    Adam, for alpha; None takes 0.3 up to 200 steps and 0.3 sqrt(200 / steps) beyond. forward:
    "hard" trains the codes that will be deployed, straight through; "soft" trains fractional ones,
    which `regularizer` (lambda, with beta falling from beta_start to beta_end) drives to 0 or 1.
    correct_targets: whether a layer's weight is fitted to what the float model's layer gives on
    the float model's inputs, and units follow the quantized model (gptq.py); None does so for
    codebooks of at most 3 bits whose inputs have 6 or more.
    tune_steps: steps of end-to-end tuning of codes, scales and biases afterwards (tune.py).
    budget: alpha, the share of bit operations shift-and-sum may add. theta_grid: points of the
    theta search. theta_samples: images on which attention is measured for theta. memory_gb:
    recorded activations larger than this (GiB) are kept in bfloat16, and if that is still too much,
    in a memory-mapped file in `spool_dir` (default: the system's temporary folder).
    """

    num_samples: int = Field(default=256, ge=1, le=MAX_IMAGES)
    rounding: Rounding = "adaround"
    steps: int = Field(default=2000, ge=0)
    patience: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    forward: Literal["hard", "soft"] = "hard"
    regularizer: float = Field(default=0.0, ge=0)
    beta_start: float = Field(default=20.0, gt=0)
    beta_end: float = Field(default=2.0, gt=0)
    correct_targets: bool | None = None
    tune_steps: int = Field(default=0, ge=0)
    budget: float = Field(default=0.01, ge=0)
    theta_grid: int = Field(default=10_000, ge=2)
    theta_samples: int = Field(default=8, ge=1, le=MAX_IMAGES)
    sampling: SamplingSettings = SamplingSettings()
    memory_gb: float = Field(default=8.0, gt=0)
    spool_dir: str | None = None

    @property
    def solves(self) -> bool:
        """Whether rounding begins in closed form."""
        return self.rounding.startswith("gptq")

    def corrects(self, spec: LinearSpec) -> bool:
        """Whether the targets of a layer of this spec are corrected."""
        if spec.weight is None or not self.solves:
            return False
        if self.correct_targets is not None:
            return self.correct_targets
        table = QUANTIZERS[spec.weight.type].table is not None
        exact = spec.input is None or spec.input.num_bits >= LEAST_INPUT_BITS
        return table and spec.weight.num_bits <= MOST_WEIGHT_BITS and exact

    @property
    def learns(self) -> bool:
        """Whether rounding is learned, from nearest or after GPTQ."""
        return self.rounding.endswith("adaround") and self.steps > 0

    @property
    def says_rounding(self) -> bool:
        """Whether rounding or its steps were given explicitly."""
        return not self.model_fields_set.isdisjoint({"rounding", "steps"})

    @property
    def steps_per_unit(self) -> int:
        """Steps that progress counts for one unit: its training steps, or 1 without any."""
        return self.steps if self.learns else 1

    @property
    def rate(self) -> float:
        """The learning rate in use; the rule fits the demo model at 200 and 1000 steps."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.3 * min(1.0, math.sqrt(200 / max(self.steps, 1)))

    @classmethod
    def preset(cls, name: str) -> Self:
        """A row of `PRESETS`: an effort ("fast", "standard" or "max"), "default" (256 images, and
        2000 steps where the method learns, from nearest) or "released" (the authors' settings)."""
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
    # In rising cost; benchmarks/speed/calibration.py measures what each is worth.
    "fast": {"num_samples": 32, "rounding": "gptq"},
    "standard": {"num_samples": 128, "steps": 200, "rounding": "gptq+adaround", "patience": 50},
    "max": {
        **{"num_samples": 256, "steps": 200, "rounding": "gptq+adaround", "patience": 50},
        "tune_steps": 150,
    },
}
EFFORTS = ("fast", "standard", "max")
