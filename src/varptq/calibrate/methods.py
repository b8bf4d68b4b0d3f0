"""Methods by name, and `quantize`: the whole path from a float pipeline to a quantized one.

    rtn      nearest rounding
    gptq     + reconstruction in closed form, whatever the settings say of rounding
    brecq    + reconstruction as the settings say, learned by default
    sas      + shift-and-sum and resampling (the paper)

A name may switch single parts on for ablations: "brecq+shift", "brecq+resample", "rtn+shift".
LiteVAR is a bit policy, so it is a modifier of the config and composes with every method: the
paper's row is method "sas" on "w4a4+paper+litevar". Which method stands where none is named is
`default_method`'s to say. A config whose inputs are smoothed or centred, as those of bare presets
are, has the calibration images drawn for every method, "rtn" too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from varptq.calibrate.config import PRESETS as CALIBRATIONS
from varptq.calibrate.config import CalibrationConfig, Rounding
from varptq.calibrate.means import center_inputs
from varptq.calibrate.reconstruct import reconstruct, unit_layers
from varptq.calibrate.record import Recorder
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smoothed
from varptq.calibrate.theta import measure_attention, search_theta
from varptq.calibrate.tune import check_tunable, put, tune
from varptq.errors import ConfigError, InputError
from varptq.models.bare import bare, check_layers
from varptq.models.pipeline import Pipeline
from varptq.models.state_file import networks_sha256
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.quant.describe import bops_account
from varptq.quant.find import quant_linears, release_float_weights, set_theta
from varptq.quant.pipeline import QuantizedPipeline
from varptq.quant.presets import BASE_NAME, MODIFIERS, NAMES
from varptq.torch_state import plain_torch
from varptq.work import Piece, Work


@dataclass(frozen=True)
class Method:
    """Which parts of the method are on; `rounding` where it is not left to the settings."""

    reconstruct: bool = False
    shift: bool = False
    resample: bool = False
    rounding: Rounding | None = None

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
        return replace(METHODS[base], **dict.fromkeys(parts, True))

    def settle(self, calibration: CalibrationConfig) -> CalibrationConfig:
        """The settings as this method takes them."""
        return calibration.replace(rounding=self.rounding) if self.rounding else calibration


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


# Raised when what a piece of a work folder holds, or how it is computed, changes.
WORK_FORMAT = 2
PARTS = ("reconstruct", "shift", "resample")
METHODS = {
    "rtn": Method(),
    "gptq": Method(reconstruct=True, rounding="gptq"),
    "brecq": Method(reconstruct=True),
    "sas": Method(reconstruct=True, shift=True, resample=True),
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


@plain_torch()
def quantize(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    method: str | None = None,
    calibration: CalibrationConfig | None = None,
    seed: int = 0,
    progress: Progress = silent,
    work: Work | None = None,
) -> QuantizedPipeline:
    """Quantize the transformer of a float pipeline.

    method: "rtn", "gptq", "brecq" or "sas", or with single parts switched on ("brecq+shift"); None
    is the `default_method` of config and calibration. The float pipeline is left as it is; the
    result shares what stays in float with it. `report` of the result holds the resampling
    statistic, theta with its bit-operation account, the losses of every unit, and what end-to-end
    tuning changed. Same seed, settings and thread count give the same result. `work`, entered,
    keeps what is finished, and says which of several processes on the same call this is (work.py).
    Raises `ConfigError` for settings that contradict the model,
    `NonFiniteError` for NaN or infinity by layer.
    """
    method = default_method(config, calibration) if method is None else method
    parts = Method.parse(method)
    calibration = parts.settle(calibration or CalibrationConfig())
    if isinstance(pipe, QuantizedPipeline):
        raise InputError(f"model {pipe.name!r}: already quantized; give the float pipeline")
    pipe = bare(pipe)
    check_layers(pipe, hooks=True)
    check_tunable(pipe, calibration)
    work = work or Work()
    # Before the work folder is touched: it finds settings that contradict the model.
    run = _Run(pipe, config, parts, calibration, seed, progress, work)
    if work.folder is not None:
        work.begin(identity(pipe, config, method, calibration, seed), progress)
    run.smooth_inputs()
    run.center_inputs()
    theta = run.search_theta("theta") if parts.shift else None
    if parts.reconstruct:
        run.reconstruct()
        theta = run.search_theta("theta after reconstruction") if parts.shift else None
    if calibration.tune_steps:
        run.tune()
    release_float_weights(run.quantized)
    return QuantizedPipeline(
        run.quantized,
        pipe.vae,
        pipe.name,
        pipe.class_names,
        dict(pipe.sources),
        config=config,
        method=method,
        theta=theta,
        seed=seed,
        calibration=calibration.to_dict(),
        report=run.report,
    )


def identity(
    pipe: Pipeline, config: QuantConfig, method: str, calibration: CalibrationConfig, seed: int
) -> dict[str, Any]:
    """What decides the result of `quantize`, bit for bit on one machine, as plain values.

    Where activations spool to is left out; how much memory there is decides their dtype.
    """
    return {
        "format": WORK_FORMAT,
        "model": pipe.name,
        "model_sha256": networks_sha256(pipe.var, pipe.vae),
        "sources": pipe.sources,
        "device": pipe.device.type,
        "dtype": str(pipe.dtype),
        "config": config.to_dict(),
        "method": method,
        "calibration": calibration.replace(spool_dir=None).to_dict(),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class _Run:
    """State of one `quantize` call: samples are made once, on first need."""

    def __init__(
        self,
        pipe: Pipeline,
        config: QuantConfig,
        parts: Method,
        calibration: CalibrationConfig,
        seed: int,
        progress: Progress,
        work: Work,
    ) -> None:
        self.work = work
        self.pipe, self.config, self.parts = pipe, config, parts
        self.calibration, self.seed, self.progress = calibration, seed, progress
        self.quantized = convert(pipe.var, config)
        self.report: dict[str, Any] = {}
        self._samples: CalibrationSet | None = None

    @property
    def samples(self) -> CalibrationSet:
        if self._samples is None:
            self._samples = calibration_set(
                self.pipe,
                self.calibration,
                seed=self.seed,
                resampled=self.parts.resample,
                progress=self.progress,
                work=self.work,
            )
            if self._samples.summary is not None:
                self.report["resampling"] = self._samples.summary
        return self._samples

    def smooth_inputs(self) -> None:
        """Go on with a float model whose inputs are smoothed, if the config asks for any. It
        computes the same, so samples and targets are those of the model given."""
        pipe, count = smoothed(self.pipe, self.config, lambda: self.samples)
        if count:
            self.pipe, self.quantized = pipe, convert(pipe.var, self.config)

    def center_inputs(self) -> None:
        """Set the means of centred inputs, if the config asks for any: a property of the config,
        so every method does it."""
        if any(layer.centred for layer in quant_linears(self.quantized).values()):
            samples = self.samples
            self.progress("means", 0, 1)
            center_inputs(self.pipe, self.quantized, samples)
            self.progress("means", 1, 1)

    def search_theta(self, stage: str) -> float | None:
        """Measure attention on the quantized model as it is now, choose theta and set it."""
        samples = self.samples
        self.progress(stage, 0, 1)
        found = self.work.once(stage.replace(" ", "-"), lambda: self._measure_theta(samples)).facts
        # A budget below the price of finding the orders buys no copies: shift-and-sum is off.
        theta = None if found["status"] in ("over_budget", "off") else found["theta"]
        set_theta(self.quantized, theta)
        self.report["theta"] = found
        self.progress(stage, 1, 1, f"theta {found['theta']:.4f}, {found['status']}")
        return theta

    def _measure_theta(self, samples: CalibrationSet) -> Piece:
        count, grid = self.calibration.theta_samples, self.calibration.theta_grid
        masses = measure_attention(self.pipe, self.quantized, samples, count)
        total = bops_account(self.pipe.var, self.config).total
        result = search_theta(masses, total, self.calibration.budget, grid)
        return Piece(facts=result.to_dict())

    def reconstruct(self) -> None:
        """Reconstruct the units dealt to this process, then take the codes of all units."""
        recorder = Recorder(self.pipe, self.quantized, self.samples, self.calibration)
        costs = recorder.costs()
        missing = set(self.work.missing([_unit_piece(name) for name in costs]))
        left = {name: cost for name, cost in costs.items() if _unit_piece(name) in missing}
        mine = self.work.ranks.share_by_cost(left)
        with closing(recorder.units(mine)) as units:  # its files go at once, whatever happens
            for index, unit in enumerate(units):
                listen = self._step_listener(unit.name, index, len(mine))
                listen(0, math.nan)
                report = reconstruct(unit, self.calibration, self.seed, listen)
                codes = {layer.layer: layer.codes for layer in unit_layers(unit)}
                facts = {"report": report.to_dict() if report else None}
                self.work.write(_unit_piece(unit.name), Piece(codes, facts))
                # A unit with nothing to learn is done too, or the stage might never end.
                listen(self.calibration.steps_per_unit, report.loss_hard if report else math.nan)
        self.work.ranks.barrier()
        layers = quant_linears(self.quantized)
        pieces = [self.work.read(_unit_piece(name)) for name in costs]
        for name, codes in ((n, c) for piece in pieces for n, c in piece.tensors.items()):
            layer = layers[name]
            layer.load_codes(codes.to(layer.codes.device), layer.scale, layer.zero_point)
        reports = [piece.facts["report"] for piece in pieces]
        self.report["units"] = [report for report in reports if report is not None]

    def tune(self) -> None:
        """Tune scales and biases end to end; one process does it, all take what it found."""

        def listen(step: int, loss: float) -> None:
            self.progress("tuning", step, self.calibration.tune_steps, f"KL {loss:.4g}")

        def make() -> Piece:
            report, tensors = tune(self.pipe, self.quantized, self.calibration, self.seed, listen)
            return Piece(tensors, report.to_dict())

        self.progress("tuning", 0, self.calibration.tune_steps)
        found = self.work.once("tuning", make)
        put(self.quantized, found.tensors)
        self.report["tuning"] = found.facts
        # Of a piece that was there already, too.
        self.progress("tuning", self.calibration.tune_steps, self.calibration.tune_steps)

    def _step_listener(self, name: str, index: int, num_units: int) -> Callable[[int, float], None]:
        """Progress over the steps of all units together: one bar, whatever the depth. A unit that
        learns nothing is one step."""
        steps = self.calibration.steps_per_unit

        def listen(step: int, loss: float) -> None:
            info = name if math.isnan(loss) else f"{name}, loss {loss:.4g}"
            self.progress("reconstruct", index * steps + step, num_units * steps, info)

        return listen


def _unit_piece(name: str) -> str:
    return f"unit-{name}"
