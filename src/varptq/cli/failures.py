"""One line for each failure of the machine that any verb can meet.

Memory, disks, open files, closed pipes, paths. Bad input raises `VarptqError` where it is found,
and a bug of ours has no line here: it keeps its traceback. Nothing is raised or printed.
"""

from __future__ import annotations

import errno
import traceback

from safetensors import SafetensorError

from varptq.errors import OutOfMemoryError, VarptqError, is_out_of_memory

# Verbs with a batch size; their `OutOfMemoryError` says which one would fit.
WITH_BATCHES = {"generate", "edit", "evaluate"}
LOWER = {
    "generate": "lower --batch-size",
    "edit": "lower --batch-size or --candidates",
    "evaluate": "lower --batch-size",
    "quantize": "free some and run it again, it continues where it was, or lower --samples or "
    "--memory",
    "analyze": "lower --images",
    "demo": "lower --samples or --images",
}
# Packages that write to stdout for us.
PRINTERS = {"typer", "click", "rich"}
FREE = "free some, or choose a smaller model"
REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "free some of your quota or choose another disk",
    errno.EROFS: "choose another place",
    errno.EACCES: "check its owner and permissions",
    errno.EPERM: "check its owner and permissions",
    errno.ENOENT: "check the name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ESTALE: "it was replaced or mounted again; run again",
    errno.EIO: "the disk fails; copy the files to another one",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs, the system has too many open files",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
}


def line(error: BaseException, verb: str | None) -> str | None:
    """The message for a failure of `verb`, None for a bug of ours."""
    if is_out_of_memory(error):
        if isinstance(error, OutOfMemoryError) and verb in WITH_BATCHES:
            return str(error)
        return f"memory: not enough for this run ({_reason(error)}); {LOWER.get(verb or '', FREE)}"
    if isinstance(error, VarptqError):
        return str(error)
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, SafetensorError):
        return (
            f"tensors: cannot be read or written ({_reason(error)}); check the disk and run again"
        )
    if isinstance(error, RecursionError):
        return "input: nested too deeply to be read; check the files given"
    if isinstance(error, UnicodeError):
        text = getattr(error, "object", "")
        return f"name {text!r:.300}: not UTF-8, so it cannot be used; rename it, or link to it"
    return None


def is_of_printing(error: OSError) -> bool:
    """Whether it was raised while printing; such an error names no file."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    package = frames[-1].f_globals.get("__name__", "").split(".")[0] if frames else ""
    return error.filename is None and package in PRINTERS


def _of_the_system(error: OSError) -> str:
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    remedy = REMEDIES.get(error.errno or 0, "check it and run again")
    return f"{' to '.join(names) or 'system'}: {error.strerror or _reason(error)}; {remedy}"


def _reason(error: BaseException) -> str:
    """The first line of the message, shortened."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
