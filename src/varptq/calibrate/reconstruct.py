"""Block reconstruction: choose the weight rounding of a unit so that its quantized output matches
the float one, in closed form by GPTQ (gptq.py), by gradient descent, or by both in turn.

    loss = sum over scales of mean over (rows, tokens) of sum over channels (y^ - y)^2
           + lambda sum(1 - |2h - 1|^beta)

Adam on alpha with a cosine to 0, activations quantized, gradients straight through every rounding
(AdaRound / BRECQ; paper: base pipeline; docs/method.md section 5). The released code trains the
soft h and deploys the hard one, which differ. By default we train the hard one, with the gradient
of the soft one and lambda = 0. Both losses are measured. Units are independent of each other: each
draws its rows from (seed, unit name).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.record import Recorder, Unit
from varptq.calibrate.run import Run, rounded_of
from varptq.calibrate.solve import solve
from varptq.errors import NonFiniteError
from varptq.quant import adaround
from varptq.quant.find import quant_linears
from varptq.quant.layers import LearnedRounding, QuantLinear
from varptq.work import Piece

# Rows for measuring the loss before and after: enough for two digits, cheap compared with training.
EVALUATED_ROWS = 64
# Units that see one vector per class are tiny: more rows per step cost nothing.
VECTOR_BATCH = 256
# A window of steps must improve on the best one by this share, or the unit is on a plateau.
PLATEAU = 0.005
# Size of alpha where GPTQ did not round to nearest, small enough for a few steps to undo it.
UNDECIDED = 0.5


@dataclass(frozen=True)
class UnitReport:
    """Losses of one unit: nearest rounding, and the learned one with h as a fraction (soft) and as
    deployed (hard); loss_gptq if GPTQ took part. steps: how many were made.

    kept: "learned", "gptq" or "nearest", whichever codes were best on the calibration data.
    """

    name: str
    steps: int
    loss_nearest: float
    loss_soft: float
    loss_hard: float
    kept: str
    loss_gptq: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def reconstruct(run: Run) -> None:
    """Step: reconstruct the units dealt to this process, then take the codes of all units."""
    recorder = Recorder(run.pipe, run.unit, run.samples, run.calibration)
    costs, piece = recorder.costs(), run.piece("unit")
    pieces = {name: f"{piece}-{name}" for name in costs}
    missing = set(run.work.missing(list(pieces.values())))
    left = {name: cost for name, cost in costs.items() if pieces[name] in missing}
    follow = run.quantized if left and corrects(run.quantized, run.calibration) else None
    mine = run.work.ranks.share_by_cost(left) if follow is None else list(costs)
    with closing(recorder.units(mine, follow=follow)) as units:  # its files go, whatever happens
        for index, unit in enumerate(units):
            if pieces[unit.name] not in missing:
                run.take_codes([pieces[unit.name]])
                continue
            listen = _step_listener(run, unit.name, index, len(mine))
            listen(0, math.nan)
            report = reconstruct_unit(unit, run.calibration, run.seed, listen)
            tensors = rounded_of(unit_layers(unit))
            facts = {"report": report.to_dict() if report else None}
            # Where units follow each other every process has the same result.
            if follow is None or run.work.ranks.first:
                run.work.write(pieces[unit.name], Piece(tensors, facts))
            # A unit with nothing to learn is done too, or the stage might never end.
            listen(run.calibration.steps_per_unit, report.loss_hard if report else math.nan)
    run.work.ranks.barrier()
    run.take_codes(list(pieces.values()))
    reports = [run.work.read(name, ()).facts["report"] for name in pieces.values()]
    run.report["units"] = [report for report in reports if report is not None]


def corrects(quantized: nn.Module, config: CalibrationConfig) -> bool:
    """Whether a layer's rounding follows the quantized model before it."""
    return any(config.corrects(layer.spec) for layer in quant_linears(quantized).values())


def _step_listener(run: Run, name: str, index: int, num_units: int) -> Callable[[int, float], None]:
    """Progress over the steps of all units together: one bar, whatever the depth. A unit that
    learns nothing is one step."""
    steps = run.calibration.steps_per_unit

    def listen(step: int, loss: float) -> None:
        info = name if math.isnan(loss) else f"{name}, loss {loss:.4g}"
        run.progress("reconstruct", index * steps + step, num_units * steps, info)

    return listen


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


def reconstruct_unit(
    unit: Unit,
    config: CalibrationConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
) -> UnitReport | None:
    """Choose the rounding of `unit` in place. None for a unit without quantized weights, or if the
    config asks for nearest rounding. Raises `NonFiniteError` if a loss is not finite."""
    layers = unit_layers(unit)
    learns = config.learns
    if not layers or not (learns or config.solves):
        return None
    generator = unit_generator(seed, unit.name)
    order = torch.randperm(len(unit.inputs), generator=generator, dtype=torch.int64, device="cpu")
    evaluated = order[:EVALUATED_ROWS]
    candidates = [Candidate.of("nearest", layers, evaluate(unit, evaluated))]
    loss_nearest = candidates[0].loss
    if on_step is not None:
        on_step(0, loss_nearest)
    loss_gptq = None
    if config.solves:
        solve(unit, layers, config)
        loss_gptq = evaluate(unit, evaluated)
        candidates.append(Candidate.of("gptq", layers, loss_gptq))
    loss_soft, steps = candidates[-1].loss, 0
    if learns:
        roundings = [start(layer, config) for layer in layers]
        steps = train(unit, roundings, config, generator, on_step)
        for rounding in roundings:
            rounding.hard = False
        loss_soft = evaluate(unit, evaluated)
        for layer in layers:
            layer.finish_rounding()
        candidates.append(Candidate.of("learned", layers, evaluate(unit, evaluated)))
    best = min(candidates, key=lambda candidate: candidate.loss)
    best.restore(layers)
    # The last candidate is what the settings asked for; `kept` says which one is deployed.
    loss_hard = candidates[-1].loss
    return UnitReport(unit.name, steps, loss_nearest, loss_soft, loss_hard, best.kind, loss_gptq)


