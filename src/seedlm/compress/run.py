"""A model in, a packed checkpoint out, tensor by tensor.

The arguments and the source's headers make the plan: what becomes of each tensor, and its place in the output. Then every
tensor is read (`scan`) and, behind that, encoded or copied to its place (`units`) by whatever there is to do it (`engine`), and
noted in a journal with its SHA-256 (`workfolder`). The small files follow, and the folder takes its name. Killed at any moment,
the same call goes on where it was and ends in the same bytes, those of a run over the source as it is now: a tensor that is
finished and has changed since is refused.
"""

import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import torch

from seedlm.codes.base import EncodeOptions, Format
from seedlm.codes.registry import check_settings, family_of, parse_format
from seedlm.compress import workers, workers_ray
from seedlm.compress.allocate import Mixture, most_common
from seedlm.compress.scan import Scan, scan
from seedlm.compress.worker import Item, Job, Place, Unit
from seedlm.compress.workfolder import WorkFolder
from seedlm.device import choose_devices, peak_memory
from seedlm.errors import BackendError, FormatError, OutputError, SourceError, TensorError
from seedlm.modeling.blueprint import survey
from seedlm.storage import checkpoint
from seedlm.storage import inspect as report
from seedlm.storage.checkpoint import PackedInfo, stored_name
from seedlm.storage.inspect import RunReport, inspect_checkpoint
from seedlm.storage.metadata import UNKNOWN_DIGEST
from seedlm.storage.safetensors import INDEX_NAME, SINGLE_NAME, Layout, TensorInfo, layout
from seedlm.storage.selection import (
    Survey,
    as_patterns,
    dense_linears,
    groups_of,
    largest_left,
    matrices_of,
    select,
    stack_of,
)
from seedlm.storage.source import Source, locate, open_source
from seedlm.version import __version__

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total) of the phases ``read``, in bytes, and ``compress``, in weights, side by side. A phase's first call
says where it starts, which is not 0 when an earlier run is gone on with. From several threads, one call at a time."""

_DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str | float | Format | Mixture = "4",
    dtype: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    backend: str = "auto",
    revision: str | None = None,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    **settings: Any,
) -> RunReport:
    """Compress a model into a new folder, or go on with a run that was stopped.

    source              local folder of safetensors, GGUF file or Hub repository (`source.open_source`)
    out                 folder to be created; ``OUT.partial`` beside it holds the unfinished run
    format              preset, specification or format object, or a mixture of formats
    dtype               of the floating-point tensors that are not compressed: ``"bfloat16"``, ``"float16"``, ``"float32"``;
                        None leaves every one as it is
    include, exclude    glob patterns over module names (`selection`)
    max_shard_size      bytes, or a text such as ``"5GB"``
    device              where seeds are searched (`device.choose_devices`): ``"auto"`` is every GPU, or the CPU if there is
                        none; ``"cuda:0,cuda:1"`` those two; ``"ray"`` a cluster (`engine_ray`). All find the same codes
    on_note             told, before the search, what a user should know of the plan, a line each time
    settings            of the format's family: ``rounding="nearest"`` is the paper's for the block code
    returns             sizes, bits and errors, read back from what was written, and how the run went
    Raises SourceError for a model that cannot be read, TensorError for NaN or Inf, OutputError if the output exists, belongs
    to another run or does not fit the disk, FormatError, BackendError, also for a worker that died.
    """
    clock = _Clock()
    out = Path(out).absolute()
    format = format if isinstance(format, Mixture) else parse_format(format)
    if dtype is not None and dtype not in _DTYPES:
        raise FormatError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    devices = [] if workers_ray.is_ray(device) else choose_devices(device)
    candidates = list(format.formats) if isinstance(format, Mixture) else [format]
    check_settings(candidates, settings)
    for where, candidate in itertools.product(devices, candidates):
        if backend != "auto" and (reason := family_of(candidate).reason_no_encoder(backend, where, candidate)):
            raise BackendError(reason)
    include, exclude = as_patterns(include), as_patterns(exclude)
    shard_bytes = parse_size(max_shard_size)
    progress = on_progress or (lambda phase, done, total: None)
    tell = on_note or (lambda note: None)
    path = locate(source, revision=revision).absolute()
    model = open_source(path)
    widest = max(candidates, key=lambda candidate: candidate.bits_per_weight)
    found = survey(model.config, model.tensors)
    modules, left = select(model.tensors, model.config, widest, include, exclude, found)
    for note in (*model.notes, *found.notes, *largest_left(model.tensors, left)):
        tell(note)
    matrices = {module: shape for module, (_, shape, _) in matrices_of(modules, model.tensors, model.config, found).items()}
    if isinstance(format, Mixture):
        formats = format.assign(matrices, groups_of(matrices) if any(family_of(each).fused for each in candidates) else ())
    else:
        formats = dict.fromkeys(matrices, widest)
    format = most_common(formats)
    overrides = {module: other for module, other in formats.items() if other != format}
    recorded = {**family_of(format).defaults, **settings}
    items = _items(model, formats, _DTYPES.get(dtype or ""), found)
    shards = _shards(items, shard_bytes)
    layouts = {name: _layout(shard) for name, shard in shards.items()}
    plan = {
        "seedlm": __version__,
        "arguments": {
            "format": format.spec,
            "overrides": {module: other.spec for module, other in overrides.items()},
            **recorded,
            "dtype": dtype,
            "include": sorted(include),
            "exclude": sorted(exclude),
            "max_shard_size": shard_bytes,
        },
        "source": model.fingerprint,
    }
    done: list[workers.Finished] = []
    readers = torch.get_num_threads() // 2  # the other half feeds the search

    with WorkFolder.claim(out) as work:
        fingerprint = json.dumps(model.fingerprint, sort_keys=True)
        job = Job(
            str(path),
            fingerprint,
            work.model,
            work.token,
            tuple(dict.fromkeys(formats.values())),
            EncodeOptions(backend, settings),
        )
        try:
            with workers.start(job, devices, model) if devices else workers_ray.start(job, device) as runner:
                headings = {name: line for item in items for name, line in item.headings.items()}
                published = work.begin(plan, layouts, headings)
                if not published:
                    clock.phase("compress")
                    done = _run(work, runner, model, _places(shards, layouts), readers, progress)
        except TensorError:
            if not work.resumed:  # these arguments cannot come to an end
                work.remove()
            raise
        if not published:
            clock.phase("finish")
            config = {**model.config, "fusion_config": checkpoint.guarded(model.config.get("fusion_config"))}
            if dtype is not None:
                config["dtype"] = dtype
            dense = dense_linears(model.tensors, left, found)
            config["quantization_config"] = checkpoint.quantization_config(format, recorded, dense, overrides)
            digests = {name: known for item in items for name, known in work.done[item.key]["sha256"].items()}
            work.finish({name: _layout(shard, digests) for name, shard in shards.items()})
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


def _items(source: Source, formats: Mapping[str, Format], dtype: str | None, survey: Survey) -> list[Item]:
    """What becomes of every tensor, in the source's order. SourceError if a name is taken by a part of a compressed weight.

    formats   module -> how its weight is to be stored, of every matrix to be compressed
    """
    items: list[Item] = []
    taken: dict[str, str] = {}
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        experts = f"{module}.0" in formats and stack_of(name, source.tensors, source.config, survey)
        if experts:
            found = [_packed(name, expert, PackedInfo(formats[expert], experts.matrix, experts)) for expert in experts.modules]
        elif module in formats and module != name:
            found = [_packed(name, module, PackedInfo(formats[module], (info.shape[0], info.shape[1])))]
        else:
            convert = dtype is not None and info.dtype in _DTYPES.values()
            found = [Item(name, None, None, {name: TensorInfo(dtype, info.shape) if dtype and convert else info})]
        for stored in (stored for item in found for stored in item.stored):
            if taken.setdefault(stored, name) != name:
                raise SourceError(f"{name} and {taken[stored]} would both be stored as {stored}; --exclude one of them")
        items += found
    return items


def _packed(name: str, module: str, packed: PackedInfo) -> Item:
    return Item(name, module, packed, {stored_name(module, part): spec for part, spec in packed.stored.items()})


def _shards(items: list[Item], max_bytes: int) -> dict[str, list[Item]]:
    """Deal the tensors out to files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    groups: list[list[Item]] = [[]]
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


