"""A model in, a packed checkpoint out, tensor by tensor.

A run has three parts. It reads the source once from end to end: every tensor's SHA-256, and of those to be compressed the
norm, the largest magnitude and whether all is finite. That and the arguments are the plan, on which every byte of the result
depends, and what it would refuse it refuses here, before the first hour of search. Then each tensor is encoded, or copied, to
its place in the output, and noted in a journal (`workfolder`). Then the small files follow and the folder takes its name.
Killed at any moment, the same call goes on where it was and ends in the same bytes.

A tensor is read, encoded and written in pieces of rows, so memory does not grow with the model or with its largest tensor.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from seedlm import checkpoint, report, search
from seedlm.checkpoint import PackedInfo, stored_name
from seedlm.codec import ROUNDINGS, Rounding, choose_exponent_bias
from seedlm.device import choose_device
from seedlm.errors import BackendError, FormatError, OutputError, SourceError, TensorError
from seedlm.format import Format, parse_format
from seedlm.report import Report, inspect_checkpoint
from seedlm.search import Backend
from seedlm.selection import dense_linears, select
from seedlm.source import Source, open_source
from seedlm.tensorfile import INDEX_NAME, SINGLE_NAME, Layout, TensorInfo, layout
from seedlm.version import __version__
from seedlm.workfolder import WorkFolder, Writer

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total), phases ``read`` in bytes and then ``compress`` in weights; the first call of a phase says where
it starts, which is not 0 when an earlier run is gone on with."""

_PIECE_WEIGHTS: Final = 1 << 22
"""Weights that are in memory at a time: 16 MiB of them in float32, 32 MiB in float64 while they are summed up."""

_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_TORCH_DTYPES: Final = {code: getattr(torch, name) for name, code in _DTYPES.items()}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class _Item:
    """One tensor of the source and what becomes of it.

    name     in the source
    module   whose compressed weight it becomes; None if it is copied
    packed   how, if so
    stored   what it is stored as, name -> dtype and shape
    """

    name: str
    module: str | None
    packed: PackedInfo | None
    stored: dict[str, TensorInfo]

    @property
    def key(self) -> str:
        """Its name in the journal."""
        return next(iter(self.stored))

    @property
    def weights(self) -> int:
        return self.packed.weights if self.packed else 0


@dataclass(frozen=True)
class _Scan:
    """What one pass over a tensor tells. Norm and largest magnitude are 0 for tensors that are only copied."""

    digest: str
    squared_norm: float = 0.0
    largest: float = 0.0


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str | Format = "4",
    rounding: Rounding = "best",
    dtype: str | None = None,
    include: tuple[str, ...] | list[str] = (),
    exclude: tuple[str, ...] | list[str] = (),
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    backend: Backend = "auto",
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Compress a model into a new folder, or go on with a run that was stopped.

    source              local folder of safetensors, GGUF file or Hub repository (`source.open_source`)
    out                 folder to be created; ``OUT.partial`` beside it holds the unfinished run
    format              preset, specification or format object
    rounding            how coefficients are chosen (`codec.Rounding`)
    dtype               of the floating-point tensors that are not compressed: ``"bfloat16"``, ``"float16"``, ``"float32"``;
                        None leaves every one as it is
    include, exclude    glob patterns over module names (`selection`)
    max_shard_size      bytes, or a text such as ``"5GB"``
    device              where seeds are searched: ``"auto"`` is the GPU if there is one; every device finds the same codes
    returns             sizes, bits and errors, read back from what was written
    Raises SourceError for a model that cannot be read, TensorError for NaN or Inf, OutputError if the output exists, belongs
    to another run or does not fit the disk, FormatError, BackendError.
    """
    out = Path(out).absolute()
    format = parse_format(format) if isinstance(format, str) else format
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise FormatError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    where = choose_device(device)
    if backend != "auto" and (reason := search.reason_unavailable(backend, where, format)):
        raise BackendError(reason)
    shard_bytes = parse_size(max_shard_size)
    progress = on_progress or (lambda phase, done, total: None)
    model = open_source(source, revision=revision)
    modules, left = select(model.tensors, model.config, format, include, exclude)
    items = _items(model.tensors, modules, format, _DTYPES.get(dtype or ""))
    shards = _shards(items, shard_bytes)

    with WorkFolder.claim(out) as work:
        scans = _scan(model, items, progress)
        plan = {
            "seedlm": __version__,
            "arguments": {
                "format": format.to_dict(),
                "rounding": rounding,
                "dtype": dtype,
                "include": sorted(include),
                "exclude": sorted(exclude),
                "max_shard_size": shard_bytes,
            },
            "source": model.fingerprint,
            "content": {name: scan.digest for name, scan in scans.items()},
        }
        layouts = {name: _layout(shard) for name, shard in shards.items()}
        if not work.begin(plan, layouts):
            _write_tensors(work, model, shards, scans, where, rounding, backend, progress)
            config = {**model.config, "fusion_config": checkpoint.guarded(model.config.get("fusion_config"))}
            if dtype is not None:
                config["dtype"] = dtype
            config["quantization_config"] = checkpoint.quantization_config(format, rounding, dense_linears(model.tensors, left))
            _write_rest(work, model, shards, scans, config)
            work.publish()
        work.remove()
    return inspect_checkpoint(out)


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text: ``"5GB"`` is 5 * 10^9, ``"5GiB"`` is 5 * 2^30. Raises OutputError."""
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match:
        step = 1024 if match[3] else 1000
        size = int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if not isinstance(size, int) or size < 1:
        raise OutputError(f"a shard size must be a positive number of bytes or a text such as '5GB', got {size!r}")
    return size


