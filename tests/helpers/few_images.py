"""`varptq`, with an effort "fast" that calibrates on few images, for examples that have to run.

python tests/helpers/few_images.py VERB ...
"""

from __future__ import annotations

from varptq.calibrate.config import PRESETS
from varptq.cli.main import app

FAST = {**PRESETS["fast"], "num_samples": 4}

if __name__ == "__main__":
    PRESETS["fast"] = FAST
    app(prog_name="varptq")
