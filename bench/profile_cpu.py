"""What a token of a packed model consists of on a CPU, batch 1, `seedlm generate`'s way (static cache, our decoder).

    python bench/profile_cpu.py [--shapes smollm2|1b] [--bits 4] [--tables 6-fast] [--backend auto|numba-int8] [--new 64]
        [--threads 2] [--repeats 5] [--json]

A model of `generate_cpu.py`, random codes. Functions that a step goes through are replaced by ones that look at the clock; of
the runs the one that took the shortest is shown, ms a token:

    look-up      the token's row of the embedding
    rotary       its cosines and sines, and the rest of the embedding's call
    layers       all layers, the record that is replayed; beside it *products*, `generate_cpu.py`'s row, which are
                 called one by one here and so may take longer
    head         the last norm and the head's product
    rest         of the step: the cache's lengths, copies of inputs
    generate     of transformers' and our loop, and the choice of a token
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from generate_cpu import SHAPES, check_decoder, generate, packed, processor, products
from seedlm.codes.threads import Record
from seedlm.inference import ops
from seedlm.integrations.transformers import decoder_steps
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.modeling.quantize import set_backend

PARTS = "look-up", "rotary", "layers", "head"


def timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return call


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--tables", default="6-fast")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = packed(options.shapes, getattr(torch, options.dtype), options.bits, options.tables)
    set_backend(model, options.backend)
    fuse_decoding(model)
    prompt = torch.randint(SHAPES[options.shapes].vocab_size, (1, 16))
    check_decoder(model, prompt, 0.1)
    spent: dict[str, float] = defaultdict(float)
    with ExitStack() as patched:

        def replace(owner: Any, attribute: str, name: str) -> None:
            patched.enter_context(mock.patch.object(owner, attribute, timed(spent, name, getattr(owner, attribute))))

        replace(ops, "rows", "look-up")
        replace(decoder_steps, "_before_layers", "before")
        replace(Record, "run", "layers")
        replace(decoder_steps, "_after_layers", "head")
        replace(decoder_steps._Recorded, "replay", "step")
        generate(model, prompt, "static", 4)
        ones, runs = [], []
        for _ in range(options.repeats):
            start = time.perf_counter()
            generate(model, prompt, "static", 2)
            ones.append(time.perf_counter() - start)
            spent.clear()
            start = time.perf_counter()
            generate(model, prompt, "static", 2 + options.new)
            runs.append((time.perf_counter() - start, dict(spent)))
        shortest, once = min(runs, key=lambda run: run[0])
        # all but the first token, which a prompt of several gives, go through a step
        best = {"token": (shortest - min(ones)) / options.new, **{name: once[name] / (1 + options.new) for name in once}}
    run, of_products = products(model), float("inf")
    for _ in range(options.repeats):
        start = time.perf_counter()
        run(options.new)
        of_products = min(of_products, (time.perf_counter() - start) / options.new)
    best["rotary"] = best["before"] - best["look-up"]
    shown = {name: best[name] for name in PARTS} | {"products": of_products}
    shown |= {"rest": best["step"] - sum(best[name] for name in PARTS), "generate": best["token"] - best["step"]}
    ms = {name: round(1e3 * value, 3) for name, value in (shown | {"token": best["token"]}).items()}
    facts = {
        "shapes": options.shapes,
        "bits": options.bits,
        "tables": options.tables,
        "backend": options.backend,
        "dtype": options.dtype,
        "processor": processor(),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    if options.json:
        print(json.dumps(facts | {"ms a token": ms}))
    else:
        print(", ".join(f"{key} {value}" for key, value in facts.items()))
        for name, value in ms.items():
            print(f"{'beside it ' if name == 'products' else ''}{name:12}{value:8.3f}")


if __name__ == "__main__":
    main()
