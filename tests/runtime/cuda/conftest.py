"""Triton's kernels run on a GPU where there is one, else interpreted on the CPU."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
