"""phi, the map of the token pyramid, on the native core (src/phi/).

    f_hat = add_phi(f_hat, h, weight, bias)        f_hat + (h + conv3x3(h)) / 2

An image does not depend on its batch, threads (torch's) or instruction set. Shapes: B images, C
channels, P side of the token map.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from varptq.native.binding import call
from varptq.native.pointers import dense


class PhiArgs(ctypes.Structure):
    """vq_phi_args of src/phi/phi.h, field by field in the same order."""

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


def add_phi(f_hat_BCPP: Tensor, h_BCPP: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """f_hat + 0.5 h + 0.5 conv3x3(h), (B, C, P, P), as `Phi` of models/seams.py computes it.

    weight (C, C, 3, 3), bias (C,). One accumulator per output, input channels and then kernel rows
    and columns ascending.
    """
    batch, channels, side = f_hat_BCPP.shape[:3]
    shape = (batch, channels, side, side)
    f_hat, h = dense(f_hat_BCPP, "f_hat", *shape), dense(h_BCPP, "token map", *shape)
    weight = dense(weight, "phi weight", channels, channels, 3, 3)
    bias = dense(bias, "phi bias", channels)
    out = torch.empty(shape, dtype=torch.float32, device="cpu")
    a = PhiArgs(batch=batch, channels=channels, side=side, h=h.data_ptr(), out=out.data_ptr())
    a.weight, a.bias, a.f_hat = weight.data_ptr(), bias.data_ptr(), f_hat.data_ptr()
    a.threads = torch.get_num_threads()
    call("vq_phi", a)
    return out
