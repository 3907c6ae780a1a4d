"""A model in, a packed checkpoint out, tensor by tensor.

What becomes of each tensor is decided first (`plan`). Where errors are fed back, the model is run once over a text for the
statistics of its layers (`statistics`). Then every tensor is read (`scan`) and, behind that, encoded or copied to its place
(`worker`) by whatever there is to do it (`workers`), and noted in a journal with its SHA-256 (`workfolder`). The small files
follow, and the folder takes its name. Killed at any moment, the same call goes on where it was and ends in the same bytes,
those of a run over the source as it is now: a tensor that is finished and has changed since is refused.
"""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seedlm.codes.base import EncodeOptions, Format
from seedlm.codes.registry import family_of
from seedlm.compress import plan as plans
from seedlm.compress import workers, workers_ray
from seedlm.compress.allocate import Mixture, most_common
from seedlm.compress.card import CARD_NAME, card
from seedlm.compress.feedback import Feedback
from seedlm.compress.items import Destination, Item
from seedlm.compress.plan import Plan, Selected
from seedlm.compress.request import Request, is_ray
from seedlm.compress.scan import Scan, scan
from seedlm.compress.statistics import gather
from seedlm.compress.worker import Job, Unit
from seedlm.compress.workfolder import WorkFolder
from seedlm.device import choose_devices, peak_memory
from seedlm.errors import BackendError, TensorError
from seedlm.progress import Progress, shown
from seedlm.storage import checkpoint
from seedlm.storage import inspect as report
from seedlm.storage.inspect import RunReport, inspect_checkpoint
from seedlm.storage.metadata import written_version
from seedlm.storage.safetensors import INDEX_NAME
from seedlm.storage.selection import Wish
from seedlm.storage.source import Source, locate, open_source


