"""The modules of examples/train_demo, which import each other by their bare names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "train_demo"


@pytest.fixture(scope="module")
def parts() -> Iterator[dict[str, ModuleType]]:
    """Each by its name; they leave the interpreter with the test module."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: import_module(name) for name in names}
        for name in names:
            patch.delitem(sys.modules, name)
