"""What a run knows of its model besides the weights: whence the statistics come, made once and kept in the work folder.

A killed run does not write its text again: ``statistics.safetensors`` lies in ``OUT.partial`` beside a note of what it was made
from, and a run with the same arguments takes it. A user's own file of statistics is taken as it is.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from seedlm.codes.base import Format
from seedlm.codes.registry import family_of
from seedlm.compress.allocate import Mixture
from seedlm.compress.workfolder import WorkFolder
from seedlm.errors import FormatError, SeedLMError, SourceError
from seedlm.progress import Progress
from seedlm.storage.source import Source

if TYPE_CHECKING:
    from seedlm.storage.statistics import Statistics

STATISTICS_NAME: Final = "statistics.safetensors"
_NOTE: Final = "statistics.json"
_SEQUENCES: Final = {"cuda": 256, "cpu": 64}
"""Sequences of 256 tokens that a model writes by default: KL at 3 bits 0.174 with 256, 0.185 with 64 (docs/log/quality.md)."""
_LENGTH: Final = 256


@dataclass(frozen=True)
class Feedback:
    """Where the statistics for error feedback come from.

    kind        "auto", "own" text, "none", a "text" file or a file of "statistics"
    file        of the last two
    sequences   of 256 tokens, of own text or taken from a file; None is 256 on a GPU, 64 on a CPU
    seed        of the own text
    """

    kind: Literal["auto", "own", "none", "text", "statistics"] = "auto"
    file: Path | None = None
    sequences: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, value: "str | Path | Feedback") -> "Feedback":
        """From what a user writes. Raises FormatError for a file that is not there."""
        if isinstance(value, Feedback):
            return value
        if value in ("auto", "own", "none"):
            return cls(value)  # type: ignore[arg-type]
        path = Path(value)
        if not path.is_file():
            raise FormatError(f"feedback must be auto, own, none, a file of statistics or a text, got {str(value)!r}")
        return cls("statistics" if path.suffix == ".safetensors" else "text", path)


@dataclass(frozen=True)
class Observed:
    """Statistics of a run.

    file        where they are; None without
    record      what config.json says of them: ``feedback`` is "none", "own text" or the name of a text that was data
    identity    by which a run that is gone on with knows them again
    """

    file: Path | None = None
    record: Mapping[str, str] = field(default_factory=dict)
    identity: str | None = None

    @classmethod
    def of(cls, found: "Statistics", file: Path) -> "Observed":
        facts = found.facts
        identity = f"{facts.weighting} {facts.sequences} x {facts.length}, text {facts.text[:16]}, model {facts.model[:16]}"
        return cls(file.absolute(), {"feedback": facts.source}, identity)

    def mixture(self, wanted: Mixture, shapes: Mapping[str, tuple[int, int]], source: Source) -> Mixture:
        """A mixture with the sensitivities that follow from the statistics. Raises FormatError without any."""
        from seedlm.calibration.after_feedback import sensitivities
        from seedlm.storage.statistics import Statistics

        if self.file is None:
            raise FormatError(
                f"{wanted.bits:g} bits a weight are a mixture of formats, which needs to know where bits matter: leave out "
                "--feedback none, or measure the model with `seedlm sensitivity SOURCE -o FILE` and add --sensitivity FILE"
            )
        found = sensitivities(Statistics.load(self.file), shapes, source)
        return Mixture(bits=wanted.bits, sensitivity=found, formats=wanted.formats)


def gather(
    work: WorkFolder,
    wanted: Feedback,
    formats: Sequence[Format],
    source: Source,
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    devices: Sequence[torch.device],
    progress: Progress,
    tell: Callable[[str], None],
) -> Observed:
    """The statistics of this run, made if they are not there yet.

    Raises SourceError or EvaluationError for a model that cannot be run, unless that is only tried ("auto").
    """
    if not any(family_of(format).feedback for format in formats):
        if wanted.kind not in ("auto", "none"):
            names = ", ".join(sorted({format.family for format in formats}))
            raise FormatError(f"the family {names} takes no error feedback; --feedback none")
        return Observed()
    if wanted.kind == "none":
        return Observed(record={"feedback": "none"})
    from seedlm.storage.statistics import Statistics

    if wanted.kind == "statistics":
        assert wanted.file is not None
        found = Statistics.load(wanted.file)
        _check_fit(found, wanted.file, shapes, tell)
        return Observed.of(found, wanted.file)
    device = devices[0] if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences = wanted.sequences or _SEQUENCES["cuda" if device.type == "cuda" else "cpu"]
    known = {**asdict(wanted), "file": None, "sequences": sequences, "source": source.fingerprint}
    if wanted.file is not None:
        known["file"] = {"name": wanted.file.name, "bytes": wanted.file.stat().st_size}
    known = json.loads(json.dumps(known))
    file, note = work.path / STATISTICS_NAME, work.path / _NOTE
    if file.exists() and note.exists():
        before = json.loads(note.read_text())
        if before == known:
            return Observed.of(Statistics.load(file), file)
        work.hold_against(before, known, "statistics")
    try:
        _observe(path, file, wanted, sequences, device, progress)
    except (SeedLMError, torch.OutOfMemoryError, NotImplementedError) as reason:
        cause = " ".join(str(reason).split()).split(". ")[0]
        if wanted.kind != "auto":
            raise SourceError(f"no statistics for error feedback: {cause}") from reason
        tell(f"no error feedback: the model cannot be run here ({cause})")
        return Observed(record={"feedback": "none"})
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    new = note.with_name(note.name + ".new")
    new.write_text(json.dumps(known))
    os.replace(new, note)
    return Observed.of(Statistics.load(file), file)


def _check_fit(
    statistics: "Statistics", file: Path, shapes: Mapping[str, tuple[int, int]], tell: Callable[[str], None]
) -> None:
    """Raise SourceError for statistics of another model; a line for layers that have none."""
    missing = [module for module in shapes if module not in statistics.reads]
    if len(missing) == len(shapes):
        raise SourceError(f"{file}: has statistics of no layer that is to be compressed: another model's")
    if missing:
        tell(f"no statistics of {len(missing)} of {len(shapes)} layers, which go by their weights alone: {missing[0]} ...")
    for module, (rows, columns) in shapes.items():
        if (read := statistics.input_of(module)) is None:
            continue
        if len(read.scale) != columns:
            raise SourceError(f"{file}: {module} reads {len(read.scale)} features there, its weight has {columns} columns")
        if module in statistics.rows and len(statistics.rows[module]) != rows:
            raise SourceError(f"{file}: {module} has {len(statistics.rows[module])} outputs there, its weight has {rows} rows")


def _observe(
    path: Path,
    file: Path,
    wanted: Feedback,
    sequences: int,
    device: torch.device,
    progress: Progress,
) -> None:
    from seedlm.calibration.own_text import OwnText, write_text
    from seedlm.calibration.statistics import OWN_TEXT, measure_statistics
    from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer

    progress("load", 0, 0)
    dtype = "bfloat16" if device.type == "cuda" and not path.is_file() else "auto"
    model: Any = open_language_model(path, dtype=dtype).to(device)
    if wanted.file is None:
        text: OwnText = OwnText(sequences=sequences, length=_LENGTH, seed=wanted.seed)
        tokens, name = write_text(model, text, on_progress=progress), OWN_TEXT
    else:
        try:
            content = wanted.file.read_text(encoding="utf-8")
        except UnicodeDecodeError as reason:
            raise SourceError(f"{wanted.file}: is not UTF-8 text (byte {reason.start})") from None
        ids = open_tokenizer(path)(content, return_tensors="pt").input_ids[0]
        count = min(sequences, len(ids) // _LENGTH)
        if not count:
            raise SourceError(f"{wanted.file}: has {len(ids)} tokens, at least {_LENGTH} are needed")
        tokens, name = ids[: count * _LENGTH].view(count, _LENGTH), wanted.file.name
    measure_statistics(model, tokens, source=name, on_progress=progress).save(file)
