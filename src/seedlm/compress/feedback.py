"""What errors are weighed by, as a user says it. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from seedlm.calibration.amount import OwnText
from seedlm.codes.base import Format
from seedlm.codes.registry import DEFAULT, family_of, parse_format
from seedlm.compress.allocate import Mixture
from seedlm.compress.workfolder import check_claimable
from seedlm.errors import FormatError, OutputError, SourceError
from seedlm.storage.safetensors import read_header
from seedlm.storage.untrusted import check_text, read_text

LENGTH: Final = 256


@dataclass(frozen=True)
class Feedback:
    """Where the statistics for error feedback come from.

    kind        "auto", "own" text, "none", a "text" file or a file of "statistics". What "auto" is, the family of codes says
    file        of the last two
    sequences   of own text or taken from a file; None is 256 on a GPU, 64 on a CPU or of a model that does not fit the GPU
    length      tokens in each
    seed        of the own text
    writer      another model that writes the text, such as this one's packed folder
    memory      bytes of the device to be used; None is what is free
    """

    kind: Literal["auto", "own", "none", "text", "statistics"] = "auto"
    file: Path | None = None
    sequences: int | None = None
    length: int = LENGTH
    seed: int = 0
    writer: Path | None = None
    memory: int | None = None

    def meant_for(self, formats: Sequence[Format]) -> "Feedback":
        """The same, but "none" in place of "auto" where no family of these formats has statistics gathered by itself.

        Raises FormatError where it is said how much text to gather them from.
        """
        if self.kind != "auto" or any(family_of(format).feedback == "own" for format in formats):
            return self
        if self.sequences is not None:
            names = " and ".join(sorted({format.family for format in formats}))
            raise FormatError(
                f"--sequences says on how much text to observe the model, and the {names} code looks at the weights alone "
                "unless it is asked otherwise: add --feedback own"
            )
        return replace(self, kind="none")

    def check(self, formats: Sequence[Format]) -> None:
        """Raise FormatError or SourceError for what can be told before a model is opened: of formats, and of the file."""
        if self.sequences is not None and self.kind in ("none", "statistics"):
            what = "none" if self.kind == "none" else self.file
            raise FormatError(f"--sequences says on how much text to observe the model, and --feedback {what} observes none")
        if self.kind not in ("auto", "none") and not any(family_of(format).feedback for format in formats):
            names = ", ".join(sorted({format.family for format in formats}))
            raise FormatError(f"the family {names} takes no error feedback; --feedback none")
        if self.kind == "statistics" and self.file is not None:
            read_header(self.file, SourceError)
        elif self.kind == "text" and self.file is not None:
            check_text(read_text(self.file, SourceError), self.length, SourceError, self.file)

    @classmethod
    def parse(cls, value: "str | Path | Feedback") -> "Feedback":
        """From what a user writes. Raises FormatError for a file that is not there."""
        if isinstance(value, Feedback):
            return value
        if value in ("auto", "own", "none"):
            return cls(value)  # type: ignore[arg-type]
        path = Path(value)
        if not path.is_file():
            raise FormatError(
                f"feedback must be auto, own, none, or a file of statistics or text; there is no file {str(value)!r}"
            )
        return cls("statistics" if path.suffix == ".safetensors" else "text", path)


def check_observation(out: Path, wanted: Feedback) -> None:
    """Raise OutputError or FormatError for what `observe_checkpoint` would refuse of its output and its text."""
    out = out.absolute()
    if out.suffix != ".safetensors":
        raise OutputError(f"{out}: statistics are a file of safetensors, which must be called so: {out.name}.safetensors")
    if wanted.kind not in ("own", "text"):
        raise FormatError(f"a model is observed on its own text or on a file, not on {wanted.kind!r}")
    if wanted.file is not None and not wanted.file.is_file():
        raise FormatError(f"{wanted.file}: no such text file")
    OwnText(sequences=wanted.sequences or 1, length=wanted.length, seed=wanted.seed)
    wanted.check([parse_format("4", DEFAULT)])
    check_claimable(out)


def no_sensitivities(wanted: Mixture, kind: str) -> str:
    """What a mixture lacks where no errors are fed back: `Feedback.kind` is "none", or the model cannot be run."""
    ways = {family_of(each).feedback for each in wanted.formats} if kind == "none" else set()
    remedy = {
        "own": "leave out --feedback none",
        "none": "add --feedback own",
        None: "choose bits of one format, such as --bits 4",
    }[next((way for way in ("own", "none") if way in ways), None)]
    wish = "a size is met by" if wanted.bits is None else f"{wanted.bits:g} bits a weight are"
    return (
        f"{wish} a mixture of formats, which needs to know where bits matter: "
        f"{remedy}, or measure the model with `seedlm sensitivity SOURCE -o FILE` and add --sensitivity FILE"
    )