def compress_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    format: str | float | Format | Mixture = "4",
    feedback: "str | Path | Feedback" = "auto",
    dtype: str | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    embeddings: str | float | Format | None = None,
    head: str | float | Format | None = None,
    max_shard_size: int | str = "5GB",
    device: str = "auto",
    backend: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
    **settings: Any,
) -> RunReport:
    """Compress a model into a new folder, or go on with a run that was stopped.

    source              local folder of safetensors, GGUF file or Hub repository (`source.open_source`)
    out                 folder to be created; ``OUT.partial`` beside it holds the unfinished run
    format              preset, specification or format object, or a mixture of formats
    feedback            what errors are weighed by (`feedback.Feedback`): ``"own"``, a text that the model writes itself;
                        ``"none"``, the weights alone; a file of statistics; a text, which calibrates on data. ``"auto"`` is own
                        where the format's family asks for it and the model can be run
    dtype               of the floating-point tensors that are not compressed: ``"bfloat16"``, ``"float16"``, ``"float32"``;
                        None leaves every one as it is
    include, exclude    glob patterns over module names (`selection`)
    embeddings, head    formats of the input embeddings and the output head, or ``"dense"``, which leaves them as they are; one
                        serves both if they are tied. None is the default of the format's family: 6 bits (``"6-fast"``) beside
                        layers of the trellis code in up to 6 bits; dense beside more, beside the block code, and where no code
                        can take their place. In a size they count as they are stored; one that holds layers of 6 bits
                        beside dense ones leaves them dense
    max_shard_size      bytes, or a text such as ``"5GB"``
    device              where codes are searched (`device.choose_devices`): ``"auto"`` is every GPU, or the CPU if there is
                        none; ``"cuda:0,cuda:1"`` those two; ``"ray"`` a cluster (`workers_ray`). All find the same codes
    trust_remote_code   run code that comes with the model, to know its layers and for statistics
    on_progress         told how far it is (`progress.Progress`); None shows bars in a terminal or a notebook
    on_note             told, before the search, what a user should know of the plan, a line each time
    settings            of the format's family: ``rounding="nearest"`` is the paper's for the block code
    returns             sizes, bits and errors, read back from what was written, and how the run went
    Raises SourceError for a model that cannot be read, TensorError for NaN or Inf, OutputError if the output exists, belongs
    to another run or does not fit the disk, FormatError, BackendError, also for a worker that died, EvaluationError for a model
    that cannot be run for its statistics.
    """
    clock = _Clock()
    asked = Request.of(
        out,
        format=format,
        feedback=feedback,
        dtype=dtype,
        include=include,
        exclude=exclude,
        embeddings=embeddings,
        head=head,
        max_shard_size=max_shard_size,
        device=device,
        backend=backend,
        **settings,
    )
    out, candidates, wanted, tables, shard_bytes = asked.out, asked.candidates, asked.feedback, asked.tables, asked.shard_bytes
    devices = [] if is_ray(device) else choose_devices(device)
    _check_encoding([*candidates, *tables.formats], devices, backend)
    tell = on_note or (lambda note: None)
    _tell_slow(candidates, devices, backend, tell)
    path = locate(source, revision=revision).absolute()
    model = open_source(path)
    asked.check_source(model)
    code = path if trust_remote_code else None
    selected = plans.choose(model, candidates, asked.include, asked.exclude, tables, code)

    def size_with(chosen: Selected, formats: Mapping[str, Format]) -> int:
        return plans.make(model, chosen, formats, dtype=dtype, shard_bytes=shard_bytes, arguments={}).nbytes

    wished = asked.format
    if isinstance(wished, Mixture) and wished.size and tables.default and selected.modules:
        coded, said = selected, Wish(tables.said)
        left = plans.choose(model, candidates, asked.include, asked.exclude, said, found=coded.survey)
        selected, wished = plans.by_size(wished, tables.default, coded, left, size_with)
    size_of = partial(size_with, selected)
    for note in selected.notes:
        tell(note)
    if isinstance(wished, Mixture) and selected.modules:
        plans.check_reach(wished, selected, size_of)
    with WorkFolder.claim(out) as work, shown(on_progress) as progress:
        if wanted.kind != "none" and any(family_of(each).feedback for each in candidates):
            clock.phase("observe")
        observed = gather(work, wanted, candidates, model, path, selected.layers, devices, progress, tell, trust_remote_code)
        clock.phase("prepare")
        if isinstance(wished, Mixture) and not wished.sensitivity:
            wished = observed.mixture(wished, selected.modules, model, selected.survey)
        formats = plans.assign(wished, selected, size_of)
        leading = most_common(formats) if formats else candidates[0]  # whose options a reader takes the record for
        options = {**family_of(leading).defaults, **settings, **observed.record}
        table_formats = {"embeddings" if info.embedding else "head": info.format.spec for info in selected.tables.values()}
        patterns = {"include": sorted(asked.include), "exclude": sorted(asked.exclude)}
        arguments = {**options, **table_formats, "statistics": observed.identity, **patterns}
        plan = plans.make(model, selected, formats, dtype=dtype, shard_bytes=shard_bytes, arguments=arguments)
        fingerprint = json.dumps(model.fingerprint, sort_keys=True)
        used = tuple(dict.fromkeys(plan.formats.values()))
        job = Job(str(path), fingerprint, work.model, work.token, used, EncodeOptions(backend, settings), observed.file)
        started = workers.start(job, devices, model) if devices else workers_ray.start(job, device)
        done = _compress(work, started, plan, model, clock, progress)
        if done is not None:
            clock.phase("finish")
            _finish(work, plan, model, dtype, selected, options)
            work.write_text(CARD_NAME, card(inspect_checkpoint(work.model), model, path, options))
            work.publish()
        work.remove()
    clock.phase("")
    return _report(out, devices, done or [], clock)


def _check_encoding(formats: Iterable[Format], devices: Iterable[torch.device], backend: str) -> None:
    """BackendError for a search that cannot run on a device."""
    for where, format in itertools.product(devices, formats):
        if backend != "auto" and (reason := family_of(format).reason_no_encoder(backend, where, format)):
            raise BackendError(reason)


