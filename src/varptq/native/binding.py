"""ctypes binding of the native core's Linear layers: typed functions on torch CPU tensors.

    core() -> library or None        reason() -> why it is None        isa(), features()
    rows = quantize(x, num_bits=8, row_group=None, weight_group=None, sign_split=False, norm=None,
                    gelu=False, means=None, mean_rows=None, hadamard=None, layer="") -> Rows
    weight = pack(codes, scale, zero_point, num_bits=8, row_group=None) -> PackedWeight
    y = linear(rows, weight, bias=None, bias_rows=None, dtype=torch.float32) -> (..., N)
    p = accumulate(rows, weight) -> (rows, N, S) int32, for tests

`row_group` is the activation group in channels (None: one scale per row), the group of the weight
is read off its scale; both must be known to both calls, since codes and weights are laid out by
segments, the finer of the two groups, each padded to a multiple of 64 channels. The definitions
are those of varptq.quant (affine, sign_split, transforms), to the bit; src/varptq.h says what is
summed in which order. Threads are torch's (`torch.get_num_threads()`); results do not depend on
them. Shapes: M rows, K inputs, N outputs, G groups, S segments.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from varptq.errors import InputError, NonFiniteError
from varptq.native import build
from varptq.native.pointers import pointer, row_numbers
from varptq.native.structs import LinearArgs, PackArgs, QuantizeArgs

OK, NON_FINITE = 0, 1
PANEL = 64
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_NO_PROLOGUE, _NORM, _GELU = 0, 1, 2


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str


@functools.cache
def _load() -> _Loaded:
    path: Path = build.LIBRARY
    hint = "run `python -m varptq.native.build`"
    if not path.exists():
        return _Loaded(None, f"the native core is not built: {hint}")
    try:
        library = ctypes.CDLL(str(path))
        library.vq_source_hash.restype = ctypes.c_char_p
        found = library.vq_source_hash().decode()
    except (OSError, AttributeError) as error:
        return _Loaded(None, f"{path.name} cannot be loaded ({error}): {hint}")
    if found != build.source_hash():
        return _Loaded(None, f"{path.name} was built from other sources: {hint}")
    for name, struct in (
        ("vq_quantize", QuantizeArgs),
        ("vq_pack", PackArgs),
        ("vq_linear", LinearArgs),
        ("vq_accumulate", LinearArgs),
    ):
        getattr(library, name).argtypes = [ctypes.POINTER(struct)]
    library.vq_packed_bytes.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_int32]
    library.vq_packed_bytes.restype = ctypes.c_int64
    library.vq_isa.restype = library.vq_features.restype = ctypes.c_char_p
    library.vq_peak_gops.restype = ctypes.c_double
    return _Loaded(library, "")


def core() -> ctypes.CDLL | None:
    """The loaded library, or None where there is none that fits; `reason` says why."""
    return _load().library


def reason() -> str:
    """Why `core` is None, in one sentence with what to do; empty where it is not."""
    return _load().reason


def forget() -> None:
    """Look for the library again at the next call, after a build in this process."""
    _load.cache_clear()


def _library() -> ctypes.CDLL:
    library = core()
    assert library is not None, reason()
    return library


def isa() -> str:
    """The instruction set in use: "portable", "avx2", "avx512vnni", "amx" or "amx-emulated"."""
    return _library().vq_isa().decode()


def features() -> list[str]:
    """The instruction sets this machine can run."""
    return _library().vq_features().decode().split()


def select_isa(name: str) -> bool:
    """Use this instruction set from now on, for tests and benchmarks; False where it cannot run."""
    return _library().vq_select_isa(name.encode()) == OK


def usable_threads(asked: int) -> int:
    """How many threads a call that asks for `asked` gets."""
    return _library().vq_threads(asked)


def peak_gops() -> float:
    """Measured 10^9 operations a second (two per multiply-add) of the product instruction alone, on
    one thread; 0 for sets without one."""
    return _library().vq_peak_gops()


class Norm(NamedTuple):
    """Prologue LayerNorm(x) (1 + gain) + shift: gain and shift (B, K) float32, or (K,) for all."""

    gain: Tensor
    shift: Tensor
    eps: float = 1e-6


class Rows(NamedTuple):
    """Quantized rows; with `pairs`, rows 2m and 2m + 1 are the signs of row m.

    codes (M, S Lp) uint8, scale (M, Ga) float32, zero_point (M, Ga) int32, sums (M, S) int32;
    `shape` is the input's. `plain_codes` leaves the padding out.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor
    num_bits: int
    group: int
    segment: int
    pairs: bool
    shape: torch.Size
    values: Tensor | None = None

    @property
    def plain_codes(self) -> Tensor:
        """(M, K) uint8."""
        cut = self.codes.unflatten(1, (self.sums.shape[1], -1))[..., : self.segment]
        return cut.flatten(1)


