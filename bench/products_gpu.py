"""Fused products of the trellis code on one GPU: held against float64 first, then timed beside cuBLAS FP16 and tinygemm.

    python bench/products_gpu.py [--bits 4 3 2] [--tokens 1 8] [--many 256 2048] [--shapes 57344x8192 ...]

Times are medians of CUDA graph replays, in microseconds for one product; weights take turns so that none is read from a
cache. `product` is the product alone, each kernel after the one before it has ended (`next early`: it may start before); `with
input` is the rotation and quantisation of x and the product, which overlap on Hopper; `one launch` is a kernel that does both,
as a layer runs them where x is short. Ratios are to cuBLAS FP16 at the same tokens in the same run. The last line is JSON.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_times import SHAPES, copies, copy_bandwidth, microseconds
from seedlm import nvrtc
from seedlm.codes import hadamard
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.kernels import launch, sources
from seedlm.codes.trellis.kernels.cuda import CudaBackend, CudaInt8Backend

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3, torch.float32: 1e-4}
EXACT, INT8 = CudaBackend(), CudaInt8Backend()


def random_weight(format: TrellisFormat, out: int, width: int) -> list[Tensor]:
    """Parts of a weight on the GPU: every word is a code, so random ones are as good as any."""
    shape = (format.segments(out), width * format.rate)
    words = torch.randint(-(2**31), 2**31, shape, device="cuda", dtype=torch.int64).to(torch.int32)
    scales = (torch.rand(out, device="cuda") * 0.02 + 0.01).half()
    return [launch.padded(words, format, width), scales, torch.full((1,), 0.125, device="cuda")]


def hard_inputs(tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Activations that make kernels fail: outliers, zeros, large, subnormal numbers."""
    normal = torch.randn(tokens, width, device="cuda")
    outliers = normal.clone()
    outliers[:, ::97] *= 100
    smallest = 6e-8 if dtype == torch.float16 else 1e-38
    return {
        "normal": normal.to(dtype),
        "outliers": outliers.to(dtype),
        "zeros": torch.zeros_like(normal).to(dtype),
        "1e4": torch.full_like(normal, 1e4).to(dtype),
        "subnormal": (normal * smallest * 8).to(dtype),
    }


def relative_error(y: Tensor, reference: Tensor) -> float:
    """Of the worst token. Infinite for NaN."""
    error = (y.double() - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-300)
    return torch.nan_to_num(error, nan=torch.inf).max().item()


def check(bits: list[int], everything: bool) -> int:
    """Products and weights of formats, sizes and inputs against float64; exits at the first that is wrong.

    Those that are timed, or many more: some minutes, nearly all of which goes to compiling kernels.
    """
    count = 0
    cases = [(TrellisFormat(rate=rate), 520, 576) for rate in (range(1, 9) if everything else bits)]
    if everything:
        cases += [(TrellisFormat(rate=rate, state_bits=12, sequence_rows=128), 1000, 208) for rate in (2, 3, 4)]
        cases += [(TrellisFormat(rate=4, sequence_rows=rows, transform=64), 700, 100) for rows in (32, 96, 512)]
        cases += [(TrellisFormat(rate=3, transform=512), 130, 1100), (TrellisFormat(rate=2), 33, 40000)]
    for format, out, width in cases:
        parts = random_weight(format, out, width)
        words = parts[0][:, : width * format.rate].contiguous()
        rotated = codec.rotated_weight(words, *parts[1:], format, (out, width))
        weight = torch.full((out, width), torch.nan, device="cuda")
        launch.dequantize(weight, parts, format, original=True)
        if not torch.equal(weight, hadamard.inverse(rotated, format.transform)):
            sys.exit(f"{format} {out}x{width}: dequantize differs from the definition")
        for tokens in (1, 3, 8, 16, 70, 1100):
            for dtype in TOLERANCE:
                for name, x in hard_inputs(tokens, width, dtype).items():
                    reference = hadamard.forward(x.double(), format.transform) @ rotated.double().T
                    for backend in (EXACT, INT8):
                        y = backend.linear(x, parts, format, (out, width), None)
                        if reference.abs().max() > 60000 and dtype == torch.float16:
                            continue
                        allowed = TOLERANCE[dtype] + (2.5e-2 if backend is INT8 else 0.0)
                        if name == "subnormal":  # of outputs or of scales: few digits are left
                            allowed = 0.5 if dtype == torch.float16 else allowed + 1e-3
                        if relative_error(y, reference) > allowed:
                            sys.exit(f"{format} {out}x{width}, {tokens} tokens, {dtype}, {name}, {backend.name}: wrong")
                        count += 1
    return count


def dense(out: int, width: int, tokens: int) -> float:
    """Time of FP16 weights through cuBLAS."""
    weights = [torch.randn(out, width, device="cuda", dtype=torch.float16) for _ in range(copies(2 * out * width))]
    x = torch.randn(tokens, width, device="cuda", dtype=torch.float16)
    return microseconds([lambda w=w: x @ w.T for w in weights])


