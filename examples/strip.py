"""The strip of README.md: five images of the demo model, each beside its 4-bit version.

    python examples/strip.py docs/images/strip.png      # about a minute on one CPU core

Quantizes with the preset w4a4 and the effort fast, as the README's commands do, and draws both
images of a pair from the same seed, at the guidance of `varptq demo`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import varptq
from varptq.pictures import Block, Row, sheet, to_pixels, write_png

CLASSES = ("automobile", "bird", "frog", "horse", "ship")
# The first seed whose float images all show what they are of; chosen before the others were drawn.
SEED = 7


def main(path: Path) -> None:
    pipe = varptq.load_model("demo")
    config = varptq.QuantConfig.preset("w4a4")
    calibration = varptq.CalibrationConfig.preset("fast")
    quantized = varptq.quantize(pipe, config, calibration=calibration, seed=0)
    drawn = [
        varptq.generate(model, list(CLASSES), seed=SEED, cfg=4.0, top_k=100, top_p=0.96).images
        for model in (pipe, quantized)
    ]
    before, after = (to_pixels(images) for images in drawn if images is not None)
    blocks = [
        Block([Row(np.stack(pair))], title=name)
        for name, pair in zip(CLASSES, zip(before, after, strict=True), strict=True)
    ]
    heading = "Left: float. Right: W4A4 (4-bit weights and activations), same seed."
    write_png(path, sheet(blocks, across=len(blocks), heading=heading))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
