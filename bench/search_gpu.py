"""Seed search on one GPU: checked against brute force first, then timed from weights in GPU memory to packed words there.

    python bench/search_gpu.py [--repeats 5] [--shape 4096 14336]

Prints a table and, last, one JSON line. Beside it, on the same tensor and device: brute force and the bounded search in plain
torch, and, where they are installed, what a user runs instead: bitsandbytes' NF4 and HQQ, 4 bits in groups of 64.
"""

import argparse
import importlib.util
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable

import torch

from seedlm import codec, search, search_torch, search_triton
from seedlm.format import PRESETS, Format


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median device time of `run`, after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def check(format: Format) -> int:
    """Compare with brute force on fresh blocks, some of them hard; returns how many. Exits if a bit differs."""
    normal = torch.randn(1000, format.block_size, device="cuda") * 0.02
    heavy = torch.distributions.StudentT(3.0).sample((200, format.block_size)).cuda() * 0.02
    blocks = torch.cat([normal, heavy, normal[:20] * 1e-3, torch.zeros_like(normal[:3])])
    bias = codec.choose_exponent_bias(blocks, format)
    expected, expected_scores = search_torch.brute_force(blocks, bias, format)
    pieces = list(search_triton.search(blocks, bias, format))
    found = [torch.cat(field) for field in zip(*(codes for codes, _ in pieces), strict=True)]
    scores = torch.cat([scores for _, scores in pieces])
    if not all(torch.equal(a, b) for a, b in zip((*found, scores), (*expected, expected_scores), strict=True)):
        sys.exit(f"{format}: the search differs from brute force")
    return len(blocks)


def measure(format: Format, shape: tuple[int, int], repeats: int) -> dict[str, float]:
    weight = (torch.randn(shape, device="cuda") * 0.02).bfloat16()
    blocks = weight.float().view(-1)[: weight.numel() // format.block_size * format.block_size].view(-1, format.block_size)
    bias = codec.choose_exponent_bias(weight, format)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spent = seconds(lambda: search.encode(weight, format, backend="triton"), repeats)
    peak = torch.cuda.max_memory_allocated() - before
    redone: Counter[int | None] = Counter()
    searched = seconds(lambda: list(search_triton.search(blocks, bias, format, redone=redone)), repeats)
    few, some = blocks[:64], blocks[:4096]
    brute = seconds(lambda: search_torch.brute_force(few, bias, format), 1) / few.numel()
    bounded = seconds(lambda: list(search_torch.search(some, bias, format)), 1) / some.numel()
    return {
        "weights_per_s": weight.numel() / spent,
        "search_weights_per_s": blocks.numel() / searched,
        "blocks_redone_per_million": 1e6 * sum(redone.values()) / ((repeats + 1) * len(blocks)),
        "brute_force_weights_per_s": 1 / brute,
        "times_brute_force": brute / (spent / weight.numel()),
        "torch_search_weights_per_s": 1 / bounded,
        "peak_bytes": peak,
    }


def others(shape: tuple[int, int], repeats: int) -> dict[str, float]:
    """Weights/s of other quantisers on such a tensor, for those installed."""
    weight = (torch.randn(shape, device="cuda") * 0.02).bfloat16()
    rates = {}
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes.functional import quantize_4bit

        spent = seconds(lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4"), repeats)
        rates["bitsandbytes NF4"] = weight.numel() / spent
    if importlib.util.find_spec("hqq"):
        from hqq.core.quantize import Quantizer

        spent = seconds(lambda: Quantizer.quantize(weight, nbits=4, group_size=64, axis=1, device="cuda"), repeats)
        rates["HQQ"] = weight.numel() / spent
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=2, action="append", help="default: 4096 x 4096 and 4096 x 14336")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    shapes = [tuple(shape) for shape in options.shape or ([4096, 4096], [4096, 14336])]
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "search": {}}
    for name, format in PRESETS.items():
        print(f"{name} bit: {check(format)} blocks equal brute force")
        for shape in shapes:
            numbers = measure(format, shape, options.repeats)
            result["search"][f"{name} bit {shape[0]}x{shape[1]}"] = numbers
            print(
                f"{name} bit {shape[0]:>6} x {shape[1]:<6} {numbers['weights_per_s'] / 1e6:8.0f} M weights/s encoded, "
                f"{numbers['search_weights_per_s'] / 1e6:.0f} searched; {numbers['times_brute_force']:.0f} x brute force; "
                f"redone {numbers['blocks_redone_per_million']:.1f} in 10^6; peak {numbers['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
    result["others"] = others(shapes[-1], options.repeats)
    for name, rate in result["others"].items():
        print(f"{name}: {rate / 1e6:.0f} M weights/s")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
