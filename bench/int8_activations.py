"""What int8 activations cost in KL: the backends `cuda-int8` and `numba-int8` emulated, beside 16 bits and none.

    python bench/int8_activations.py MODEL wiki.test.raw [--bits 4-fast 3-fast 2-fast] [--feedback own none]
        [--windows 24] [--context 512] [--json results/int8_activations.json]

MODEL is a folder or a GGUF file. It is compressed as `seedlm compress` does it, embeddings and head in 6 bits too; what is made
is kept under WORK, where what is there is not made again. Then each packed linear layer, the head among them, becomes a dense
one whose weight is in the rotated basis, and a hook before it rotates its input (`hadamard`) and rounds that, in float32 by the
arithmetic of `quantize.cuh`. Look-ups read no activations. Every token is rounded, as if all had come
one by one: on a GPU a prompt of more than 16 tokens is multiplied in 16 bits.

    float32      as it is
    16 bits      integers of two int8 with one scale a token, the default of a GPU (`cuda`)
    cuda-int8    int8 with a scale for each 256 columns, a whole multiple of the token's, all of which together are bounded
    numba-int8   int8 with a scale of their own for each 256 columns, on a CPU
    one scale    int8 with one for the token, which no backend has

Before a window is scored, one layer of every shape is held against exact sums of integers in the rotated basis, on random x.
KL is to the unquantized model, in nats; the difference is to the same weights with float32 activations, over the same windows,
and so is its standard error; the share is of that model's KL. Windows are those of `seedlm evaluate --wikitext`. Rows of models
that were not asked for stay in the JSON as they are, if they are of the same windows.
"""

import argparse
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from seedlm import __version__, compress_checkpoint, observe_checkpoint
from seedlm.codes import hadamard
from seedlm.codes.trellis import codec
from seedlm.codes.trellis.kernels import sources
from seedlm.compress.feedback import Feedback
from seedlm.evaluation.perplexity import cut_windows, score_windows, summarize
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer
from seedlm.modeling.embedding import TiedLinear
from seedlm.modeling.linear import PackedModule, SeedLinear
from seedlm.modeling.quantize import dequantize_model
from seedlm.progress import Bars, Lines, Progress, say

TOLERANCE = 2e-6
"""Of the norm of products, beside exact sums: what float32 leaves."""

ROWS = 2048
"""Of a weight, whose products are checked."""


