"""The recorder: order of units, inputs and targets against the formulas, one pass, storage."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import varptq.calibrate.samples
import varptq.models.generate
from helpers.var_oracle import both_rows, trace
from varptq.calibrate import record
from varptq.calibrate.config import CalibrationConfig
from varptq.calibrate.record import Recorder, Storage, Unit, scale_weights
from varptq.calibrate.samples import CalibrationSet
from varptq.errors import NonFiniteError, OutputError
from varptq.models.blocks import Block
from varptq.models.pipeline import Pipeline
from varptq.models.scales import Scales
from varptq.models.seams import spans_of
from varptq.quant.config import QuantConfig
from varptq.quant.convert import convert

W4A4 = QuantConfig.preset("w4a4+paper")
# float32 sums of a few hundred terms of order 1, against float64.
FLOAT, BFLOAT16 = 2e-4, 2**-7
COUNT = 7  # 14 rows: one batch of the recorder and a part of one
GIB = 2.0**30


def sample_set(pipe: Pipeline, count: int = COUNT) -> CalibrationSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % pipe.var.arch.num_classes
    ids = torch.randint(0, 32, (count, pipe.scales.num_tokens), generator=generator)
    return CalibrationSet(pipe.prompts(labels), ids)


def recorder(
    pipe: Pipeline, config: CalibrationConfig | None = None, count: int = COUNT
) -> Recorder:
    quantized = convert(pipe.var, W4A4)
    return Recorder(
        pipe, quantized.get_submodule, sample_set(pipe, count), config or CalibrationConfig()
    )


def rows_of(unit: Unit) -> tuple[Tensor, Tensor]:
    """All inputs and targets, copied: the recorder reuses their storage."""
    every = torch.arange(len(unit.inputs))
    return unit.inputs.float().clone(), unit.target(every).clone()


def unit_names(depth: int, shared: bool) -> list[str]:
    names = ["word_embed", "shared_ada_lin.1"] if shared else ["word_embed"]
    for i in range(depth):
        own = [] if shared else [f"blocks.{i}.ada_lin.1"]
        names += [*own, f"blocks.{i}.attn", f"blocks.{i}.ffn"]
    return [*names, "head_nm.ada_lin.1", "head"]


def test_units_come_in_model_order(any_tiny: Pipeline) -> None:
    run = recorder(any_tiny)
    found = [unit.name for unit in run.units()]
    assert found == unit_names(2, any_tiny.var.arch.shared_adaln)
    assert list(run.costs()) == found


def test_every_quantized_layer_is_in_one_unit(any_tiny: Pipeline) -> None:
    run = recorder(any_tiny)
    layers = Counter(
        layer.layer
        for unit in run.units()
        for layer in unit.module.modules()
        if hasattr(layer, "codes")
    )
    wanted = [n for n, m in any_tiny.var.named_modules() if isinstance(m, torch.nn.Linear)]
    assert layers == dict.fromkeys(wanted, 1)


def check_against_formulas(pipe: Pipeline, config: CalibrationConfig | None, bound: float) -> None:
    samples = sample_set(pipe)
    labels, inputs = both_rows(pipe, samples.prompts, samples.tokens)
    pieces = trace(pipe.var, labels, inputs).pieces
    for unit in recorder(pipe, config).units():
        ours = rows_of(unit)
        if "ada_lin" in unit.name:  # one row per class and the unconditional one
            assert len(ours[0]) == pipe.var.arch.num_classes + 1
            ours = tuple(part[labels] for part in ours)
        theirs = tuple(
            part.flatten(1, -2) if part.dim() > 3 else part for part in pieces[unit.name]
        )
        if unit.name == "word_embed":  # the same for both rows of an image
            theirs = tuple(part[: len(part) // 2] for part in theirs)
        for mine, exact in zip(ours, theirs, strict=True):
            error = float((mine.double() - exact).abs().max())
            assert error <= bound * float(exact.abs().max().clamp(min=1)), unit.name


def test_inputs_and_targets_follow_the_formulas(any_tiny: Pipeline) -> None:
    check_against_formulas(any_tiny, None, FLOAT)


def test_bfloat16_storage_keeps_them_close(tiny: Pipeline) -> None:
    numel = 2 * COUNT * tiny.scales.num_tokens * tiny.var.arch.width
    config = CalibrationConfig(memory_gb=13 * numel / GIB)
    check_against_formulas(tiny, config, BFLOAT16)


def test_mapped_storage_keeps_them_close(any_tiny: Pipeline, tmp_path: Path) -> None:
    config = CalibrationConfig(memory_gb=1e-9, spool_dir=str(tmp_path))
    check_against_formulas(any_tiny, config, BFLOAT16)


def test_the_unquantized_unit_has_no_loss(any_tiny: Pipeline) -> None:
    """`reference` of a unit maps its inputs to its targets."""
    for unit in recorder(any_tiny).units():
        expected = unit.target(torch.arange(3))
        torch.testing.assert_close(unit.reference(unit.inputs[:3]), expected, rtol=0, atol=FLOAT)
        assert unit.run(unit.inputs[:3]).shape == expected.shape


def test_each_block_runs_once_over_the_rows_and_nothing_is_generated(
    make_tiny: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("recording generates no image")

    for module in (varptq.calibrate.samples, varptq.models.generate):
        monkeypatch.setattr(module, "generate", refuse)
    rows: Counter[Block] = Counter()
    forward = Block.forward

    def counted(self: Block, x: Tensor, *rest: object) -> Tensor:
        rows[self] += len(x)
        return forward(self, x, *rest)

    monkeypatch.setattr(Block, "forward", counted)
    for depth in (1, 4):
        pipe = make_tiny(depth=depth)
        rows.clear()
        assert len(list(recorder(pipe).units())) == 3 + 3 * depth
        # Linear in depth: a block is asked for each row once, and no quantized block is asked.
        assert rows == dict.fromkeys(pipe.var.blocks, 2 * COUNT)


def test_a_single_scale_has_no_word_embed_unit(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny(scales=Scales((3,)), depth=1)
    run = recorder(pipe)
    names = [unit.name for unit in run.units()]
    assert names == unit_names(1, shared=False)[1:]
    assert list(run.costs()) == names


@pytest.mark.parametrize("count", [1, 4])
def test_few_samples(tiny: Pipeline, count: int) -> None:
    sizes = {unit.name: len(unit.inputs) for unit in recorder(tiny, count=count).units()}
    assert sizes["word_embed"] == count
    assert sizes["blocks.1.attn"] == sizes["head"] == 2 * count


def test_weights_count_every_scale_once() -> None:
    scales = Scales((1, 2, 3))
    weights = scale_weights(spans_of(scales))
    assert weights.shape == (14,)
    sums = [float(weights[part].sum()) for part in scales.slices()]
    assert sums == pytest.approx([1, 1, 1])
    assert torch.equal(scale_weights(spans_of(scales, first=1)), weights[1:])


def test_storage_goes_from_memory_to_half_to_a_file(tmp_path: Path) -> None:
    numel = 1000
    # A residual stream in float32, and two inputs and two targets.
    as_float, as_half = 4 + 4 * 4, 4 + 4 * 2

    def plan(bytes_: int) -> Storage:
        config = CalibrationConfig(memory_gb=bytes_ / GIB, spool_dir=str(tmp_path))
        return Storage.plan(numel, 2, config, stack)

    with ExitStack() as stack:
        assert plan(as_float * numel) == Storage(torch.float32, None)
        assert plan(as_float * numel - 1) == Storage(torch.bfloat16, None)
        assert plan(as_half * numel) == Storage(torch.bfloat16, None)
        mapped = plan(as_half * numel - 1)
        assert mapped.dtype == torch.bfloat16 and mapped.folder is not None
        assert mapped.folder.parent == tmp_path
        tensor = mapped.empty("x", (2, 3))
        tensor.fill_(1.5)
        assert (mapped.folder / "x.bin").stat().st_size == 12
    assert not list(tmp_path.iterdir())


def test_mapped_files_are_there_while_units_are_used_and_gone_after(
    tiny: Pipeline, tmp_path: Path
) -> None:
    config = CalibrationConfig(memory_gb=1e-9, spool_dir=str(tmp_path))
    units = recorder(tiny, config).units()
    for unit in units:
        if unit.name == "blocks.0.ffn":
            (folder,) = tmp_path.iterdir()
            assert {"residual.bin", "stage.bin"} <= {p.name for p in folder.iterdir()}
    assert not list(tmp_path.iterdir())
    # Also when the caller stops in the middle.
    units = recorder(tiny, config).units()
    while next(units).name != "blocks.0.attn":
        pass
    assert list(tmp_path.iterdir())
    units.close()
    del unit, units
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_an_unusable_spool_dir_is_named(tiny: Pipeline, tmp_path: Path) -> None:
    config = CalibrationConfig(memory_gb=1e-9, spool_dir=str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match=r"spool_dir .*nowhere: cannot be used"):
        list(recorder(tiny, config).units())


def test_a_full_disk_is_noticed_before_recording(
    tiny: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    config = CalibrationConfig(memory_gb=1e-9, spool_dir=str(tmp_path))
    with pytest.raises(OutputError, match=r"spool_dir .*: has 0\.0 GiB free"):
        list(recorder(tiny, config).units())
    assert not list(tmp_path.iterdir())


def test_non_finite_float_activations_name_the_block(make_tiny: Callable[..., Pipeline]) -> None:
    pipe = make_tiny()
    pipe.var.blocks[1].ffn.fc2.bias[0] = 1e38
    pipe.var.blocks[1].ada_lin[1].bias.fill_(1e38)
    with pytest.raises(NonFiniteError, match=r"layer blocks\.1: float activations"):
        list(recorder(pipe).units())
