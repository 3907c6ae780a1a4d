"""Every error this package raises on purpose. Each message says what was wrong, what was found, what is allowed, and where."""


class SeedLMError(Exception):
    """Base class. The command line prints its message on one line and exits with code 2."""


class FormatError(SeedLMError, ValueError):
    """A format that cannot exist: a parameter out of range, an unknown family, preset or specification."""


class TensorError(SeedLMError, ValueError):
    """A tensor that cannot be encoded or decoded: wrong rank, dtype or shape, NaN or Inf, a code out of range."""


class SourceError(SeedLMError):
    """A model that cannot be read: missing, unreadable, truncated, changed under us, or in a refused kind of file."""


class CheckpointError(SeedLMError):
    """A packed checkpoint that is not what FORMAT.md says it must be."""


class OutputError(SeedLMError):
    """A result that cannot be written: no space, a folder in the way, or one that belongs to another run."""


class BackendError(SeedLMError, RuntimeError):
    """A backend that was asked for by name and cannot run here. The message is the reason."""


class EvaluationError(SeedLMError):
    """A measurement that cannot be made: a text shorter than a window, models that do not share a vocabulary, no memory."""
