"""What the choices of FORMAT.md cost or gain, measured on normal weights with all 65,535 seeds.

The paper leaves the exponent rule, the rounding and row tails open. Each line is a relative error ||W - W^|| / ||W||, 4 bit and
3 bit. The exponent rules are tried by replacing the one in the codec, which the torch search then uses.
"""

import sys

import torch

from seedlm.codes.block import codec
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.block.search import torch_search
from seedlm.codes.encoded import encode

BIAS = -4

FORMATS = {name: PRESETS[name] for name in ("4", "3")}


def relative_error(blocks: torch.Tensor, format: BlockFormat, rounding: str) -> float:
    scores = torch.cat([scores for _, scores in torch_search.search(blocks, BIAS, format, rounding)])
    energy = blocks.double().square().sum()
    return float((1 + scores.sum() / format.divisor**2 / energy).sqrt())


def rule(change):
    """`codec.best_exponent` with another formula for the exponent of max|t|."""

    def best_exponent(solution, exponent_bias, format):
        low, high = format.exponent_range
        largest = solution.abs().amax(-1)
        return torch.where(largest == 0, low, change(largest).long() - exponent_bias).clamp(low, high)

    return best_exponent


RULES = {
    "ceil(log2(max|t| / 7.5)), by frexp (kept)": codec.best_exponent,
    "floor(log2 max|t|) - 2": rule(lambda t: torch.frexp(t)[1] - 3),
    "floor(log2 max|t|), as printed in the paper": rule(lambda t: torch.frexp(t)[1] - 1),
}


def main(count: int) -> None:
    blocks = {
        name: torch.randn(count, format.block_size, generator=torch.Generator().manual_seed(1))
        for name, format in FORMATS.items()
    }

    def line(label: str, measure) -> None:
        print(f"{label:48}" + "".join(f"{measure(name, format):9.4f}" for name, format in FORMATS.items()), flush=True)

    print(f"{'':48}" + "".join(f"{name + ' bit':>9}" for name in FORMATS))
    for label, function in RULES.items():
        codec.best_exponent = function
        line(f"nearest, {label}", lambda name, format: relative_error(blocks[name], format, "nearest"))
    codec.best_exponent = RULES["ceil(log2(max|t| / 7.5)), by frexp (kept)"]
    line("best of all roundings at three exponents", lambda name, format: relative_error(blocks[name], format, "best"))

    def tail(name: str, format: BlockFormat) -> float:
        """Error of the last C / 2 weights of rows that end in the middle of a block."""
        weight = torch.randn(count, format.block_size * 3 // 2, generator=torch.Generator().manual_seed(2))
        encoded, _ = encode(weight, format)
        end = slice(format.block_size, None)
        return float((encoded.dequantize()[:, end] - weight[:, end]).norm() / weight[:, end].norm())

    line("the half block at a row's end, zero-padded", tail)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
