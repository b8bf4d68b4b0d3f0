"""End-to-end tuning of what an artifact stores, on the loss of the whole model.

    minimize  mean over images and tokens of KL(p || q),
              p and q the guided next-token distributions of the float and the quantized model

It tunes scales of weights, s exp(change), biases, the bias rows of centred inputs, and codes: each
has a number beside it, at first 0, that is added to what the code stands for, and the nearest code
is in use, so one steps to its neighbour when steps of descent agree on it. Zero points, means and
theta stay. (Scales: the second stage of EfficientQAT, Chen et al. 2024; codes: training of
quantized weights with gradients straight through, Esser et al. 2020, from solved codes on and with
distillation as the loss.) Both models read the same tokens, of images that the float model
generates for tuning alone. Adam with a cosine to 0, gradients straight through every rounding. A
gate keeps the tuned tensors only if they lower the KL on images that tuning never saw. The whole
model's activations for `BATCH` images are in memory at a time, and `WEIGHT_BYTES` for each weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.reconstruct import unit_generator
from varptq.calibrate.run import Run
from varptq.calibrate.samples import CalibrationSet, calibration_set
from varptq.errors import ConfigError, NonFiniteError
from varptq.models.pipeline import Pipeline
from varptq.models.reading import guided_logits, kl_divergence
from varptq.models.sampling import SamplingSettings
from varptq.models.transformer import Transformer
from varptq.quant.find import quant_linears
from varptq.work import Piece

# Last parts of the names of the tensors that are tuned.
OF_WEIGHTS = ("codes", "scale")
BIASES = ("bias", "q_bias", "v_bias", "mean_bias")
TUNED = (*OF_WEIGHTS, *BIASES)
# Images in a step, images of the gate, and training images per step, up to a maximum.
BATCH, HELD_OUT, MAX_IMAGES = 4, 32, 1024
# Adam's rates: of the logarithm of a scale, of a bias in units of its root mean square, and of what
# a code stands for in steps between codes.
SCALE_RATE, BIAS_RATE, LEAST_RMS, CODE_RATE = 2e-3, 2e-3, 1e-3, 4e-2
# The share of steps before which rates are not full: a step of Adam has the length of its rate even
# where its gradient is noise, and codes that are half a step away cross together.
WARM_UP = 0.2
# Of each weight while it is tuned: what its code stands for, how far it is from there, the gradient
# of that and Adam's two means, and the weight twice for the way back.
WEIGHT_BYTES = 28


@dataclass(frozen=True)
class TuneReport:
    """Steps made, mean KL in nats per token on held-out images before and after, and whether the
    gate let the tuned tensors through."""

    steps: int
    kl_before: float
    kl_after: float
    kept: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def tune(run: Run) -> None:
    """Step: tune codes, scales and biases end to end, if the settings ask for steps of it. One
    process does it, all take what it found."""
    steps = run.calibration.tune_steps
    if not steps:
        return

    def listen(step: int, loss: float) -> None:
        run.progress("tuning", step, steps, f"KL {loss:.4g}")

    def make() -> Piece:
        report, tensors = tune_model(run.pipe, run.quantized, run.calibration, run.seed, listen)
        return Piece(tensors, report.to_dict())

    run.progress("tuning", 0, steps)
    found = run.once("tuning", make)
    put(run.quantized, found.tensors)
    run.report["tuning"] = found.facts
    # Of a piece that was there already, too.
    run.progress("tuning", steps, steps)


def check_tunable(pipe: Pipeline, config: CalibrationConfig) -> None:
    """Raise `ConfigError` if tuning is asked for in a dtype too coarse for its steps."""
    if config.tune_steps and pipe.dtype != torch.float32:
        raise ConfigError(
            f"tune_steps {config.tune_steps}: model in {pipe.dtype}, expected torch.float32; "
            "calibrate in float32 or set tune_steps to 0"
        )


def images_for(config: CalibrationConfig) -> int:
    """How many images tuning draws: those it learns from, and those of the gate."""
    return min(MAX_IMAGES, BATCH * config.tune_steps) + HELD_OUT


def tune_model(
    pipe: Pipeline,
    quantized: Transformer,
    config: CalibrationConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[TuneReport, dict[str, Tensor]]:
    """Tune `quantized` in place against `pipe`; returns its final tensors by name, for `put`.
    Raises `NonFiniteError` if the loss is not finite."""
    generator = unit_generator(seed, "tuning")
    images = calibration_set(
        pipe,
        config.replace(num_samples=images_for(config)),
        seed=generator.initial_seed(),
        resampled=False,
    )
    held_out = images.first(HELD_OUT)
    train = images.part(slice(HELD_OUT, None))
    student = replace(pipe, var=quantized)
    before = tuned_tensors(quantized)
    kl_before = mean_kl(pipe, student, held_out, config)
    with learnable(quantized) as parameters:
        descend(pipe, student, train, parameters, config, generator, on_step)
    kl_after = mean_kl(pipe, student, held_out, config)
    kept = kl_after < kl_before
    after = tuned_tensors(quantized) if kept else before
    put(quantized, after)
    return TuneReport(config.tune_steps, kl_before, kl_after, kept), after


def tuned_tensors(quantized: Transformer) -> dict[str, Tensor]:
    """Copies of all tensors that tuning may change, by name."""
    return {
        name: tensor.detach().clone()
        for name, tensor in quantized.state_dict().items()
        if name.rpartition(".")[2] in TUNED
    }


def put(quantized: Transformer, tensors: dict[str, Tensor]) -> None:
    """Set copies of these tensors in the model, whose biases are shared with the float model
    before."""
    layers = quant_linears(quantized)
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        module, value = quantized.get_submodule(owner), tensor.to(quantized.device, copy=True)
        if key in OF_WEIGHTS:
            parts = {part: getattr(module, part) for part in (*OF_WEIGHTS, "zero_point")}
            layers[owner].load_codes(**{**parts, key: value})
        elif key == "mean_bias":
            module.mean_bias = value
        else:
            setattr(module, key, nn.Parameter(value, requires_grad=False))


@contextmanager
def learnable(quantized: Transformer) -> Iterator[list[tuple[Tensor, float]]]:
    """The tuned tensors as leaves that take gradients, with the rate of each; afterwards plain
    tensors of their final values."""
    put(quantized, tuned_tensors(quantized))
    layers = [m for m in quant_linears(quantized).values() if m.weight_bits]
    weights = [m.start_tuning() for m in layers]
    learned: list[tuple[Tensor, float]] = [(w.change, SCALE_RATE) for w in weights]
    learned += [(w.shift, CODE_RATE * w.step) for w in weights]
    biases = [
        tensor.requires_grad_()
        for name, tensor in quantized.state_dict(keep_vars=True).items()
        if name.rpartition(".")[2] in BIASES
    ]
    for bias in biases:
        rms = float(bias.detach().square().mean().sqrt())
        learned.append((bias, BIAS_RATE * max(rms, LEAST_RMS)))
    try:
        yield learned
    finally:
        for layer in layers:
            layer.finish_tuning()
        for bias in biases:
            bias.requires_grad_(False)


def share_of_rate(step: int, steps: int) -> float:
    """Of Adam's rates at step 0, 1 .. steps - 1: rising in a line while it knows little of its
    gradients, and in all a cosine to 0."""
    rising = min(1.0, (step + 1) / (1 + WARM_UP * steps))
    return rising * (1 + math.cos(math.pi * step / steps)) / 2


def descend(
    pipe: Pipeline,
    student: Pipeline,
    train: CalibrationSet,
    parameters: list[tuple[Tensor, float]],
    config: CalibrationConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None,
) -> None:
    """`config.tune_steps` Adam steps, images in random order, all once before any is repeated."""
    groups = [{"params": [tensor], "lr": rate} for tensor, rate in parameters]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(step, config.tune_steps)
    )
    order: list[int] = []
    for step in range(1, config.tune_steps + 1):
        if not order:
            order = torch.randperm(
                len(train.prompts), generator=generator, dtype=torch.int64, device="cpu"
            ).tolist()
        rows = torch.tensor(order[:BATCH], dtype=torch.int64, device="cpu")
        order = order[BATCH:]
        part = train.part(rows)
        with torch.no_grad():
            target = all_logits(pipe, part, config.sampling)
        found = all_logits(student, part, config.sampling)
        # float32 as the model: gradients in float64 would cost more and say no more.
        loss = pipe.alphabet.per_token(kl_divergence(target, found, torch.float32)).mean()
        if not math.isfinite(value := float(loss.detach())):
            raise NonFiniteError(
                f"tuning step {step}: KL is {value}, expected a finite number; set tune_steps to 0"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, value)


@torch.no_grad()
def mean_kl(
    pipe: Pipeline, student: Pipeline, images: CalibrationSet, config: CalibrationConfig
) -> float:
    """Over all tokens of `images`, nats."""
    total = 0.0
    for start in range(0, len(images.prompts), BATCH):
        part = images.part(slice(start, start + BATCH))
        p, q = (all_logits(which, part, config.sampling) for which in (pipe, student))
        kl_BL = pipe.alphabet.per_token(kl_divergence(p, q, torch.float32))
        total += float(kl_BL.mean(dim=1).sum())
    return total / len(images.prompts)


def all_logits(pipe: Pipeline, images: CalibrationSet, sampling: SamplingSettings) -> Tensor:
    """(B, L draws, V) float32 guided logits of all scales, nothing filtered."""
    guidance = (sampling.cfg, sampling.tau, sampling.guided_scales)
    parts = guided_logits(pipe, images.prompts, images.tokens, *guidance)
    return torch.cat([part.float() for _, part in parts], dim=1)
