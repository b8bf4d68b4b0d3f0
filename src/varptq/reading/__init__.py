"""Pictures from files that other programs wrote: one reader for edits, masks and real images."""

from varptq.reading.picture import (
    FORMATS,
    MAX_PIXELS,
    Header,
    ImageLike,
    at_least,
    eight_bit,
    flattened,
    is_opaque,
    opened,
    read_header,
    read_image,
    turned,
)

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "Header",
    "ImageLike",
    "at_least",
    "eight_bit",
    "flattened",
    "is_opaque",
    "opened",
    "read_header",
    "read_image",
    "turned",
]
