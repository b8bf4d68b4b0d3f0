"""`varptq`, with an effort "fast" that calibrates on few images and an analysis of few tensors, for
examples that have to run.

python tests/helpers/few_images.py VERB ...
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from varptq.calibrate.config import PRESETS
from varptq.cli.main import app

FAST = {**PRESETS["fast"], "num_samples": 2}
EVERY = 8


def analyze_few(put: Callable[[Any, str, Any], None] = setattr) -> None:
    """From here on, an analysis measures every eighth tensor. put: changes an attribute of a
    module."""
    from varptq.analyze import sensitivity, suggest

    sites, changes = sensitivity.sites, suggest.changes
    put(sensitivity, "sites", lambda var: sites(var)[::EVERY])
    put(suggest, "changes", lambda *given: list(changes(*given))[::EVERY])


if __name__ == "__main__":
    PRESETS["fast"] = FAST
    analyze_few()
    app(prog_name="varptq")
