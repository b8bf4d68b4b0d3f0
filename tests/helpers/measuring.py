"""Weights and images of measuring networks, which are not part of the repository.

`VARPTQ_WEIGHTS` names a folder with resnet56_cifar10.safetensors, lpips_alex.safetensors,
cifar10_test_2000.npz and default_1.pt (docs/metrics.md says where they come from).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def weight_file(name: str) -> Path:
    """The file `name` of the folder VARPTQ_WEIGHTS; skips the test where there is none."""
    folder = os.environ.get("VARPTQ_WEIGHTS")
    if not folder:
        pytest.skip(f"needs {name}: VARPTQ_WEIGHTS names no folder with it")
    path = Path(folder, name)
    if not path.is_file():
        pytest.skip(f"needs {name}: not in VARPTQ_WEIGHTS={folder}")
    return path
