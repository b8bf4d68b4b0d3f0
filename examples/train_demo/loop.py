"""A training loop that can be killed: the same steps in the same order, whenever it is started.

    state after step n = f(recipe, data): batches and noise are functions of (seed, stage, step)
So a state needs no generators, and a run that was stopped ends in the same weights (on one machine
and number of threads). The average of the weights (EMA) is kept beside them. What is trained is in
vqvae_stage.py and var_stage.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from recipe import Schedule
from torch import Tensor, nn

from varptq.errors import InputError, NonFiniteError
from varptq.files import write_atomic
from varptq.progress import Progress

# Steps after which the average forgets its start, while `ema` would still remember it.
EMA_WARMUP = 10
REPORT_EVERY = 50


def generator(seed: int, *address: object) -> torch.Generator:
    """Random numbers of one place of the run, e.g. (stage, step, purpose)."""
    text = ":".join(str(part) for part in (seed, *address))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Batches:
    """Indices of step n: every image once per epoch, in an order of the epoch's own."""

    def __init__(self, count: int, batch: int, seed: int, stage: str) -> None:
        self.count, self.batch, self.seed, self.stage = count, min(batch, count), seed, stage
        self._epoch, self._order = -1, torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """(B,) int64. What does not fill a batch at the end of an epoch is left out."""
        epoch, place = divmod(step, self.count // self.batch)
        if epoch != self._epoch:
            draws = generator(self.seed, self.stage, "epoch", epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=draws)
        return self._order[place * self.batch : (place + 1) * self.batch]


@dataclass
class Stage:
    """What one loop trains. loss(step) is a scalar with its graph; after(step) may change weights
    outside of the gradient; identity is everything that decides the result."""

    name: str
    module: nn.Module
    schedule: Schedule
    loss: Callable[[int], Tensor]
    identity: Mapping[str, Any]
    after: Callable[[int], None] = lambda step: None
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def train(stage: Stage, path: Path, progress: Progress, *, go_on: bool = True) -> int:
    """Bring `stage.module` to the average of its trained weights; `path` keeps the state.

    A state that is there is gone on with; a finished one is only read, and so is any other without
    `go_on`. Returns the steps it is the average of. Raises `InputError` for the state of another
    recipe, `NonFiniteError` where the loss is lost.
    """
    schedule, module = stage.schedule, stage.module
    optimizer = _optimizer(module, schedule)
    average = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    step = _resume(stage, path, optimizer, average)
    last = schedule.steps if go_on else step
    started = time.monotonic() - stage.seconds
    progress(stage.name, step, schedule.steps)
    while step < last:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        loss = stage.loss(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), schedule.clip)
        optimizer.step()
        stage.after(step)
        _follow(average, module, schedule.ema, step)
        step += 1
        if step % REPORT_EVERY == 0 or step == schedule.steps:
            _note(stage, step, float(loss.detach()))
        if step % schedule.save_every == 0 or step == schedule.steps:
            stage.seconds = time.monotonic() - started
            _save(stage, path, step, optimizer, average)
        progress(stage.name, step, schedule.steps, _info(stage))
    module.load_state_dict(average)
    return step


def learning_rate(schedule: Schedule, step: int) -> float:
    if step < schedule.warmup:
        return schedule.learning_rate * (step + 1) / schedule.warmup
    share = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    cosine = (1 + math.cos(math.pi * share)) / 2
    return schedule.learning_rate * (schedule.final + (1 - schedule.final) * cosine)


def _optimizer(module: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) and embeddings do not decay."""
    matrices = [p for n, p in module.named_parameters() if p.ndim > 1 and "emb" not in n]
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in module.parameters() if id(p) not in chosen]
    groups = [
        {"params": matrices, "weight_decay": schedule.decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=schedule.betas)


@torch.no_grad()
def _follow(average: dict[str, Tensor], module: nn.Module, decay: float, step: int) -> None:
    share = 1 - min(decay, (1 + step) / (EMA_WARMUP + step))
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, share)
        else:
            average[name].copy_(tensor)


def _note(stage: Stage, step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"{stage.name}: loss is {loss} at step {step}; lower the learning rate"
        )
    stage.losses.append((step, loss))


def _info(stage: Stage) -> str:
    return f"loss {stage.losses[-1][1]:.4f}" if stage.losses else ""


def _save(
    stage: Stage,
    path: Path,
    step: int,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor],
) -> None:
    state = {
        "identity": _encoded(stage.identity),
        "step": step,
        "module": stage.module.state_dict(),
        "average": average,
        "optimizer": optimizer.state_dict(),
        "losses": stage.losses,
        "seconds": stage.seconds,
    }
    write_atomic(path, lambda file: torch.save(state, file))


def _resume(
    stage: Stage, path: Path, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]
) -> int:
    if not path.is_file():
        return 0
    device = next(stage.module.parameters()).device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read ({reason}); delete it to start again") from None
    if state["identity"] != _encoded(stage.identity):
        raise InputError(
            f"{path}: is the state of another recipe or other data; choose another --out"
        )
    stage.module.load_state_dict(state["module"])
    optimizer.load_state_dict(state["optimizer"])
    for name, tensor in state["average"].items():
        average[name].copy_(tensor)
    stage.losses = [(step, loss) for step, loss in state["losses"]]
    stage.seconds = state["seconds"]
    return state["step"]


def _encoded(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