def tinygemm(out: int, width: int, tokens: int) -> float | None:
    """Time of torch's own 4-bit product, groups of 128, bfloat16; None where it is missing."""
    try:
        packed = []
        for _ in range(copies(out * width // 2)):
            codes = torch.randint(0, 256, (out, width // 2), device="cuda", dtype=torch.uint8)
            packed.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        tables = torch.randn(width // 128, out, 2, device="cuda", dtype=torch.bfloat16)
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        return microseconds([lambda w=w: torch.ops.aten._weight_int4pack_mm(x, w, 128, tables) for w in packed])
    except (RuntimeError, AttributeError):
        return None


def measure(format: TrellisFormat, out: int, width: int, tokens: int, kind: launch.Kind | None) -> dict[str, float]:
    """Times of the input's part, of the product alone, and of both as a layer runs them; kind None: as the backend chooses."""
    shape, dtype = (out, width), torch.float16
    weights = [random_weight(format, out, width) for _ in range(copies(out * width * format.rate // 8))]
    x, y = torch.randn(tokens, width, device="cuda", dtype=dtype), torch.empty(tokens, out, device="cuda", dtype=dtype)
    if kind is None:
        shared = EXACT.transform(x, format, width)
        return {
            "input": microseconds([lambda: EXACT.transform(x, format, width)] * 10),
            "product": microseconds([lambda w=w: EXACT.linear(x, w, format, shape, None, shared) for w in weights]),
            "with input": microseconds([lambda w=w: EXACT.linear(x, w, format, shape, None) for w in weights]),
        }

    def steps(overlap: bool) -> tuple[Callable[[], None], Callable[[list[Tensor]], None]]:
        inputs = launch.input_plan(format.transform, width, tokens, dtype, kind, 0, overlap)
        plan = launch.product_plan(format, (shape,), tokens, dtype, kind, 0, None, overlap, own_input=False)
        work = torch.empty(inputs.size, dtype=torch.int32, device="cuda")
        launch.rotate(x, inputs, work)
        return (lambda: launch.rotate(x, inputs, work)), (lambda w: launch.product([y], [w], plan, work, [None], inputs))

    rotate, multiply = steps(overlap=False)
    rotate_over, multiply_over = steps(overlap=True)

    def both(w: list[Tensor]) -> None:
        rotate_over()
        multiply_over(w)

    times = {
        "input": microseconds([rotate] * 20),
        "product": microseconds([lambda w=w: multiply(w) for w in weights]),
        "next early": microseconds([lambda w=w: multiply_over(w) for w in weights]),
        "with input": microseconds([lambda w=w: both(w) for w in weights]),
    }
    if sources.own_input(width, tokens):
        own = launch.product_plan(format, (shape,), tokens, dtype, kind, 0)
        times["one launch"] = microseconds([lambda w=w: launch.product([y], [w], own, x, [None]) for w in weights])
    return times


def rows(options: argparse.Namespace, copy: float) -> Iterator[dict[str, object]]:
    """Measure and print, line by line. Many tokens heat the card: they come last, cuBLAS timed beside them."""
    for text in options.shapes:
        out, width = map(int, text.split("x"))
        for tokens in (*options.tokens, *options.many):
            few = tokens in options.tokens
            base = dense(out, width, tokens)
            print(f"{text}, {tokens} tokens: cuBLAS FP16 {base:.1f} us")
            if few and (time := tinygemm(out, width, tokens)):
                print(f"  tinygemm 4 bit {time:8.1f} us {base / time:5.2f}x", flush=True)
                yield {"shape": text, "what": "tinygemm", "bits": 4, "tokens": tokens, "product": time, "ratio": base / time}
            kinds: list[launch.Kind | None] = [None]
            if few:
                kinds = [kind for kind in ("exact", "int8") if tokens * launch.parts_of_token(kind) <= 16]
            for bits, kind in itertools.product(options.bits, kinds):
                times = measure(TrellisFormat(rate=bits), out, width, tokens, kind)
                rate = out * width * bits / 8 / times["product"] / 1e6
                ratios = {name: base / time for name, time in times.items() if name != "input"}
                print(
                    f"  {bits} bit {kind or 'many':6} "
                    + ", ".join(
                        f"{name} {time:.1f} us" + (f" {ratios[name]:.2f}x" if name in ratios else "")
                        for name, time in times.items()
                    )
                    + f"; {rate:.2f} TB/s, {rate / copy:.0%} of copy",
                    flush=True,
                )
                yield {"shape": text, "what": kind or "many", "bits": bits, "tokens": tokens, "cuBLAS": base} | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--many", type=int, nargs="*", default=[256, 2048])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--check-everything", action="store_true", help="formats too that are not timed")
    options = parser.parse_args()
    if not torch.cuda.is_available() or (reason := nvrtc.reason_unavailable()):
        sys.exit("no CUDA device" if not torch.cuda.is_available() else reason)
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    checked = check(options.bits, options.check_everything)
    print(f"{device}, torch {torch.__version__}: {checked} products checked against float64", flush=True)
    copy = copy_bandwidth(torch.device("cuda"))
    print(f"copy {copy:.2f} TB/s", flush=True)
    table = list(rows(options, copy))
    print(json.dumps({"device": device, "torch": torch.__version__, "copy TB/s": copy, "rows": table}, default=float))


if __name__ == "__main__":
    main()
