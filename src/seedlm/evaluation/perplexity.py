"""How well a model predicts a text, and how far its predictions are from another model's, token by token.

The text is one run of tokens, cut into windows of equal length; what is left over at the end is dropped. Each window is scored
alone: its first token is only context, each later one is predicted from all before it in the window. The mean negative log
likelihood over all predictions, and its exponential, the perplexity, are what GPTQ's `llama_eval` and OmniQuant's `evaluate`
compute: they multiply each window's mean over context - 1 predictions by the context and divide the sum by windows x context.

Against a reference, per prediction: KL(reference || model) in nats, and whether both have the same most likely token.

Logits are formed one batch at a time, in the model's dtype, and turned to float32 a few hundred rows at a time: beside the
logits themselves, a vocabulary of 128 thousand costs no more memory than one of 32 thousand. The unit of every standard error
is the window, since the tokens inside one are not independent.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from seedlm.errors import EvaluationError

RECORD: Final = np.dtype([("nll", "<f4"), ("top1", "<i4")])
"""One prediction of one model: negative log likelihood in nats of the token that came, and the most likely token."""

PAIR_RECORD: Final = np.dtype(
    [*((name, RECORD[name]) for name in ("nll", "top1")), ("kl", "<f4"), ("reference_nll", "<f4"), ("reference_top1", "<i4")]
)
"""The same of a model and a reference, and KL(reference || model) in nats."""

_CHUNK = 1 << 23
"""32 MB of logits, and a handful of temporary copies of it."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; None where a single window leaves it unknown."""

    mean: float
    standard_error: float | None


def cut_windows(token_ids: Tensor, context: int, limit: int | None = None) -> Tensor:
    """int64 [windows, context]: the text's whole windows, at most `limit` of them.

    token_ids   int64 [tokens]
    Raises EvaluationError for a context below 2, a limit below 1, or a text shorter than one window.
    """
    if context < 2:
        raise EvaluationError(f"a window needs at least 2 tokens, got a context of {context}")
    if limit is not None and limit < 1:
        raise EvaluationError(f"the limit must be at least 1 window, got {limit}")
    windows = len(token_ids) // context
    if not windows:
        found = f"the text has {len(token_ids)} tokens, one window needs {context}"
        raise EvaluationError(f"{found}: choose a shorter context (--context) or a longer text")
    return token_ids[: windows * context].view(windows, context)[:limit]


def score_windows(
    model: Any, windows: Tensor, *, reference: Any = None, batch_size: int = 1, start: int = 0, chunk: int = _CHUNK
) -> Iterator[tuple[np.ndarray, float]]:
    """Score windows, a batch at a time.

    model, reference   causal language models as transformers makes them, in evaluation mode; each runs on its own device
    windows            int64 [windows, context], on the CPU
    start              windows before this one are passed over
    chunk              logits turned to float32 at a time
    yields             RECORD or PAIR_RECORD [batch, context - 1], and the seconds that `model` took to give its logits
    Raises EvaluationError if predictions are not finite, if the vocabularies differ, or if the memory does not suffice.
    """
    for first in range(start, len(windows), batch_size):
        batch = windows[first : first + batch_size]
        try:
            records, seconds = _score_batch(model, batch, reference, chunk)
        except torch.OutOfMemoryError:
            raise EvaluationError(
                f"the device has no memory left for {len(batch)} x {batch.shape[1]} tokens: choose a smaller batch or context"
            ) from None
        for row, window in enumerate(records):
            for field in ("nll", "reference_nll", "kl"):
                if field in (records.dtype.names or ()) and not np.isfinite(window[field]).all():
                    whose = "reference" if field == "reference_nll" else "model"
                    raise EvaluationError(
                        f"window {first + row}: the {whose}'s {'KL divergence' if field == 'kl' else 'log likelihood'} is not "
                        "finite; float16 overflows on some models: try bfloat16 or float32"
                    )
        yield records, seconds


def summarize(records: np.ndarray) -> dict[str, Estimate]:
    """Means over all predictions, with standard errors over windows.

    records   RECORD or PAIR_RECORD [windows, predictions]
    returns   nll and perplexity; with a reference also kl, top1_agreement (a fraction), reference_nll,
              reference_perplexity, and perplexity_ratio, the model's over the reference's: its error is that of the paired
              difference, so it shows differences far smaller than the error of either perplexity
    """
    nll = _window_means(records["nll"])
    results = {"nll": _estimate(nll), "perplexity": _exponential(nll)}
    if "kl" in (records.dtype.names or ()):
        reference = _window_means(records["reference_nll"])
        results |= {
            "kl": _estimate(_window_means(records["kl"])),
            "top1_agreement": _estimate(_window_means(records["top1"] == records["reference_top1"])),
            "reference_nll": _estimate(reference),
            "reference_perplexity": _exponential(reference),
            "perplexity_ratio": _exponential(nll - reference),
        }
    return results


