"""The argument structs of src/attention.h for ctypes, field by field in the same order."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p


class TraceArgs(ctypes.Structure):
    """vq_attention_trace."""

    _fields_ = (
        ("query_codes", c_void_p),
        ("query_scale", c_void_p),
        ("query_zero", c_void_p),
        ("key_codes", c_void_p),
        ("key_scale", c_void_p),
        ("key_zero", c_void_p),
        ("value_codes", c_void_p),
        ("value_scale", c_void_p),
        ("value_zero", c_void_p),
        ("scores", c_void_p),
        ("probability_codes", c_void_p),
        ("orders", c_void_p),
        ("row_scale", c_void_p),
    )


class AttentionArgs(ctypes.Structure):
    """vq_attention_args."""

    _fields_ = (
        ("batch", c_int64),
        ("heads", c_int64),
        ("width", c_int64),
        ("tokens", c_int64),
        ("start", c_int64),
        ("capacity", c_int64),
        ("ends", c_void_p),
        ("segments", c_int64),
        ("spans", c_void_p),
        ("num_spans", c_int64),
        ("policy", c_int32),
        ("query_bits", c_int32),
        ("key_bits", c_int32),
        ("value_bits", c_int32),
        ("probability_bits", c_int32),
        ("l2_norm", c_int32),
        ("max_order", c_int32),
        ("theta", c_float),
        ("qkv", c_void_p),
        ("query_bias", c_void_p),
        ("value_bias", c_void_p),
        ("query_factor", c_void_p),
        ("key_mean", c_void_p),
        ("cache", c_void_p),
        ("out", c_void_p),
        ("trace", ctypes.POINTER(TraceArgs)),
        ("threads", c_int32),
    )


class SampleArgs(ctypes.Structure):
    """vq_sample_args."""

    _fields_ = (
        ("rows", c_int64),
        ("vocabulary", c_int64),
        ("logits", c_void_p),
        ("unconditional", c_void_p),
        ("guidance", c_float),
        ("guidance_plus_one", c_float),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("temperature", c_float),
        ("uniform", c_void_p),
        ("ids", c_void_p),
        ("filtered", c_void_p),
        ("bad_row", c_void_p),
        ("threads", c_int32),
    )


class PhiArgs(ctypes.Structure):
    """vq_phi_args."""

    _fields_ = (
        ("batch", c_int64),
        ("channels", c_int64),
        ("side", c_int64),
        ("h", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("f_hat", c_void_p),
        ("out", c_void_p),
        ("threads", c_int32),
    )
