"""How much text a model writes by itself, and which. Imports no torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from seedlm.errors import EvaluationError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class OwnText:
    """How much text, and which.

    sequences    how many; four times as many, 256, make the KL at 3 bits 6 % less (`for_device`)
    length       tokens in each, the first one included
    seed         of the numbers that are drawn
    temperature  of the predictions; 1 as the model makes them
    Raises EvaluationError for a value that cannot be.
    """

    sequences: int = 64
    length: int = 256
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("length", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise EvaluationError(f"temperature must be above 0, got {self.temperature}")

    @classmethod
    def for_device(cls, device: "torch.device", seed: int = 0) -> "OwnText":
        """As much as takes seconds to a minute: 256 sequences on a GPU, 64 on a CPU."""
        return cls(sequences=64 if device.type == "cpu" else 256, seed=seed)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


def check_length(longest: int | None, length: int) -> None:
    """Raise EvaluationError for sequences of more tokens than a model has positions for; None if it does not say."""
    if longest is not None and length > longest:
        raise EvaluationError(f"the model knows {longest} positions, the text has {length} tokens: choose a shorter length")


@dataclass(frozen=True, kw_only=True)
class SensitivityText:
    """The text that a model writes by itself: how many sequences, tokens in each, and the seed of what is drawn.

    Not those of `OwnText`: these sequences begin with any token, and are drawn otherwise. What was measured with
    mixtures of the block code (docs/results.md) rests on them.
    Raises EvaluationError for a value that cannot be.
    """

    sequences: int = 32
    length: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sequences", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise EvaluationError(f"{name} must be at least {least}, got {getattr(self, name)}")
