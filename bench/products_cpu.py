"""One token through one layer on a CPU: each backend of the trellis code and a dense layer, checked, then timed in turn.

python bench/products_cpu.py --size 2048 --threads 2
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from seedlm.codes.registry import parse_format
from seedlm.modeling.linear import SeedLinear


def layer(bits: str, size: int, backend: str) -> SeedLinear:
    """Random codes: every word is a valid one."""
    torch.manual_seed(0)
    made = SeedLinear(size, size, parse_format(bits), dtype=torch.float32, backend=backend)
    made.weight_words.random_(-(2**31), 2**31 - 1)
    made.weight_scales.fill_(1.0)
    made.weight_scale.fill_(1.0)
    return made


def milliseconds(call: Callable[[], Tensor], repeats: int = 7) -> float:
    """The shortest of some calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def main() -> None:
    """Print milliseconds, and how many times the dense layer's that is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(1, options.size)
    for bits in ("4", "3", "2", "4-fast"):
        layers = {backend: layer(bits, options.size, backend) for backend in ("numba", "torch")}
        with torch.no_grad():
            weight = layers["torch"].dequantize()
            calls = {name: (lambda made=made: made(x)) for name, made in layers.items()}
            calls["dense"] = lambda weight=weight: torch.nn.functional.linear(x, weight)
            for call in calls.values():
                torch.testing.assert_close(call(), calls["dense"](), rtol=1e-3, atol=1e-3 * float(calls["dense"]().abs().max()))
            found = {name: milliseconds(call) for name, call in calls.items()}
        print(
            f"{bits:7}", ", ".join(f"{name} {ms:.2f} ms ({ms / found['dense']:.1f})" for name, ms in found.items()), flush=True
        )


if __name__ == "__main__":
    main()
