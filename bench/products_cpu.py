"""Products on a CPU: packed layers of both codes beside dense ones, checked, then timed in turn.

    python bench/products_cpu.py [--size 2048] [--threads 2] [--tokens 1,4,8,512] [--formats 4,3,2,4-fast,block-k16-c8-p3-q4-e4]
    python bench/products_cpu.py --in-caches [--tokens 1] [--formats 4,3,2,4-fast]

Microseconds: the shortest on the clock and, in brackets, the least time of this thread's processor, which is what a product
costs where other work shares the machine and one thread multiplies. Layers take turns, so that each finds its weight outside
the nearest caches. "int4 of torch" is the product that torchao calls for 4 bits, 4.25 a weight. The last numbers, for bfloat16,
are nanoseconds of that time a weight, and times the dense layer's.

--in-caches: what a kernel's loop takes for 128 weights, nanoseconds of one thread, float32: the difference between weights of
1024 and of 256 rows, 2048 columns, so without calls and inputs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear

from seedlm.codes.block import packing
from seedlm.codes.registry import parse_format
from seedlm.inference.backend import reason_no_backend
from seedlm.modeling.linear import SeedLinear


def layer(spec: str, size: int, backend: str, rows: int | None = None) -> SeedLinear:
    """Random codes, [rows or size, size]."""
    torch.manual_seed(0)
    format = parse_format(spec)
    made = SeedLinear(size, rows or size, format, dtype=torch.float32, backend=backend)
    if format.family == "trellis":
        made.weight_words.random_(-(2**31), 2**31 - 1)
        made.weight_scales.fill_(1.0)
        made.weight_scale.fill_(1.0)
        return made
    blocks, rows = format.blocks_per_row(size), rows or size
    fields = torch.randint(1, 1 << format.seed_bits, (rows, blocks)), torch.randint(-8, 8, (rows, blocks))
    made.weight_words.copy_(packing.pack(*fields, torch.randint(-4, 4, (rows, blocks, format.num_coefficients)), format))
    return made


def int4(out_features: int, in_features: int) -> tuple[Tensor, int, Tensor] | None:
    """Arguments of torch's product by weights of 4 bits with a scale for each 128 or 64, checked; None where torch has none."""
    group = next((group for group in (128, 64) if in_features % group == 0), 0)
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") or not group:
        return None
    torch.manual_seed(0)
    integers = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
    scales = torch.zeros(in_features // group, out_features, 2, dtype=torch.bfloat16)
    scales[..., 0] = 0.25
    found = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 8), group, scales
    x = torch.randn(1, in_features).bfloat16()
    expected = x.double() @ (0.25 * (integers - 8).double()).T
    error = (torch.ops.aten._weight_int4pack_mm_for_cpu(x, *found).double() - expected).norm() / expected.norm()
    assert float(error) < 2e-2, error
    return found


def shortest(calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, tuple[float, float]]:
    """Microseconds of each call, which take turns: the shortest on the clock, the least of this thread's processor."""
    found, end = {name: [] for name in calls}, time.monotonic() + seconds
    while time.monotonic() < end or len(found[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start, used = time.perf_counter(), time.thread_time()
            call()
            found[name].append((time.perf_counter() - start, time.thread_time() - used))
    return {name: tuple(1e6 * min(each) for each in zip(*times, strict=True)) for name, times in found.items()}


def in_caches(spec: str, tokens: int, seconds: float) -> None:
    torch.set_num_threads(1)
    x, few, many = torch.randn(tokens, 2048), 256, 1024
    names = [name for name in ("numba", "numba-int8") if reason_of(name, spec) is None]
    layers = {(name, rows): layer(spec, 2048, name, rows) for name in names for rows in (few, many)}
    found = shortest({str(key): partial(each, x) for key, each in layers.items()}, seconds)
    for name in names:
        apart = found[str((name, many))][1] - found[str((name, few))][1]
        print(f"{spec}, {tokens}, {name}: {1e3 * apart * 128 / ((many - few) * 2048):.2f} ns for 128 weights", flush=True)


def reason_of(name: str, spec: str) -> str | None:
    return reason_no_backend(name, torch.device("cpu"), parse_format(spec), (2048, 2048))


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,4,8,512")
    parser.add_argument("--formats", default="4,3,2,4-fast,block-k16-c8-p3-q4-e4,block-k16-c12-p4-q4-e4")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--in-caches", action="store_true")
    options = parser.parse_args()
    if options.in_caches:
        for spec, tokens in product(options.formats.split(","), map(int, options.tokens.split(","))):
            in_caches(spec, tokens, options.seconds)
        return
    torch.set_num_threads(options.threads)
    peer = int4(options.size, options.size)
    for spec in options.formats.split(","):
        exact = layer(spec, options.size, "numba")
        weight = exact.dequantize()
        half, coarse = weight.bfloat16(), layer(spec, options.size, "numba-int8")
        if reason_of("numba-int8", spec):
            coarse = None
        for tokens in map(int, options.tokens.split(",")):
            x = torch.randn(tokens, options.size)
            y = x.bfloat16()
            calls = {
                "float32": partial(exact, x),
                "bfloat16": partial(exact, y),
                "dense float32": partial(linear, x, weight),
                "dense bfloat16": partial(linear, y, half),
            }
            if coarse is not None:
                calls["int8"] = partial(coarse, y)
            if peer is not None:
                calls["int4 of torch"] = partial(torch.ops.aten._weight_int4pack_mm_for_cpu, y, *peer)
            expected = x.double() @ weight.double().T
            for name, call in calls.items():
                if name == "int4 of torch":
                    continue  # another weight
                error = float((call().double() - expected).norm() / expected.norm())
                assert error < (1e-4 if name.endswith("float32") else 2e-2), (spec, tokens, name, error)
            found = shortest(calls, options.seconds)
            used = found["bfloat16"][1]
            times = ", ".join(f"{name} {clock:.0f} ({own:.0f})" for name, (clock, own) in found.items())
            print(
                f"{spec}, {tokens}: {times}; {1e3 * used / options.size**2:.3f} ns, {used / found['dense bfloat16'][1]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
