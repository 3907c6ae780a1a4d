"""A model in, a packed checkpoint out, tensor by tensor.

A run has three parts. It reads the source once from end to end: every tensor's SHA-256, and of those to be compressed the
largest magnitude and whether all is finite. That and the arguments are the plan, on which every byte of the result depends,
and what it would refuse it refuses here, before the first hour of search. Then each tensor is encoded, or copied, to its place
in the output (`units`), by whatever there is to do it (`engine`), and noted in a journal (`workfolder`). Then the small files
follow and the folder takes its name. Killed at any moment, the same call goes on where it was and ends in the same bytes.
"""

import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from seedlm import checkpoint, engine, engine_ray, report, search
from seedlm.allocate import Mixture, most_common
from seedlm.checkpoint import PackedInfo, stored_name
from seedlm.codec import ROUNDINGS, Rounding, choose_exponent_bias
from seedlm.device import choose_devices, peak_memory
from seedlm.errors import BackendError, FormatError, OutputError, SourceError, TensorError
from seedlm.format import Format, parse_format
from seedlm.report import RunReport, inspect_checkpoint
from seedlm.search import Backend
from seedlm.selection import as_patterns, dense_linears, matrices_of, select, stack_of
from seedlm.source import Source, locate, open_source
from seedlm.tensorfile import INDEX_NAME, SINGLE_NAME, TORCH_DTYPES, Layout, TensorInfo, layout
from seedlm.units import Job, Unit, as_bytes, converted, pieces
from seedlm.version import __version__
from seedlm.workfolder import WorkFolder

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total), phases ``read`` in bytes and then ``compress`` in weights; the first call of a phase says where
it starts, which is not 0 when an earlier run is gone on with. One call at a time, but not always from the same thread."""

_SCAN_WEIGHTS: Final = 1 << 22
_SCAN_THREADS: Final = 16
"""Weights that a thread of the first part has in memory at a time; threads at most. SHA-256 lets each do 1 to 2 GB/s."""

_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_BITS: Final[Mapping[str, tuple[Any, Any, int]]] = {
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F32": (np.int32, np.uint32, 0x7F800000),
}
"""A dtype as integers, and infinity as one: the bits of magnitudes are in their order, those of NaN above infinity's."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class _Item:
    """One tensor of the source, or one matrix of a stack, and what becomes of it.

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
        """What tells it from all others."""
        return next(iter(self.stored))


@dataclass(frozen=True)
class _Scan:
    """What one pass over a tensor tells. `largest` magnitude is 0 for tensors that are only copied."""

    digest: str
    largest: float = 0.0


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str | float | Format | Mixture = "4",
    rounding: Rounding = "best",
    dtype: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    backend: Backend = "auto",
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> RunReport:
    """Compress a model into a new folder, or go on with a run that was stopped.

    source              local folder of safetensors, GGUF file or Hub repository (`source.open_source`)
    out                 folder to be created; ``OUT.partial`` beside it holds the unfinished run
    format              preset, specification or format object, or a mixture of formats
    rounding            how coefficients are chosen (`codec.Rounding`)
    dtype               of the floating-point tensors that are not compressed: ``"bfloat16"``, ``"float16"``, ``"float32"``;
                        None leaves every one as it is
    include, exclude    glob patterns over module names (`selection`)
    max_shard_size      bytes, or a text such as ``"5GB"``
    device              where seeds are searched (`device.choose_devices`): ``"auto"`` is every GPU, or the CPU if there is
                        none; ``"cuda:0,cuda:1"`` those two; ``"ray"`` a cluster (`engine_ray`). All find the same codes
    returns             sizes, bits and errors, read back from what was written, and how the run went
    Raises SourceError for a model that cannot be read, TensorError for NaN or Inf, OutputError if the output exists, belongs
    to another run or does not fit the disk, FormatError, BackendError, also for a worker that died.
    """
    clock = _Clock()
    out = Path(out).absolute()
    format = format if isinstance(format, Mixture) else parse_format(format)
    if rounding not in ROUNDINGS:
        raise FormatError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    if dtype is not None and dtype not in _DTYPES:
        raise FormatError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    devices = [] if engine_ray.is_ray(device) else choose_devices(device)
    candidates = list(format.formats) if isinstance(format, Mixture) else [format]
    for where, candidate in itertools.product(devices, candidates):
        if backend != "auto" and (reason := search.reason_unavailable(backend, where, candidate)):
            raise BackendError(reason)
    include, exclude = as_patterns(include), as_patterns(exclude)
    shard_bytes = parse_size(max_shard_size)
    progress = on_progress or (lambda phase, done, total: None)
    path = locate(source, revision=revision).absolute()
    model = open_source(path)
    widest = max(candidates, key=lambda candidate: candidate.bits_per_weight)
    modules, left = select(model.tensors, model.config, widest, include, exclude)
    matrices = {module: shape for module, (_, shape, _) in matrices_of(modules, model.tensors, model.config).items()}
    formats = format.assign(matrices) if isinstance(format, Mixture) else dict.fromkeys(matrices, widest)
    format = most_common(formats)
    overrides = {module: other for module, other in formats.items() if other != format}
    items = _items(model, formats, _DTYPES.get(dtype or ""))
    shards = _shards(items, shard_bytes)
    done: list[engine.Finished] = []

    with WorkFolder.claim(out) as work:
        fingerprint = json.dumps(model.fingerprint, sort_keys=True)
        job = Job(str(path), fingerprint, work.model, work.token, tuple(dict.fromkeys(formats.values())), rounding, backend)
        with engine.start(job, devices, model) if devices else engine_ray.start(job, device) as runner:
            clock.phase("read")
            scans = _scan(model, items, progress)
            plan = {
                "seedlm": __version__,
                "arguments": {
                    "format": format.spec,
                    "overrides": {module: other.spec for module, other in overrides.items()},
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
            published = work.begin(plan, layouts)
            if not published:
                clock.phase("compress")
                done = _run(work, runner, _units(shards, layouts, scans), progress)
        clock.phase("finish")
        if not published:
            config = {**model.config, "fusion_config": checkpoint.guarded(model.config.get("fusion_config"))}
            if dtype is not None:
                config["dtype"] = dtype
            dense = dense_linears(model.tensors, left)
            config["quantization_config"] = checkpoint.quantization_config(format, rounding, dense, overrides)
            _write_rest(work, model, shards, config)
            work.publish()
        work.remove()
    clock.phase("")
    host, held = peak_memory(devices[0] if devices else torch.device("cpu"))
    return RunReport(
        **vars(inspect_checkpoint(out)),
        devices=sorted({event.device for event in done}) or [str(where) for where in devices],
        phase_seconds=clock.seconds,
        peak_host_bytes=max([host, *(event.host_bytes for event in done)]),
        peak_device_bytes=max([held, *(event.device_bytes for event in done)]),
    )


def parse_size(size: int | str) -> int:
    """Bytes from a number or a text: ``"5GB"`` is 5 * 10^9, ``"5GiB"`` is 5 * 2^30. Raises OutputError."""
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match:
        step = 1024 if match[3] else 1000
        size = int(float(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if not isinstance(size, int) or size < 1:
        raise OutputError(f"a shard size must be a positive number of bytes or a text such as '5GB', got {size!r}")
    return size


class _Clock:
    """Seconds of the phases, the first of which is ``prepare``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "prepare", time.monotonic()

    def phase(self, name: str) -> None:
        """End the phase before, and start this one."""
        now = time.monotonic()
        self.seconds[self._name] = round(now - self._since, 3)
        self._name, self._since = name, now


