"""What a run knows of its model besides the weights: whence the statistics come, made once and kept in the work folder.

A killed run does not write its text again: ``text.safetensors`` and then ``statistics.safetensors`` lie in ``OUT.partial`` with
a note of what they were made from, and a run with the same arguments takes them. A user's own file of statistics is taken as
it is; `observe_checkpoint` makes one.

A model that does not fit the device is observed layer by layer, and writes its text so, too: a pass over all of its weights for
each token of a sequence. From a disk that is not tried unless it is asked for: a smaller model may write the text, such as the
model's own compressed version.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from seedlm.codes.base import Format
from seedlm.codes.registry import FEEDBACK, family_of
from seedlm.compress.allocate import Mixture
from seedlm.compress.feedback import Feedback, no_sensitivities
from seedlm.compress.workfolder import WorkFolder
from seedlm.device import free_host_memory, free_memory
from seedlm.errors import FormatError, OutputError, SeedLMError, SourceError
from seedlm.progress import Progress
from seedlm.storage.selection import NO_SURVEY, Survey
from seedlm.storage.source import Source
from seedlm.storage.untrusted import file_digest, parse_json, read_config, read_text
from seedlm.storage.written import replacing, write_tensors

if TYPE_CHECKING:
    from seedlm.calibration.own_text import OwnText
    from seedlm.storage.statistics import Statistics

STATISTICS_NAME: Final = "statistics.safetensors"
_NOTE: Final = "statistics.json"
_DIGEST: Final = "sha256"
"""In the note, of the statistics."""
_TEXT: Final = "text.safetensors"
_SPOOL: Final = "spool"
_SEQUENCES: Final = {"cuda": 256, "cpu": 64}
"""Sequences of 256 tokens that a model writes by default: KL at 3 bits 0.174 with 256, 0.185 with 64 (docs/log/quality.md)."""
_BATCH: Final = 8
"""Sequences observed at a time."""


@dataclass(frozen=True)
class Observed:
    """Statistics of a run.

    file        where they are; None without
    record      what config.json says of them: ``feedback`` is "none", "own text" or the name of a text that was data; nothing
                where none is what a reader expects
    identity    by which a run that is gone on with knows them again
    """

    file: Path | None = None
    record: Mapping[str, str] = field(default_factory=dict)
    identity: str | None = None

    @classmethod
    def of(cls, found: "Statistics", file: Path) -> "Observed":
        facts = found.facts
        identity = f"{facts.weighting} {facts.sequences} x {facts.length}, text {facts.text[:16]}, model {facts.model[:16]}"
        return cls(file.absolute(), {FEEDBACK: facts.source}, identity)

    def mixture(
        self, wanted: Mixture, shapes: Mapping[str, tuple[int, int]], source: Source, survey: Survey = NO_SURVEY
    ) -> Mixture:
        """A mixture with the sensitivities that follow from the statistics. Raises FormatError without any."""
        from seedlm.calibration.after_feedback import sensitivities
        from seedlm.storage.statistics import Statistics

        if self.file is None:
            raise FormatError(no_sensitivities(wanted, "auto"))
        found = sensitivities(Statistics.load(self.file), shapes, source, next(iter(wanted.formats)), survey)
        return replace(wanted, sensitivity=found)


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
    trust_remote_code: bool = False,
) -> Observed:
    """The statistics of this run, made if they are not there yet.

    Raises SourceError or EvaluationError for a model that cannot be run, unless that is only tried ("auto").
    """
    ways = {family_of(format).feedback for format in formats}
    if not any(ways) or (wanted.kind == "none" and "own" not in ways):  # none, where none is what is expected: no record
        return Observed()
    if wanted.kind == "none":
        return Observed(record={FEEDBACK: "none"})
    from seedlm.storage.statistics import Statistics

    if wanted.kind == "statistics":
        assert wanted.file is not None
        found = Statistics.load(wanted.file)
        _check_fit(found, wanted.file, shapes)
        _say_what_lacks(found, shapes, tell)
        return Observed.of(found, wanted.file)
    if wanted.writer is not None:
        _check_writer(wanted.writer, source)
    device = devices[0] if devices else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file, note = work.path / STATISTICS_NAME, work.path / _NOTE
    known = _known(wanted, source, device)
    if file.exists() and (before := _read_note(note)) is not None:
        digest = before.pop(_DIGEST, None)
        work.hold_against(before, known, "statistics")
        if before == known and digest == file_digest(file, OutputError):
            return Observed.of(Statistics.load(file), file)
        if before == known:
            tell(f"{file}: is damaged, and made again")
    if work.abandoned and wanted.file is None and _kept_text(work.path / _TEXT, known) is None:
        tell("an earlier run was stopped before its text was whole; none of it was kept, and it is written again")
    try:
        _observe(work.path, path, wanted, known, device, progress, tell, trust_remote_code)
    except OutputError:  # a full disk says nothing about the model
        raise
    except (SeedLMError, RuntimeError, ValueError) as reason:
        # No memory, a kernel that a dtype lacks, a model that cannot be trained, one that refuses text without an image.
        cause = " ".join(str(reason).split()).split(". ")[0]
        if wanted.kind != "auto":
            raise SourceError(f"no statistics for error feedback: {cause}") from reason
        tell(f"no error feedback: the model cannot be run here ({cause})")
        return Observed(record={FEEDBACK: "none"})
    finally:
        shutil.rmtree(work.path / _SPOOL, ignore_errors=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    with replacing(note) as out:
        out.write(json.dumps({**known, _DIGEST: file_digest(file, OutputError)}).encode())
    found = Statistics.load(file)
    _say_what_lacks(found, shapes, tell)
    return Observed.of(found, file)


def _read_note(path: Path) -> dict[str, Any] | None:
    """What statistics were made from, with their digest; None for a note that is not there or not whole."""
    try:
        found = parse_json(path.read_bytes(), str(path), OutputError)
    except (OSError, OutputError):
        return None
    return found if isinstance(found, dict) else None


def _check_writer(writer: Path, source: Source) -> None:
    """Raise FormatError for a writer with other tokens, as far as configurations tell."""
    if writer.is_dir():
        sizes = [
            config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
            for config in (read_config(writer, SourceError), source.config)
        ]
        if None not in sizes and sizes[0] != sizes[1]:
            raise FormatError(f"{writer}: knows {sizes[0]} tokens, the model that is to be observed {sizes[1]}")


def _known(wanted: Feedback, source: Source, device: torch.device) -> dict[str, Any]:
    """What the statistics of a run are made from, as JSON."""
    room = wanted.memory or (torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None)
    fits = room is None or sum(2 * math.prod(info.shape) for info in source.tensors.values()) < room
    usual = _SEQUENCES["cuda" if device.type == "cuda" and fits else "cpu"]
    sequences = usual if wanted.sequences is None else wanted.sequences
    known = {**asdict(wanted), "file": None, "writer": None, "sequences": sequences, "source": source.fingerprint}
    del known["memory"]
    if wanted.file is not None:
        known["file"] = {"name": wanted.file.name, "bytes": wanted.file.stat().st_size}
    if wanted.writer is not None:
        from seedlm.integrations.transformers.models import describe

        known["writer"] = describe(wanted.writer.name, wanted.writer).fingerprint
    return json.loads(json.dumps(known))


def _check_fit(statistics: "Statistics", file: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise SourceError for statistics of another model."""
    if not any(module in statistics.reads for module in shapes):
        raise SourceError(f"{file}: has statistics of no layer that is to be compressed: another model's")
    for module, (rows, columns) in shapes.items():
        if (read := statistics.input_of(module)) is None:
            continue
        if len(read.scale) != columns:
            raise SourceError(f"{file}: {module} reads {len(read.scale)} features there, its weight has {columns} columns")
        if module in statistics.rows and len(statistics.rows[module]) != rows:
            raise SourceError(f"{file}: {module} has {len(statistics.rows[module])} outputs there, its weight has {rows} rows")


