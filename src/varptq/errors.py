"""The errors that a user can meet. Each message is one line: the thing, the value, what was
expected, what to do.

Every error that varptq raises for bad input derives from `VarptqError`; the command line prints its
message and exits with code 2. Bugs of our own stay ordinary Python exceptions.
"""


class VarptqError(Exception):
    """Base of every error meant for the user."""


class ConfigError(VarptqError, ValueError):
    """A setting has a value that is not allowed, or settings contradict each other."""


class InputError(VarptqError, ValueError):
    """An argument of a call (label, cfg, image, path) cannot be used."""


class CheckpointError(VarptqError):
    """A float checkpoint is missing, damaged, of an unknown kind, or does not fit the other one."""


class ArtifactError(VarptqError):
    """A quantized artifact is missing, damaged, of another version or of another model."""


class HubError(VarptqError):
    """A repository of the Hugging Face hub, or a file of it, cannot be had or sent."""


class OutputError(VarptqError):
    """A result cannot be written to the chosen place."""


class OutOfMemoryError(VarptqError, MemoryError):
    """A call needs more memory than there is; the message says what to lower."""


class NonFiniteError(VarptqError):
    """A tensor that must be finite holds NaN or infinity; the message names the layer."""


# Messages of torch, oneDNN, CUDA, C++, mmap and the dynamic linker when memory is short.
_NO_MEMORY = (
    *("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory"),
    *("bad_alloc", "bad allocation", "_alloc_failed", "failed to map segment"),
    *("could not create a memory object", "could not create a primitive"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of any library means that memory is short; most have no type for it."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, VarptqError) or not isinstance(error, Exception):
        return False
    text = str(error).lower()
    return any(words in text for words in _NO_MEMORY)
