"""Files of pictures that are not what they say, or say more than a picture needs."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

from PIL import Image

SIGNATURE_AND_HEADER = 33


def chunk(kind: bytes, content: bytes) -> bytes:
    """One of a PNG."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with(image: Image.Image, front: bytes = b"", back: bytes = b"") -> bytes:
    """A PNG with more chunks before, or behind, its pixels."""
    plain = file_of(image)
    end = len(plain) - len(chunk(b"IEND", b""))
    before = plain[:SIGNATURE_AND_HEADER] + front + plain[SIGNATURE_AND_HEADER:end]
    return before + back + plain[end:]


def png_of(
    width: int, height: int, depth: int, colour: int, rows: bytes, more: bytes = b""
) -> bytes:
    """A PNG of these bytes: each row behind a 0. depth, colour: as in its header."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    return png_of(width, height, 8, 2, b"\0" * 100)
