"""Fused products of the block code on one GPU: held against float64 first, then timed beside cuBLAS FP16.

    python bench/products_block_gpu.py [--presets 4 3] [--tokens 1 8] [--many 256 2048] [--shapes 57344x8192 ...]

Times are medians of CUDA graph replays, in microseconds for one product; weights take turns so that none is read from a
cache. `alone`: each kernel starts when the one before it has ended; `in a row`: as layers run them, where on Hopper a kernel
may start while the one before it ends; `wide kernel`: that one, where the backend may choose torch's product. Activations are
prepared inside the products. Ratios are to cuBLAS FP16 with as many tokens in the same run. The last line is JSON.
--keep-going times what failed its check too, and says so.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gpu_times import SHAPES, copies, copy_bandwidth, microseconds
from seedlm import nvrtc
from seedlm.codes.block import packing
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.block.kernels import launch
from seedlm.codes.block.kernels.backends import TorchBackend
from seedlm.codes.block.kernels.cuda import CudaBackend

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 5e-3, torch.float32: 2e-3}
BACKEND = CudaBackend()


def random_parts(format: BlockFormat, out: int, width: int) -> dict[str, Tensor]:
    """Parts of a weight on the GPU: any seed and coefficients, exponents as close together as a layer's are."""
    blocks = format.blocks_per_row(width)
    low, high = format.coefficient_range
    seeds = torch.randint(1, format.num_seeds + 1, (out, blocks))
    exponents = torch.randint(-2, 2, (out, blocks))
    coefficients = torch.randint(low, high + 1, (out, blocks, format.num_coefficients))
    words = packing.pack(seeds, exponents, coefficients, format)
    return {"words": words.cuda(), "exponent_bias": torch.tensor([-9], dtype=torch.int32, device="cuda")}


def random_words(format: BlockFormat, out: int, width: int) -> list[Tensor]:
    """A prepared weight for timing: all words alike likely."""
    shape = (out, format.words_per_row(width))
    words = torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).to(torch.int32)
    parts = {"words": words, "exponent_bias": torch.zeros(1, dtype=torch.int32, device="cuda")}
    return BACKEND.prepare(parts, format, (out, width))


def hard_inputs(tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Activations that make kernels fail: outlier channels, zeros, large numbers, subnormal numbers."""
    normal = torch.randn(tokens, width, device="cuda")
    outliers = normal.clone()
    outliers[:, ::97] *= 100
    return {
        "normal": normal.to(dtype),
        "outliers": outliers.to(dtype),
        "zeros": torch.zeros_like(normal).to(dtype),
        "1e4": torch.full_like(normal, 1e4).to(dtype),
        "subnormal": (normal * (5e-7 if dtype == torch.float16 else 1e-38)).to(dtype),
    }


def relative_error(y: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    """Of the worst token; NaN counts as infinite. Outputs below the dtype's normal range are forgiven their grid."""
    grid = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134, torch.float32: 2.0**-150}[dtype] * reference.shape[1] ** 0.5
    error = (y.double() - reference).norm(dim=1)
    ratio = (error - grid).clamp_min(0) / reference.norm(dim=1).clamp_min(1e-300)
    return torch.where(error.isfinite(), ratio, torch.inf).max().item()


