"""The native integer Linear against exact arithmetic, on every instruction set this machine runs.

Integers (codes, sums, products P') are compared bit for bit with varptq.quant and with int64
products; outputs with float64. All sets, batch splits and thread counts must give the same bits.
Sizes are odd on purpose: no multiple of 4, 16, 64 or 128 is assumed anywhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varptq.native import binding
from varptq.native.linear import PackedWeight, accumulate, linear, pack
from varptq.native.quantize import Rows, quantize
from varptq.runtime.cpu import cpu_kernels

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(binding.core() is None, reason=binding.reason()),
]

# The last two run wherever AVX512-VNNI does, and test what most machines here lack.
NAMES = (
    *("portable", "avx2", "avxvnni", "avx512vnni", "amx", "neon-dotprod", "neon-i8mm"),
    *binding.EMULATED,
)
# float32 sums of a few terms a group, against float64, in units of the largest sum of magnitudes.
SUM_ERROR = 2e-6


def sets() -> list[str]:
    """The instruction sets that run here, the portable one first."""
    before = binding.isa()
    found = [name for name in NAMES if binding.select_isa(name)]
    binding.select_isa(before)
    return found


class Problem(NamedTuple):
    """A weight and inputs; row_group and weight_group are None for one scale a row."""

    x: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    row_bits: int
    weight_bits: int
    row_group: int | None
    weight_group: int | None

    def rows(self, x: Tensor | None = None, *, sign_split: bool = False) -> Rows:
        return quantize(
            self.x if x is None else x,
            num_bits=self.row_bits,
            row_group=self.row_group,
            weight_group=self.weight_group,
            sign_split=sign_split,
        )

    def packed(self) -> PackedWeight:
        return pack(
            *(self.codes, self.scale, self.zero_point),
            num_bits=self.weight_bits,
            row_group=self.row_group,
        )

    def products(self, rows: Rows) -> Tensor:
        """P' (M, N, S) int64 from the definition."""
        segments = rows.sums.shape[1]
        zero = rows.zero_point.repeat_interleave(self.codes.shape[1] // rows.zero_point.shape[1], 1)
        a = rows.plain_codes.long() - zero
        size = self.codes.shape[1] // self.zero_point.shape[1]
        w = self.codes.long() - self.zero_point.long().repeat_interleave(size, 1)
        cut = (a.unflatten(1, (segments, -1)), w.unflatten(1, (segments, -1)))
        return torch.einsum("msk,nsk->mns", *cut)

    def outputs(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(y, sum of magnitudes) in float64, without bias; one row per row of codes."""
        spread = self.codes.shape[1] // rows.zero_point.shape[1]
        a = rows.plain_codes.double() - rows.zero_point.repeat_interleave(spread, 1)
        a = a * rows.scale.double().repeat_interleave(spread, 1)
        size = self.codes.shape[1] // self.zero_point.shape[1]
        w = self.codes.double() - self.zero_point.double().repeat_interleave(size, 1)
        w = w * self.scale.double().repeat_interleave(size, 1)
        return a @ w.T, a.abs() @ w.abs().T


def problem(
    shape: tuple[int, int, int],
    bits: tuple[int, int] = (8, 8),
    groups: tuple[int | None, int | None] = (None, None),
    *,
    seed: int = 0,
    extreme: bool = False,
) -> Problem:
    """Random data; `extreme` puts every code at an end of its range, so that sums are largest."""
    (m, n, k), (row_bits, weight_bits), (row_group, weight_group) = shape, bits, groups
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g) * torch.rand(m, 1, generator=g).exp()
    top, count = 2**weight_bits - 1, k // (weight_group or k)
    codes = torch.randint(0, top + 1, (n, k), generator=g)
    zero = torch.randint(0, top + 1, (n, count), generator=g)
    if extreme:
        x, codes, zero = x.sign(), codes.gt(top // 2) * top, zero.gt(top // 2) * top
        x[:, : k // 2] = 1.0
    return Problem(
        *(x, codes.to(torch.uint8), torch.rand(n, count, generator=g) + 0.1, zero.float()),
        *(torch.randn(n, generator=g), row_bits, weight_bits, row_group, weight_group),
    )


def check(p: Problem) -> None:
    """Everything that must hold for one problem, on every instruction set."""
    first: Tensor | None = None
    for name in sets():
        assert binding.select_isa(name)
        rows, weight = p.rows(), p.packed()
        exact = p.products(rows)
        assert torch.equal(accumulate(rows, weight).long(), exact), name
        y = linear(rows, weight, p.bias)
        want, size = p.outputs(rows)
        error = (y.double() - want - p.bias).abs() / (size + p.bias.abs() + 1e-9)
        assert error.max() < SUM_ERROR, (name, error.max())
        first = y if first is None else first
        assert torch.equal(y, first), f"{name} differs from {NAMES[0]}"


widths = st.integers(2, 8)
# (activation group, weight group) and the K they are tried on: nested either way, odd sizes, groups
# beyond the 128 inputs whose corrections fit 16 bits.
layouts = st.sampled_from(
    [
        *((None, None, k) for k in (1, 3, 37, 64, 130, 257)),
        *((64, 128, 384), (64, 128, 128), (None, 128, 384), (64, None, 192), (128, 64, 256)),
        *((8, 24, 72), (24, 8, 72), (200, None, 400), (None, 200, 400), (200, 100, 400)),
        *((64, 64, 192), (200, 200, 600), (32, 128, 256)),
    ]
)


@settings(max_examples=60)
@given(
    st.sampled_from([1, 2, 3, 5, 6, 7, 13, 18, 33, 37]),
    st.sampled_from([1, 3, 16, 37, 64, 70, 130]),
    layouts,
    widths,
    widths,
    st.booleans(),
    st.integers(0, 999),
)
def test_products_are_exact_and_outputs_the_same_bits_on_every_set(
    m: int,
    n: int,
    layout: tuple[int | None, int | None, int],
    row_bits: int,
    weight_bits: int,
    extreme: bool,
    seed: int,
) -> None:
    *groups, k = layout
    check(
        problem((m, n, k), (row_bits, weight_bits), tuple(groups), seed=seed, extreme=extreme)  # pyright: ignore[reportArgumentType]
    )


@pytest.mark.parametrize("bits", [(8, 8), (8, 7), (7, 8), (8, 4), (4, 4), (6, 6)])
@pytest.mark.parametrize("groups", [(None, None), (64, 128)])
def test_no_sum_saturates_or_overflows_at_the_ends_of_the_codes(
    bits: tuple[int, int], groups: tuple[int | None, int | None]
) -> None:
    # 7680 is the longest row of the published models (fc2 at depth 30).
    check(problem((7, 17, 7680), bits, groups, extreme=True))


@pytest.mark.parametrize("shape", [(300, 70, 130), (301, 70, 4096)])
@pytest.mark.parametrize("bits", [(8, 8), (8, 4)])
def test_many_rows_for_which_panels_are_copied_and_tasks_cut(
    shape: tuple[int, int, int], bits: tuple[int, int]
) -> None:
    check(problem(shape, bits))


@pytest.mark.parametrize(
    ("bits", "groups"), [((8, 8), (None, None)), ((8, 4), (None, 128)), ((4, 4), (64, 128))]
)
def test_a_row_has_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    bits: tuple[int, int], groups: tuple[int | None, int | None]
) -> None:
    p = problem((211, 130, 256), bits, groups)
    for name in sets():
        if name == "portable":
            continue
        binding.select_isa(name)
        weight = p.packed()
        whole = linear(p.rows(), weight, p.bias)
        for cut in (1, 5, 12, 100):
            parts = [linear(p.rows(x), weight, p.bias) for x in p.x[:48].split(cut)]
            assert torch.equal(torch.cat(parts), whole[:48]), (name, cut)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert torch.equal(linear(p.rows(), weight, p.bias), whole), name
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("groups", [(None, None), (64, 128), (None, 128), (128, 64)])
@pytest.mark.parametrize("m", [1, 3, 20])
def test_the_two_signs_of_a_row_are_added(groups: tuple[int | None, int | None], m: int) -> None:
    p = problem((m, 37, 256), (4, 4), groups)
    results = []
    for name in sets():
        binding.select_isa(name)
        rows, weight = p.rows(sign_split=True), p.packed()
        assert torch.equal(accumulate(rows, weight).long(), p.products(rows))
        y = linear(rows, weight, p.bias)
        want, size = p.outputs(rows)
        error = (y.double() - want[0::2] - want[1::2] - p.bias).abs()
        assert (error / (size[0::2] + size[1::2] + p.bias.abs())).max() < SUM_ERROR
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)


def test_bias_may_depend_on_the_token_and_y_may_be_bfloat16() -> None:
    p = problem((10, 37, 130))
    table = torch.randn(3, 37, generator=torch.Generator().manual_seed(1))
    token_rows = torch.tensor([2, 0, 1, 1, 0], dtype=torch.int32)
    for name in sets():
        binding.select_isa(name)
        x = p.x.view(2, 5, 130)
        rows, weight = p.rows(x), p.packed()
        plain = [linear(rows, weight, table[i].contiguous()) for i in range(3)]
        want = torch.stack([plain[i][:, t] for t, i in enumerate(token_rows.tolist())], dim=1)
        assert torch.equal(linear(rows, weight, table, token_rows), want)
        half = linear(rows, weight, table, token_rows, dtype=torch.bfloat16)
        assert torch.equal(half, want.bfloat16())


def test_a_weight_packed_for_other_groups_is_refused() -> None:
    p = problem((3, 16, 256), (4, 4), (64, 128))
    with pytest.raises(ValueError, match="packed for 64 and 64"):
        linear(quantize(p.x, num_bits=4), p.packed())
    with pytest.raises(ValueError, match="do not nest"):
        quantize(p.x, num_bits=4, row_group=96)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("m", [1, 7, 12, 13, 33])
@pytest.mark.parametrize(
    ("k", "groups"), [(37, (None, None)), (257, (None, None)), (256, (None, 128))]
)
def test_codes_of_a_table_multiply_as_its_entries_do(
    bits: int, m: int, k: int, groups: tuple[int | None, int | None]
) -> None:
    """Any 16 bytes: few rows are looked up in registers, more of them once per panel."""
    p, g = problem((m, 70, k), (8, 8), groups), torch.Generator().manual_seed(bits)
    table = torch.randint(-127, 128, (2**bits,), dtype=torch.int8, generator=g)
    codes = torch.randint(0, 2**bits, p.codes.shape, dtype=torch.uint8, generator=g)
    bytes_of = p._replace(
        codes=(table.int() + 128)[codes.int()].to(torch.uint8),
        zero_point=torch.full_like(p.zero_point, 128),
    )
    outputs = []
    for name in sets():
        binding.select_isa(name)
        zero_point = torch.zeros_like(p.scale)
        weight = pack(codes, p.scale, zero_point, num_bits=bits, table=table)
        assert weight.packed.numel() <= -(-k // 128) * 128 // 2 * 128
        rows = p.rows()
        assert torch.equal(accumulate(rows, weight), accumulate(rows, bytes_of.packed())), name
        outputs.append(linear(rows, weight, p.bias))
        assert torch.equal(outputs[-1], linear(rows, bytes_of.packed(), p.bias)), name
    assert all(torch.equal(y, outputs[0]) for y in outputs)


def test_four_bit_weights_take_half_the_memory() -> None:
    eight, four = problem((1, 128, 1024)), problem((1, 128, 1024), (4, 4), (64, 128))
    assert eight.packed().packed.numel() == 128 * 1024
    assert four.packed().packed.numel() == 128 * 1024 // 2


# Prints the set in use under each name of VARPTQ_ISA. The core, which reads it once, is loaded by
# children alone; one process imports torch for all.
CAPPED = """
import os, sys, torch
from varptq.native import binding, linear, quantize
for name in sys.argv[1:]:
    if (child := os.fork()) == 0:
        os.environ["VARPTQ_ISA"] = name
        x, w = torch.ones(3, 64), torch.ones(5, 64, dtype=torch.uint8)
        p = linear.pack(w, torch.ones(5, 1), torch.zeros(5, 1), num_bits=8)
        y = linear.linear(quantize.quantize(x, num_bits=8), p)
        assert abs(float(y.sum()) - 960) < 1e-2, y
        print(name, binding.isa(), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


def test_the_environment_caps_the_instruction_set_and_never_crashes() -> None:
    names = ["portable", "avx2", "amx", "neon-dotprod", "neon-i8mm", "nonsense"]
    done = subprocess.run(
        [sys.executable, "-c", CAPPED, *names], capture_output=True, text=True, check=True
    )
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == names
    for name, used in found.items():
        if name in NAMES:
            assert NAMES.index(used) <= NAMES.index(name) and used not in binding.EMULATED
        if name in binding.features():
            assert used == name


def test_a_cap_that_is_no_instruction_set_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VARPTQ_ISA", "AVX2")
    with pytest.warns(UserWarning, match="VARPTQ_ISA 'AVX2': unknown, nothing is capped; use port"):
        cpu_kernels()
    assert set(binding.features()) <= set(binding.names())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (*binding.names(), *binding.EMULATED, ""):
            monkeypatch.setenv("VARPTQ_ISA", name)
            cpu_kernels()


def test_a_child_process_computes_after_a_fork() -> None:
    p = problem((200, 130, 256))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        y = linear(p.rows(), p.packed(), p.bias)
        child = os.fork()
        if child == 0:
            same = torch.equal(linear(p.rows(), p.packed(), p.bias), y)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)


def test_row_numbers_spread_over_many_tokens_outlive_the_call() -> None:
    """One row number for all tokens is spread into a tensor of the binding's own, whose memory must
    not be given to the next tensor while the core reads it."""
    p = problem((2 * 700, 37, 130))
    x = p.x.view(2, 700, 130)
    g = torch.Generator().manual_seed(2)
    means, table = torch.randn(5, 130, generator=g), torch.randn(5, 37, generator=g)
    weight = p.packed()
    for number in (0, 3, 4) * 10:
        one = torch.tensor([number], dtype=torch.int32)
        rows = quantize(x, num_bits=8, means=means, mean_rows=one)
        want = quantize(x - means[number], num_bits=8)
        assert torch.equal(rows.codes, want.codes)
        found = linear(rows, weight, table, one)
        assert torch.equal(found, linear(want, weight, table[number].contiguous()))
