"""One measurement of one model: its text, its models, its record of finished windows, and its results as one JSON object.

Everything that the numbers depend on is gathered first, from files alone, as the plan. The results are the plan, the metrics,
and what the run itself was like; what it saw item by item stands in the records beside them. A run that was stopped goes on
from its journal and comes to the same results to the last bit. OUT exists only when it is whole.
"""

import hashlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from seedlm.device import choose_device, peak_host_memory
from seedlm.errors import EvaluationError
from seedlm.evaluation import perplexity
from seedlm.evaluation.baselines import CALIBRATION_WINDOWS, apply_baseline
from seedlm.evaluation.journal import Journal
from seedlm.evaluation.layer_errors import compare_layers
from seedlm.evaluation.prompts import continue_prompts
from seedlm.evaluation.records import EVALUATION_VERSION, finite, pack_records, records_path, token_records
from seedlm.evaluation.settings import Settings, check_context, check_request
from seedlm.evaluation.text import Text
from seedlm.evaluation.zeroshot import check_tasks, zero_shot
from seedlm.integrations.transformers import models
from seedlm.modeling.quantize import backends_used, set_backend
from seedlm.progress import Progress
from seedlm.storage.source import locate
from seedlm.storage.written import replacing
from seedlm.version import __version__


def evaluate(
    model: str,
    text: Text,
    settings: Settings | None = None,
    *,
    reference: str | None = None,
    out: Path | None = None,
    tokens_out: Path | None = None,
    revision: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a text with a model, and with a reference if there is one.

    model, reference   what `source.locate` finds: a folder, packed or not, a GGUF file, a Hub repository
    out                JSON file to write the results to, with its records beside it (`records`: tokens, layers, prompts,
                       tasks); with it, a run that was stopped can go on
    tokens_out         .npz file to write the record of every prediction to: the fields of `perplexity.PAIR_RECORD`
                       [windows, context - 1], and token_ids [windows, context]
    revision           of the model on the Hub
    returns            the results, as `out` holds them
    Raises EvaluationError, SourceError, CheckpointError, BackendError or OutputError.
    """
    settings = settings or Settings()
    start = time.monotonic()
    check_request(text, settings, out, tokens_out)
    if settings.tasks:
        settings = replace(settings, tasks=check_tasks(settings.tasks, settings.task_data))
    device = choose_device(settings.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    inputs = _read_inputs(model, reference, revision, text, settings, device)
    dtype = perplexity.RECORD if reference is None else perplexity.PAIR_RECORD
    record, windows = np.dtype((dtype, settings.context - 1)), inputs.windows
    with Journal.claim(out, inputs.plan, record, len(windows), settings.batch_size) as journal:
        progress = on_progress or (lambda phase, done, total: None)
        progress("load", 0, 0)
        loaded, tokenizer = _load(inputs, settings, device, settings.prompts if out is not None else ())
        baseline = apply_baseline(loaded[0], settings.baseline, inputs.calibration, tokenizer) if settings.baseline else None
        run = {"baseline": baseline, **_score(journal, windows, loaded, settings, device, on_progress)}
        records = np.concatenate(journal.records)
        tasks = _answer(journal, loaded[0], tokenizer, settings, progress)
        companion = None
        if out is not None:
            progress("prompts", 0, 0)
            seen = {
                "tokens": token_records(windows.numpy(), records, tokenizer),
                "distributions": perplexity.distributions(records),
                **_record_behaviour(loaded, tokenizer, windows, settings),
                "tasks": {task: questions for task, (_, questions) in tasks.items()},
            }
            companion = _write_records(records_path(out), seen)
        run["seconds"] = round(time.monotonic() - start, 3)
        results: dict[str, Any] = finite(
            {
                **inputs.plan,
                "metrics": {name: asdict(estimate) for name, estimate in perplexity.summarize(records).items()},
                "tasks": {task: accuracy for task, (accuracy, _) in tasks.items()},
                "records": companion,
                "run": run,
            }
        )
        if tokens_out is not None:
            columns: dict[str, Any] = {field: records[field] for field in dtype.names or ()}
            with replacing(tokens_out) as file:
                np.savez_compressed(file, token_ids=windows.numpy().astype(np.int32), **columns)
        if out is not None:
            with replacing(out) as file:
                file.write(json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    journal.remove()
    return results


@dataclass(frozen=True)
class _Inputs:
    """What is known before a model is loaded.

    paths         of the model, and of the reference if there is one
    windows       int64 [windows, context], to be scored
    calibration   the same of the baseline's text
    plan          all that the numbers depend on, for the results and to hold a resumed run against
    """

    paths: list[Path]
    windows: Tensor
    calibration: Tensor | None
    plan: dict[str, Any]


def _read_inputs(
    model: str, reference: str | None, revision: str | None, text: Text, settings: Settings, device: torch.device
) -> _Inputs:
    """The inputs, from files alone."""
    names = [model] if reference is None else [model, reference]
    paths = [locate(model, revision=revision)] + ([locate(reference)] if reference is not None else [])
    windows, facts = _tokenize(text, paths, settings.context, settings.limit, settings.trust_remote_code)
    calibration, calibration_facts = None, None
    if settings.calibration is not None:
        content = Text.from_file(settings.calibration)
        calibration, calibration_facts = _tokenize(
            content, paths[:1], settings.context, CALIBRATION_WINDOWS, settings.trust_remote_code
        )
    infos = [asdict(models.describe(name, path)) for name, path in zip(names, paths, strict=True)]
    plan = {
        "evaluation_version": EVALUATION_VERSION,
        "model": infos[0],
        "reference": infos[1] if reference is not None else None,
        "settings": {**asdict(settings), "tasks": list(settings.tasks), "prompts": list(settings.prompts)},
        "text": facts,
        "calibration": calibration_facts,
        "protocol": _protocol(len(windows), settings.context),
        "seed": None,  # nothing is drawn
        "environment": _environment(device, ["lm_eval"] if settings.tasks else []),
    }
    return _Inputs(paths, windows, calibration, plan)


def _load(inputs: _Inputs, settings: Settings, device: torch.device, prompts: Sequence[str]) -> tuple[list[Any], Any]:
    """The models, and the tokenizer of the first.

    prompts   that will be continued
    Raises EvaluationError for one that does not know as many positions, SourceError for one that does not know all tokens,
    BackendError for a backend that cannot be had.
    """
    trust = settings.trust_remote_code
    loaded = [
        models.load_model(path, device=device, dtype=settings.dtype, packed=settings.packed, trust_remote_code=trust)
        for path in inputs.paths
    ]
    if settings.backend != "auto":
        set_backend(loaded[0], settings.backend)
    tokenizer = models.load_tokenizer(inputs.paths[0], trust_remote_code=trust)
    texts = [(inputs.plan["text"]["path"], inputs.windows)]
    if inputs.calibration is not None:
        texts.append((str(settings.calibration), inputs.calibration))
    texts += [(f"the prompt {prompt!r:.60}", tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for path, network in zip(inputs.paths, loaded, strict=True):
        check_context(models.longest_text(network), settings)
        for name, ids in texts:
            models.check_tokens(network, ids, name, path)
    return loaded, tokenizer


def _score(
    journal: Journal,
    windows: Tensor,
    loaded: list[Any],
    settings: Settings,
    device: torch.device,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Score the windows that the journal lacks: what that was like.

    "backends" tell how many packed layers multiply by which; None where nothing is packed, and torch multiplies.
    """
    model, reference = loaded[0], loaded[1] if len(loaded) > 1 else None
    dtypes = [str(network.dtype).removeprefix("torch.") for network in loaded]
    used = [backends_used(network) or None for network in loaded]
    done = resumed = sum(map(len, journal.records))
    speeds = []
    if on_progress:
        on_progress("evaluate", done * settings.context, windows.numel())
    batches = perplexity.score_windows(model, windows, reference=reference, batch_size=settings.batch_size, start=done)
    for records, seconds in batches:
        journal.add(records)
        speeds.append(len(records) * settings.context / seconds)
        done += len(records)
        if on_progress:
            on_progress("evaluate", done * settings.context, windows.numel())
    return {
        "dtype": dtypes[0],
        "reference_dtype": dtypes[1] if len(dtypes) > 1 else None,
        "backends": used[0],
        "reference_backends": used[1] if len(used) > 1 else None,
        "resumed_windows": resumed,
        "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "peak_memory_bytes": _peak_memory(device),
    }


def _answer(journal: Journal, model: Any, tokenizer: Any, settings: Settings, progress: Progress) -> dict[str, Any]:
    """The tasks that the journal lacks are done: task -> (accuracy, questions), as `zero_shot` yields them."""
    if missing := [task for task in settings.tasks if task not in journal.tasks]:
        progress("tasks", len(settings.tasks) - len(missing), len(settings.tasks))
        data, limit, batch_size = settings.task_data, settings.task_limit, settings.task_batch
        for task, *answers in zero_shot(model, tokenizer, missing, data=data, limit=limit, batch_size=batch_size):
            journal.add_task(task, answers)
            progress("tasks", len(journal.tasks), len(settings.tasks))
    return {task: journal.tasks[task] for task in settings.tasks}


def _write_records(path: Path, seen: dict[str, Any]) -> dict[str, str]:
    """Write what was seen item by item; the file's name and digest, for the results."""
    packed = pack_records(seen)
    with replacing(path) as file:
        file.write(packed)
    return {"file": path.name, "sha256": hashlib.sha256(packed).hexdigest()}


def _record_behaviour(loaded: list[Any], tokenizer: Any, windows: Tensor, settings: Settings) -> dict[str, Any]:
    """Continued prompts, and the layers' errors where there is a reference."""
    texts = [continue_prompts(network, tokenizer, settings.prompts, settings.new_tokens) for network in loaded]
    columns = (settings.prompts, texts[0], texts[1] if len(texts) > 1 else [None] * len(texts[0]))
    return {
        "prompts": [
            {"prompt": prompt, "text": text, "reference_text": other} for prompt, text, other in zip(*columns, strict=True)
        ],
        "layers": compare_layers(loaded[0], loaded[1], windows[: settings.layers])
        if len(loaded) > 1 and settings.layers
        else None,
    }


def _tokenize(text: Text, paths: list[Path], context: int, limit: int | None, trust: bool) -> tuple[Tensor, dict[str, Any]]:
    """The windows int64 [windows, context] of a text, and what there is to say of it."""
    tokenizer = models.load_tokenizer(paths[0], trust_remote_code=trust)
    ids = tokenizer(text.content)["input_ids"]
    for other in paths[1:]:
        theirs = models.load_tokenizer(other, trust_remote_code=trust)(text.content)["input_ids"]
        if theirs != ids:
            raise EvaluationError(f"{other} and {paths[0]} turn the text into different tokens: they have no common vocabulary")
    windows = perplexity.cut_windows(torch.tensor(ids, dtype=torch.int64), context, limit)
    return windows, {
        "path": text.path,
        "form": text.form,
        "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
        "tokens": len(ids),
        "starts_with_bos": bool(ids and ids[0] == tokenizer.bos_token_id),
        "windows": len(windows),
        "predictions": windows.numel() - len(windows),
    }


def _protocol(windows: int, context: int) -> str:
    return (
        f"The text is tokenised once, with the special tokens that the tokenizer adds by itself, and its first {windows} whole "
        f"windows of {context} tokens are scored, each alone: {context - 1} predictions, the first token being context only. "
        "Perplexity is exp of the mean negative log likelihood over all predictions (as GPTQ and OmniQuant compute it). "
        "Log-probabilities are float32, from logits in the model's dtype; KL is KL(reference || model) in nats. "
        "Standard errors are over windows, taken as independent."
    )


def _environment(device: torch.device, extras: list[str]) -> dict[str, Any]:
    """What else the last bits of the results depend on."""
    cuda = device.type == "cuda"
    return {
        "seedlm": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{name: version(name) for name in extras if find_spec(name)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _commit() -> str | None:
    """The commit of a source checkout that this package runs from, with "-dirty" if it was changed; else None."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # a virtual environment may lie inside another project
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def _peak_memory(device: torch.device) -> int | None:
    """Bytes: what torch had allocated on a CUDA device, models and reference together; on a CPU the process's largest size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return (peak_host_memory() or None) if device.type == "cpu" else None
