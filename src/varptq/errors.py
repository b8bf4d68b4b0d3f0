"""The errors a user can meet. Each message is one line: the thing, the value, what was expected,
what to do.

Anything raised by varptq on bad input derives from `VarptqError`; the command line prints its
message and exits with code 2. Bugs of our own stay ordinary Python exceptions.
"""


class VarptqError(Exception):
    """Base of every error meant for the user."""


class ConfigError(VarptqError, ValueError):
    """A setting has a value that is not allowed, or settings contradict each other."""


class InputError(VarptqError, ValueError):
    """An argument of a call (label, cfg, image, path) cannot be used."""


class CheckpointError(VarptqError):
    """A float checkpoint is missing, damaged, foreign, or does not fit its partner."""


class ArtifactError(VarptqError):
    """A quantized artifact is missing, damaged, of another version or of another model."""


class OutputError(VarptqError):
    """A result cannot be written where it was asked to go."""


class NonFiniteError(VarptqError):
    """A tensor that must be finite holds NaN or infinity; the message names the layer."""
