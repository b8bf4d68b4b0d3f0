"""The argument structs of src/varptq.h for ctypes, field by field in the same order."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p


class QuantizeArgs(ctypes.Structure):
    """vq_quantize_args."""

    _fields_ = (
        ("rows", c_int64),
        ("width", c_int64),
        ("x", c_void_p),
        ("row_stride", c_int64),
        ("x_type", c_int32),
        ("prologue", c_int32),
        ("gain", c_void_p),
        ("shift", c_void_p),
        ("modulation_stride", c_int64),
        ("rows_per_image", c_int64),
        ("eps", c_float),
        ("hadamard", c_int32),
        ("means", c_void_p),
        ("mean_row", c_void_p),
        ("num_bits", c_int32),
        ("sign_split", c_int32),
        ("group", c_int64),
        ("segment", c_int64),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("sum", c_void_p),
        ("values", c_void_p),
        ("threads", c_int32),
    )


class PackArgs(ctypes.Structure):
    """vq_pack_args."""

    _fields_ = (
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("codes", c_void_p),
        ("zero_point", c_void_p),
        ("scale", c_void_p),
        ("num_bits", c_int32),
        ("group", c_int64),
        ("segment", c_int64),
        ("packed", c_void_p),
        ("panel_scale", c_void_p),
        ("panel_zero", c_void_p),
        ("panel_sum", c_void_p),
    )


class LinearArgs(ctypes.Structure):
    """vq_linear_args."""

    _fields_ = (
        ("rows", c_int64),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("row_group", c_int64),
        ("weight_group", c_int64),
        ("segment", c_int64),
        ("row_bits", c_int32),
        ("weight_bits", c_int32),
        ("pairs", c_int32),
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("zero_point", c_void_p),
        ("sum", c_void_p),
        ("packed", c_void_p),
        ("panel_scale", c_void_p),
        ("panel_zero", c_void_p),
        ("panel_sum", c_void_p),
        ("bias", c_void_p),
        ("bias_row", c_void_p),
        ("rows_per_image", c_int64),
        ("y", c_void_p),
        ("y_stride", c_int64),
        ("y_type", c_int32),
        ("products", c_void_p),
        ("threads", c_int32),
    )
