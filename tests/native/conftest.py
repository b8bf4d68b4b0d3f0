"""What tests of the native core share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from varptq.native import binding


@pytest.fixture(autouse=True)
def _same_set_afterwards() -> Iterator[None]:
    before = binding.isa() if binding.core() else ""
    yield
    if before:
        binding.select_isa(before)


@pytest.fixture(params=binding.features() if binding.core() else [])
def isa(request: pytest.FixtureRequest) -> Any:
    before = binding.isa()
    assert binding.select_isa(request.param)
    yield request.param
    binding.select_isa(before)
