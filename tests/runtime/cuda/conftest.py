"""Triton's kernels run on a GPU where there is one, else interpreted on the CPU."""

import os

import pytest
import torch

# Triton reads this when a kernel is defined, so before varptq.runtime.cuda is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