def multiply(x: Tensor, prepared: list[Tensor], format: BlockFormat, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """The backend's product; of many tokens the wide kernel's also where the backend would take torch's product."""
    if len(x) > 16:
        plan = launch.wide_plan(format, shape[1], len(x), 0, launch.has_vector_loads(prepared[0], format))
        if plan is not None:
            return launch.wide_product(x, *prepared, plan, bias)
    return BACKEND.linear(x, prepared, format, shape, bias)


def check(presets: list[str], counts: list[int]) -> dict[str, float]:
    """The largest relative error of each kernel and dtype over formats, shapes and inputs, against float64."""
    worst: dict[str, float] = {}
    for format in map(PRESETS.__getitem__, presets):
        for out, width in [(1000, 576), (520, 8192), (83, 1013), (16, 40)]:
            parts, shape = random_parts(format, out, width), (out, width)
            prepared = BACKEND.prepare(parts, format, shape)
            weight = BACKEND.dequantize(prepared, format, shape, torch.float32)
            definition = TorchBackend()
            if not torch.equal(
                weight, definition.dequantize(definition.prepare(parts, format, shape), format, shape, torch.float32)
            ):
                worst["dequantize"] = torch.inf
            for dtype in TOLERANCE:
                bias = torch.randn(out, device="cuda").to(dtype) * 1e-2
                for tokens in counts:
                    for name, x in hard_inputs(tokens, width, dtype).items():
                        shift = None if name == "subnormal" else bias
                        reference = x.double() @ weight.double().T + (0 if shift is None else shift.double())
                        if reference.abs().max() > torch.finfo(dtype).max / 2:
                            continue  # 1e4 by weights of more than 4 bits is more than float16 holds
                        y = multiply(x, prepared, format, shape, shift)
                        kernel = "vector" if tokens == 1 else "batch" if tokens <= 16 else "wide"
                        key = f"{kernel} {str(dtype).removeprefix('torch.')}" + (" outliers" if name == "outliers" else "")
                        worst[key] = max(worst.get(key, 0.0), relative_error(y, reference, dtype))
    return worst


def dense(out: int, width: int, tokens: list[int]) -> dict[int, float]:
    """Times of FP16 weights through cuBLAS, by tokens."""
    weights = [torch.randn(out, width, device="cuda", dtype=torch.float16) for _ in range(copies(2 * out * width))]
    inputs = {count: torch.randn(count, width, device="cuda", dtype=torch.float16) for count in tokens}
    return {count: microseconds([lambda w=w, x=x: x @ w.T for w in weights]) for count, x in inputs.items()}


def measure(format: BlockFormat, out: int, width: int, tokens: int) -> dict[str, float]:
    """Times of one product with `tokens` tokens; of the weight's dequantizing for 0."""
    shape = (out, width)
    weights = [random_words(format, out, width) for _ in range(copies(4 * out * format.words_per_row(width)))]
    if not tokens:
        weights = weights[:2]
        return {"alone": microseconds([lambda w=w: BACKEND.dequantize(w, format, shape, torch.float16) for w in weights])}
    x = torch.randn(tokens, width, device="cuda", dtype=torch.float16)
    times = {"in a row": microseconds([lambda w=w: BACKEND.linear(x, w, format, shape, None) for w in weights])}
    vector_loads = launch.has_vector_loads(weights[0][0], format)
    if tokens > 16:
        times["wide kernel"] = microseconds([lambda w=w: multiply(x, w, format, shape, None) for w in weights])
    alone = launch.plan(format, shape, tokens, 0, vector_loads, overlap=False)
    if alone is not None:
        times["alone"] = microseconds([lambda w=w: launch.product(x, *w, alone, None) for w in weights])
    return times


def rows(options: argparse.Namespace, copy: float) -> Iterator[dict[str, Any]]:
    """Measure and print, line by line."""
    for text in options.shapes:
        out, width = map(int, text.split("x"))
        counts = [*options.tokens, *options.many]
        base = dense(out, width, counts)
        print(f"{text}: cuBLAS FP16 " + ", ".join(f"{count} tokens {time:.1f} us" for count, time in base.items()), flush=True)
        for name in options.presets:
            format = PRESETS[name]
            stored = 4 * out * format.words_per_row(width)
            for count in counts:
                times = measure(format, out, width, count)
                ratios = {key: base[count] / time for key, time in times.items()}
                rate = stored / times.get("alone", times["in a row"]) / 1e6
                print(
                    f"  {name:>3} bit {count:4} tokens "
                    + ", ".join(f"{key} {time:8.1f} us {ratios[key]:5.2f}x" for key, time in times.items())
                    + f"; {rate:5.2f} TB/s = {rate / copy:4.0%} of copy",
                    flush=True,
                )
                yield {"shape": text, "preset": name, "tokens": count, "us": times, "ratio": ratios, "TB/s": rate}
            if options.dequantize:
                time = measure(format, out, width, 0)["alone"]
                rate = (stored + 2 * out * width) / time / 1e6
                print(f"  {name:>3} bit dequantize {time:8.1f} us; {rate:5.2f} TB/s = {rate / copy:4.0%} of copy", flush=True)
                yield {"shape": text, "preset": name, "tokens": 0, "us": {"alone": time}, "TB/s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["4", "3"])
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--many", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--shapes", nargs="*", default=SHAPES)
    parser.add_argument("--checked", type=int, nargs="*", default=[1, 5, 16, 70, 300], help="tokens of the products checked")
    parser.add_argument("--dequantize", action="store_true")
    parser.add_argument("--keep-going", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available() or (reason := nvrtc.reason_unavailable()):
        sys.exit("no CUDA device" if not torch.cuda.is_available() else reason)
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    errors = check(options.presets, options.checked)
    print(f"{device}, torch {torch.__version__}; largest relative errors against float64:", flush=True)
    print("  " + ", ".join(f"{key} {error:.1e}" for key, error in errors.items()), flush=True)
    limits = {key: TOLERANCE[getattr(torch, key.split()[1])] if " " in key else 0.0 for key in errors}
    wrong = [key for key, error in errors.items() if not error <= limits[key]]
    if wrong and not options.keep_going:
        sys.exit(f"wrong: {', '.join(wrong)}")
    copy = copy_bandwidth(torch.device("cuda"))
    print(f"copy {copy:.2f} TB/s" + (f"; WRONG: {', '.join(wrong)}" if wrong else ""), flush=True)
    table = list(rows(options, copy))
    result = {"device": device, "torch": torch.__version__, "copy TB/s": copy, "errors": errors, "wrong": wrong, "rows": table}
    print(json.dumps(result, default=float))


if __name__ == "__main__":
    main()
