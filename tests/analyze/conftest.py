"""A bench on the tiny model: three images of tokens drawn at random."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from varptq.analyze.bench import Bench
from varptq.models.pipeline import Pipeline

LABELS = torch.tensor([0, 3, 4])


@pytest.fixture(scope="session")
def ids(tiny: Pipeline) -> Tensor:
    """(3, L) int64."""
    generator = torch.Generator().manual_seed(0)
    codebook = tiny.var.arch.codebook_size
    return torch.randint(0, codebook, (3, tiny.scales.num_tokens), generator=generator)


@pytest.fixture(scope="module")
def bench(tiny: Pipeline, ids: Tensor) -> Bench:
    return Bench(tiny, LABELS, ids, batch_size=2)
