"""Squared relative error ||W - W^||^2 / ||W||^2 of every preset and every data-free baseline, on weights alone.

    python bench/weight_space.py results/weight_space.json --model "label=FOLDER=PATTERN" ...

Sources: independent numbers from N(0,1), from Student's t with 4 degrees of freedom, and N(0,1) with 1 % of them ten times as
large; 512 rows of 4096. Then the linear layers of models whose names match a glob, taken together. Bits are those really
stored for the source's shapes; the bound on what R bits can do for N(0,1) is 4^-R (Shannon).
"""

import argparse
import json
import time
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from seedlm import encode
from seedlm.codes.base import stored_bits
from seedlm.codes.block.format import PRESETS
from seedlm.device import choose_device
from seedlm.evaluation.baselines import round_trip
from seedlm.evaluation.methods import METHODS, baseline_names
from seedlm.integrations.transformers import models
from seedlm.modeling.quantize import choose_modules

SHAPE = (512, 4096)


def synthetic() -> dict[str, tuple[str, list[Tensor]]]:
    """Source -> heading and weights, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SHAPE, generator=generator)
    chi = torch.randn((4, *SHAPE), generator=generator).square().sum(0)
    outlier = torch.rand(SHAPE, generator=generator) < 0.01
    return {
        "normal": ("N(0,1)", [normal]),
        "student": ("Student t(4)", [normal / (chi / 4).sqrt()]),
        "outliers": ("1 % outliers", [torch.where(outlier, 10 * normal, normal)]),
    }


def layers(folder: str, pattern: str) -> list[Tensor]:
    """The weights that we would compress of the modules that match."""
    model = models.load_model(Path(folder), device=torch.device("cpu"))
    return [
        model.get_parameter(f"{name}.weight").detach().float()
        for name in choose_modules(model, PRESETS["4"])
        if fnmatchcase(name, pattern)
    ]


def measure(name: str, weights: list[Tensor]) -> tuple[float, float]:
    """Bits a weight, and the squared relative error."""
    stored = error = norm = 0.0
    for weight in weights:
        if name.startswith("seedlm-"):
            format = PRESETS[name.removeprefix("seedlm-")]
            _, squared = encode(weight, format)
            stored += stored_bits(format, *weight.shape)
        else:
            found, bits = round_trip(weight, name)
            squared = float((weight.double() - found.double()).square().sum())
            stored += bits
        error += squared
        norm += float(weight.double().square().sum())
    return stored / sum(weight.numel() for weight in weights), error / norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", default=[], help="label=FOLDER=GLOB")
    options = parser.parse_args()
    sources = synthetic()
    for number, argument in enumerate(options.model):
        label, folder, pattern = argument.split("=")
        sources[f"model{number}"] = (label, layers(folder, pattern))
    device = choose_device("auto")
    sources = {key: (label, [weight.to(device) for weight in weights]) for key, (label, weights) in sources.items()}
    names = [f"seedlm-{preset}" for preset in PRESETS]
    names += [name for name in baseline_names() if not METHODS[name.rpartition("-")[0]].calibrated]
    rows, start = [], time.monotonic()
    for name in names:
        errors = {key: measure(name, weights) for key, (_, weights) in sources.items()}
        rows.append({"name": name, "bits_per_weight": errors["normal"][0], "errors": errors})
        print(
            name,
            *(f"{bits:.3f} b {error:.5f}" for bits, error in errors.values()),
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    results = {"sources": {key: label for key, (label, _) in sources.items()}, "device": str(device), "rows": rows}
    options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
