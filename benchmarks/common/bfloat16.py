"""Whether bfloat16 is worth measuring here: without instructions for it float32 is faster."""

from __future__ import annotations

import os

import torch

# What ONEDNN_MAX_CPU_ISA may cap at, without bfloat16 products.
CAPS_WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")


def has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 by instructions for it."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in CAPS_WITHOUT:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
