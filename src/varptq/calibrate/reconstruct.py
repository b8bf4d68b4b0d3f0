"""Block reconstruction: the weight rounding of a unit is learned so that its quantized output
matches the float one.

    loss = sum over scales of mean over (rows, tokens) of sum over channels (y^ - y)^2
           + lambda sum(1 - |2h - 1|^beta)

Adam on alpha with a cosine to 0, activations quantized, gradients straight through every rounding
(AdaRound / BRECQ; paper: base pipeline; docs/method.md section 5). The released code trains the
soft h and deploys the hard one, which differ; by default the hard one is trained, with the soft
one's gradient, and lambda is 0. Both losses are measured. Units are independent of each other: each
draws its rows from (seed, unit name).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.record import Unit
from varptq.errors import NonFiniteError
from varptq.quant import adaround
from varptq.quant.layers import LearnedRounding, QuantLinear

# Rows the loss before and after is measured on: enough for two digits, little next to the training
# itself.
EVALUATED_ROWS = 64
# Units with one vector per class are tiny; more rows a step cost nothing there.
VECTOR_BATCH = 256


@dataclass(frozen=True)
class UnitReport:
    """Losses of one unit: nearest rounding, and the learned one with h as a fraction (soft) and as
    deployed (hard).

    kept: "learned", or "nearest" where the learned codes were no better on the calibration data.
    """

    name: str
    steps: int
    loss_nearest: float
    loss_soft: float
    loss_hard: float
    kept: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def unit_loss(output: Tensor, target: Tensor, token_weights: Tensor | None) -> Tensor:
    """Channel-summed squared error, mean over rows, tokens weighted by 1 / l_k (sum over scales of
    means)."""
    error = (output.float() - target.to(output.device)).square().sum(dim=-1)
    if token_weights is None:
        return error.mean()
    return (error @ token_weights.to(error.device)).mean()


def unit_generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def unit_layers(unit: Unit) -> list[QuantLinear]:
    """The layers of a unit that have a quantized weight."""
    return [m for m in unit.module.modules() if isinstance(m, QuantLinear) and m.weight_bits]


def reconstruct(
    unit: Unit,
    config: CalibrationConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> UnitReport | None:
    """Learn the rounding of `unit` in place. None for a unit without quantized weights or with 0
    steps."""
    layers = unit_layers(unit)
    if not layers or config.steps == 0:
        return None
    generator = unit_generator(seed, unit.name)
    nearest = [layer.codes for layer in layers]
    evaluated = torch.randperm(len(unit.inputs), generator=generator)[:EVALUATED_ROWS]
    loss_nearest = evaluate(unit, evaluated)
    roundings = [layer.start_rounding(hard=config.forward == "hard") for layer in layers]
    if on_step is not None:
        on_step(0, loss_nearest)
    train(unit, roundings, config, generator, on_step)
    for rounding in roundings:
        rounding.hard = False
    loss_soft = evaluate(unit, evaluated)
    for layer in layers:
        layer.finish_rounding()
    loss_hard = evaluate(unit, evaluated)
    kept = "learned" if loss_hard < loss_nearest else "nearest"
    if kept == "nearest":
        for layer, codes in zip(layers, nearest, strict=True):
            layer.load_codes(codes, layer.scale, layer.zero_point)
    return UnitReport(unit.name, config.steps, loss_nearest, loss_soft, loss_hard, kept)


def train(
    unit: Unit,
    roundings: list[LearnedRounding],
    config: CalibrationConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """`config.steps` Adam steps on the alphas of `roundings`."""
    alphas = [rounding.alpha for rounding in roundings]
    optimizer = torch.optim.Adam(alphas, lr=config.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.steps)
    batch = config.batch_size if unit.token_weights is not None else VECTOR_BATCH
    batch = min(batch, len(unit.inputs))
    for step in range(1, config.steps + 1):
        rows = torch.randint(len(unit.inputs), (batch,), generator=generator)
        beta = adaround.linear_beta(step, config.steps, config.beta_start, config.beta_end)
        loss = train_step(unit, rows, alphas, optimizer, config.regularizer, beta)
        schedule.step()
        if on_step is not None:
            on_step(step, loss)


def train_step(
    unit: Unit,
    rows: Tensor,
    alphas: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    strength: float,
    beta: float,
) -> float:
    """One step; returns the reconstruction loss of its batch."""
    loss = unit_loss(unit.run(unit.inputs[rows]), unit.target(rows), unit.token_weights)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"unit {unit.name}: reconstruction loss is {value}; lower the learning rate"
        )
    optimizer.zero_grad(set_to_none=True)
    total = loss
    if strength > 0:
        total = loss + strength * sum(adaround.regularizer(alpha, beta) for alpha in alphas)
    total.backward()
    optimizer.step()
    return value


@torch.no_grad()
def evaluate(unit: Unit, rows: Tensor) -> float:
    """Loss over these rows, a few at a time."""
    total = 0.0
    for part in rows.split(8):
        loss = unit_loss(unit.run(unit.inputs[part]), unit.target(part), unit.token_weights)
        total += float(loss) * len(part)
    return total / len(rows)