def _items(source: Source, formats: Mapping[str, Format], dtype: str | None) -> list[_Item]:
    """What becomes of every tensor, in the source's order. SourceError if a name is taken by a part of a compressed weight.

    formats   module -> how its weight is to be stored, of every matrix to be compressed
    """
    items: list[_Item] = []
    taken: dict[str, str] = {}
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        experts = f"{module}.0" in formats and stack_of(name, source.tensors, source.config)
        if experts:
            found = [_packed(name, expert, PackedInfo(formats[expert], experts.matrix, experts)) for expert in experts.modules]
        elif module in formats and module != name:
            found = [_packed(name, module, PackedInfo(formats[module], (info.shape[0], info.shape[1])))]
        else:
            convert = dtype is not None and info.dtype in _DTYPES.values()
            found = [_Item(name, None, None, {name: TensorInfo(dtype, info.shape) if dtype and convert else info})]
        for stored in (stored for item in found for stored in item.stored):
            if taken.setdefault(stored, name) != name:
                raise SourceError(f"{name} and {taken[stored]} would both be stored as {stored}; --exclude one of them")
        items += found
    return items


def _packed(name: str, module: str, packed: PackedInfo) -> _Item:
    return _Item(name, module, packed, {stored_name(module, part): spec for part, spec in packed.stored.items()})


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
    total, done, stopped = sum(source.tensors[name].nbytes for name in {item.name for item in items}), 0, False
    lock = threading.Lock()
    progress("read", 0, total)

    def tell(count: int) -> None:
        nonlocal done
        with lock:
            if stopped:
                raise InterruptedError
            done += count
            progress("read", done, total)

    with ThreadPoolExecutor(min(_SCAN_THREADS, max(2, torch.get_num_threads()))) as pool:
        try:
            found = list(pool.map(lambda item: _scan_tensor(source, item, tell), items))
        except BaseException:
            stopped = True
            raise
    broken = [reason for _, reason in found if reason]
    if broken:
        others = f"; and {len(broken) - 1} more tensors like it" if len(broken) > 1 else ""
        raise TensorError(f"{broken[0]}{others}; --exclude keeps a tensor as it is")
    return {item.key: scan for item, (scan, _) in zip(items, found, strict=True)}