class PackedWeight(NamedTuple):
    """A weight in the kernels' layout: packed uint8, and by panels of 64 outputs scale (P, Gw, 64),
    zero_point (P, Gw, 64) and sums (P, S, 64) of the stored values."""

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    sums: Tensor
    num_bits: int
    group: int
    row_group: int
    segment: int
    outputs: int
    inputs: int

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero_point, self.sums))


def _layout(inputs: int, row_group: int | None, weight_group: int | None) -> tuple[int, int, int]:
    """(row group, weight group, segment) in channels."""
    row, weight = row_group or inputs, weight_group or inputs
    segment = min(row, weight)
    if inputs % row or inputs % weight or row % segment or weight % segment:
        raise ValueError(f"groups of {row} and {weight} for {inputs} inputs do not nest")
    return row, weight, segment


def _padded(segment: int) -> int:
    return -(-segment // 64) * 64


def _per_image(t: Tensor, inputs: int, images: int, what: str) -> Tensor:
    """gain or shift as (1 or images, K)."""
    rows = t.reshape(-1, inputs)
    if rows.shape[0] not in (1, images):
        raise InputError(f"native core, {what}: {tuple(t.shape)}, expected one or {images} rows")
    return rows.contiguous()


def quantize(
    x: Tensor,
    *,
    num_bits: int,
    row_group: int | None = None,
    weight_group: int | None = None,
    sign_split: bool = False,
    norm: Norm | None = None,
    gelu: bool = False,
    means: Tensor | None = None,
    mean_rows: Tensor | None = None,
    hadamard: int | None = None,
    layer: str = "",
    keep_values: bool = False,
) -> Rows:
    """Codes of x (..., K), float32 or bfloat16; (B, l, K) where something depends on the image or
    the token.

    In this order: `norm` or `gelu`, minus `means` (R, K) float32 at the rows `mean_rows` (l,) int32
    (without them row 0), rotation in blocks of `hadamard`, codes. `keep_values` returns what was
    quantized as `values`, for tests. Raises `NonFiniteError` naming `layer` on NaN or infinity.
    """
    inputs = x.shape[-1]
    row, _, segment = _layout(inputs, row_group, weight_group)
    if x.dtype not in _TYPES or not x.is_contiguous():
        x = x.contiguous() if x.dtype in _TYPES else x.float().contiguous()
    m = x.numel() // inputs
    images = x.shape[0] if x.dim() == 3 else 1
    rows, segments = m * (1 + sign_split), inputs // segment
    codes = torch.empty((rows, segments * _padded(segment)), dtype=torch.uint8, device="cpu")
    scale = torch.empty((rows, inputs // row), dtype=torch.float32, device="cpu")
    zero_point = torch.empty((rows, inputs // row), dtype=torch.int32, device="cpu")
    sums = torch.empty((rows, segments), dtype=torch.int32, device="cpu")
    values = torch.empty((m, inputs), dtype=torch.float32, device="cpu") if keep_values else None
    a = QuantizeArgs(rows=m, width=inputs, row_stride=inputs)
    a.x = pointer(x, f"input of layer {layer}", x.dtype, *x.shape)
    a.x_type, a.num_bits, a.sign_split = _TYPES[x.dtype], num_bits, sign_split
    a.group, a.segment, a.hadamard = row, segment, hadamard or 0
    a.rows_per_image = max(1, m // max(1, images))
    a.prologue = _NORM if norm else _GELU if gelu else _NO_PROLOGUE
    if norm:
        gain = _per_image(norm.gain, inputs, images, "gain")
        shift = _per_image(norm.shift, inputs, images, "shift")
        a.gain = pointer(gain, "gain", torch.float32, *gain.shape)
        a.shift, a.eps = pointer(shift, "shift", torch.float32, *gain.shape), norm.eps
        a.modulation_stride = inputs if gain.shape[0] > 1 else 0
    # Held until the call is over: the pointer keeps nothing alive.
    token_rows = _token_rows(mean_rows, a.rows_per_image)
    if means is not None:
        a.means = pointer(means, "means", torch.float32, len(means), inputs)
        if token_rows is not None:
            a.mean_row = row_numbers(token_rows, "mean_rows", a.rows_per_image, means)
    a.codes, a.scale, a.zero_point = codes.data_ptr(), scale.data_ptr(), zero_point.data_ptr()
    a.sum, a.values = sums.data_ptr(), None if values is None else values.data_ptr()
    a.threads = torch.get_num_threads()
    code = _library().vq_quantize(ctypes.byref(a))
    if code == NON_FINITE:
        raise NonFiniteError(f"layer {layer}: input holds NaN or infinity")
    assert code == OK, f"vq_quantize: {code}"
    return Rows(codes, scale, zero_point, sums, num_bits, row, segment, sign_split, x.shape, values)


def _token_rows(rows: Tensor | None, tokens: int) -> Tensor | None:
    """Row numbers per token, one for all spread over the tokens."""
    if rows is not None and rows.numel() == 1 and tokens != 1:
        rows = rows.reshape(1).expand(tokens).contiguous()
    if rows is not None and rows.numel() != tokens:
        raise ValueError(f"{rows.numel()} row numbers for {tokens} tokens an image")
    return rows


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    *,
    num_bits: int,
    row_group: int | None = None,
) -> PackedWeight:
    """codes (N, K) uint8, scale and integer-valued zero_point (N, Gw) as in a QuantLinear;
    `row_group` is the group of the activations it will meet."""
    outputs, inputs = codes.shape
    row, group, segment = _layout(inputs, row_group, inputs // scale.shape[1])
    panels = -(-outputs // PANEL)
    library = _library()
    zero_point = zero_point.to(torch.int32).contiguous()
    scale, codes = scale.float().contiguous(), codes.contiguous()
    packed = _aligned_bytes(library.vq_packed_bytes(outputs, inputs, segment, num_bits))
    panel_scale = torch.empty((panels, inputs // group, PANEL), dtype=torch.float32, device="cpu")
    panel_zero = torch.empty((panels, inputs // group, PANEL), dtype=torch.int32, device="cpu")
    panel_sum = torch.empty((panels, inputs // segment, PANEL), dtype=torch.int32, device="cpu")
    a = PackArgs(outputs=outputs, inputs=inputs, num_bits=num_bits, group=group, segment=segment)
    a.codes = pointer(codes, "codes", torch.uint8, outputs, inputs)
    a.zero_point = pointer(zero_point, "zero_point", torch.int32, outputs, inputs // group)
    a.scale = pointer(scale, "scale", torch.float32, outputs, inputs // group)
    a.packed, a.panel_scale = packed.data_ptr(), panel_scale.data_ptr()
    a.panel_zero, a.panel_sum = panel_zero.data_ptr(), panel_sum.data_ptr()
    code = library.vq_pack(ctypes.byref(a))
    assert code == OK, f"vq_pack: {code}"
    return PackedWeight(
        *(packed, panel_scale, panel_zero, panel_sum),
        *(num_bits, group, row, segment, outputs, inputs),
    )


def _aligned_bytes(size: int) -> Tensor:
    """uint8 tensor whose data starts at a multiple of 64 bytes, so that no load crosses a line."""
    whole = torch.empty(size + 64, dtype=torch.uint8, device="cpu")
    start = -whole.data_ptr() % 64
    return whole[start : start + size]


def _linear_args(rows: Rows, weight: PackedWeight) -> LinearArgs:
    if (rows.segment, rows.group) != (weight.segment, weight.row_group):
        raise ValueError(
            f"rows in groups of {rows.group} and segments of {rows.segment}, the weight was packed "
            f"for {weight.row_group} and {weight.segment}"
        )
    a = LinearArgs(rows=rows.codes.shape[0], outputs=weight.outputs, inputs=weight.inputs)
    a.rows_per_image = 1
    a.row_group, a.weight_group, a.segment = rows.group, weight.group, rows.segment
    a.row_bits, a.weight_bits, a.pairs = rows.num_bits, weight.num_bits, rows.pairs
    groups, segments = a.inputs // a.row_group, a.inputs // a.segment
    width = segments * _padded(a.segment)
    a.codes = pointer(rows.codes, "codes", torch.uint8, a.rows, width)
    a.scale = pointer(rows.scale, "scale", torch.float32, a.rows, groups)
    a.zero_point = pointer(rows.zero_point, "zero_point", torch.int32, a.rows, groups)
    a.sum = pointer(rows.sums, "sums", torch.int32, a.rows, segments)
    size = _library().vq_packed_bytes(a.outputs, a.inputs, a.segment, a.weight_bits)
    panels, groups = -(-weight.outputs // PANEL), a.inputs // a.weight_group
    a.packed = pointer(weight.packed, "weight", torch.uint8, size)
    a.panel_scale = pointer(weight.scale, "weight's scale", torch.float32, panels, groups, PANEL)
    a.panel_zero = pointer(weight.zero_point, "weight's zero", torch.int32, panels, groups, PANEL)
    a.panel_sum = pointer(weight.sums, "weight's sums", torch.int32, panels, segments, PANEL)
    a.threads = torch.get_num_threads()
    return a


def linear(
    rows: Rows,
    weight: PackedWeight,
    bias: Tensor | None = None,
    bias_rows: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y (..., N) of dtype float32 or bfloat16. bias float32, (N,) or a table (R, N) that a token
    takes the row `bias_rows` (l,) int32 of (without them row 0)."""
    a = _linear_args(rows, weight)
    shape = rows.shape
    y = torch.empty((*shape[:-1], weight.outputs), dtype=dtype, device="cpu")
    m = y.numel() // weight.outputs
    a.rows_per_image = max(1, m // max(1, shape[0] if len(shape) == 3 else 1))
    # Held until the call is over: the pointer keeps nothing alive.
    token_rows = _token_rows(bias_rows, a.rows_per_image)
    if bias is not None:
        table = bias.view(-1, weight.outputs)
        a.bias = pointer(table, "bias", torch.float32, *table.shape)
        if token_rows is not None:
            a.bias_row = row_numbers(token_rows, "bias_rows", a.rows_per_image, table)
    a.y, a.y_stride, a.y_type = y.data_ptr(), weight.outputs, _TYPES[dtype]
    code = _library().vq_linear(ctypes.byref(a))
    assert code == OK, f"vq_linear: {code}"
    return y


def accumulate(rows: Rows, weight: PackedWeight) -> Tensor:
    """The exact integers behind `linear`: sum of (a - za)(w - zw) over each segment, (rows, N, S)
    int32."""
    a = _linear_args(rows, weight)
    products = torch.empty(
        (a.rows, weight.outputs, rows.sums.shape[1]), dtype=torch.int32, device="cpu"
    )
    a.products = products.data_ptr()
    code = _library().vq_accumulate(ctypes.byref(a))
    assert code == OK, f"vq_accumulate: {code}"
    return products
