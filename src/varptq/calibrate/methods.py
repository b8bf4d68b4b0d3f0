"""Methods by name: each is a list of steps, and `METHODS` is the table of them.

A step is a function of the run (run.py) and lives beside what it does:

    resample        resample.py      the calibration set is resampled
    smooth          smoothing.py     inputs balanced against weights, where the config asks for it
    center          means.py         means of inputs set, where the config asks for it
    choose_theta    theta.py         the threshold of shift-and-sum under a budget
    reconstruct     reconstruct.py   the rounding of weights, unit by unit, as the settings say
    tune            tune.py          codes, scales and biases end to end, where the settings ask

A name may switch single parts on for ablations: "brecq+shift", "brecq+resample", "rtn+shift".
LiteVAR is a bit policy, so it is a modifier of the config and composes with every method: the
paper's row is method "sas" on "w4a4+paper+litevar".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from varptq.calibrate.config import PRESETS as CALIBRATIONS
from varptq.calibrate.config import CalibrationConfig, Rounding
from varptq.calibrate.means import center
from varptq.calibrate.reconstruct import reconstruct
from varptq.calibrate.resample import resample
from varptq.calibrate.run import Run
from varptq.calibrate.smoothing import smooth
from varptq.calibrate.theta import choose_theta
from varptq.calibrate.tune import tune
from varptq.errors import ConfigError
from varptq.quant.config import QuantConfig
from varptq.quant.presets import BASE_NAME, MODIFIERS, NAMES

Step = Callable[[Run], None]


@dataclass(frozen=True)
class Method:
    """Steps in order; `summary` for those who choose; `rounding` where the method does not leave it
    to the settings. samples: images that it takes where the settings do not say how many and
    nothing is reconstructed."""

    steps: tuple[Step, ...]
    summary: str = ""
    rounding: Rounding | None = None
    samples: int | None = None

    @classmethod
    def parse(cls, name: str) -> Method:
        """ "<method>" or "<method>+<part>+..."; raises `ConfigError` listing the known names."""
        base, *parts = name.split("+")
        unknown = [part for part in parts if part not in PARTS]
        if base not in METHODS or unknown:
            raise ConfigError(
                f"method {name!r}: unknown; methods are {', '.join(METHODS)}, each with any of "
                + ", ".join(f"+{part}" for part in PARTS)
                + _hint([base, *parts])
            )
        method = METHODS[base]
        # In the order of the table: shift-and-sum looks where reconstruction is.
        for part in (part for part in PARTS if part in parts):
            method = replace(method, steps=PARTS[part](method.steps))
        return method

    @property
    def shift(self) -> bool:
        """Whether shift-and-sum is on, if theta's budget pays for it."""
        return choose_theta in self.steps

    def settle(self, calibration: CalibrationConfig) -> CalibrationConfig:
        """The settings as this method takes them."""
        if self.rounding:
            calibration = calibration.replace(rounding=self.rounding)
        said = "num_samples" in calibration.model_fields_set
        if self.samples is None or said or reconstruct in self.steps:
            return calibration
        return calibration.replace(num_samples=self.samples)


# Images for diagonals and means of inputs; with 256 the KL of the demo model is 2% lower
# (benchmarks/quality/means_samples.py, docs/log.md).
MEANS_SAMPLES = 32

METHODS = {
    "rtn": Method(
        (smooth, center, tune),
        "nearest rounding; draws the images first, unless +paper",
        samples=MEANS_SAMPLES,
    ),
    "gptq": Method(
        (smooth, center, reconstruct, tune), "reconstruction in closed form", rounding="gptq"
    ),
    "brecq": Method((smooth, center, reconstruct, tune), "reconstruction, block by block"),
    "sas": Method(
        (resample, smooth, center, choose_theta, reconstruct, choose_theta, tune),
        "reconstruction, shift-and-sum, resampled calibration",
    ),
}


def _with_reconstruction(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return steps if reconstruct in steps else _before_tuning(steps, reconstruct)


def _with_shift(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Theta is chosen before reconstruction, which trains against its copies, and again after it,
    on the attention that the new weights give."""
    if choose_theta in steps:
        return steps
    if reconstruct not in steps:
        return _before_tuning(steps, choose_theta)
    at = steps.index(reconstruct)
    return (*steps[:at], choose_theta, reconstruct, choose_theta, *steps[at + 1 :])


def _with_resampling(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    return steps if resample in steps else (resample, *steps)


def _before_tuning(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    at = steps.index(tune) if tune in steps else len(steps)
    return (*steps[:at], step, *steps[at:])


# What a part that is switched on does to the steps of a method; nothing where it is on already.
PARTS: dict[str, Callable[[tuple[Step, ...]], tuple[Step, ...]]] = {
    "reconstruct": _with_reconstruction,
    "shift": _with_shift,
    "resample": _with_resampling,
}


def default_method(config: QuantConfig, calibration: CalibrationConfig | None = None) -> str:
    """The method of `quantize` where none is named.

    "sas" for the paper's quantizers (attention policy "release": "w4a4+paper" and its like), whose
    method it is. For the others, bare presets among them, "gptq", which their published KL was
    measured with; or "brecq", which rounds as the settings say, where these do say another rounding
    or steps of learning (efforts "standard" and "max", `--steps`).
    """
    if config.attention is not None and config.attention.policy == "release":
        return "sas"
    if calibration is None or not calibration.says_rounding or calibration.rounding == "gptq":
        return "gptq"
    return "brecq"


def _hint(words: list[str]) -> str:
    """What else the words are that are no method, for those who put them in the wrong place."""
    found = ""
    for word in words:
        if word in MODIFIERS:
            found += f"; {word} is a modifier of the config, as in w4a4+paper+{word}"
        if re.fullmatch(BASE_NAME, word) or word in NAMES:
            found += f"; {word} is a config"
        if word in CALIBRATIONS:
            found += f"; {word} is a calibration"
    return found
