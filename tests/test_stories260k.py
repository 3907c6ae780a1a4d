"""A real model, 260 thousand float32 parameters: packed, saved, loaded through transformers, generating."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from seedlm import hf
from seedlm.linear import compress_model, seed_linears

FOLDER = Path(__file__).parent / "data" / "stories260k"
STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball. "
    "She wanted to play with it, but it was too high.\nLily"
)
SPEC = "block-k8-c6-p2-q4-e4"
"""3.33 bits, and 255 seeds only: the plain torch search takes seconds."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def greedy(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    count = len(tokenizer(STORY)["input_ids"]) - inputs["input_ids"].shape[1]
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=count, do_sample=False)[0], skip_special_tokens=True)


def perplexity(model, tokenizer):
    ids = tokenizer(STORY, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss)


def test_the_original_tells_the_reference_story(tokenizer):
    """The text is that of an independent float64 implementation."""
    assert greedy(AutoModelForCausalLM.from_pretrained(FOLDER), tokenizer, "Once upon a time") == STORY
