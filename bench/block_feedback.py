"""What error feedback costs the block code's encoder, and what it gains in the output error, on SmolLM2's shapes.

    python bench/block_feedback.py [--bits 4] [--runs 3]

Normal weights and correlated inputs, one matrix at a time through `seedlm.encode`, on the CPU. A run codes one matrix without
and with feedback, one right after the other, since other work on a machine slows both. Best of the runs; the last line is JSON.
"""

import argparse
import json
import platform
import time

import torch

from seedlm import encode
from seedlm.codes.registry import parse_format

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    format = parse_format(options.bits, "block")
    encode(torch.ones(1, format.block_size), format)  # compiles, and makes tables
    results = {}
    for rows, columns in SHAPES:
        random = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=random)
        mixing = torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=random) / columns**0.5
        inputs = torch.randn(4 * columns, columns, generator=random) @ mixing
        hessian = inputs.T @ inputs / len(inputs)
        encode(weight[:1], format, hessian=hessian)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        errors = {}
        for _ in range(options.runs):
            for fed in (False, True):
                start = time.perf_counter()
                # A copy, since what is derived from statistics is kept as long as they live.
                coded, _ = encode(weight, format, hessian=hessian.clone() if fed else None)
                seconds[fed].append(time.perf_counter() - start)
                missed = (coded.dequantize() - weight).double()
                errors[fed] = float(((missed @ hessian.double()) * missed).sum())
        plain, fed = (weight.numel() / min(times) / 1e6 for times in seconds.values())
        ratio = errors[True] / errors[False]
        print(
            f"{rows:5} x {columns:5}  {plain:.3f} M weights/s without, {fed:.3f} with; output error x {ratio:.3f}", flush=True
        )
        results[f"{rows}x{columns}"] = {"plain": plain, "fed": fed, "output_error": ratio}
    machine = platform.processor() or platform.machine()
    print(json.dumps({"format": format.spec, "threads": torch.get_num_threads(), "machine": machine, "shapes": results}))


if __name__ == "__main__":
    main()
