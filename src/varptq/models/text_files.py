"""Text files of a caller: read whole, or refused in one line."""

from __future__ import annotations

from pathlib import Path

from varptq.errors import InputError

# Many times the largest list of prompts that benchmarks use, 30,000 of them.
MAX_BYTES = 64 * 2**20


def read_text(path: str | Path, what: str) -> str:
    """The UTF-8 text of a file of `what`, plural, in the words of messages. Raises `InputError` for
    one that is missing, too large or no UTF-8."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path}: larger than {MAX_BYTES} bytes, so no file of {what}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the {what} as UTF-8 text"
        ) from None
    except ValueError as error:
        raise InputError(f"{str(path)!r}: is no path ({error})") from None


def lines_of(text: str) -> list[str]:
    """Line ends are those of files, not of Unicode."""
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
