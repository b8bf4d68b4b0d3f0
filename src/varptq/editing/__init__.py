"""Editing images: the part that is kept is encoded and given to the model, the rest is drawn anew
(docs/editing.md)."""

from varptq.editing.edit import EditResult, PreparedEdit, edit, prepare
from varptq.reading import MAX_PIXELS, read_image

__all__ = ["MAX_PIXELS", "EditResult", "PreparedEdit", "edit", "prepare", "read_image"]
