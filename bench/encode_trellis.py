"""The trellis encoder: checked against the reference first, then timed from targets in memory to packed words there.

    python bench/encode_trellis.py [--device cuda] [--rates 2 3 4] [--state-bits 16 12] [--rows 256] [--columns 4096]

Prints a table and, last, one JSON line. Per format: million weights/s of the search with the default overlap, all of both runs
and of the tracebacks counted; of a panel of 64 columns with feedback; and the mean squared error on N(0,1) at exactly R bits.
On a CPU, rates are also given per second of processor time, which other work on the machine does not change.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from seedlm.codes.trellis import codec
from seedlm.codes.trellis.encode import GAINS
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.codes.trellis.panel import Strips, encode_panel
from seedlm.codes.trellis.viterbi import OVERLAPS, choose, cost, viterbi


def seconds(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median wall and processor time of `run`, waiting for the device, after one warm-up."""
    run()
    wall, busy = [], []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin, processor = time.perf_counter(), time.process_time()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - begin)
        busy.append(time.process_time() - processor)
    return statistics.median(wall), statistics.median(busy)


def check(format: TrellisFormat, device: torch.device) -> None:
    """Compare with the reference on fresh targets, with padding rows and row weights. Exits if a bit differs."""
    count = 5 if format.state_bits == 16 else 37
    targets = torch.randn(count, 64) * codec.VALUE_STD
    weights = torch.exp(torch.randn(64))
    for valid, given in ((64, None), (51, weights)):
        expected = viterbi(targets, valid, format, row_weights=given, backend="reference")
        there = None if given is None else given.to(device)
        found = viterbi(targets.to(device), valid, format, row_weights=there)
        if not all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True)):
            sys.exit(f"{format}: the search on {device} differs from the reference")


def panel_run(format: TrellisFormat, device: torch.device, count: int, rows: int) -> Callable[[], object]:
    """A panel of 64 columns of `count` strips, with feedback."""
    one = torch.ones(count, rows, device=device)
    unit = one.double() * 2.0**-20
    weight = torch.randn(count, 64, rows, device=device) * codec.VALUE_STD
    coefficients = (torch.randn(1, 64, 64, device=device) * 2.0**16).round().double().triu(1)
    matrix = torch.zeros(count, dtype=torch.int32, device=device)
    strips = Strips(one, cost.row_roots(one), unit * 2.0**-20, 1 / unit, matrix)
    return lambda: encode_panel(weight, None, coefficients, strips, format.trellis, min(OVERLAPS[format.state_bits], rows // 2))


def measure(format: TrellisFormat, device: torch.device, columns: int, rows: int, repeats: int) -> dict[str, float | str]:
    """One format's row of the table."""
    normal = torch.randn(columns, rows, device=device)
    targets = normal * (codec.VALUE_STD / GAINS[format.state_bits][format.rate])
    wall, busy = seconds(lambda: viterbi(targets, rows, format), device, repeats)
    error = (viterbi(targets, rows, format)[1].float() - targets).square().mean() / targets.square().mean()
    strips = max(32, columns // 64)
    panel, _ = seconds(panel_run(format, device, strips, rows), device, 1)
    result: dict[str, float | str] = {
        "format": format.spec,
        "Mweights/s": round(columns * rows / wall / 1e6, 3),
        "panel Mweights/s": round(strips * 64 * rows / panel / 1e6, 3),
        "error": float(f"{float(error):.4g}"),
    }
    if device.type == "cpu":
        result["Mweights/s of processor time"] = round(columns * rows / busy / 1e6, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--state-bits", type=int, nargs="+", default=[16, 12])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, help="sequences; 33,792 on a GPU and 256 on a CPU if not given")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    columns = options.columns or (33_792 if device.type == "cuda" else 256)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    formats = [
        TrellisFormat(rate=rate, state_bits=bits, sequence_rows=options.rows)
        for bits in options.state_bits
        for rate in options.rates
        if bits == 16 or rate <= 6
    ]
    for format in formats:
        check(format, device)
    print(f"{name}, torch {torch.__version__}, search {choose(device)}: bits equal to the reference's\n")
    results = []
    for format in formats:
        results.append(measure(format, device, columns, options.rows, options.repeats))
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    print(json.dumps({"device": name, "columns": columns, "rows": options.rows, "overlap": OVERLAPS, "results": results}))


if __name__ == "__main__":
    main()