@dataclass(frozen=True)
class Candidate:
    """Codes and scales of all layers of a unit, and their loss."""

    kind: str
    rounded: list[tuple[Tensor, Tensor]]
    loss: float

    @classmethod
    def of(cls, kind: str, layers: list[QuantLinear], loss: float) -> Candidate:
        return cls(kind, [(layer.codes, layer.scale) for layer in layers], loss)

    def restore(self, layers: list[QuantLinear]) -> None:
        for layer, (codes, scale) in zip(layers, self.rounded, strict=True):
            layer.load_codes(codes, scale, layer.zero_point)


def start(layer: QuantLinear, config: CalibrationConfig) -> LearnedRounding:
    """Make the rounding of a layer learnable, from its codes if GPTQ found them.

    The choice is then between that code and its neighbour on the other side of the float weight.
    Where GPTQ rounded to nearest, alpha has the size that the float weight gives it; elsewhere it
    is small, so that training can undo the choice.
    """
    codes = layer.codes_grouped.float()
    rounding = layer.start_rounding(hard=config.forward == "hard")
    if not config.solves:
        return rounding
    with torch.no_grad():
        at_or_above = codes > rounding.floor
        nearest = (rounding.alpha >= 0) == at_or_above
        size = torch.where(nearest, rounding.alpha.abs(), UNDECIDED)
        rounding.alpha.copy_(torch.where(at_or_above, size, -size))
        rounding.floor = codes - at_or_above.float()
    return rounding


def optimizer_of(alphas: list[nn.Parameter], config: CalibrationConfig) -> torch.optim.Optimizer:
    """Fused: one pass over memory that the steps of a wide unit would otherwise read a dozen
    times."""
    return torch.optim.Adam(alphas, lr=config.rate, fused=True)


def train(
    unit: Unit,
    roundings: list[LearnedRounding],
    config: CalibrationConfig,
    generator: torch.Generator,
    on_step: Callable[[int, float], None] | None = None,
) -> int:
    """At most `config.steps` Adam steps on the alphas of `roundings`; returns how many were
    made."""
    alphas = [rounding.alpha for rounding in roundings]
    optimizer = optimizer_of(alphas, config)
    batch = VECTOR_BATCH if unit.sees_vectors else config.batch_size
    batch = min(batch, len(unit.inputs))
    schedule = Schedule(config.steps, config.patience)
    while (phase := schedule.phase) < 1:
        rows = torch.randint(
            len(unit.inputs), (batch,), generator=generator, dtype=torch.int64, device="cpu"
        )
        for group in optimizer.param_groups:
            group["lr"] = config.rate * (1 + math.cos(math.pi * phase)) / 2
        step = schedule.made + 1
        beta = adaround.linear_beta(step, config.steps, config.beta_start, config.beta_end)
        loss = train_step(unit, rows, alphas, optimizer, config.regularizer, beta)
        schedule.advance(loss)
        if on_step is not None:
            on_step(step, loss)
    return schedule.made


class Schedule:
    """Progress of a training from 0 to 1 in `steps` equal strides, or in fewer: when the mean loss
    of a window of `patience` steps is no better than that of the best window, the rest of the way
    is done in one more window, so that the rate still falls to 0."""

    def __init__(self, steps: int, patience: int | None) -> None:
        self.steps, self.patience = steps, patience
        self.made = 0
        self._losses: list[float] = []
        self._best = math.inf
        self._left_at: int | None = None

    @property
    def phase(self) -> float:
        if self._left_at is None:
            return self.made / self.steps
        assert self.patience is not None
        strides = min(self.patience, self.steps - self._left_at)
        begun = self._left_at / self.steps
        return begun + (1 - begun) * (self.made - self._left_at) / max(strides, 1)

    def advance(self, loss: float) -> None:
        self.made += 1
        if self.patience is None or self._left_at is not None:
            return
        self._losses.append(loss)
        if len(self._losses) < self.patience:
            return
        mean = sum(self._losses) / len(self._losses)
        self._losses.clear()
        if mean > self._best * (1 - PLATEAU) and self.made < self.steps:
            self._left_at = self.made
        self._best = min(self._best, mean)


def train_step(
    unit: Unit,
    rows: Tensor,
    alphas: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    strength: float,
    beta: float,
) -> float:
    """One step; returns the reconstruction loss of its batch."""
    loss = unit_loss(unit.run(unit.met[rows]), unit.target(rows), unit.token_weights)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"unit {unit.name}: reconstruction loss is {value}, expected a finite number; "
            "lower the learning rate"
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
    """Mean loss over these rows, a few at a time. Raises `NonFiniteError` if it is not finite."""
    total = 0.0
    for part in rows.split(8):
        loss = unit_loss(unit.run(unit.met[part]), unit.target(part), unit.token_weights)
        total += float(loss) * len(part)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"unit {unit.name}: reconstruction loss is {total}, expected a finite number; "
            "calibrate in another dtype, or check the size of the weights"
        )
    return total / len(rows)
