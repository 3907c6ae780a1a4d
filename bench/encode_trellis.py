"""The trellis encoder: checked against the reference first, then timed from targets in memory to packed words there.

    python bench/encode_trellis.py [--device cuda] [--rates 2 3 4] [--state-bits 16 12] [--rows 256] [--columns 4096]
    python bench/encode_trellis.py --errors 8 [--columns 1024] [--rows 256] [--overlap 128] [--free]

Prints a table and, last, one JSON line. Per format: million weights/s of the search with the default overlap, all of both runs
and of the tracebacks counted; of a panel of 64 columns with feedback; and the mean squared error on N(0,1) at exactly R bits.
On a CPU, rates are also given per second of processor time, which other work on the machine does not change.

`--errors N` times nothing: it encodes N matrices of N(0,1), ROWS x COLUMNS, as the product does (cyclic streams, a rounded
scale a row), and gives the mean squared error at R bits with its standard error over the matrices. `--free` adds, for the first
of them, the least error of streams that begin in any state, as if naming it took no bits; and what that is worth at R bits, its
L - R bits a stream counted: 4^((L - R) / ROWS) times as much.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from seedlm.codes.encoded import encode
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


def matrix_errors(format: TrellisFormat, device: torch.device, count: int, columns: int, free: bool) -> dict[str, float | str]:
    """Errors of whole matrices, relative to their squared norms; rows are those of one strip."""
    found, first = [], None
    for seed in range(count):
        weight = torch.randn(format.sequence_rows, columns, generator=torch.Generator().manual_seed(seed)).to(device)
        first = weight if first is None else first
        found.append(encode(weight, format)[1] / float(weight.double().square().sum()))
    mean, spread = statistics.mean(found), statistics.stdev(found) / count**0.5 if count > 1 else float("nan")
    result: dict[str, float | str] = {
        "format": format.spec,
        "error": float(f"{mean:.5g}"),
        "standard error": float(f"{spread:.2g}"),
    }
    result["times 4^R"] = float(f"{mean * 4**format.rate:.4f}")
    if free and first is not None:
        least = free_error(first.T, format)
        named = least * 4 ** ((format.state_bits - format.rate) / format.sequence_rows)
        result |= {
            "these": float(f"{found[0]:.4g}"),
            "free": float(f"{least:.4g}"),
            "free, start counted": float(f"{named:.4g}"),
        }
    return result


def free_error(rows: torch.Tensor, format: TrellisFormat) -> float:
    """The least error of sequences [n, T] over streams that begin in any state, at the default gain, in float32."""
    gain = GAINS[format.state_bits][format.rate] / codec.VALUE_STD
    values = codec.value_table(format.trellis, rows.device).float() * gain
    best = []
    for part in rows.float().split(32):
        costs = (part[:, :1] - values).square_()
        for column in part.T[1:]:
            least = costs.unflatten(1, (-1, 1 << format.rate)).amin(-1)  # by the bits that the next state keeps, its lowest
            costs = (
                (column[:, None] - values).square_().unflatten(1, (1 << format.rate, -1)).add_(least.unsqueeze(1)).flatten(1)
            )
        best.append(costs.amin(1).double())
    return float(torch.cat(best).sum() / rows.double().square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rates", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--state-bits", type=int, nargs="+", default=[16, 12])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--columns", type=int, help="sequences; 33,792 on a GPU and 256 on a CPU if not given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--errors", type=int, metavar="N", help="encode N whole matrices and time nothing")
    parser.add_argument("--overlap", type=int, help="rows on each side of a seam; default: the product's")
    parser.add_argument("--free", action="store_true", help="beside --errors: streams that begin in any state")
    options = parser.parse_args()
    if options.overlap:
        OVERLAPS.update(dict.fromkeys(OVERLAPS, options.overlap))
    device = torch.device(options.device)
    columns = options.columns or (33_792 if device.type == "cuda" else 256)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    formats = [
        TrellisFormat(rate=rate, state_bits=bits, sequence_rows=options.rows)
        for bits in options.state_bits
        for rate in options.rates
        if bits == 16 or rate <= 6
    ]
    if not options.errors:
        for format in formats:
            check(format, device)
        print(f"{name}, torch {torch.__version__}, search {choose(device)}: bits equal to the reference's\n")
    results = []
    for format in formats:
        if options.errors:
            results.append(matrix_errors(format, device, options.errors, columns, options.free))
        else:
            results.append(measure(format, device, columns, options.rows, options.repeats))
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    print(json.dumps({"device": name, "columns": columns, "rows": options.rows, "overlap": OVERLAPS, "results": results}))


if __name__ == "__main__":
    main()
