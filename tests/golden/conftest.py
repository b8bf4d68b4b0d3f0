"""Golden data: numbers from the reference implementations, and where the tests find them.

The folders come from the environment variables VARPTQ_GOLDEN and VARPTQ_GOLDEN_INFINITY; the
defaults are the small copies beside this file. Every test takes its sizes from the arrays, so the
same tests run on a folder with other widths and seeds.
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
DEFAULT_INFINITY = Path(__file__).parent / "data_infinity"


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


def infinity_folder() -> Golden:
    return Golden(Path(os.environ.get("VARPTQ_GOLDEN_INFINITY", DEFAULT_INFINITY)))


@pytest.fixture(scope="session")
def golden() -> Golden:
    return golden_folder()


@pytest.fixture(scope="session")
def golden_infinity() -> Golden:
    return infinity_folder()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `a_file` runs once for every a_var_*.npz of the folder, one with
    `case_file` for every case of Infinity, one with `recipe_file` or `wide_file` for every
    autoencoder or transformer of it by formula."""
    infinity = infinity_folder()
    others = {*infinity.files("h_recipe_*.npz"), "rope_positions.npz"}
    cases = [name for name in infinity.files("*_*.npz") if name not in others]
    for argument, names, pattern in (
        ("a_file", golden_folder().files("a_var_*.npz"), "a_var_*.npz"),
        ("case_file", cases, "?_*.npz"),
        ("recipe_file", infinity.files("h_recipe_vae*.npz"), "h_recipe_vae*.npz"),
        ("wide_file", infinity.files("h_recipe_infinity*.npz"), "h_recipe_infinity*.npz"),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, names or [pattern], scope="module")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