def _layout(items: list[Item], digests: Mapping[str, str] | None = None) -> Layout:
    """A file that holds these; the same with zeros for digests that are not known yet."""
    stored = {name: info for item in items for name, info in item.stored.items()}
    packed = {item.module: item.packed for item in items if item.module and item.packed}
    return layout(stored, checkpoint.metadata(packed, {name: (digests or {}).get(name, UNKNOWN_DIGEST) for name in stored}))


def _places(shards: Mapping[str, list[Item]], layouts: Mapping[str, Layout]) -> dict[Item, Place]:
    """Where each item goes, in the order of the work: that of the files, one format after the other."""
    places = {
        item: Place(file, {name: layouts[file].offsets[name] for name in item.stored})
        for file, shard in shards.items()
        for item in shard
    }
    return dict(sorted(places.items(), key=lambda pair: pair[0].packed.format.spec if pair[0].packed else ""))


def _run(
    work: WorkFolder,
    runner: workers.Runner,
    source: Source,
    places: Mapping[Item, Place],
    readers: int,
    progress: Progress,
) -> list[workers.Finished]:
    """Read everything, and run every unit that the journal does not name; each is noted as its bytes have reached the disk."""
    lock = threading.Lock()

    def counter(phase: str, done: int, total: int) -> Callable[[int], None]:
        def add(count: int) -> None:
            nonlocal done
            with lock:
                done += count
                progress(phase, done, total)

        add(0)
        return add

    def units(scanned: Iterable[tuple[Item, Scan]]) -> Iterator[Unit]:
        for item, found in scanned:
            digests[item.key] = found.digest
            if item.key in work.done:
                work.expect(item.key, content=found.digest)
                continue
            yield Unit(item, places[item], found.largest)

    finished: list[workers.Finished] = []
    digests: dict[str, str] = {}
    read = counter("read", 0, sum(source.tensors[name].nbytes for name in {item.name for item in places}))
    done = sum(item.weights for item in places if item.key in work.done)
    compressed = counter("compress", done, sum(item.weights for item in places))
    with closing(scan(source, places, read, readers)) as scanned:
        for event in runner.run(units(scanned)):
            if isinstance(event, workers.Finished):
                key = event.unit.item.key
                work.finish_tensor(key, content=digests[key], **event.facts)
                finished.append(event)
            else:
                compressed(event.weights)
    return finished


def _write_rest(
    work: WorkFolder,
    source: Source,
    shards: Mapping[str, list[Item]],
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
