"""One call of `quantize` under way: what the steps of a method read, and what they change.

A step is a function of one `Run`. It reads what it needs off the run, changes `quantized`, and says
in `report` what it did. The steps of a method run in order in every process of a job; which steps a
method has is written in methods.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import ConfigError
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import Transformer
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert
from varptq.work import Piece, Work


@dataclass(eq=False)
class Run:
    """State of one `quantize` call.

    pipe: the float pipeline; a step may put one in its place that computes the same (`go_on_with`).
    quantized: its transformer with quantizers, which the steps improve. It still shares biases and
    what stays in float with `pipe`: give it new tensors, change none in place.
    report: plain JSON values by part, stored in the artifact. theta: threshold of shift-and-sum,
    None while it is off.
    """

    pipe: Pipeline
    config: QuantConfig
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    seed: int = 0
    progress: Progress = silent
    work: Work = field(default_factory=Work)
    quantized: Transformer = field(init=False)
    report: dict[str, Any] = field(default_factory=dict, init=False)
    theta: float | None = field(default=None, init=False)
    _resampled: bool = field(default=False, init=False)
    _samples: CalibrationSet | None = field(default=None, init=False)
    _names: Counter[str] = field(default_factory=Counter[str], init=False)

    def __post_init__(self) -> None:
        self.quantized = convert(self.pipe.var, self.config)

    @property
    def samples(self) -> CalibrationSet:
        """The calibration set. The float model generates it when it is first asked for."""
        if self._samples is None:
            self._samples = calibration_set(
                self.pipe,
                self.calibration,
                seed=self.seed,
                resampled=self._resampled,
                progress=self.progress,
                work=self.work,
            )
            if self._samples.summary is not None:
                self.report["resampling"] = self._samples.summary
        return self._samples

    def resample(self) -> None:
        """Have the calibration set resampled (resample.py). Raises `ConfigError` where it has been
        used already."""
        if self._samples is not None:
            raise ConfigError(
                "step resample: the calibration set is in use already; put resample before the "
                "steps that use it"
            )
        self._resampled = True

    def go_on_with(self, pipe: Pipeline) -> None:
        """Quantize `pipe` from here on, a float model that computes the same: samples and targets
        stay right. What steps did to `quantized` is lost, so this is for the first of them."""
        self.pipe, self.quantized = pipe, convert(pipe.var, self.config)

    def piece(self, name: str) -> str:
        """`name` for a piece of the work folder, with a number from the second time on: a step that
        a method lists twice does not find what it made the first time."""
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}-{count}"

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """What `make` gives, computed by one process, kept in the work folder, read by all."""
        return self.work.once(self.piece(name), make)
