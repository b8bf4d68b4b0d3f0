"""Triton's codebooks against quant/codebook.py: rows, products and caches, bit for bit."""

import math

import pytest
import torch

from varptq.errors import NonFiniteError
from varptq.models.scales import Scales
from varptq.models.seams import spans_of
from varptq.quant.affine import Grid, affine_codes, affine_grid, to_groups
from varptq.quant.codebook import entries
from varptq.quant.config import AttentionSpec, TensorSpec
from varptq.quant.quantizers import QUANTIZERS
from varptq.quant.transforms import hadamard, signs
from varptq.runtime.cuda.codebook import book
from varptq.runtime.cuda.gemm import linear, pack
from varptq.runtime.cuda.kernels import CudaKernels
from varptq.runtime.cuda.quantize import CodeRows, quantize
from varptq.runtime.kernels import AttentionRule, InputRule, Weight

CODEBOOK = QUANTIZERS["codebook"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def defined(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries (..., n) int32 and scale (...) of the slices of x."""
    grid = CODEBOOK.grid(x, bits)
    found = CODEBOOK.integers(CODEBOOK.codes(x, grid, bits), grid, bits)
    return found.int(), grid.scale.squeeze(-1)


def coded(x: torch.Tensor, bits: int, device: str, **options: int) -> CodeRows:
    x = x.to(device)
    width = x.shape[-1]
    options = {"group": width, "segment": width, **options}
    return quantize(x, num_bits=bits, book=book("codebook", bits, x.device), **options)


# width, group, bits, rotation: whole rows and groups with padding behind, one channel, all widths.
ROWS = [(256, 256, 4, 128), (192, 64, 3, 64), (130, 130, 6, 0), (37, 37, 5, 0), (1, 1, 2, 0)]


@pytest.mark.parametrize(("width", "group", "bits", "block"), ROWS)
def test_entries_scales_and_sums_are_exact(
    width: int, group: int, bits: int, block: int, device: str
) -> None:
    x = random(8, width)
    x[1] = -x[1].abs()
    x[2] = 0.0
    # Denormals, scales that are about to be, and squares that overflow.
    x[3], x[4], x[5] = x[3] * 1e-42, x[4] * 1e-36, x[5] * 1e36
    x[6, 0] = 1e30
    found, scale = defined(to_groups(hadamard(x, block) if block else x, group), bits)
    rotation = {"signs": signs(block).to(device)} if block else {}
    rows = coded(x, bits, device, group=group, segment=group, **rotation)
    assert torch.equal(rows.codes.cpu().int(), found.flatten(1))
    assert torch.equal(rows.scale.cpu(), scale)
    assert torch.equal(rows.sum.cpu(), found.sum(-1).int())
    assert not rows.zero_point.any()


def test_a_value_on_a_border_takes_the_larger_entry(device: str) -> None:
    """Floats around the border of the entries 38 and 127: some lie on it to the bit."""
    x = random(1, 5)
    for _ in range(50):
        x[0, 0] = 82.5 * CODEBOOK.grid(x, 2).start
    around = x[0, 0].view(torch.int32) + torch.arange(-8, 9, dtype=torch.int32)
    x = torch.cat((around.view(torch.float32).unsqueeze(-1), x[:, 1:].expand(17, -1)), dim=-1)
    on_it = x[:, 0] / CODEBOOK.grid(x, 2).start.squeeze(-1) == 82.5
    assert on_it.any()
    found = coded(x, 2, device).codes.cpu()
    assert (found[on_it, 0] == 127).all()
    assert torch.equal(found.int(), defined(x, 2)[0])


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, where it interprets
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_number_is_refused_by_layer(number: float, device: str) -> None:
    x = random(1, 3, 40).to(device)
    x[0, 1, 7] = number
    rule = InputRule("fc1", 40, "codebook", 4, "with_zero", None, None, True, None)
    with pytest.raises(NonFiniteError, match="layer fc1: input holds NaN or infinity"):
        CudaKernels().quantize(x, rule, None, None)


# rows, inputs, outputs, weight bits: nibbles with a table, and bytes.
PRODUCTS = [(5, 256, 70, 4), (3, 128, 17, 3), (2, 128, 5, 2), (3, 130, 9, 4), (18, 256, 3, 6)]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs", "bits"), PRODUCTS)
def test_products_with_a_table_are_exact(
    rows: int, inputs: int, outputs: int, bits: int, affine: bool, device: str
) -> None:
    """Inputs on a codebook, and affine ones of 8 bits with zero points."""
    x = random(rows, inputs) + 1.0
    if affine:
        grid = affine_grid(x, 8)
        steps = affine_codes(x, grid, 8) - grid.zero_point
        a = quantize(x.to(device), num_bits=8, group=inputs, segment=inputs)
    else:
        steps, a = defined(x, 4)[0], coded(x, 4, device)
    weight = random(outputs, inputs, seed=1)
    scale = CODEBOOK.grid(weight, bits).scale
    grid = Grid(scale, torch.zeros_like(scale))
    codes = CODEBOOK.codes(weight, grid, bits)
    codes[0, : 2**bits] = torch.arange(2**bits)
    operand = Weight(codes.to(torch.uint8), *grid, bits, entries(bits))
    packed = pack(operand._replace(**moved(operand, device)), inputs)
    assert packed.codes.shape[1] == (inputs // 2 if bits <= 4 and inputs % 128 == 0 else inputs)
    exact = steps.double() @ CODEBOOK.integers(codes, grid, bits).double().T
    assert torch.equal(linear(a, packed, exact=True).squeeze(-1).cpu().double(), exact)


def moved(weight: Weight, device: str) -> dict[str, torch.Tensor]:
    fields = weight._asdict().items()
    return {name: x.to(device) for name, x in fields if isinstance(x, torch.Tensor)}


HEADS, HEAD, TOKENS = 2, 20, 5


def attention(device: str) -> AttentionRule:
    spec = TensorSpec(num_bits=5, type="codebook", strategy="token")
    probability = TensorSpec(num_bits=8, type="uniform")
    operands = {name: spec for name in ("query", "key", "value")}
    whole = AttentionSpec(policy="token", probability=probability, max_order=0, **operands)
    bias, factor = torch.zeros(HEADS * HEAD, device=device), torch.ones(HEADS, device=device)
    return AttentionRule("attn", whole, None, HEADS, HEAD, False, bias, bias, factor)


def test_the_cache_holds_entries(device: str) -> None:
    rule = attention(device)
    qkv = random(1, TOKENS, 3 * HEADS * HEAD)
    cache = CudaKernels().new_cache(rule, 1, (TOKENS,))
    CudaKernels().attend(qkv.to(device), rule, cache, spans_of(Scales((1, 2))))
    _, k, v = qkv.unflatten(-1, (3, HEADS, HEAD)).permute(2, 0, 3, 1, 4).flatten(1, 2)
    for found, scale, x in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
        expected = defined(x, 5)
        assert torch.equal(found.cpu().int(), expected[0])
        assert torch.equal(scale.cpu(), expected[1])
    assert torch.equal(cache.k_sum.cpu(), defined(k, 5)[0].sum(-1).int())
    assert not cache.k_zero.any() and not cache.v_extra.any()


@pytest.mark.slow
def test_values_of_zero_come_out_as_zero(device: str) -> None:
    rule = attention(device)
    qkv = random(1, TOKENS, 3 * HEADS * HEAD)
    qkv[..., 2 * HEADS * HEAD :] = 0.0
    cache = CudaKernels().new_cache(rule, 1, (TOKENS,))
    out = CudaKernels().attend(qkv.to(device), rule, cache, spans_of(Scales((1, 2))))
    assert torch.equal(out.cpu(), torch.zeros_like(out, device="cpu"))
