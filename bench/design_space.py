"""Measure the whole design space (paper Section 3.4) on a GPU: what docs/design.md is written from.

    python bench/design_space.py OUT.json [--model FOLDER] [--blocks 512] [--final-blocks 8192] [--finalists 6] [--seconds 150]

Every candidate of seven budgets is measured on a few normal blocks; the best of each budget again on many, and on a model's
weights; then error against seed bits, for every preset. Stops opening new work when the time is up, and says so.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.compress.design import measure, model_blocks, normal_blocks
from seedlm.compress.design_space import candidates
from seedlm.device import choose_device
from seedlm.storage.source import open_source

QUICK = 64
"""Contenders of a block up to which a search is quick; one with more is measured with `EVERY` seeds, on fewer blocks."""
EVERY = 65535
BUDGETS = (2, 2.5, 3, 3.5, 4, 4.5, 5)
CURVE_SEED_BITS = range(4, 21)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--final-blocks", type=int, default=8192)
    parser.add_argument("--finalists", type=int, default=6, help="of each kind and budget")
    parser.add_argument("--seconds", type=float, default=600, help="for the grid and for the rest, each")
    options = parser.parse_args()
    device = choose_device("auto")
    results = {
        "device": str(device),
        "torch": torch.__version__,
        "blocks": options.blocks,
        "final_blocks": options.final_blocks,
    }
    if device.type == "cuda":
        results["device"] = torch.cuda.get_device_name(device)

    def run(name: str, formats: Iterable[BlockFormat], samples: torch.Tensor, seconds: float, kept: int = 256) -> None:
        start, formats = time.monotonic(), list(formats)
        rows = results[name] = []
        for measured in measure(formats, samples.to(device), kept=kept):
            rows.append(measured.to_dict())
            if time.monotonic() - start > seconds:
                print(f"{name}: out of time", flush=True)
                break
        print(f"{name}: {len(rows)} of {len(formats)} formats in {time.monotonic() - start:.1f} s", flush=True)
        options.out.write_text(json.dumps(results))

    grid = {bits: candidates(bits) for bits in BUDGETS}
    run(
        "grid",
        dict.fromkeys(format for formats in grid.values() for format in formats),
        normal_blocks(options.blocks),
        options.seconds,
    )
    rows = {row["format"]: row for row in results["grid"]}
    finalists, open_ended = dict.fromkeys(PRESETS.values()), {}
    for formats in grid.values():
        known = sorted((f for f in formats if f.spec in rows), key=lambda f: rows[f.spec]["nmse"])
        quick = [f for f in known if rows[f.spec]["contenders"] <= QUICK]
        wide = [f for f in quick if f.exponent_bits == 4]
        for kind in (quick, wide, [f for f in wide if f.num_coefficients <= 4 and f.block_size <= 16]):
            finalists |= dict.fromkeys(kind[: options.finalists])
        known.sort(key=lambda f: rows[f.spec]["at_least"])
        open_ended |= dict.fromkeys(known[: options.finalists // 2])
    run("normal", finalists, normal_blocks(options.final_blocks, seed=1), options.seconds)
    run("open ended", open_ended, normal_blocks(options.blocks // 4, seed=3), options.seconds / 2, kept=EVERY)
    curves = [
        dataclasses.replace(preset, seed_bits=k)
        for preset in PRESETS.values()
        for k in CURVE_SEED_BITS
        if preset.block_bits - preset.seed_bits + k <= 63
    ]
    run("curves", curves, normal_blocks(options.final_blocks // 4, seed=2), options.seconds / 4)
    if options.model:
        run("model", finalists, model_blocks(open_source(options.model), options.final_blocks), options.seconds)


if __name__ == "__main__":
    sys.exit(main())
