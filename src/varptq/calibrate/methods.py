"""Methods by name, and `quantize`: the whole path from a float pipeline to a quantized one.

    rtn      nearest rounding
    gptq     + reconstruction in closed form, whatever the settings say of rounding
    brecq    + reconstruction as the settings say, learned by default
    sas      + shift-and-sum and resampling (the paper)

A name may switch single parts on for ablations: "brecq+shift", "brecq+resample", "rtn+shift".
LiteVAR is a bit policy, so it is a preset of the config ("w4a4+litevar") and composes with every
method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig, Rounding
from varptq.calibrate.means import center_inputs
from varptq.calibrate.reconstruct import reconstruct, unit_layers
from varptq.calibrate.record import Recorder
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.calibrate.smoothing import smoothed
from varptq.calibrate.theta import AttentionMass, search_theta
from varptq.calibrate.tune import check_tunable, put, tune
from varptq.errors import ConfigError, InputError
from varptq.models.bare import bare, check_layers
from varptq.models.pipeline import Pipeline
from varptq.models.state_file import networks_sha256
from varptq.models.var import VAR, Mix
from varptq.progress import Progress, silent
from varptq.quant.affine import wide
from varptq.quant.attention import QuantMix
from varptq.quant.bops import FLOAT_BITS
from varptq.quant.config import QuantConfig
from varptq.quant.convert import (
    bops_account,
    convert,
    quant_linears,
    quant_mixes,
    release_float_weights,
    set_theta,
)
from varptq.quant.pipeline import QuantizedPipeline
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
            )
        return replace(METHODS[base], **dict.fromkeys(parts, True))


# Raised when what a piece of a work folder holds, or how it is computed, changes.
WORK_FORMAT = 2
PARTS = ("reconstruct", "shift", "resample")
METHODS = {
    "rtn": Method(),
    "gptq": Method(reconstruct=True, rounding="gptq"),
    "brecq": Method(reconstruct=True),
    "sas": Method(reconstruct=True, shift=True, resample=True),
}


@plain_torch()
def quantize(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    method: str = "sas",
    calibration: CalibrationConfig | None = None,
    seed: int = 0,
    progress: Progress = silent,
    work: Work | None = None,
) -> QuantizedPipeline:
    """Quantize the transformer of a float pipeline.

    method: "rtn", "gptq", "brecq" or "sas", or with single parts switched on ("brecq+shift"). The
    float pipeline is left as it is; the result shares what stays in float with it. `report` of the
    result holds the resampling statistic, theta with its bit-operation account, the losses of every
    unit, and what end-to-end tuning changed. Same seed, settings and thread count give the same
    result. `work`, entered, keeps what is finished, and says which of several processes on the same
    call this is (work.py). Raises `ConfigError` for settings that contradict the model,
    `NonFiniteError` for NaN or infinity by layer.
    """
    parts = Method.parse(method)
    calibration = calibration or CalibrationConfig()
    if isinstance(pipe, QuantizedPipeline):
        raise InputError(f"model {pipe.name!r}: already quantized; give the float pipeline")
    pipe = bare(pipe)
    check_layers(pipe, hooks=True)
    if parts.rounding is not None:
        calibration = calibration.replace(rounding=parts.rounding)
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
        orders = {mix.spec.max_order for mix in quant_mixes(self.quantized)} or {0}
        result = search_theta(masses, total, self.calibration.budget, grid, max(orders))
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
                listen(max(self.calibration.steps, 1), report.loss_hard if report else math.nan)
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
        """Progress over the steps of all units together: one bar, whatever the depth."""
        steps = max(self.calibration.steps, 1)

        def listen(step: int, loss: float) -> None:
            info = name if math.isnan(loss) else f"{name}, loss {loss:.4g}"
            self.progress("reconstruct", index * steps + step, num_units * steps, info)

        return listen


def _unit_piece(name: str) -> str:
    return f"unit-{name}"


@torch.no_grad()
def measure_attention(
    pipe: Pipeline, quantized: VAR, samples: CalibrationSet, count: int
) -> list[AttentionMass]:
    """Attention of the quantized model averaged over queries, per block and scale, on `count`
    samples.

    Rows are the conditional and unconditional ones; probabilities are taken before their
    quantization.
    """
    rows = pipe.guidance_rows(samples.labels_N[:count])
    inputs = pipe.vae.teacher_inputs(samples.ids_NL[:count]).repeat(2, 1, 1)
    masses: list[AttentionMass] = []
    lengths = pipe.scales.lengths

    def listener(block: int, mix: QuantMix) -> Any:
        seen = 0

        def record(_: torch.nn.Module, operands: tuple[Tensor, Tensor]) -> None:
            nonlocal seen
            masses.append(_mass(block, seen % len(lengths), operands[0], mix, pipe))
            seen += 1

        return mix.register_forward_pre_hook(record)

    handles = [
        listener(block, mix)
        for block, mix in enumerate(m for m in quantized.modules() if isinstance(m, Mix))
        if isinstance(mix, QuantMix) and mix.spec.value is not None
    ]
    try:
        quantized(rows, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return masses


def _mass(block: int, scale: int, p_BHlL: Tensor, mix: QuantMix, pipe: Pipeline) -> AttentionMass:
    value, probability = mix.spec.value, mix.spec.probability
    return AttentionMass(
        block=block,
        scale=scale,
        num_queries=p_BHlL.shape[-2],
        abar_BHl=wide(p_BHlL).mean(dim=-2).cpu(),
        head_dim=pipe.var.arch.head_width,
        probability_bits=probability.num_bits if probability else FLOAT_BITS,
        value_bits=value.num_bits if value else FLOAT_BITS,
    )
