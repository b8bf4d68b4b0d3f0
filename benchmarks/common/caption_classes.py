"""The class that a caption of the text demo names, by the nouns of its trainer's captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TRAINER = Path(__file__).parents[2] / "examples" / "train_demo"


def classes_named(texts: Sequence[str]) -> np.ndarray:
    """(N,) int64. The trainer is a folder of scripts, which import each other by name."""
    sys.path.append(str(TRAINER))
    try:
        from captions import NOUNS
    finally:
        sys.path.remove(str(TRAINER))
    of_noun = {noun: label for label, nouns in enumerate(NOUNS) for noun in nouns}
    named = [[of_noun[word] for word in text.split() if word in of_noun] for text in texts]
    return np.array([label for (label,) in named], dtype=np.int64)