def _say_what_lacks(statistics: "Statistics", shapes: Mapping[str, tuple[int, int]], tell: Callable[[str], None]) -> None:
    """A line on layers without statistics, and one on those that hardly any token reached."""
    missing = [module for module in shapes if module not in statistics.reads]
    if missing:
        tell(f"no statistics of {len(missing)} of {len(shapes)} layers, which go by their weights alone: {missing[0]} ...")
    tokens = {module: read.tokens for module in shapes if (read := statistics.input_of(module)) is not None}
    few = [module for module, count in tokens.items() if count < shapes[module][1]]
    if few:
        least = min(few, key=lambda module: tokens[module])
        tell(
            f"{len(few)} of {len(shapes)} layers saw fewer tokens than they have columns, the fewest {tokens[least]}, {least}: "
            "the fewer, the more they go by their weights alone; more --sequences reach more"
        )


def _observe(
    folder: Path,
    path: Path,
    wanted: Feedback,
    known: Mapping[str, Any],
    device: torch.device,
    progress: Progress,
    tell: Callable[[str], None],
    trust: bool,
) -> None:
    """Leave statistics in a folder, and the text that they are of."""
    from seedlm.calibration.amount import check_length
    from seedlm.calibration.own_text import OwnText, write_text
    from seedlm.calibration.statistics import measure_statistics
    from seedlm.integrations.transformers.models import check_tokens, load_model, longest_text
    from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer
    from seedlm.storage.inspect import OWN_TEXT

    text = OwnText(sequences=known["sequences"], length=wanted.length, seed=wanted.seed)
    tokens, name = _kept_text(folder / _TEXT, known), OWN_TEXT
    if wanted.file is not None:
        name = wanted.file.name
        if tokens is None:
            tokens = _tokens_of(wanted.file, open_tokenizer(path, trust_remote_code=trust), text)
    elif wanted.writer is not None:
        name = f"{OWN_TEXT}, written by {wanted.writer.name}"
        if tokens is None:
            progress("text", 0, text.tokens)
            tokens = write_text(
                load_model(wanted.writer, device=device, packed=device.type == "cuda"), text, on_progress=progress
            )
            _keep_text(folder / _TEXT, tokens, known)
    progress("load", 0, 0)
    dtype = "bfloat16" if device.type == "cuda" and not path.is_file() else "auto"
    model: Any = open_language_model(path, dtype=dtype, trust_remote_code=trust)
    check_length(longest_text(model), text.length)
    if tokens is not None:
        check_tokens(model, tokens, name, path)
    large, on_disk = _place(model, wanted, text, device, tell)
    if tokens is None:
        if on_disk and wanted.kind == "auto":
            raise SourceError(
                f"it fits neither {device} nor the memory, and would be read from the disk {text.length - 1} times to write a "
                "text; compress it with --feedback none and let that write: seedlm observe --writer"
            )
        tokens = write_text(model, text, on_progress=progress)
        _keep_text(folder / _TEXT, tokens, known)
    spool = folder / _SPOOL if large else None
    if spool:
        spool.mkdir(exist_ok=True)
    statistics = measure_statistics(model, tokens, batch=_BATCH, source=name, spool=spool, on_progress=progress)
    statistics.save(folder / STATISTICS_NAME)