def distributions(records: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """How the predictions are spread over bins, the outer ones with all that lies beyond; nothing without a reference.

    records   PAIR_RECORD [windows, predictions]
    returns   kl and nll_change, the model's negative log likelihood less the reference's: edges in nats [bins + 1], counts
              [bins]
    """
    if "kl" not in (records.dtype.names or ()):
        return {}
    spread = {}
    for name, values, edges in (
        ("kl", records["kl"], 10.0 ** np.arange(-5, 1.75, 0.25)),
        ("nll_change", records["nll"].astype(np.float64) - records["reference_nll"], np.arange(-5, 5.25, 0.25)),
    ):
        counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
        spread[name] = {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist()}
    return spread


def perplexity(
    model: Any, token_ids: Tensor, *, context: int = 2048, limit: int | None = None, batch_size: int = 1
) -> Estimate:
    """A model's perplexity on a text by the protocol above.

    token_ids   int64 [tokens]
    """
    windows = cut_windows(token_ids, context, limit)
    return summarize(np.concatenate([records for records, _ in score_windows(model, windows, batch_size=batch_size)]))[
        "perplexity"
    ]


@torch.inference_mode()
def _score_batch(model: Any, windows: Tensor, reference: Any, chunk: int) -> tuple[np.ndarray, float]:
    """Records [windows, context - 1] of one batch int64 [windows, context], and the model's seconds."""
    _synchronize(model.device)
    begin = time.perf_counter()
    logits = model(input_ids=windows.to(model.device), use_cache=False).logits
    _synchronize(model.device)
    seconds = time.perf_counter() - begin
    other = None
    if reference is not None:
        other = reference(input_ids=windows.to(reference.device), use_cache=False).logits
        if other.shape[-1] != logits.shape[-1]:
            raise EvaluationError(
                f"the reference scores {other.shape[-1]} tokens, the model {logits.shape[-1]}: they have no common vocabulary"
            )
    records = np.empty((len(windows), windows.shape[1] - 1), RECORD if reference is None else PAIR_RECORD)
    for row, window in enumerate(windows):
        columns = _score(logits[row, :-1], window[1:], None if other is None else other[row, :-1], chunk)
        for field, values in columns.items():
            records[row][field] = values.cpu().numpy()
    return records, seconds


def _score(logits: Tensor, targets: Tensor, reference: Tensor | None, chunk: int) -> dict[str, Tensor]:
    """The record fields of T predictions.

    logits, reference   floating point [T, vocabulary]
    targets             int64 [T], the tokens that came
    returns             field -> [T]
    """
    rows = max(1, chunk // logits.shape[1])
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(logits), rows):
        these = slice(start, start + rows)
        target = targets[these, None].to(logits.device)
        ours = logits[these].float().log_softmax(-1)
        part = {"nll": -ours.gather(1, target)[:, 0], "top1": ours.argmax(-1)}
        if reference is not None:
            theirs = reference[these].to(logits.device).float().log_softmax(-1)
            part["reference_nll"] = -theirs.gather(1, target)[:, 0]
            part["reference_top1"] = theirs.argmax(-1)
            part["kl"] = (theirs.exp() * (theirs - ours)).sum(-1)
        parts.append(part)
    return {field: torch.cat([part[field] for part in parts]) for field in parts[0]}


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given, so that a clock read next is true."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _window_means(values: np.ndarray) -> np.ndarray:
    """float64 [windows]."""
    return np.asarray(values.mean(axis=1, dtype=np.float64))


def _estimate(means: np.ndarray) -> Estimate:
    windows = len(means)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / windows**0.5) if windows > 1 else None)


def _exponential(means: np.ndarray) -> Estimate:
    """The exponential of the mean; its standard error to first order."""
    inner = _estimate(means)
    with np.errstate(over="ignore"):  # a perplexity may be beyond float64
        value = float(np.exp(inner.mean))
    return Estimate(value, None if inner.standard_error is None else value * inner.standard_error)