@dataclass(frozen=True)
class Rounding:
    """How activations become integers: in so many int8 parts, with a scale for so many columns (0: for a token)."""

    name: str
    parts: int = 1
    columns: int = 0
    multiples: bool = False  # scales are multiples of the token's

    def integers(self, rotated: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What `Quantizer` (quantize.cuh) makes of float32 [tokens, in]: whole numbers, in float32, of each scale; and it."""
        width = rotated.shape[-1]
        levels, base = sources.levels(width), sources.half_base(width, self.parts)
        limit = torch.tensor(float(levels * base + levels))  # a tensor, since a number over one is a reciprocal's multiple
        groups = rotated.split(self.columns or width, -1)
        largest = torch.cat([some.abs().amax(-1, keepdim=True) for some in groups], -1)
        multiples, many = torch.ones_like(largest), torch.ones_like(largest)
        if self.multiples:
            multiples, many = bounded_multiples(largest, levels)
            largest = largest.amax(-1, keepdim=True).expand_as(largest)
        boost = torch.where(largest < 2.0**-100, 2.0**100, 1.0)
        inverse = torch.where(largest > 0, limit / (largest * boost), 0.0) * (many / multiples)
        scales = largest / limit / many * multiples
        each = zip(groups, boost.split(1, -1), inverse.split(1, -1), scales.split(1, -1), strict=True)
        return [((some * up * factor).round(), scale) for some, up, factor, scale in each]

    def __call__(self, rotated: Tensor) -> Tensor:
        """What a layer's product is of."""
        return torch.cat([whole * scale for whole, scale in self.integers(rotated)], -1)


def bounded_multiples(largest: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Of a token's unit for its groups, whose largest magnitudes are [tokens, groups]; and what the largest group has."""
    top = largest.amax(-1, keepdim=True).clamp_min(1e-30)
    shares = (largest / top * 256).ceil().sum(-1, keepdim=True).clamp_min(1)
    budget = int(2e9 / (510 * sources.GROUP * levels)) - largest.shape[-1]
    many = (budget * 256 / shares).floor().clamp(1, 16)
    return (largest / top * many * 0.99999).ceil().clamp(1, 16), many.expand_as(largest)


ROUNDINGS = (
    Rounding("16 bits", parts=2),
    Rounding("cuda-int8", columns=sources.GROUP, multiples=True),
    Rounding("numba-int8", columns=sources.GROUP),
    Rounding("one scale"),
)


class Emulated:
    """A packed model with dense weights in the rotated basis, and its layers' inputs rounded in the way that is asked for."""

    def __init__(self, folder: Path) -> None:
        self.model = open_language_model(folder, dtype="float32")
        self.rounding: Rounding | None = None
        self._kept: tuple[Tensor | None, int, Rounding | None, Tensor] = None, 0, None, torch.empty(0)
        found = {name: module for name, module in self.model.named_modules() if isinstance(module, (SeedLinear, TiedLinear))}
        packed = {name: module.codes if isinstance(module, TiedLinear) else module for name, module in found.items()}
        dequantize_model(self.model, torch.float32)
        for name, codes in packed.items():
            layer, parts = self.model.get_submodule(name), codes.parts
            weight = codec.rotated_weight(parts["words"], parts["scales"], parts["scale"], codes.format, codes.shape)
            layer.weight = nn.Parameter(weight, requires_grad=False)  # of its own, if it was tied
            layer.register_forward_pre_hook(partial(self._read, transform=codes.format.transform))
        self.layers = len(packed)
        kinds = {(codes.format, codes.shape): name for name, codes in packed.items()}
        self.worst = max(self._error(name, packed[name]) for name in kinds.values())
        assert self.worst < TOLERANCE, f"{folder.name}: products are off by {self.worst:.1e}"

    def _read(self, layer: nn.Module, inputs: tuple[Tensor], transform: int) -> tuple[Tensor]:
        """Layers that read the same tensor share what is made of it."""
        (x,), rounding = inputs, self.rounding
        if self._kept[0] is not x or self._kept[1:3] != (transform, rounding):
            rotated = hadamard.forward(x.float(), transform)
            self._kept = x, transform, rounding, rotated if rounding is None else rounding(rotated)
        return (self._kept[3],)

    def _error(self, name: str, codes: PackedModule) -> float:
        """The largest error of a token's products, relative to their norm.

        Rounded ones are held against exact sums of integers, those of x as it is against the dequantized weight in float64.
        """
        x, layer = (
            torch.randn(6, codes.shape[1], generator=torch.Generator().manual_seed(1)) ** 3,
            self.model.get_submodule(name),
        )
        x[4], x[5] = 1e-33 * x[4], 0.0  # which needs the boost; which has no scale
        rows = slice(0, ROWS)
        values = codec.decode_values(codes.parts["words"], codes.format, codes.shape)[rows].long()
        factors = codes.parts["scales"][rows].double() * codes.parts["scale"].double()
        errors = []
        for self.rounding in (None, *ROUNDINGS):
            expected = x.double() @ codes.dequantize()[rows].double().T
            if self.rounding is not None:
                pieces = self.rounding.integers(hadamard.forward(x, codes.format.transform))
                columns = values.split(self.rounding.columns or codes.shape[1], 1)
                sums = [(whole.long() @ some.T).double() * scale for (whole, scale), some in zip(pieces, columns, strict=True)]
                expected = sum(sums) * factors
            expected = expected if layer.bias is None else expected + layer.bias[rows].double()
            missed = (layer(x)[:, rows].double() - expected).norm(dim=1)
            errors.append(float((missed / expected.norm(dim=1).clamp_min(1e-300)).max()))
        self.rounding = None
        return max(errors)


@dataclass(frozen=True)
class Said:
    """Logits of a window, as a model that says them whenever it is asked."""

    logits: Tensor

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def __call__(self, **asked: Any) -> "Said":
        return self


def said(model: Any, window: Tensor) -> Said:
    return Said(model(input_ids=window, use_cache=False).logits)


@torch.inference_mode()
def scored(emulated: Emulated, original: Any, windows: Tensor, tell: Callable[[int], None]) -> list[dict[str, Any]]:
    """The rows of one packed model."""
    records: dict[str, list[np.ndarray]] = {}
    apart: dict[str, list[np.ndarray]] = {}
    for window in windows.split(1):
        first, plain = said(original, window), None
        tell(window.numel())
        for emulated.rounding in (None, *ROUNDINGS):
            name = emulated.rounding.name if emulated.rounding else "float32"
            found = said(emulated.model, window)
            plain = plain or found
            records.setdefault(name, []).append(next(score_windows(found, window, reference=first))[0])
            apart.setdefault(name, []).append(next(score_windows(found, window, reference=plain))[0])
            tell(window.numel())
    emulated.rounding = None
    each = {name: np.concatenate(found)["kl"].mean(1, dtype=np.float64) for name, found in records.items()}
    rows = []
    for name, kl in each.items():
        measures, own = summarize(np.concatenate(records[name])), each["float32"]
        difference, share = kl - own, (kl - own).mean() / own.mean()
        rows.append(
            {
                "activations": name,
                **{key: pair(measures[key]) for key in ("kl", "perplexity", "top1_agreement")},
                "difference": [float(difference.mean()), error(difference)],
                "share": [float(share), error(difference - share * own) / float(own.mean())],  # of a ratio, to first order
                "kl_to_float32": pair(summarize(np.concatenate(apart[name]))["kl"]),
                "kl_by_window": [round(float(value), 6) for value in kl],
            }
        )
    return rows


def pair(found: Any) -> list[float | None]:
    return [found.mean, found.standard_error]


def error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def place(options: argparse.Namespace, bits: str, feedback: str) -> Path:
    """Where a packed model is kept."""
    return options.work / options.model.stem / (f"{bits}-own{options.sequences}" if feedback == "own" else f"{bits}-none")


def compressed(options: argparse.Namespace, bits: str, feedback: str, progress: Progress) -> None:
    """Make the folder of a packed model if it is not there."""
    folder, statistics = place(options, bits, feedback), place(options, "statistics", "own").with_suffix(".safetensors")
    if feedback == "own" and not statistics.exists():
        text = Feedback("own", sequences=options.sequences)
        observe_checkpoint(options.model, statistics, text=text, device="cpu", on_progress=progress)
    if not folder.exists():
        wanted = statistics if feedback == "own" else "none"
        compress_checkpoint(options.model, folder, format=bits, feedback=wanted, device="cpu", on_progress=progress)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="wiki.test.raw")
    parser.add_argument("--bits", nargs="+", default=["4-fast", "3-fast", "2-fast"], help="presets of the trellis code")
    parser.add_argument("--feedback", nargs="+", choices=("own", "none"), default=["own", "none"])
    parser.add_argument("--sequences", type=int, default=64, help="of 256 tokens, its own text for feedback")
    parser.add_argument("--windows", type=int, default=24, help="the first so many, two at least")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--label", help="what the model is called in the results")
    parser.add_argument("--work", type=Path, default=Path("build/int8_activations"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    (options.work / options.model.stem).mkdir(parents=True, exist_ok=True)
    wanted = [(feedback, bits) for feedback in options.feedback for bits in options.bits]
    text, rows = Text.from_wikitext(options.text), []
    ids = open_tokenizer(options.model)(text.content, return_tensors="pt", verbose=False).input_ids[0]
    windows = cut_windows(ids, options.context, options.windows)
    if len(windows) < 2:
        parser.error("standard errors over windows take two of them")
    about: dict[str, Any] = {
        "model": options.model.name,
        "label": options.label or options.model.name,
        "text": {"form": text.form, "windows": len(windows), "context": options.context, "own": [options.sequences, 256]},
        "environment": {
            "seedlm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device_name": f"CPU, {platform.processor() or platform.machine()}",
            "threads": options.threads,
        },
    }
    for feedback, bits in wanted:
        with Bars() if Bars.are_seen() else Lines() as progress:
            compressed(options, bits, feedback, progress)
    original = open_language_model(options.model, dtype="float32")
    total, done = len(wanted) * windows.numel() * (2 + len(ROUNDINGS)), 0
    with Bars() if Bars.are_seen() else Lines() as progress:
        progress("evaluate", 0, total)

        def tell(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress("evaluate", done, total)

        for feedback, bits in wanted:
            emulated = Emulated(place(options, bits, feedback))
            say(f"{bits}, feedback {feedback}: {emulated.layers} layers, products off by {emulated.worst:.1e} at most")
            facts = {"bits": bits, "feedback": feedback, "layers": emulated.layers, "check": float(f"{emulated.worst:.2g}")}
            rows += [facts | row for row in scored(emulated, original, windows, tell)]
            del emulated
            if options.json:
                write(options.json, about, rows)
    show(rows)


def write(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows, and those of other models that are there."""
    before = json.loads(path.read_text()) if path.exists() else {}
    same, made = all(before.get(key) == value for key, value in about.items()), {(row["feedback"], row["bits"]) for row in rows}
    others = [row for row in before["rows"] if (row["feedback"], row["bits"]) not in made] if same else []
    path.write_text(json.dumps(about | {"rows": rows + others}, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    print("| bits | feedback | activations | KL | difference | of the KL, % | KL to float32 | same top token, % |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["bits"], row["feedback"], row["activations"], "{:.5f} +- {:.5f}".format(*row["kl"])]
        if row["activations"] == "float32":
            cells += ["", "", ""]
        else:
            share = (100 * value for value in row["share"])
            cells += ["{:+.6f} +- {:.6f}".format(*row["difference"]), "{:+.2f} +- {:.2f}".format(*share)]
            cells.append(f"{row['kl_to_float32'][0]:.6f}")
        print("| " + " | ".join([*cells, f"{100 * row['top1_agreement'][0]:.2f}"]) + " |")


if __name__ == "__main__":
    main()
