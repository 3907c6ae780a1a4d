r"""Tasks without examples, asked and scored by lm-evaluation-harness, from the Hub or from local files.

What a task asks for stands in its definition (``output_type``), which is read before anything runs: a choice among answers, the
likelihood of one answer or of a text, or a text to be generated. Groups and tags of tasks stand for the tasks in them.

The harness' own task definitions stay in charge: prompts, targets, metrics and versions are theirs. Local files only take the
place of the data set; `_READERS` turns their rows into the fields that the task's definition reads. They are:

    arc/arc_easy.jsonl, arc/arc_challenge.jsonl   {"query": "Question: ...", "choices": [...], "gold": 0}
    boolq/boolq.jsonl                             {"query": "Passage: ...\nQuestion: ...?", "choices": ["no", "yes"], "gold": 0}
    winogrande/winogrande.jsonl                   {"context_options": [2 texts], "continuation": "...", "gold": 0}
    hellaswag/hellaswag_val_full.txt.bz2          six lines a row: the context, the number of the right ending, four endings
"""

import bz2
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from seedlm.errors import EvaluationError, extra
from seedlm.evaluation.settings import TASKS
from seedlm.integrations.transformers.models import check_tokens
from seedlm.storage.untrusted import MAX_TEXT_BYTES, read_bytes, read_text

Row = dict[str, Any]

_OUTPUTS: Final = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
_NOT_METRICS: Final = frozenset({"alias", "sample_len", "name", "sample_count"})
_MAX_RATIO, _FREE_BYTES = 16, 1 << 16
"""Packed questions are unpacked to at most 16 times their size: HellaSwag's shrink to a quarter."""
_TEXTS, _QUESTION, _CHOICE = 500, 600, 200
"""Questions of a task whose texts are recorded, and the characters of a question and of a choice: half a megabyte a task."""


def zero_shot(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    *,
    data: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Iterator[tuple[str, dict[str, Any], list[Row]]]:
    """Ask a model the questions of some tasks.

    model, tokenizer   as transformers makes them; the model in evaluation mode, on its device
    data               folder of the local files above; None lets the harness fetch its data sets from the Hub
    limit              only the first questions of each task
    yields             a task; its version, questions, and acc and, where the task has it, acc_norm (accuracy by log likelihood
                       per character of the answer), each as mean and standard_error; and every question with what was
                       chosen, by acc_norm where the task has it. Tasks without choices have `metrics` besides: all that the
                       harness measures, by its names; and no questions
    Raises EvaluationError without lm-evaluation-harness, for a task it does not know, and for files not as above.
    """
    found = check_tasks(tasks, data)
    return (_ask(model, tokenizer, task, data, limit, batch_size) for task in found)


def _ask(
    model: Any, tokenizer: Any, task: str, data: str | Path | None, limit: int | None, batch_size: int
) -> tuple[str, dict[str, Any], list[Row]]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    manager = _manager()
    # The harness' bars and remarks are for a terminal only.
    with TemporaryDirectory() as folder, nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):
        stock = str(manager.task_index[task].yaml_path)
        wanted = task if data is None else _write_local(task, stock, read_local(task, data), Path(folder))
        try:
            loaded = manager.load([wanted])
            for definition in loaded["tasks"].values():
                definition.set_config(key="num_fewshot", value=0)
            harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            # Its own way forms the logits of every token of the questions, and waits for the device three times an answer.
            harness._loglikelihood_tokens = lambda requests, **_: score_answers(
                model, [(context, answer) for _, context, answer in requests], batch_size, harness.max_length
            )
            # Not simple_evaluate: for its report it asks pip and the driver for versions, seconds a call.
            results = lm_eval.evaluate(lm=harness, task_dict=loaded, limit=limit)
        except OSError as reason:  # a data set that cannot be fetched
            raise EvaluationError(f"{task} cannot be run ({' '.join(str(reason).split())[:300]})") from reason
    choices = loaded["tasks"][task].config.output_type == "multiple_choice"
    return task, _read_result(task, results, choices), _read_samples(results["samples"][task]) if choices else []


