"""CUDA graphs: a scale of a pass recorded once for a size of batch, then run by a single launch.

At batch 1 a GPU waits for kernels to be launched. What runs again has to read and write where it
did when it was recorded. So conditions, input tokens, keys and values of a size of batch are
tensors that stay, and a scale writes its keys and values at the same place every time. Recorded are
what is made of the condition, and each scale from its input tokens to its logits; token map,
guidance and draws are not, so random numbers and results are those without graphs.

Checks of layers are kept while work is recorded, and looked at after each run (finite.py). Hooks of
modules run while it is recorded, and not again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from varptq.errors import InputError, is_out_of_memory
from varptq.models.finite import kept_checks
from varptq.models.sampling import LOGITS, DrawPlan
from varptq.models.seams import Stage
from varptq.models.stepper import Batch, Mix, Rows
from varptq.models.transformer import Transformer

Work = Callable[[], Any]


class Recorder(Protocol):
    """Records work on tensors that stay: the result runs it again and returns what it returned,
    with new values. `lasting`: these must outlive the next run of other work."""

    def __call__(self, work: Work, *, lasting: bool = False) -> Work: ...


class CudaRecorder:
    """Records as CUDA graphs. Those whose results are read at once share their memory.

    Raises `InputError` for a device that has no CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise InputError(
                f"cuda_graphs: the model is on {device}, expected a CUDA device; move it with "
                "pipe.to(device='cuda') or leave cuda_graphs out"
            )
        self._device = device
        self._memory: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work, *, lasting: bool = False) -> Work:
        """Raises `InputError` for work that a graph cannot hold."""
        try:
            return self._recorded(work, lasting)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise InputError(
                f"cuda_graphs: this model cannot be recorded ({reason}); leave cuda_graphs out, or "
                "load a quantized model on runtime 'cuda'"
            ) from error

    def _recorded(self, work: Work, lasting: bool) -> Work:
        with torch.cuda.device(self._device):
            # Kernels are compiled and tables made the first time, which cannot be recorded.
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                work()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            memory = None if lasting else self._memory
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                made = work()

        def replay() -> Any:
            graph.replay()
            return made

        return replay


class Recorded:
    """Work recorded with the checks it makes."""

    def __init__(self, record: Recorder, work: Work, *, lasting: bool = False) -> None:
        def checked() -> tuple[Any, Any]:
            with kept_checks() as checks:
                made = work()
            return made, checks

        self._run = record(checked, lasting=lasting)

    def __call__(self) -> Any:
        """What the work returns. Raises `NonFiniteError` naming the layer."""
        made, checks = self._run()
        checks.verify()
        return made


class StaticRows(Rows):
    """`Rows` whose work is recorded: condition, inputs, keys and values stay where they are."""

    def __init__(
        self, record: Recorder, var: Transformer, count: int, cache: list[Any], mix: Mix
    ) -> None:
        super().__init__(var, count, cache, mix)
        self._record = record
        self._ask: Recorded | None = None
        self._inputs: dict[int, Tensor | None] = {}
        self._steps: dict[int, Recorded] = {}

    def ask(self, condition: Any) -> None:
        if self._ask is None:
            self.condition = copied(condition)
            # Every scale reads what is made of the condition.
            self._ask = Recorded(self._record, self._prepared, lasting=True)
        else:
            fill(self.condition, condition)
        self.stages = self._ask()

    def _prepared(self) -> list[Stage]:
        stages = self.mix(self.var.stages(self.condition))
        for stage in stages:
            if stage.prepare is not None:
                stage.prepare()
        return stages

    def step(self, scale: int, inputs_Blc: Tensor | None) -> Tensor:
        if scale not in self._steps:
            self._inputs[scale] = copied(inputs_Blc)
            self._steps[scale] = Recorded(self._record, lambda: self._run(scale))
        else:
            fill(self._inputs[scale], inputs_Blc)
        # The next run of this scale writes over its logits, which a caller may keep.
        return self._steps[scale]().clone()

    def _run(self, scale: int) -> Tensor:
        for cache in self.cache:
            cache.rewind(self.var.scales.starts[scale])
        return super().step(scale, self._inputs[scale])


def copied(value: Any) -> Any:
    """Tensors, and tuples of such, in memory of their own."""
    if isinstance(value, Tensor):
        return value.clone()
    if not isinstance(value, tuple):
        return value
    parts = [copied(part) for part in cast(tuple[Any, ...], value)]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def fill(value: Any, new: Any) -> None:
    """Put the numbers of `new` into the tensors of `value`, which `copied` made of its like."""
    if isinstance(value, Tensor):
        value.copy_(new)
    elif isinstance(value, tuple):
        for part, new_part in zip(cast(tuple[Any, ...], value), new, strict=True):
            fill(part, new_part)


class Graphs:
    """What a pipeline has recorded, by size of batch and guidance. A model whose tensors are not
    where they were is recorded anew."""

    def __init__(self, make_recorder: Callable[[torch.device], Recorder] = CudaRecorder) -> None:
        self._make_recorder = make_recorder
        # What is recorded works on tensors of its own: one batch at a time.
        self._lock = threading.Lock()
        self._holder: int | None = None
        self._of: Any = None
        self._batches: dict[Any, Batch] = {}

    def __deepcopy__(self, memo: Any) -> Graphs:
        """A copy of a model has other tensors."""
        return Graphs(self._make_recorder)

    def __reduce__(self) -> Any:
        return Graphs, (self._make_recorder,)

    @contextmanager
    def batch(self, var: Transformer, images: int, plan: DrawPlan) -> Iterator[Batch]:
        """The rows of a batch of so many images, for the time of a block. Raises `InputError` for a
        model that cannot be recorded, and from within such a block."""
        check(var)
        with self._held():
            self._forget_others(var)
            # Logits are mixed outside of what is recorded, at any strength.
            inside = plan.guide_at != (LOGITS,) and (plan.guide_at, plan.strengths)
            key = (images, plan.is_guided, var.scales, inside)
            try:
                if key not in self._batches:
                    self._batches[key] = Batch(var, images, plan, self._rows)
                yield self._batches[key]
            except BaseException:
                # What was cut off may be half recorded.
                self._batches.pop(key, None)
                raise

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Other threads wait; this one would wait for itself."""
        if self._holder == threading.get_ident():
            raise InputError(
                "cuda_graphs: this model is drawing a batch by graphs in this thread; leave "
                "cuda_graphs out of calls from on_scale"
            )
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None

    def _forget_others(self, var: Transformer) -> None:
        tensors = (*var.parameters(), *var.buffers())
        found = [(t.data_ptr(), t.dtype, t.device) for t in tensors]
        if found != self._of:
            self._batches.clear()
            self._record = self._make_recorder(var.device)
            self._of = found

    def _rows(self, var: Transformer, count: int, cache: list[Any], mix: Mix) -> Rows:
        return StaticRows(self._record, var, count, cache, mix)


def check(var: Transformer) -> None:
    """Raises `InputError` for a model whose tensors have other shapes from batch to batch."""
    if var.READS_TEXTS:
        raise InputError(
            "cuda_graphs: this model reads texts, whose lengths differ; leave cuda_graphs out"
        )
