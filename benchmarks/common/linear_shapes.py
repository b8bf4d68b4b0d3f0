"""The Linear layers of VAR-d16 at 256 px, and the schemes they are timed with."""

from __future__ import annotations

# Rows of the ten scales, with guidance.
ROWS = (2, 8, 18, 32, 50, 72, 128, 200, 338, 512)
DEPTH = 16
# Name, inputs, outputs, times in an image per scale (0: ada_lin, once an image at M = 2).
LAYERS = (
    ("qkv", 1024, 3072, DEPTH),
    ("proj", 1024, 1024, DEPTH),
    ("fc1", 1024, 4096, DEPTH),
    ("fc2", 4096, 1024, DEPTH),
    ("head", 1024, 4096, 1),
    ("ada_lin", 1024, 6144, 0),
)
# Row bits, weight bits, activation group, weight group.
SCHEMES = {
    "W8A8": (8, 8, None, None),
    "W6A6": (6, 6, None, None),
    "W4A8": (8, 4, None, 128),
    "W4A4": (4, 4, 64, 128),
}
