"""One tensor of a model on its way: read, encoded or copied, and written to its place. The same code in every kind of worker.

A unit of work is a tensor. It needs nothing that another unit makes, and the bytes it leaves depend on the plan alone, so units
may run in any order, on any device or machine, and once more after a kill. Whoever plans them notes which are done.

A tensor passes through in pieces of rows, so memory does not grow with the model or with its largest tensor.
"""

import json
import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.codes.base import EncodeOptions, Facts, Format, totals
from seedlm.codes.encoded import EncodedTensor
from seedlm.codes.registry import family_of
from seedlm.compress.items import Destination, Item, Target
from seedlm.compress.workfolder import Writer, sync, writing
from seedlm.errors import SourceError, TensorError
from seedlm.progress import Tell
from seedlm.storage.metadata import stored_name
from seedlm.storage.safetensors import TensorInfo, torch_dtype
from seedlm.storage.source import Source, open_source
from seedlm.storage.statistics import Statistics

PIECE_WEIGHTS: Final = {"cpu": 1 << 22, "cuda": 1 << 23}
"""Weights of a tensor that are in memory at a time. 2^22 are 16 MiB in float32 and 32 MiB while their squares are added up."""


_FACTORIZATION_BYTES: Final = 88
"""For each pair of columns, while the coefficients of feedback are made on a CPU: 88 measured at 2048 columns, 65 at 4096."""

_MARGIN: Final = 4
"""Codes may stand for more than the largest weight; where that is beyond this share of a dtype's range, they are checked."""


@dataclass(frozen=True)
class Job:
    """What a worker must know before its first unit.

    source        local path of the model
    fingerprint   that it must have, JSON (`Source.fingerprint`)
    folder        where the files to be filled are
    token         by which the folder above is known (`workfolder.is_held`)
    formats       that will be encoded
    options       how
    statistics    file of the layers' statistics, for error feedback; None without
    """

    source: str
    fingerprint: str
    folder: Path
    token: str
    formats: tuple[Format, ...]
    options: EncodeOptions
    statistics: Path | None = None


@dataclass(frozen=True)
class Unit:
    """What a worker is given: an item, where it goes, and the largest magnitude in it, if it is to be encoded."""

    item: Item
    destination: Destination
    largest: float