def _scan_tensor(source: Source, item: _Item, tell: Callable[[int], None]) -> tuple[_Scan, str | None]:
    """Read one tensor; returns also why it cannot be compressed. TensorError for a number too large for the dtype it gets."""
    digest, info = hashlib.sha256(), source.tensors[item.name]
    largest, nan, inf = 0, 0, 0
    if item.packed is None:
        for chunk in source.chunks(item.name):
            converted(chunk, info, item.stored[item.name], item.name)
            digest.update(chunk)
            tell(len(chunk))
        return _Scan(digest.hexdigest()), None
    signed, unsigned, infinity = _BITS[info.dtype]
    mask = np.iinfo(signed).max
    for piece in pieces(source, item.name, f"{item.module}", item.packed, _SCAN_WEIGHTS):
        data = as_bytes(piece)
        digest.update(data)
        bits = np.frombuffer(data, signed)
        # The largest positive number is the largest signed integer, the largest negative one the largest unsigned.
        largest = max(largest, int(bits.max()), int(bits.view(unsigned).max()) & mask)
        if largest >= infinity:
            inf += int((bits & mask == infinity).sum())
            nan += int((bits & mask > infinity).sum())
        tell(len(data))
    reason = f"{item.name}: a weight must be finite, got {nan} NaN and {inf} Inf values" if nan or inf else None
    value = torch.from_numpy(np.array([largest], signed)).view(TORCH_DTYPES[info.dtype])
    return _Scan(digest.hexdigest(), float(value)), reason


def _units(shards: Mapping[str, list[_Item]], layouts: Mapping[str, Layout], scans: Mapping[str, _Scan]) -> list[Unit]:
    """The work that the plan amounts to, in the order of the files."""
    units = []
    for file, shard in shards.items():
        for item in shard:
            bias = 0
            if item.packed is not None:
                bias = choose_exponent_bias(torch.tensor([scans[item.key].largest]), item.packed.format)
            offsets = {name: layouts[file].offsets[name] for name in item.stored}
            units.append(Unit(item.name, item.module, item.packed, bias, item.stored, file, offsets))
    return units


def _run(work: WorkFolder, runner: engine.Runner, units: list[Unit], progress: Progress) -> list[engine.Finished]:
    """Run every unit that the journal does not name, and note each as its bytes have reached the disk."""
    total = sum(unit.weights for unit in units)
    done = sum(unit.weights for unit in units if unit.key in work.done)
    finished = []
    progress("compress", done, total)
    for event in runner.run(unit for unit in units if unit.key not in work.done):
        if isinstance(event, engine.Finished):
            work.finish_tensor(event.unit.key, **event.facts)
            finished.append(event)
        else:
            done += event.weights
            progress("compress", done, total)
    return finished


def _write_rest(
    work: WorkFolder,
    source: Source,
    shards: Mapping[str, list[_Item]],
    config: dict[str, Any],
) -> None:
    """Everything but the tensors; config.json, without which nothing is a model, comes last."""
    items = [item for shard in shards.values() for item in shard]
    source.copy_side_files(work.model)
    if len(shards) > 1:
        size = sum(info.nbytes for item in items for info in item.stored.values())
        weight_map = {name: file for file, shard in shards.items() for item in shard for name in item.stored}
        work.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    facts = {item.module: work.done[item.key] for item in items if item.module}
    errors = {module: (found["squared_error"], found["squared_norm"]) for module, found in facts.items()}
    work.write_json(report.REPORT_NAME, report.recorded(source.nbytes, errors))
    work.write_json("config.json", config)
