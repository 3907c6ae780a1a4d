"""Text that a model writes by itself: what its statistics are taken from, so that compressing it needs no data.

Every sequence starts as the model's own texts do, with its token for a beginning (BOS), or with any token where it has none,
and goes on as the model says, drawn from its predictions at temperature 1 without truncation. Calibrating a language model on
its own text is known (Williams et al. 2024, arXiv 2410.17170). Measured on SmolLM2-135M-Instruct with error feedback at 3 bits
(KL on WikiText-2, 64 sequences of 256): BOS and temperature 1 0.180, random first tokens 0.191, temperature 0.8 0.207.

What is drawn depends on predictions and on numbers that are drawn beforehand, for each sequence and position its own. So the
same model, seed and machine write the same text, in batches of any size but for rounding in the predictions; another device
rounds otherwise and writes another text as soon as one token differs. Whoever needs the same text keeps it.
"""

import hashlib
import inspect
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from seedlm.calibration.amount import OwnText, check_length
from seedlm.errors import EvaluationError
from seedlm.integrations.transformers.models import longest_text, vocabulary
from seedlm.progress import Progress

BATCH: Final = 128
"""Sequences written at a time: the time of a step hardly depends on them until their caches fill the memory."""

OVERFLOW: Final = "float16 overflows on some models: try bfloat16 or float32"
"""What to do about numbers that are not finite."""


@torch.no_grad()
def write_text(model: Any, text: OwnText, *, batch: int = BATCH, on_progress: Progress | None = None) -> Tensor:
    """Let a causal language model write.

    model     as transformers makes it, in evaluation mode, on any device; Mamba and its like write without a cache, slowly
    batch     sequences at a time
    returns   int64 [sequences, length], on the CPU
    Raises EvaluationError for text longer than the model's context, and for predictions that are not finite.
    """
    check_length(longest_text(model), text.length)
    progress = on_progress or (lambda phase, done, total: None)
    random = torch.Generator().manual_seed(text.seed)
    first = _first_tokens(model, text, random)
    draws = torch.rand(text.sequences, text.length - 1, generator=random, dtype=torch.float64)
    written, done = [], 0
    progress("text", done, text.tokens)
    for start in range(0, text.sequences, batch):
        rows, columns = slice(start, start + batch), []
        for column in _columns(model, first[rows], draws[rows], text.temperature):
            columns.append(column)
            progress("text", done := done + len(column), text.tokens)
        written.append(torch.cat(columns, 1).cpu())
    return torch.cat(written)


def text_hash(tokens: Tensor) -> str:
    """What tells one text from another: SHA-256 of its shape and tokens, as hexadecimal digits."""
    content = tokens.to("cpu", torch.int64).contiguous()
    return hashlib.sha256(repr(tuple(content.shape)).encode() + content.numpy().astype("<i8").tobytes()).hexdigest()


def _first_tokens(model: Any, text: OwnText, random: torch.Generator) -> Tensor:
    """int64 [sequences, 1]: the model's BOS token, or any tokens if it has none."""
    known = vocabulary(model)
    bos = getattr(getattr(model, "generation_config", None), "bos_token_id", None)
    bos = getattr(model.config, "bos_token_id", None) if bos is None else bos
    if isinstance(bos, int) and 0 <= bos < known:
        return torch.full((text.sequences, 1), bos)
    return torch.randint(known, (text.sequences, 1), generator=random)


def predict(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits float32 [batch, vocabulary] of the token after these, and the cache for the next call; None if there is none.

    Raises EvaluationError for predictions that are not finite.
    """
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # since transformers 5.24
    output = model(input_ids=tokens, use_cache=True, **{name: cache})
    logits = output.logits[:, -1].float()
    if not logits.isfinite().all():
        raise EvaluationError(f"the model's predictions are not finite; {OVERFLOW}")
    return logits, output.get(name)


def _columns(model: Any, first: Tensor, draws: Tensor, temperature: float) -> Iterator[Tensor]:
    """The tokens int64 [batch, 1] of each position, from the first ones and a number in [0, 1) for each further one."""
    tokens, cache = [first.to(model.device)], None
    yield tokens[-1]
    for draw in draws.to(model.device).T:
        before = tokens[-1] if cache is not None else torch.cat(tokens, 1)
        logits, cache = predict(model, before, cache)
        tokens.append(_draw((logits / temperature).softmax(-1), draw))
        yield tokens[-1]


def _draw(probabilities: Tensor, draw: Tensor) -> Tensor:
    """int64 [batch, 1]: the token in whose share of [0, 1) the number lies; probabilities [batch, vocabulary], draw [batch]."""
    upper = probabilities.double().cumsum(-1)
    chosen = torch.searchsorted(upper, draw[:, None] * upper[:, -1:], right=True)
    return chosen.clamp_max(probabilities.shape[-1] - 1)
