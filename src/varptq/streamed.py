"""Quantizing a checkpoint that is larger than memory, one block after another.

    files -> mapped float model -> the steps of the method -> each block packed -> artifact

The steps are those of `quantize`, on a run whose blocks are brought when they are needed
(models/on_demand.py): in memory are one block in float, one unit with its quantizers, and the
activations between two blocks. Codes and packed blocks are pieces of the work folder. The artifact
is that of `quantize`, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varptq.artifact.format import (
    AUTOENCODER,
    CONFIG_FILE,
    TRANSFORMER,
    UNPACKED,
    pack_linear,
    slots,
)
from varptq.artifact.save import write
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.means import center
from varptq.calibrate.methods import Method, default_method
from varptq.calibrate.quantize import carried_out, prepared
from varptq.calibrate.reconstruct import corrects, reconstruct
from varptq.calibrate.run import ROUNDED, Run, give_rounded, layers_in
from varptq.calibrate.smoothing import smooth
from varptq.calibrate.tune import tune
from varptq.errors import ConfigError, NonFiniteError
from varptq.files import StagedFolder
from varptq.models.memory import free_bytes
from varptq.models.on_demand import OnDemand
from varptq.models.pipeline import Pipeline
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.seams import GainFold, block_of, start_gains
from varptq.models.transformer import Transformer, float_layout
from varptq.progress import Progress, silent
from varptq.quant.config import QuantConfig
from varptq.quant.convert import REGISTRY, convert, converted
from varptq.quant.find import quant_linears
from varptq.quant.folds import Diagonals, places, scale_all
from varptq.quant.layers import QuantLinear
from varptq.quant.pipeline import QuantizedPipeline
from varptq.torch_state import plain_torch
from varptq.work import Piece, Work

STAGE = "blocks"
# What a model takes while it is quantized as a whole, over its weights: these, their smoothed copy,
# the rotated ones, and the values of codes.
IN_MEMORY = 4
# The steps that need no more than one block at a time; tuning only where it has no steps.
STEPS = (smooth, center, reconstruct, tune)


@dataclass(frozen=True)
class Streamed:
    """What a streamed run made: the quantized pipeline as shapes alone, and its tensors."""

    quantized: QuantizedPipeline
    run: StreamedRun

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """As `varptq.save`."""
        return write(self.quantized, lambda: self.run.tensors(), folder, force=force)


def larger_than_memory(
    pipe: Pipeline,
    method: str,
    calibration: CalibrationConfig,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    limit: int | None = None,
) -> bool:
    """Whether a mapped pipeline is to be streamed: what `quantize` takes of it does not fit into
    `limit` bytes, or into what is free. Raises `ConfigError` for a method that cannot be streamed
    if not even the weights fit into what is free."""
    weights = sum(p.numel() for p in pipe.var.parameters()) * checked_dtype(dtype).itemsize
    free = free_bytes(checked_device(device))
    try:
        check_streamable(method, calibration)
    except ConfigError:
        if free is not None and weights > free:
            raise
        return False
    return any(room is not None and IN_MEMORY * weights > room for room in (limit, free))


def check_streamable(method: str, calibration: CalibrationConfig) -> None:
    """Raise `ConfigError` for a method that needs the whole model in memory."""
    recipe = Method.parse(method)
    calibration = recipe.settle(calibration)
    learns = reconstruct in recipe.steps and calibration.learns
    if learns or not set(recipe.steps) <= set(STEPS):
        raise ConfigError(
            f"method {method!r}: needs the whole model in memory, and block by block there are "
            "rtn and gptq; use one of these, or a machine with more memory"
        )
    if calibration.tune_steps:
        raise ConfigError(
            f"tune_steps {calibration.tune_steps}: tuning needs the whole model in memory; set it "
            "to 0 (--tune 0)"
        )


@plain_torch()
@torch.no_grad()
def quantize_streamed(
    pipe: Pipeline,
    config: QuantConfig,
    folder: str | Path,
    *,
    force: bool = False,
    **settings: Any,
) -> Path:
    """Quantize a float pipeline, best one of `load_model(mapped=True)`, into an artifact at
    `folder`; returns the path. Settings are those of `stream`; errors are those of `quantize` and
    `save`.
    """
    StagedFolder(folder, force=force, marker=CONFIG_FILE).check()
    return stream(pipe, config, **settings).save(folder, force=force)


@plain_torch()
@torch.no_grad()
def stream(
    pipe: Pipeline,
    config: QuantConfig,
    *,
    method: str | None = None,
    calibration: CalibrationConfig | None = None,
    prompts: Any = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    progress: Progress = silent,
    work: Work | None = None,
) -> Streamed:
    """`quantize`, with one block in memory at a time. device, dtype: where and in what blocks
    compute, as `load_model` takes them. Without a `work` folder the pieces are in memory, which is
    a byte for each weight where codes are solved. The pipeline is left as it is. Errors are those
    of `quantize`, and `ConfigError` for a method that needs all blocks together.
    """
    method = default_method(config, calibration) if method is None else method
    calibration = Method.parse(method).settle(calibration or CalibrationConfig())
    check_streamable(method, calibration)
    pipe, calibration = prepared(pipe, calibration, prompts)
    device, dtype = checked_device(device), checked_dtype(dtype)
    vae = copy.deepcopy(pipe.vae).to(device=device, dtype=dtype)
    for name, tensor in vae.named_parameters():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"tensor {name}: holds NaN or infinity; repair the checkpoint")
    blocks = OnDemand(pipe.var, dtype, device, calibration.spool_dir)
    pipe = replace(pipe, var=blocks.var, vae=vae)
    run = StreamedRun(pipe, config, calibration, seed, progress, work or Work(), blocks=blocks)
    if corrects(run.quantized, calibration):
        raise ConfigError(
            "correct_targets: following the quantized model needs all of it in memory; set it to "
            "false in --calibration FILE, or use weights of 4 bits"
        )
    quantized = carried_out(run, method)
    run.pack()
    return Streamed(quantized, run)


@dataclass(eq=False)
class StreamedRun(Run):
    """A run whose float model has one block in memory. `quantized` is shapes alone; what steps set
    in its layers is kept here and given to a part of it when that is made."""

    blocks: OnDemand = field(kw_only=True)
    _means: dict[str, Tensor] = field(default_factory=dict, init=False)
    # By layer, the piece that has its codes.
    _codes: dict[str, str] = field(default_factory=dict, init=False)

    def converted(self) -> Transformer:
        shell = float_layout(self.pipe.var).to(self.pipe.dtype)
        return convert(shell, self.config)

    def fold(self, diagonals: Diagonals) -> None:
        var = self.pipe.var
        self.blocks.change(lambda *within: scale_all(var.folds(), diagonals, within))
        found = places(var.folds())
        wanted = [found[names] for names in diagonals]
        gains = {id(fold.gain) for fold in wanted if isinstance(fold, GainFold)}
        names = {f"{name}.weight" for name, m in var.named_modules() if id(m) in gains}
        shell = self.quantized
        start_gains(shell, names, torch.empty(shell.width, dtype=shell.dtype, device=shell.device))

    def center_on(self, means: Mapping[str, Tensor]) -> None:
        self._means |= means

    def float_weight(self, linear: nn.Linear) -> Tensor:
        return self.blocks.weight(linear)

    def unit(self, name: str) -> nn.Module:
        unit = converted(self.blocks.part(name), self.config, name, self.pipe.scales)
        for layer in quant_linears(unit).values():
            if layer.centred:
                layer.set_means(self._means[layer.layer])
        return unit

    def take_codes(self, pieces: Sequence[str]) -> None:
        for piece in pieces:
            self._codes |= dict.fromkeys(layers_in(self.work.read(piece).tensors), piece)

    def pack(self) -> None:
        """Have every block packed, in the work folder; processes share them."""
        pieces = self._pieces()
        left = self.work.missing(list(pieces))
        mine = self.work.ranks.share(left)
        self.progress(STAGE, 0, len(mine))
        for done, name in enumerate(mine, 1):
            self.work.write(name, Piece(self._packed(pieces[name])))
            self.progress(STAGE, done, len(mine))
        self.blocks.leave()
        self.work.ranks.barrier()

    def _pieces(self) -> dict[str, int | None]:
        """Blocks by the name of their piece; None is all that is outside of them."""
        blocks = dict.fromkeys(block_of(f"{n}.") for n, _ in self.pipe.var.named_modules())
        return {"packed" if block is None else f"packed-{block}": block for block in blocks}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the artifact, those of packed blocks on their files."""
        expected = slots(self.quantized, self.autoencoder)
        found = {AUTOENCODER + name: t for name, t in self.autoencoder.state_dict().items()}
        for name in self._pieces():
            found |= self.work.read(name).tensors
        assert set(found) == set(expected)
        return {name: found[name].detach().cpu().contiguous() for name in expected}

    def _packed(self, block: int | None) -> dict[str, Tensor]:
        self.blocks.bring(block)
        found: dict[str, Tensor] = {}
        for name, module in self.blocks.modules(block).items():
            own = module
            if type(module) in REGISTRY and isinstance(module, nn.Linear):
                own = self.unit(name)
            if isinstance(own, QuantLinear) and own.weight_bits:
                if name in self._codes:
                    wanted = [f"{name}.{part}" for part in ROUNDED]
                    give_rounded(own, self.work.read(self._codes[name], wanted).tensors)
                packed = pack_linear(own)
                found |= {f"{TRANSFORMER}{name}.{key}": t for key, t in packed.items()}
            for key, tensor in _state(own).items():
                found[f"{TRANSFORMER}{name}.{key}".replace("..", ".")] = tensor.clone()
        return found


def _state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module itself, less its codes."""
    own = {name for name, _ in module.named_parameters(recurse=False)}
    own |= {name for name, _ in module.named_buffers(recurse=False)}
    packed = isinstance(module, QuantLinear) and module.weight_bits
    left_out = set(UNPACKED) if packed else set()
    return {k: t for k, t in module.state_dict().items() if k in own - left_out}
