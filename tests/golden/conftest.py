"""Golden data: numbers from the reference implementations, and where the tests find them.

The folder comes from the environment variable VARPTQ_GOLDEN; the default is the small copy beside
this file. Every test takes its sizes from the arrays, so the same tests run on a folder with other
widths and seeds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DEFAULT = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Golden:
    """A folder of golden files; a missing file skips the test that wants it."""

    folder: Path

    def path(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            pytest.skip(f"golden file {name} is not in {self.folder}")
        return path

    def files(self, pattern: str) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.glob(pattern))

    def npz(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.path(name)) as data:
            return {key: data[key] for key in data.files}

    def weights(self, name: str) -> dict[str, Tensor]:
        tensors = load_file(self.path(name))
        return {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}


def golden_folder() -> Golden:
    return Golden(Path(os.environ.get("VARPTQ_GOLDEN", DEFAULT)))


@pytest.fixture(scope="session")
def golden() -> Golden:
    return golden_folder()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `a_file` runs once for every a_var_*.npz of the folder."""
    if "a_file" in metafunc.fixturenames:
        names = golden_folder().files("a_var_*.npz") or ["a_var_*.npz"]
        metafunc.parametrize("a_file", names)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
