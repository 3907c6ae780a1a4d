"""Every error this package raises on purpose. Each message says what was wrong, what was found, what is allowed, and where."""

from typing import Final

_MOST_CHARACTERS: Final = 2000
_MOST_OF_A_WORD: Final = 240


class SeedLMError(Exception):
    """Base class. The command line prints its message on one line and exits with code 2.

    Messages quote names from files, which may be a megabyte long: one of over 2,000 characters is shown without their middle.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _MOST_CHARACTERS:
            words = text.split(" ")
            text = " ".join(word if len(word) <= _MOST_OF_A_WORD else f"{word[:160]}...{word[-60:]}" for word in words)
        return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 500]} ... {text[-400:]}"


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


def extra(name: str) -> str:
    """What to type for an extra of this package, which no index has under its name yet."""
    return f"pip install '.[{name}]' in a copy of seedlm's repository"