def _place(
    model: Any, wanted: Feedback, text: "OwnText", device: torch.device, tell: Callable[[str], None]
) -> tuple[bool, bool]:
    """Put a model on the device as far as it fits, and say in a line what does not.

    returns   whether what observing it leaves belongs on a disk, and whether weights that do not fit come from there already
    """
    from seedlm.calibration.own_text import BATCH
    from seedlm.calibration.placement import kept, nbytes, place, workspace

    free, host, size = wanted.memory or free_memory(device), free_host_memory(), nbytes(model)
    room = None if free is None else free - workspace(model, min(BATCH, text.sequences), text.length, _BATCH)
    away = place(model, device, room, host=(host or 0) // 2)
    on_disk = host is not None and (size if device.type == "cpu" else away) > host
    if away:
        tell(
            f"the model's {size / 1e9:.3g} GB do not fit the {(free or 0) / 1e9:.3g} GB of {device}: layers of "
            f"{away / 1e9:.3g} GB come from the {'disk' if on_disk else 'memory'} one at a time"
        )
    elif on_disk:
        tell(f"the model's {size / 1e9:.3g} GB do not fit the memory: they are read from the disk as they are used")
    return away > 0 or (host is not None and size + kept(model, text.tokens) > host // 2), on_disk


def _tokens_of(file: Path, tokenizer: Any, text: "OwnText") -> Tensor:
    """The beginning of a text as tokens [sequences, length]. Raises SourceError for one that is shorter than a sequence."""
    # Not verbose: it would warn of a text that is longer than the model's context, which is cut into sequences below.
    ids = tokenizer(read_text(file, SourceError), return_tensors="pt", verbose=False).input_ids[0]
    count = min(text.sequences, len(ids) // text.length)
    if not count:
        raise SourceError(f"{file}: has {len(ids)} tokens, at least {text.length} are needed")
    return ids[: count * text.length].view(count, text.length)


def _keep_text(path: Path, tokens: Tensor, known: Mapping[str, Any]) -> None:
    """Keep a text with what it was made from; it appears whole or not at all."""
    write_tensors(path, {"tokens": tokens.contiguous()}, {"text": json.dumps(known, sort_keys=True)})


def _kept_text(path: Path, known: Mapping[str, Any]) -> Tensor | None:
    """The text that an earlier run has kept; None if there is none, or another one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("text") == json.dumps(known, sort_keys=True)
            return file.get_tensor("tokens") if same else None
    except (OSError, SafetensorError):
        return None
