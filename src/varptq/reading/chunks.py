"""PNG files stripped of metadata that is large, damaged or not needed here.

A PNG is a signature and chunks: length, kind, content, checksum. Kinds with a lower-case first
letter are ancillary, and a picture is complete without them. Pillow refuses a file with a damaged
one, or with a text or colour profile above 1 MB; viewers ignore these, and so do we.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from typing import BinaryIO

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Size of a colour profile or a text, packed or not; Pillow unpacks no more.
MAX_METADATA = 1 << 20
# Transparency is part of the picture; the others hold the profile and the orientation.
_KEPT = (b"tRNS", b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt")
_PACKED = (b"iCCP", b"zTXt")
# Where programs put the orientation before there was eXIf. Only texts of these names are kept.
_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0\0")


def only_what_shows(file: BinaryIO) -> BinaryIO:
    """A copy of a PNG with only the chunks that decide how it looks, metadata before the pixels; a
    file of another kind unchanged. Both are positioned at their start. Lengths in chunks are not
    trusted."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(SIGNATURE)) != SIGNATURE:
        file.seek(0)
        return file
    front, pixels = [SIGNATURE], []
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        ancillary = kind[:1].islower()
        if ancillary and (kind not in _KEPT or length > MAX_METADATA):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        content = file.read(min(length + 4, size))
        if not ancillary or _is_sound(kind, content):
            # Metadata may also follow the pixels, where Pillow finds it only after decoding.
            in_front = ancillary or (not pixels and kind not in (b"IDAT", b"IEND"))
            (front if in_front else pixels).append(head + content)
        if kind == b"IEND":
            break
    return io.BytesIO(b"".join(front + pixels))


def _is_sound(kind: bytes, content: bytes) -> bool:
    """Whether Pillow can use an ancillary chunk. content: with the checksum."""
    content, checksum = content[:-4], content[-4:]
    if checksum != struct.pack(">I", zlib.crc32(content, zlib.crc32(kind))):
        return False
    if kind.endswith(b"Xt") and not content.startswith(_TEXTS):
        return False
    return kind not in _PACKED or _unpacks(content.partition(b"\0")[2])


def _unpacks(packed: bytes) -> bool:
    """Whether a method byte and a zlib stream unpack to at most `MAX_METADATA`."""
    stream = zlib.decompressobj()
    try:
        stream.decompress(packed[1:], MAX_METADATA)
    except zlib.error:
        return False
    return packed[:1] == b"\0" and not stream.unconsumed_tail
