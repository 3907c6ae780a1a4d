"""Seed search on one GPU: checked against brute force first, then timed from weights in GPU memory to packed words there.

    python bench/search_gpu.py [--repeats 5] [--shape 4096 14336] [--format 4]

Prints a table and, last, one JSON line. Beside it, on the same tensor and device: brute force and the bounded search in plain
torch, and, where they are installed, what a user runs instead: bitsandbytes' NF4 and HQQ, 4 bits in groups of 64.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from seedlm.codes.block import codec
from seedlm.codes.block.format import BlockFormat
from seedlm.codes.block.search import torch_search, triton_search
from seedlm.codes.encoded import encode
from seedlm.codes.registry import parse_format

SHAPES = [[4096, 4096], [4096, 11008], [4096, 14336], [8192, 28672], [576, 576], [576, 1536]]
"""Layers of 7B, 8B and 70B models, and of SmolLM2-135M."""


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median of `run`, waiting for the device, after one warm-up."""
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


def check(format: BlockFormat) -> int:
    """Compare with brute force on fresh blocks, some of them hard; returns how many. Exits if a bit differs."""
    normal = torch.randn(1000, format.block_size, device="cuda") * 0.02
    heavy = torch.distributions.StudentT(3.0).sample((200, format.block_size)).cuda() * 0.02
    blocks = torch.cat([normal, heavy, normal[:20] * 1e-3, torch.zeros_like(normal[:3])])
    bias = codec.choose_exponent_bias(blocks, format)
    expected, expected_scores = torch_search.brute_force(blocks, bias, format)
    pieces = list(triton_search.search(blocks, bias, format))
    found = [torch.cat(field) for field in zip(*(codes for codes, _ in pieces), strict=True)]
    scores = torch.cat([scores for _, scores in pieces])
    if not all(torch.equal(a, b) for a, b in zip((*found, scores), (*expected, expected_scores), strict=True)):
        sys.exit(f"{format}: the search differs from brute force")
    return len(blocks)


def measure(format: BlockFormat, weight: Tensor, repeats: int) -> dict[str, float]:
    """Rates of this search and of plain torch on one weight, blocks that were redone, and GPU memory beside the weight."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spent = seconds(lambda: encode(weight, format, backend="triton"), repeats)
    peak = torch.cuda.max_memory_allocated() - before
    # Any length of float32 makes blocks: what does not fill one is left out.
    count = weight.numel() // format.block_size
    blocks = weight.float().view(-1)[: count * format.block_size].view(count, -1)
    bias = codec.choose_exponent_bias(weight, format)
    redone: Counter[int | None] = Counter()
    list(triton_search.search(blocks, bias, format, redone=redone))
    few, some = blocks[:64], blocks[:4096]
    brute = seconds(lambda: torch_search.brute_force(few, bias, format), 1) / few.numel()
    bounded = seconds(lambda: list(torch_search.search(some, bias, format)), 1) / some.numel()
    return {
        "weights_per_s": weight.numel() / spent,
        "times_brute_force": brute / (spent / weight.numel()),
        "brute_force_weights_per_s": 1 / brute,
        "torch_search_weights_per_s": 1 / bounded,
        "blocks_redone_per_million": 1e6 * sum(redone.values()) / count,
        "peak_bytes": peak,
    }


def others() -> dict[str, Callable[[Tensor], object]]:
    """What a user runs instead, 4 bits in groups of 64: name and version -> function, for those installed."""
    found: dict[str, Callable[[Tensor], object]] = {}
    try:
        from bitsandbytes import __version__ as version
        from bitsandbytes.functional import quantize_4bit

        found[f"bitsandbytes {version} NF4"] = lambda weight: quantize_4bit(weight, blocksize=64, quant_type="nf4")
    except ImportError as error:
        print(f"bitsandbytes is not measured: {error}")
    try:
        from hqq import __version__ as version
        from hqq.core.quantize import Quantizer

        # axis=1 is the one that HQQ's inference kernels read.
        found[f"HQQ {version}"] = lambda weight: Quantizer.quantize(weight, nbits=4, group_size=64, axis=1)
    except ImportError as error:
        print(f"HQQ is not measured: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", type=int, nargs=2, action="append", help=f"default: {SHAPES}")
    parser.add_argument("--format", action="append", help="preset or format name; default: 4 and 3")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    result: dict = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "shapes": {}}
    formats = {name: parse_format(name) for name in options.format or ("4", "3")}
    for name, format in formats.items():
        print(f"{name} bit: {check(format)} blocks equal brute force")
    peers = others()
    for shape in options.shape or SHAPES:
        weight = (torch.randn(*shape, device="cuda") * 0.02).bfloat16()
        row = result["shapes"][f"{shape[0]}x{shape[1]}"] = {}
        for name, format in formats.items():
            row[name] = numbers = measure(format, weight, options.repeats)
            print(
                f"{shape[0]:>6} x {shape[1]:<6} {name + ' bit':<26} {numbers['weights_per_s'] / 1e6:8.0f} M weights/s, "
                f"{numbers['times_brute_force']:.0f} x brute force, redone {numbers['blocks_redone_per_million']:.1f} in 10^6, "
                f"peak {numbers['peak_bytes'] / 1e9:.2f} GB",
                flush=True,
            )
        for name, run in peers.items():
            rate = row[name] = weight.numel() / seconds(partial(run, weight), options.repeats)
            ratios = ", ".join(f"{row[ours]['weights_per_s'] / rate:.3f} at {ours} bit" for ours in formats)
            print(f"{'':15} {name:<26} {rate / 1e6:8.0f} M weights/s; this search is {ratios} of it", flush=True)
        torch.cuda.empty_cache()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