@torch.inference_mode()
def score_answers(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], batch_size: int, longest: int
) -> list[tuple[float, bool]]:
    """Log likelihoods of answers, and whether each is what the model finds most likely, token by token.

    model     causal language model, in evaluation mode
    pairs     tokens of each context and of its answer, neither empty
    longest   tokens that the model can take: earlier ones are cut off
    Raises SourceError for tokens that the model does not know.
    """
    check_tokens(model, [token for context, answer in pairs for token in context + answer], "the task's questions", "the model")
    answers: dict[tuple[int, ...], list[int]] = {}  # inputs -> the pairs that they serve: yes and no after one question
    for number, (context, answer) in enumerate(pairs):
        answers.setdefault(tuple((context + answer)[-longest - 1 : -1]), []).append(number)
    inputs = sorted(answers, key=len, reverse=True)
    partial = "logits_to_keep" in inspect.signature(model.forward).parameters
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        width = len(batch[0])
        asked = [(row, number, pairs[number][1]) for row, ids in enumerate(batch) for number in answers[ids]]
        # Token n of an answer is predicted at the place before its own. Padding comes after all that counts.
        places = [len(batch[row]) - len(answer) + n for row, _, answer in asked for n in range(len(answer))]
        rows = [row for row, _, answer in asked for _ in answer]
        targets = torch.tensor([token for _, _, answer in asked for token in answer], device=model.device)
        padded = torch.tensor([ids + (0,) * (width - len(ids)) for ids in batch], device=model.device)
        keep = width - min(places) if partial else width
        logits = model(input_ids=padded, use_cache=False, **({"logits_to_keep": keep} if partial else {})).logits
        chosen = logits[rows, [place - width + keep for place in places]].float().log_softmax(-1)
        scores = chosen.gather(1, targets[:, None])[:, 0].double()
        likely = chosen.argmax(-1) == targets
        for (_, number, _), score, greedy in zip(
            asked,
            *([part.split([len(answer) for _, _, answer in asked]) for part in (scores.cpu(), likely.cpu())]),
            strict=True,
        ):
            found[number] = float(score.sum()), bool(greedy.all())
    return found


@cache
def _manager() -> Any:
    """The harness' index of its tasks: 14 thousand files are read for it, which takes 10 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_tasks(tasks: Sequence[str], data: str | Path | None) -> tuple[str, ...]:
    """The tasks that names stand for, groups and tags opened, each once.

    Raises EvaluationError for what `zero_shot` would refuse, before anything large is loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(f"zero-shot tasks need lm-evaluation-harness: {extra('eval')}")
    if data is None:
        found = dict.fromkeys(leaf for task in tasks for leaf in _leaves(task, ()))
        for task in found:
            _check_output(task)
        return tuple(found)
    for task in tasks:
        if task not in _READERS:
            raise EvaluationError(f"unknown task {task!r}: local files are read for {', '.join(_READERS)}")
        read_local(task, data)
    return tuple(dict.fromkeys(tasks))


def _leaves(name: Any, within: tuple[str, ...]) -> Iterator[str]:
    """The tasks that a name stands for, or an entry of a group's definition.

    within   the groups around it
    """
    if isinstance(name, dict) and "group" in name and set(name) <= {"group", "group_alias", "task", "aggregate_metric_list"}:
        for member in name["task"]:
            yield from _leaves(member, within)
        return
    entry = _manager().task_index.get(name) if isinstance(name, str) else None
    if isinstance(name, dict) or (entry is None and within):
        raise EvaluationError(f"the group {within[0]!r} changes the tasks in it, which is not done here: name its tasks")
    if entry is None:
        raise EvaluationError(f"unknown task {name!r}: `lm_eval ls tasks` lists those known")
    if name in within:
        raise EvaluationError(f"the group {name!r} holds itself")
    if entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member, (*within, name))
    elif entry.kind.name == "GROUP":
        members = entry.cfg["task"]
        for member in [members] if isinstance(members, str) else members:
            yield from _leaves(member, (*within, name))
    else:
        yield name


def _check_output(task: str) -> None:
    """Raise EvaluationError for a task whose kind of answers is not known here."""
    entry = _manager().task_index[task]
    kind = (entry.cfg or {}).get("output_type", "generate_until")  # the harness' default
    if entry.kind.name != "TASK" or kind not in _OUTPUTS:
        what = "is defined by code of its own" if entry.kind.name != "TASK" else f"asks for {kind!r}"
        raise EvaluationError(f"task {task!r} {what}; tasks that are run here ask for {', '.join(_OUTPUTS)}")


def read_local(task: str, data: str | Path) -> list[Row]:
    """A task's rows from local files, in the fields of the harness' definition. Raises EvaluationError if they do not fit."""
    name, reader = _READERS[task]
    path = Path(data) / name
    try:
        rows = reader(_unpack(path) if path.suffix == ".bz2" else read_text(path, EvaluationError))
    except EvaluationError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as reason:
        raise EvaluationError(f"{path}: is not as {task} needs it ({type(reason).__name__}: {reason})") from None
    if not rows:
        raise EvaluationError(f"{path}: holds no questions")
    return rows


def _unpack(path: Path) -> str:
    """A text packed by bzip2. Raises EvaluationError for one that would become far larger than questions do."""
    data = read_bytes(path, MAX_TEXT_BYTES, EvaluationError, "questions")
    limit, unpacking = _MAX_RATIO * len(data) + _FREE_BYTES, bz2.BZ2Decompressor()
    try:
        text = unpacking.decompress(data, limit + 1)
    except OSError as reason:
        raise EvaluationError(f"{path}: cannot be read ({reason})") from None
    if len(text) > limit:
        raise EvaluationError(f"{path}: would become more than {_MAX_RATIO} times its size, which no questions do")
    if not unpacking.eof or unpacking.unused_data:
        raise EvaluationError(f"{path}: is damaged ({'ends early' if not unpacking.eof else 'goes on after its end'})")
    return text.decode()