class Worker:
    """Runs units on one device. Several threads may call `run` at once, each with a unit of its own.

    source   the job's, if it is open already. Raises SourceError if it is not the one that was planned with.
    """

    def __init__(self, job: Job, device: torch.device, source: Source | None = None) -> None:
        self.job, self.device = job, device
        if source is None:
            source = open_source(job.source)
            if json.dumps(source.fingerprint, sort_keys=True) != job.fingerprint:
                raise SourceError(f"{job.source}: changed while it was being compressed")
        self.source = source
        self._own = threading.local()
        self._opening = threading.Lock()
        self._files: dict[str, FileIO] = {}
        self._statistics: Statistics | None = None

    def warm_up(self) -> None:
        """Build the tables and compile what encoding needs, which takes seconds, on the least matrix."""
        for format in self.job.formats:
            shape = (format.row_step, format.column_step)
            with torch.cuda.stream(self._stream()):
                encoder = family_of(format).encoder(format, shape, Facts(1.0), self.job.options, self.device)
                encoder.rows(torch.ones(shape, device=self.device), lambda weights: None)

    def working_bytes(self, unit: Unit) -> int:
        """About what a unit with error feedback takes on a CPU: a piece of rows in several forms, and its coefficients."""
        if unit.item.target is None:
            return 0
        rows, columns = unit.item.target.packed.shape
        return 40 * min(rows * columns, max(PIECE_WEIGHTS["cpu"], columns)) + _FACTORIZATION_BYTES * columns**2

    def run(self, unit: Unit, tell: Tell) -> dict[str, Any]:
        """Put one tensor into its place; its bytes have reached the disk once `settle` was called after this.

        tell      told the weights that are encoded, as they are
        returns   what the journal keeps: sha256, by stored name; squared_error and squared_norm of a compressed weight
        Raises SourceError, TensorError, BackendError, OSError; whatever `tell` raises ends the unit.
        """
        item = unit.item
        self._open(unit.destination.file)
        with writing(self.job.folder / unit.destination.file, unit.destination.offsets, item.headings) as writer:
            if item.target is None:
                self._copy(item, writer)
                return {"sha256": writer.digests}
            facts = self._compress(item, item.target, unit.largest, writer, tell)
            return {"sha256": writer.digests, **facts}

    def settle(self, files: Iterable[str]) -> None:
        """Wait until all that was written to these files of the output has reached the disk. Raises OSError if it could not."""
        for name in files:
            sync(self._open(name))

    def _open(self, name: str) -> FileIO:
        """A file of the output, open from before its first byte is written: who has it open is told if a later write fails."""
        with self._opening:
            if name not in self._files:
                self._files[name] = FileIO(self.job.folder / name, "r+")
            return self._files[name]

    def close(self) -> None:
        """Close the output's files."""
        for file in self._files.values():
            file.close()

    def _copy(self, item: Item, writer: Writer) -> None:
        start = 0
        for chunk in self.source.chunks(item.name):
            data = converted(chunk, self.source.tensors[item.name], item.stored[item.name], item.name)
            writer.write(item.name, start, data)
            start += len(data)

    def _compress(self, item: Item, target: Target, largest: float, writer: Writer, tell: Tell) -> dict[str, float]:
        """Encode a matrix piece by piece. On a GPU each thread has its own stream."""
        module, format, shape = target.module, target.packed.format, target.packed.shape
        rows, columns = shape
        parts = format.parts(rows, columns)
        start, errors = 0, []
        dtype = torch_dtype(self.source.tensors[item.name].dtype)
        kept: dict[str, list[Tensor]] | None = {} if largest > torch.finfo(dtype).max / _MARGIN else None
        on_gpu = self.device.type == "cuda"
        weights = PIECE_WEIGHTS["cuda" if on_gpu else "cpu"]
        with torch.cuda.stream(self._stream()):
            facts = self._facts(target, largest)
            encoder = family_of(format).encoder(format, shape, facts, self.job.options, self.device)
            for piece in pieces(self.source, item.name, target, weights, pinned=on_gpu):
                left = len(piece) * columns

                def within(weights: int) -> None:
                    nonlocal left
                    weights = min(weights, left)  # an encoder counts the padding of rows too
                    left -= weights
                    tell(weights)

                codes, found = encoder.rows(piece.to(self.device, non_blocking=True), within)
                for name, tensor in codes.items():
                    part = parts[name]
                    entry_bytes = part.nbytes // part.shape[0]
                    first = start // part.rows_per_entry * entry_bytes
                    writer.write(stored_name(module, name), first, as_bytes(tensor.cpu()))
                    if kept is not None:
                        kept.setdefault(name, []).append(tensor.cpu())
                errors.append(found)
                tell(left)
                start += len(piece)
            for name, tensor in encoder.rest().items():
                writer.write(stored_name(module, name), 0, as_bytes(tensor.cpu()))
                if kept is not None:
                    kept[name] = [tensor.cpu()]
        if kept is not None:
            weight = EncodedTensor(format, shape, {name: torch.cat(kept[name]) for name in parts}).dequantize(dtype)
            if count := int((~weight.isfinite()).sum()):
                raise TensorError(
                    f"{item.name}: holds {largest:g}, and {count} of its weights would dequantize to infinity in {dtype}; "
                    "--exclude keeps it as it is"
                )
        error, norm = totals(errors)
        if not math.isfinite(norm):
            raise SourceError(f"{item.name}: has NaN or Inf values that it did not have before; it changed while being read")
        return {"squared_error": error, "squared_norm": norm}

    def _facts(self, target: Target, largest: float) -> Facts:
        """What is known of a matrix; statistics are read by the first that has some.

        Rows of embeddings and heads count alike: what a gradient says of tokens that a text hardly has is next to nothing, and
        rows that count next to nothing would take all errors (docs/log/quality.md).
        """
        if self.job.statistics is None:
            return Facts(largest)
        with self._opening:
            if self._statistics is None:
                self._statistics = Statistics.load(self.job.statistics)
        facts = self._statistics.facts_of(target.observed or target.module, largest)
        return facts if target.observed is None else replace(facts, importance=None)

    def _stream(self) -> torch.cuda.Stream | None:
        if self.device.type == "cuda" and not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self.device)
        return getattr(self._own, "stream", None)


def pieces(source: Source, name: str, target: Target, weights: int, pinned: bool = False) -> Iterator[Tensor]:
    """The matrix that becomes `target`, as rows, about so many weights at a time: [rows, columns] in its own dtype.

    Every piece but the last is a multiple of the format's `row_step`.

    name     of the tensor that holds it, alone or in a stack; one of a stack is read as a whole
    pinned   read them into memory that a GPU copies from four times as fast
    Each piece is gone when the next is asked for.
    """
    info, stack = source.tensors[name], target.packed.stack
    rows, columns = target.packed.shape
    row_step = target.packed.format.row_step
    step = min(rows, max(1, weights // columns // row_step) * row_step)
    if stack is not None:
        into = torch.empty(info.nbytes // stack.shape[0], dtype=torch.uint8, pin_memory=pinned)
        matrix = source.rows(name, *stack.span(stack.expert(target.module)), into).view(stack.shape[1:])
        yield from (matrix.mT.contiguous() if stack.transposed else matrix).split(step)
        return
    into = torch.empty(step * (info.nbytes // rows), dtype=torch.uint8, pin_memory=pinned)
    for start in range(0, rows, step):
        yield source.rows(name, start, min(start + step, rows), into)


def as_bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, row-major."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def converted(chunk: Any, read: TensorInfo, stored: TensorInfo, name: str) -> Any:
    """Some bytes of a dense tensor in the dtype that it is stored in. TensorError for a number too large for it."""
    if read.dtype == stored.dtype:
        return chunk
    values = torch.frombuffer(bytearray(chunk), dtype=torch_dtype(read.dtype))
    converted = values.to(torch_dtype(stored.dtype))
    if not torch.equal(converted.isfinite(), values.isfinite()):
        raise TensorError(f"{name}: holds {float(values.abs().nan_to_num(posinf=0.0).max()):g}, too large for {stored.dtype}")
    return as_bytes(converted)