def _tell_slow(formats: Iterable[Format], devices: Iterable[torch.device], backend: str, tell: Callable[[str], None]) -> None:
    """A line for every reason why the search will take many times as long as it could."""
    pairs = itertools.product(devices, formats) if backend == "auto" else ()
    for reason in dict.fromkeys(family_of(format).reason_slow(where, format) for where, format in pairs):
        if reason is not None:
            tell(f"the search will take many times as long as it could: {reason}")


def _report(out: Path, devices: list[torch.device], done: list[workers.Finished], clock: "_Clock") -> RunReport:
    """What is in the output, and how the run went."""
    host, held = peak_memory(devices[0] if devices else torch.device("cpu"))
    return RunReport(
        **vars(inspect_checkpoint(out)),
        devices=sorted({event.device for event in done}) or [str(where) for where in devices],
        phase_seconds=clock.seconds,
        peak_host_bytes=max([host, *(event.host_bytes for event in done)]),
        peak_device_bytes=max([held, *(event.device_bytes for event in done)]),
    )


def _compress(
    work: WorkFolder,
    started: AbstractContextManager[workers.Runner],
    plan: Plan,
    model: Source,
    clock: "_Clock",
    progress: Progress,
) -> list[workers.Finished] | None:
    """Everything up to the last tensor; None if an earlier run had published the output already."""
    try:
        with started as runner:
            if work.begin(plan.to_dict(), plan.layouts, plan.headings()):
                return None
            work.stage(model.copy_side_files)
            clock.phase("compress")
            readers = torch.get_num_threads() // 2  # the other half feeds the search
            return _run(work, runner, model, plan.destinations(), readers, progress)
    except TensorError:
        if not work.resumed:  # these arguments cannot come to an end
            work.remove()
        raise


def _say_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A configuration that names another dtype wherever it names one: parts of a model have configurations of their own."""
    said: dict[str, Any] = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(config.get(key), str)}
    return {key: said.get(key, _say_dtype(item, dtype) if isinstance(item, dict) else item) for key, item in config.items()}


def _finish(
    work: WorkFolder, plan: Plan, model: Source, dtype: str | None, selected: Selected, record: Mapping[str, Any]
) -> None:
    """What follows the last tensor: digests in the headers, small files, config.json."""
    config = {**model.config, "fusion_config": checkpoint.guarded(model.config.get("fusion_config"))}
    if dtype is not None:
        config = {**_say_dtype(config, dtype), "dtype": dtype}
    version = written_version(item.target.packed for item in plan.items if item.target)
    config["quantization_config"] = checkpoint.quantization_config(plan.format, record, selected.dense, plan.overrides, version)
    digests = {name: known for item in plan.items for name, known in work.done[item.key]["sha256"].items()}
    work.finish({name: plans.file_layout(shard, digests) for name, shard in plan.shards.items()})
    _write_rest(work, model.nbytes, plan.shards, config)


class _Clock:
    """Seconds of the phases, the first of which is ``prepare``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "prepare", time.monotonic()

    def phase(self, name: str) -> None:
        """End the phase before, and start this one."""
        now = time.monotonic()
        self.seconds[self._name] = round(self.seconds.get(self._name, 0.0) + now - self._since, 3)
        self._name, self._since = name, now


def _run(
    work: WorkFolder,
    runner: workers.Runner,
    source: Source,
    places: Mapping[Item, Destination],
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
    source_bytes: int,
    shards: Mapping[str, list[Item]],
    config: dict[str, Any],
) -> None:
    """Everything but the tensors; config.json, without which nothing is a model, comes last."""
    items = [item for shard in shards.values() for item in shard]
    if len(shards) > 1:
        size = sum(info.nbytes for item in items for info in item.stored.values())
        weight_map = {name: file for file, shard in shards.items() for item in shard for name in item.stored}
        work.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    facts = {item.target.module: work.done[item.key] for item in items if item.target}
    errors = {module: (found["squared_error"], found["squared_norm"]) for module, found in facts.items()}
    work.write_json(report.REPORT_NAME, report.recorded(source_bytes, errors))
    work.write_json("config.json", config)
