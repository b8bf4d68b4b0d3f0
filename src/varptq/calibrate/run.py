"""One call of `quantize` under way: what the steps of a method read, and what they change.

A step is a function of one `Run`. It reads what it needs off the run, changes `quantized`, and says
in `report` what it did. The steps of a method run in order in every process of a job; which steps a
method has is written in methods.py.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import ConfigError
from varptq.models.autoencoder import Autoencoder
from varptq.models.pipeline import Pipeline
from varptq.models.transformer import Transformer
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.convert import check_groups, convert, convert_autoencoder
from varptq.quant.find import quant_linears
from varptq.quant.folds import Diagonals, scale_all
from varptq.quant.layers import QuantLinear
from varptq.work import Piece, Work

ROUNDED = ("codes", "scale")


@dataclass(eq=False)
class Run:
    """State of one `quantize` call.

    pipe: the float pipeline; a step may put one in its place that computes the same (`go_on_with`).
    quantized: its transformer with quantizers, which the steps improve. It still shares biases and
    what stays in float with `pipe`: give it new tensors, change none in place. autoencoder: that of
    `pipe`, quantized as the config says.
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
    autoencoder: Autoencoder = field(init=False)
    report: dict[str, Any] = field(default_factory=dict, init=False)
    theta: float | None = field(default=None, init=False)
    _resampled: bool = field(default=False, init=False)
    _samples: CalibrationSet | None = field(default=None, init=False)
    _names: Counter[str] = field(default_factory=Counter[str], init=False)

    def __post_init__(self) -> None:
        check_groups(self.pipe.var, self.config)
        self.quantized = self.converted()
        self.autoencoder = convert_autoencoder(self.pipe.vae, self.config)

    def converted(self) -> Transformer:
        """The transformer of `pipe` with quantizers, rounded to nearest."""
        return convert(self.pipe.var, self.config)

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
        self.pipe = pipe
        self.quantized = self.converted()

    def fold(self, diagonals: Diagonals) -> None:
        """Go on with the float model that has these diagonals on the inputs of its layers."""
        self.go_on_with(folded(self.pipe, diagonals))

    def center_on(self, means: Mapping[str, Tensor]) -> None:
        """Centre the inputs of the named layers on these means (K, in)."""
        layers = quant_linears(self.quantized)
        for name, means_Ki in means.items():
            layers[name].set_means(means_Ki)

    def float_weight(self, linear: nn.Linear) -> Tensor:
        """Of a Linear of the float model."""
        return linear.weight

    def unit(self, name: str) -> nn.Module:
        """A submodule of `quantized` whose rounding is chosen on its own."""
        return self.quantized.get_submodule(name)

    def take_codes(self, pieces: Sequence[str]) -> None:
        """Give every layer what these pieces have of it (`rounded_of`)."""
        layers = quant_linears(self.quantized)
        for piece in pieces:
            tensors = self.work.read(piece).tensors
            for name in layers_in(tensors):
                give_rounded(layers[name], tensors)

    def piece(self, name: str) -> str:
        """`name` for a piece of the work folder, with a number from the second time on: a step that
        a method lists twice does not find what it made the first time."""
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}-{count}"

    def once(self, name: str, make: Callable[[], Piece]) -> Piece:
        """What `make` gives, computed by one process, kept in the work folder, read by all."""
        return self.work.once(self.piece(name), make)


def rounded_of(layers: Iterable[QuantLinear]) -> dict[str, Tensor]:
    """What rounding chooses of layers, as tensors LAYER.codes and LAYER.scale; zero points stay."""
    return {f"{x.layer}.{part}": getattr(x, part) for x in layers for part in ROUNDED}


def layers_in(names: Iterable[str]) -> list[str]:
    """The layers that such tensors belong to."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def give_rounded(layer: QuantLinear, tensors: Mapping[str, Tensor]) -> None:
    codes, scale = (tensors[f"{layer.layer}.{part}"].to(layer.codes.device) for part in ROUNDED)
    layer.load_codes(codes, scale, layer.zero_point)


@torch.no_grad()
def folded(pipe: Pipeline, diagonals: Diagonals) -> Pipeline:
    """A copy of the float pipeline with these diagonals; it computes the same."""
    var = copy.deepcopy(pipe.var)
    scale_all(var.folds(), diagonals)
    return replace(pipe, var=var)
