"""Weights by formula: the tables of the h_recipe_*.npz files, turned into tensors.

Tensor t with n elements, integers modulo 2^64, i = 0..n-1 in row-major order:

    z_i = splitmix64((i + 1) * GAMMA + (t * STRIDE + seed));   u = (z >> 11) * 2^-52 - 1
    w = float32(mean[t] + std[t] * sqrt(3) * u)

The tables list parameters only; the caller adds the buffers.
"""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15
STRIDE = 0xD1B54A32D192ED03
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
WORD = 1 << 64


def uniform(index: int, count: int, seed: int) -> np.ndarray:
    """(count,) float64 in [-1, 1) of tensor number `index`."""
    offset = np.uint64((index * STRIDE + seed) % WORD)
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GAMMA) + offset
    z ^= z >> np.uint64(30)
    z *= MIX1
    z ^= z >> np.uint64(27)
    z *= MIX2
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def recipe_state(data: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """float32 tensors by name from a recipe file's `seed` and `tensor_*` tables."""
    state = {}
    for t, name in enumerate(data["tensor_names"]):
        shape = tuple(int(size) for size in re.split("[ ,]", str(data["tensor_shapes"][t])))
        u = uniform(t, int(np.prod(shape)), int(data["seed"]))
        values = data["tensor_mean"][t] + data["tensor_std"][t] * np.sqrt(3.0) * u
        state[str(name)] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    return state


def check_values(state: dict[str, Tensor], names: list[str]) -> np.ndarray:
    """(len(names), 4): the first four values of these tensors, as the file's `check_values`."""
    return np.stack([state[name].flatten()[:4].numpy() for name in names])