def _items(tensors: Mapping[str, TensorInfo], modules: list[str], format: Format, dtype: str | None) -> list[_Item]:
    """What becomes of every tensor, in the source's order. SourceError if a name is taken by a part of a compressed weight."""
    chosen = {f"{module}.weight": module for module in modules}
    items: list[_Item] = []
    taken: dict[str, str] = {}
    for name, info in tensors.items():
        module = chosen.get(name)
        if module is None:
            convert = dtype is not None and info.dtype in _DTYPES.values()
            item = _Item(name, None, None, {name: TensorInfo(dtype, info.shape) if dtype and convert else info})
        else:
            packed = PackedInfo(format, (info.shape[0], info.shape[1]))
            item = _Item(name, module, packed, {stored_name(module, part): spec for part, spec in packed.stored.items()})
        for stored in item.stored:
            if taken.setdefault(stored, name) != name:
                raise SourceError(f"{name} and {taken[stored]} would both be stored as {stored}; --exclude one of them")
        items.append(item)
    return items


def _shards(items: list[_Item], max_bytes: int) -> dict[str, list[_Item]]:
    """Deal the tensors out to files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    groups: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        size = sum(info.nbytes for info in item.stored.values())
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _layout(items: list[_Item]) -> Layout:
    stored = {name: info for item in items for name, info in item.stored.items()}
    return layout(stored, checkpoint.metadata({item.module: item.packed for item in items if item.module and item.packed}))


def _scan(source: Source, items: list[_Item], progress: Progress) -> dict[str, _Scan]:
    """Read the whole source once. Raises TensorError naming the first weight with NaN or Inf values, and how many follow."""
    total, done = sum(source.tensors[item.name].nbytes for item in items), 0
    progress("read", 0, total)
    scans, broken = {}, []
    for item in items:
        digest = hashlib.sha256()
        squares, largest, nan, inf = 0.0, 0.0, 0, 0
        for piece in source.chunks(item.name) if item.packed is None else _pieces(source, item):
            if isinstance(piece, Tensor):
                magnitude = piece.float().abs()
                peak = float(magnitude.max())
                if not math.isfinite(peak):
                    nan += int(magnitude.isnan().sum())
                    inf += int(magnitude.isinf().sum())
                squares += float(magnitude.double().square().sum())
                largest = max(largest, peak)
            data = _bytes(piece) if isinstance(piece, Tensor) else memoryview(piece)
            digest.update(data)
            done += data.nbytes
            progress("read", done, total)
        if nan or inf:
            broken.append(f"{item.name}: a weight must be finite, got {nan} NaN and {inf} Inf values")
        scans[item.name] = _Scan(digest.hexdigest(), squares, largest)
    if broken:
        others = f"; and {len(broken) - 1} more tensors like it" if len(broken) > 1 else ""
        raise TensorError(f"{broken[0]}{others}; --exclude keeps a tensor as it is")
    return scans


def _pieces(source: Source, item: _Item) -> Iterator[Tensor]:
    """A weight in pieces of whole rows."""
    rows, columns = source.tensors[item.name].shape
    step = max(1, _PIECE_WEIGHTS // columns)
    for start in range(0, rows, step):
        yield source.rows(item.name, start, min(start + step, rows))


def _write_tensors(
    work: WorkFolder,
    source: Source,
    shards: Mapping[str, list[_Item]],
    scans: Mapping[str, _Scan],
    device: torch.device,
    rounding: Rounding,
    backend: Backend,
    progress: Progress,
) -> None:
    """Encode or copy every tensor that the journal does not name."""
    items = [item for shard in shards.values() for item in shard]
    total = sum(item.weights for item in items)
    done = sum(item.weights for item in items if item.key in work.done)
    progress("compress", done, total)
    for file_name, shard in shards.items():
        for item in shard:
            if item.key in work.done:
                continue
            facts = {}
            with work.writing(file_name) as writer:
                if item.packed is None:
                    start = 0
                    for chunk in source.chunks(item.name):
                        data = _converted(chunk, source.tensors[item.name], item.stored[item.name], item.name)
                        writer.write(item.name, start, data)
                        start += len(data)
                else:

                    def within(count: int, before: int = done) -> None:
                        progress("compress", before + count, total)

                    bias = choose_exponent_bias(torch.tensor([scans[item.name].largest]), item.packed.format)
                    facts["squared_error"] = _encode(writer, source, item, item.packed, bias, device, rounding, backend, within)
            work.finish_tensor(item.key, **facts)
            done += item.weights


def _encode(
    writer: Writer,
    source: Source,
    item: _Item,
    packed: PackedInfo,
    exponent_bias: int,
    device: torch.device,
    rounding: Rounding,
    backend: Backend,
    progress: Callable[[int], None],
) -> float:
    """Encode one weight piece by piece to its place; returns its squared error. `progress` is told its weights so far."""
    rows, columns = packed.shape
    squared_error, start = 0.0, 0
    for piece in _pieces(source, item):
        before, stop, count = start * columns, (start + len(piece)) * columns, 0

        def within(weights: int, before: int = before, stop: int = stop) -> None:
            nonlocal count
            count += weights
            progress(min(before + count, stop))  # a search counts the padding of row tails too

        encoded, error = search.encode(
            piece.to(device), packed.format, rounding=rounding, exponent_bias=exponent_bias, backend=backend, on_progress=within
        )
        squared_error += error
        for part, tensor in encoded.tensors.items():
            info = packed.stored[part]
            offset = start * (info.nbytes // rows) if info.shape[0] == rows else 0
            writer.write(stored_name(f"{item.module}", part), offset, _bytes(tensor.cpu()))
        progress(stop)
        start += len(piece)
    return squared_error


def _converted(chunk: bytes | bytearray, read: TensorInfo, stored: TensorInfo, name: str) -> bytes | bytearray | memoryview:
    """Some bytes of a dense tensor in the dtype that it is stored in. TensorError for a number too large for it."""
    if read.dtype == stored.dtype:
        return chunk
    values = torch.frombuffer(bytearray(chunk), dtype=_TORCH_DTYPES[read.dtype])
    converted = values.to(_TORCH_DTYPES[stored.dtype])
    if not torch.equal(converted.isfinite(), values.isfinite()):
        raise TensorError(f"{name}: holds {float(values.abs().nan_to_num(posinf=0.0).max()):g}, too large for {stored.dtype}")
    return _bytes(converted)


def _bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes, row-major."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write_rest(
    work: WorkFolder,
    source: Source,
    shards: Mapping[str, list[_Item]],
    scans: Mapping[str, _Scan],
    config: dict[str, Any],
) -> None:
    """Everything but the tensors; config.json, without which nothing is a model, comes last."""
    items = [item for shard in shards.values() for item in shard]
    source.copy_side_files(work.model)
    if len(shards) > 1:
        size = sum(info.nbytes for item in items for info in item.stored.values())
        weight_map = {name: file for file, shard in shards.items() for item in shard for name in item.stored}
        work.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    errors = {
        item.module: (work.done[item.key]["squared_error"], scans[item.name].squared_norm) for item in items if item.module
    }
    work.write_json(report.REPORT_NAME, report.recorded(source.nbytes, errors))
    work.write_json("config.json", config)
