"""Prompts, and what a model most likely writes after them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from seedlm.errors import EvaluationError
from seedlm.storage.untrusted import read_text

PROMPTS: Final = (
    "Once upon a time, there was a",
    "The capital of France is",
    "Water boils when",
    "2, 4, 6, 8,",
    "My favourite thing about the sea is",
    "def add(a, b):",
)
"""Asked unless others are given."""


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; blank lines are passed over. Raises EvaluationError if there are none."""
    prompts = tuple(line for line in read_text(path, EvaluationError).splitlines() if line.strip())
    if not prompts:
        raise EvaluationError(f"{path}: holds no prompts, one is expected on every line")
    return prompts


def continue_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> list[str]:
    """The most likely continuation of each prompt, at most this many tokens, without the prompt."""
    import torch

    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        length = inputs["input_ids"].shape[1]
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        with torch.inference_mode():
            output = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)[0]
        before = tokenizer.decode(output[:length], skip_special_tokens=True)
        texts.append(tokenizer.decode(output, skip_special_tokens=True).removeprefix(before))
    return texts
