"""The CPU seed search against plain brute force in torch, in one run: `make bench`, or with the names of presets.

Checked first: the same codes and scores as scoring every seed, bit for bit. Then timed: best and median of several runs of
the search alone, from float32 blocks to codes. Brute force is the paper's Algorithm 3 in float32 tensor operations, 4,096
seeds at a time; it picks coefficients with one rounding, the search with all of them. The last line is JSON.
"""

import json
import platform
import statistics
import sys
import time

import torch

from seedlm.codes.block.basis import basis, generator
from seedlm.codes.block.encode import reason_no_search
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.block.search import torch_search

BIAS = -4
BLOCKS = {"numba": 1 << 16, "torch": 1024, "brute force": 32}
RUNS = 5


def main() -> None:
    reason = reason_no_search("numba", torch.device("cpu"))
    if reason:
        raise SystemExit(reason)
    from seedlm.codes.block.search import numba_search

    results = {}
    for name in sys.argv[1:] or ("4", "3"):
        format = PRESETS[name]
        blocks = torch.randn(BLOCKS["numba"], format.block_size, generator=torch.Generator().manual_seed(0))
        check(numba_search.search, blocks[:8], format)
        brute = plain_brute_force(format)
        speeds = {
            "numba": rate(lambda: list(numba_search.search(blocks, BIAS, format)), blocks.numel()),  # noqa: B023
            "torch": rate(lambda: list(torch_search.search(blocks[: BLOCKS["torch"]], BIAS, format)), BLOCKS["torch"] * format.block_size),  # noqa: B023, E501
            "brute force": rate(lambda: brute(blocks[: BLOCKS["brute force"]]), BLOCKS["brute force"] * format.block_size),  # noqa: B023
        }  # fmt: skip
        for label, (best, median) in speeds.items():
            times = best / speeds["brute force"][0]
            print(
                f"{name} bit  {label:12} {best / 1e6:8.4f} M weights/s (median {median / 1e6:.4f})  {times:8.1f} x brute force"
            )
        results[name] = {label: {"weights_per_s": best, "median": median} for label, (best, median) in speeds.items()}
    facts = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({**facts, "search": results}))


def check(search, blocks: torch.Tensor, format: BlockFormat) -> None:
    expected, expected_scores = torch_search.brute_force(blocks, BIAS, format)
    ((found, scores),) = search(blocks, BIAS, format)
    assert torch.equal(scores, expected_scores)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def rate(run, weights: int) -> tuple[float, float]:
    """Best and median weights/s; the first run, which compiles and fills tables, does not count."""
    run()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return weights / min(seconds), weights / statistics.median(seconds)


def plain_brute_force(format: BlockFormat, chunk: int = 4096):
    """Algorithm 3 in float32: coefficients by pseudo-inverse, one rounding, error, argmin; `chunk` seeds at a time."""
    matrix = generator(torch.arange(format.num_seeds), format).float() / format.divisor  # [N, C, P]
    pinv = basis(format).pinv.permute(2, 0, 1) * format.divisor  # [N, P, C]
    low, high = format.coefficient_range

    def run(blocks: torch.Tensor) -> torch.Tensor:
        best, winner = torch.full((len(blocks),), torch.inf), torch.zeros(len(blocks), dtype=torch.int64)
        for first in range(0, format.num_seeds, chunk):
            u, inverse = matrix[first : first + chunk], pinv[first : first + chunk]
            t = torch.einsum("npc,bc->nbp", inverse, blocks)
            mantissa, exponent = torch.frexp(t.abs().amax(-1) / (high + 0.5))
            scale = torch.ldexp(torch.ones(()), torch.where(mantissa == 0.5, exponent - 1, exponent)).unsqueeze(-1)
            q = (t / scale).round().clamp(low, high) * scale
            error = (torch.einsum("ncp,nbp->nbc", u, q) - blocks).square().sum(-1)
            least, index = error.min(0)
            winner = torch.where(least < best, index + first, winner)
            best = torch.minimum(least, best)
        return winner

    return run


if __name__ == "__main__":
    main()