def _write_local(task: str, stock: str, rows: list[Row], folder: Path) -> str:
    """Write the harness' definition of a task, `stock`, over these rows into a folder; the path of its YAML, which JSON is."""
    data, definition = folder / f"{task}.jsonl", folder / f"{task}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = {
        "include": stock,
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    if task == "hellaswag":
        config["process_docs"] = None  # the file's texts are cleaned already
    definition.write_text(json.dumps(config))
    return str(definition)


def _read_result(task: str, results: Any, choices: bool) -> dict[str, Any]:
    found = results["results"][task]
    row: dict[str, Any] = {"version": results["versions"][task], "questions": results["n-samples"][task]["effective"]}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in found:
            row[metric] = _estimate(found, metric, "none")
    if choices:
        return row
    names = [key.partition(",")[::2] for key in found if "," in key and "_stderr," not in key]
    row["metrics"] = {
        metric if filter == "none" else f"{metric}, {filter}": _estimate(found, metric, filter)
        for metric, filter in names
        if metric not in _NOT_METRICS
    }
    return row


def _estimate(found: Any, metric: str, filter: str) -> dict[str, Any]:
    error = found.get(f"{metric}_stderr,{filter}")
    return {"mean": found[f"{metric},{filter}"], "standard_error": error if isinstance(error, float) else None}


def _read_samples(samples: list[Row]) -> list[Row]:
    """id, log_likelihoods of the choices, chosen and right (places among them; right is None if it cannot be told), and of the
    first 500 the question and its choices, shortened.
    """
    rows: list[Row] = []
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        contexts, endings = zip(*((context, ending.removeprefix(" ")) for context, ending in sample["arguments"]), strict=True)
        scores = [float(score) for score, _ in sample["filtered_resps"]]
        metric = "acc_norm" if "acc_norm" in sample else "acc"
        lengths = [max(1, len(ending)) for ending in endings] if metric == "acc_norm" else [1] * len(endings)
        chosen = max(range(len(scores)), key=lambda place: scores[place] / lengths[place])
        right = sample["target"] if isinstance(sample["target"], int) else None
        if right is None and (sample[metric] or len(scores) == 2):
            right = chosen if sample[metric] else 1 - chosen
        row: Row = {"id": sample["doc_id"], "right": right, "chosen": chosen}
        row["log_likelihoods"] = [round(score, 2) for score in scores]
        if len(rows) < _TEXTS:
            same = len(set(contexts)) == 1
            row["question"] = (contexts[0] if same else f"... {endings[0]}")[-_QUESTION:]
            row["choices"] = [choice[-_CHOICE:] for choice in (endings if same else contexts)]
        rows.append(row)
    return rows


def _json_lines(content: str) -> list[Row]:
    return [json.loads(line) for line in content.split("\n") if line.strip()]


def _read_arc(content: str) -> list[Row]:
    rows = []
    for item in _json_lines(content):
        labels = [chr(ord("A") + n) for n in range(len(item["choices"]))]
        rows.append(
            {
                "question": item["query"].removeprefix("Question: "),
                "choices": {"text": item["choices"], "label": labels},
                "answerKey": labels[item["gold"]],
            }
        )
    return rows


def _read_boolq(content: str) -> list[Row]:
    rows = []
    for item in _json_lines(content):
        passage, _, question = item["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")
        rows.append({"passage": passage, "question": question.removesuffix("?"), "label": item["gold"]})
    return rows


def _read_winogrande(content: str) -> list[Row]:
    """The definition puts each option in the place of "_": here the options hold all that comes before it too."""
    rows = []
    for item in _json_lines(content):
        first, second = item["context_options"]
        sentence = f"_ {item['continuation']}"
        rows.append({"sentence": sentence, "option1": first, "option2": second, "answer": "12"[item["gold"]]})
    return rows


def _read_hellaswag(content: str) -> list[Row]:
    lines = content.removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise ValueError(f"{len(lines)} lines are not six a question")
    return [{"query": lines[n], "label": int(lines[n + 1]), "choices": lines[n + 2 : n + 6]} for n in range(0, len(lines), 6)]


_READERS: Final[dict[str, tuple[str, Callable[[str], list[Row]]]]] = {
    "arc_easy": ("arc/arc_easy.jsonl", _read_arc),
    "arc_challenge": ("arc/arc_challenge.jsonl", _read_arc),
    "hellaswag": ("hellaswag/hellaswag_val_full.txt.bz2", _read_hellaswag),
    "winogrande": ("winogrande/winogrande.jsonl", _read_winogrande),
    "boolq": ("boolq/boolq.jsonl", _read_boolq),
}
