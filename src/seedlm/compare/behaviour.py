"""What the models did differently: the predictions, prompts and questions that changed most, one entry a model.

Of every run the items are taken that changed most from the original, and each of these is shown for all runs: so many from each
that all together stay near `_SHOWN`.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from seedlm.compare.runs import Run
from seedlm.errors import EvaluationError

_SHOWN: Final = 800
_BEFORE, _AFTER = 40, 8
"""Tokens of text around a prediction."""

_LEAST: Final = 0.1
"""Change of probability from which a question is worth showing though its answer stayed."""

Columns = Sequence[Run | None]
"""Runs in the order of the rows; None for an original that nobody ran."""


def compare_tokens(columns: Columns) -> list[dict[str, Any]]:
    """The predictions with the largest KL divergence, largest first.

    returns   window and place in the text; before, token, after: the text; original: the most likely token and the probability
              of the token that came; models: the same and kl
    """
    records = [_section(run, "tokens") for run in columns]
    known = [(run, found) for run, found in zip(columns, records, strict=True) if run and found and "kl" in found]
    if not known:
        return []
    first_run, first = known[0]
    ids = np.array(first["token_ids"])
    for run, found in known[1:]:
        if found["token_ids"] != first["token_ids"]:
            raise EvaluationError(f"{first_run.path} and {run.path} cannot be compared: their tokens differ")
    divergence = np.array([found["kl"] for _, found in known], np.float64)  # None becomes NaN
    divergence[np.isnan(divergence)] = np.inf
    share = _share(len(known))
    flat = divergence.reshape(len(known), -1)
    chosen = np.unique(np.argsort(-flat, axis=1, kind="stable")[:, :share])
    chosen = chosen[np.argsort(-flat[:, chosen].max(axis=0), kind="stable")]
    pieces = {key: piece for found in records if found for key, piece in found["pieces"].items()}
    items = []
    for place in chosen.tolist():
        window, column = divmod(place, ids.shape[1] - 1)
        begin = max(0, column + 1 - _BEFORE)
        text = [pieces[str(token)] for token in ids[window, begin : column + 2 + _AFTER].tolist()]
        here = column + 1 - begin
        items.append(
            {
                "window": window,
                "place": column + 1,
                "before": "".join(text[:here]),
                "token": text[here],
                "after": "".join(text[here + 1 :]),
                "original": {
                    "top": pieces[str(first["reference_top1"][window][column])],
                    "probability": _probability(first["reference_nll"][window][column]),
                },
                "models": [_prediction(found, window, column, pieces) if found else None for found in records],
            }
        )
    return items


def _prediction(found: dict[str, Any], window: int, column: int, pieces: dict[str, str]) -> dict[str, Any]:
    return {
        "top": pieces[str(found["top1"][window][column])],
        "probability": _probability(found["nll"][window][column]),
        "kl": found["kl"][window][column] if "kl" in found else None,
    }


def compare_prompts(columns: Columns) -> list[dict[str, Any]]:
    """prompt, original and models: what each wrote after it."""
    written = [{row["prompt"]: row for row in _section(run, "prompts") or []} for run in columns]
    items = []
    for prompt in dict.fromkeys(prompt for rows in written for prompt in rows):
        originals = [rows[prompt]["reference_text"] for rows in written if prompt in rows]
        items.append(
            {
                "prompt": prompt,
                "original": next((text for text in originals if text is not None), None),
                "models": [rows[prompt]["text"] if prompt in rows else None for rows in written],
            }
        )
    return items


def compare_questions(columns: Columns, tasks: Sequence[str], has_original: bool) -> dict[str, Any]:
    """Zero-shot questions against the first column, if that is the original.

    returns   counts: task -> for every model how many questions it answered right that the original did not (gained), and the
              reverse (lost), and of how many; items: the questions where the probability of the right answer changed most, with
              the choices, the right one, and of every model the chosen one and the probability of the right one
    Raises EvaluationError if the same number stands for different questions.
    """
    counts: dict[str, list[dict[str, int] | None]] = {}
    items = []
    for task in tasks:
        answers = [{row["id"]: row for row in (_section(run, "tasks") or {}).get(task, [])} for run in columns]
        counts[task] = [_count(answers[0], column) if has_original and column and answers[0] else None for column in answers]
        items += _changed_questions(task, answers, columns)
    items.sort(key=lambda item: -item["change"])
    return {"counts": counts, "items": items}


def _count(original: dict[int, Any], answers: dict[int, Any]) -> dict[str, int]:
    both = [(original[key], answers[key]) for key in answers if key in original and answers[key]["right"] is not None]
    right = [(a["chosen"] == a["right"], b["chosen"] == b["right"]) for a, b in both]
    return {
        "lost": sum(a and not b for a, b in right),
        "gained": sum(b and not a for a, b in right),
        "changed": sum(a["chosen"] != b["chosen"] for a, b in both),
        "questions": len(both),
    }


def _changed_questions(task: str, answers: list[dict[int, Any]], columns: Columns) -> list[dict[str, Any]]:
    """Those with texts; the texts are the same in every run."""
    texts: dict[int, dict[str, Any]] = {}
    owners: dict[int, Run] = {}
    for run, column in zip(columns, answers, strict=True):
        for key, row in column.items():
            if "question" not in row or run is None:
                continue
            other = texts.setdefault(key, row)
            if any(other[part] != row[part] for part in ("question", "choices", "right")):
                raise EvaluationError(f"{owners[key].path} and {run.path} cannot be compared: question {key} of {task} differs")
            owners.setdefault(key, run)
    found = []
    for key, text in texts.items():
        if text["right"] is None:
            continue
        models = [_answer(column[key]) if key in column else None for column in answers]
        pivot = next(model for model in models if model)  # the original's, if it was asked
        changes = [abs(model["probability"] - pivot["probability"]) if model else 0.0 for model in models]
        if max(changes) >= _LEAST or any(model and model["chosen"] != pivot["chosen"] for model in models):
            item = {"task": task, "id": key, **{name: text[name] for name in ("question", "choices", "right")}}
            found.append((changes, {**item, "models": models, "change": round(max(changes), 4)}))
    share = _share(sum(column != {} for column in answers))
    chosen: dict[int, dict[str, Any]] = {}
    for place in range(1, len(columns)):
        chosen |= {item["id"]: item for _, item in sorted(found, key=lambda pair: -pair[0][place])[:share]}
    return list(chosen.values())


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """The chosen answer, and the probability of the right one if one of them must be."""
    scores = [-math.inf if score is None else score for score in row["log_likelihoods"]]
    top = max(scores)
    weights = [1.0 if score == top else math.exp(score - top) for score in scores]
    return {"chosen": row["chosen"], "probability": round(weights[row["right"]] / sum(weights), 4)}


def _section(run: Run | None, name: str) -> Any:
    return run.records.get(name) if run and run.records else None


def _share(runs: int) -> int:
    return max(10, _SHOWN // max(1, runs))


def _probability(nll: float | None) -> float:
    return 0.0 if nll is None else float(f"{math.exp(-max(nll, 0.0)):.3g}")
