"""What the choices of mixed precision rest on, measured: which sensitivities agree with the truth, and what mixing gains.

    python bench/sensitivity.py MODEL TEXT OUT.json

Truth is the KL divergence on a real text, with one weight at a time replaced by its codes, or by normal noise of their size.
And uniform formats and mixtures of them: the codes of all weights, the whole text. TEXT is wiki.test.raw or any other file.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seedlm.calibration import sensitivity
from seedlm.calibration.sensitivity import OwnText, measure_sensitivity, own_text
from seedlm.codes.base import Format, stored_bits
from seedlm.codes.block.codec import choose_exponent_bias, dequantize_rows
from seedlm.codes.block.encode import encode_rows
from seedlm.codes.block.family import FAMILY
from seedlm.codes.block.format import PRESETS, BlockFormat
from seedlm.codes.registry import parse_format
from seedlm.compress.allocate import Mixture
from seedlm.device import choose_device
from seedlm.evaluation import perplexity
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers import models
from seedlm.modeling.quantize import choose_modules

FUSED = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up"}
START = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--windows", type=int, default=8, help="for the truth")
    parser.add_argument("--context", type=int, default=512, help="for the truth")
    parser.add_argument("--final-windows", type=int, default=None, help="for the mixtures; all by default")
    parser.add_argument("--final-context", type=int, default=2048, help="for the mixtures")
    parser.add_argument("--truth", nargs="*", default=["3"], help="formats")
    parser.add_argument("--bits", nargs="*", type=float, default=[2.5, 3, 3.5, 4], help="of mixtures")
    options = parser.parse_args()
    device = choose_device("auto")
    model = models.load_model(options.model, device=device, dtype="float32").requires_grad_(False)
    text = (Text.from_wikitext if options.text.name == "wiki.test.raw" else Text.from_file)(options.text)
    tokens = torch.tensor(models.load_tokenizer(options.model)(text.content)["input_ids"])
    weights = {name: model.get_submodule(name).weight for name in choose_modules(model, PRESETS["4"])}
    results: dict = {"torch": torch.__version__, "device": str(device), "weights": len(weights)}
    if device.type == "cuda":
        results["device"] = torch.cuda.get_device_name(device)

    measured = measure_sensitivity(model)
    note(f"sensitivities of {len(measured)} weights")
    results["sensitivity"] = measured = {name: measured[name] for name in weights}
    windows = perplexity.cut_windows(tokens, options.final_context, options.final_windows)
    results["mixtures"] = mixtures(model, weights, measured, options.bits, windows)
    options.out.write_text(json.dumps(results))

    windows = perplexity.cut_windows(tokens, options.context, options.windows)
    truth, total = single_weights(model, weights, windows, [parse_format(name) for name in options.truth])
    guesses = {"sensitivity": measured, **from_other_texts(model, weights), **from_weights(model, weights)}
    results |= {"truth": truth, "all weights": total, "guesses": guesses}
    options.out.write_text(json.dumps(results))
    for against, values in truth.items():
        print(f"against {against}: all at once {total[against]:.4f}, sum of singles {sum(values.values()):.4f}")
        for name, guess in {**guesses, **truth}.items():
            spearman, pearson = agreement(guess, values)
            print(f"{name:40} Spearman {spearman:6.3f}  Pearson of logarithms {pearson:6.3f}")


def single_weights(
    model: torch.nn.Module, weights: dict[str, Tensor], windows: Tensor, formats: list[Format]
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """KL in nats a token by codes, and by noise as large as their errors: of each weight alone, and of all at once."""
    reference = log_probabilities(model, windows)
    truth, total = {}, {}
    for format in formats:
        coded = decoded(weights, format)
        errors = {
            name: float((coded[name] - weight).square().sum() / weight.square().sum()) for name, weight in weights.items()
        }
        for kind, changed in (("codes", coded), ("noise", noisy(weights, errors, seed=0))):
            label = f"{kind} of {format}"
            truth[label] = {}
            for name in weights:
                with replaced(weights, {name: changed[name]}):
                    truth[label][name] = divergence(model, windows, reference)
            with replaced(weights, changed):
                total[label] = divergence(model, windows, reference)
            note(label)
    return truth, total


def noisy(weights: dict[str, Tensor], errors: dict[str, float], seed: int) -> dict[str, Tensor]:
    """Weights plus normal noise with a share of each row's energy."""
    random = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(weight.shape, generator=random).to(weight.device) for name, weight in weights.items()}
    return {
        name: weight + noise[name] * (errors[name] * weight.square().mean(1, keepdim=True)).sqrt()
        for name, weight in weights.items()
    }


@contextmanager
def replaced(weights: dict[str, Tensor], by: dict[str, Tensor]) -> Iterator[None]:
    """Other values in some of a model's weights for a while."""
    kept = {name: weights[name].clone() for name in by}
    for name, values in by.items():
        weights[name].copy_(values)
    try:
        yield
    finally:
        for name, values in kept.items():
            weights[name].copy_(values)


def from_other_texts(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Other ways to ask the model: random tokens in the place of its own text, fewer sequences, KL on its own text."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    texts = torch.randint(vocabulary, (32, 256), generator=torch.Generator().manual_seed(0)).to(model.device)
    found = {"gradients on random tokens": with_text(model, lambda *_: texts)}
    found["gradients, one sequence"] = measure_sensitivity(model, OwnText(sequences=1))
    windows = torch.stack(list(own_text(model, OwnText(sequences=16)))).cpu()
    reference = log_probabilities(model, windows)
    noise = {}
    for name, values in noisy(weights, dict.fromkeys(weights, 0.01), seed=1).items():
        with replaced(weights, {name: values}):
            noise[name] = divergence(model, windows, reference)
    found["KL on its own text, weight by weight"] = noise
    note("other texts")
    return found


def with_text(model: torch.nn.Module, text: Callable[..., Iterable[Tensor]]) -> dict[str, float]:
    """`measure_sensitivity` on another text than the model's own."""
    sensitivity.own_text, kept = text, sensitivity.own_text
    try:
        return measure_sensitivity(model)
    finally:
        sensitivity.own_text = kept


def from_weights(model: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """What can be read off the weights alone. Gains are those of the RMSNorm before the layer, as Llama names it."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    norms = {name: value for name, value in model.named_parameters() if "norm" in name}
    for name, weight in weights.items():
        layer, last = ".".join(name.split(".")[:3]), name.rpartition(".")[2]
        before = {"o_proj": None, "down_proj": None}.get(
            last, "input_layernorm" if last[0] in "qkv" else "post_attention_layernorm"
        )
        gain = norms.get(f"{layer}.{before}.weight", torch.ones(1, device=weight.device))
        narrow = weight.double() if weight.shape[0] < weight.shape[1] else weight.double().mT
        values = torch.linalg.eigvalsh(narrow @ narrow.mT).clamp_min(1e-12)
        facts = {
            "number of weights": weight.numel(),
            "squared norm": weight.square().sum(),
            "squared norm with the gains": (weight * gain).square().sum(),
            "mean square of the gains": gain.square().mean(),
            "largest singular value": values[-1].sqrt(),
            "smallest singular value": values[0].sqrt(),
            "stable rank": values.sum() / values[-1],
            "kurtosis": (weight**4).mean() / weight.square().mean() ** 2,
            "largest magnitude": weight.abs().max(),
        }
        for fact, value in facts.items():
            found[fact][name] = float(value)
    note("weights alone")
    return found


def mixtures(
    model: torch.nn.Module, weights: dict[str, Tensor], measured: dict[str, float], bits: list[float], windows: Tensor
) -> list[dict]:
    """Uniform formats and mixtures of them, coded for real, on the same windows."""
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    size = sum(map(math.prod, shapes.values()))
    plans: dict[str, dict[str, Format]] = {f"uniform {format}": dict.fromkeys(weights, format) for format in FAMILY.mixture}
    everywhere = dict.fromkeys(weights, 1.0)
    mixed: dict[str, Any] = {"formats": FAMILY.mixture}
    for target in bits:
        plans[f"mixed {target:g}"] = Mixture(bits=target, sensitivity=measured, **mixed).assign(shapes)
        plans[f"mixed {target:g}, all equally sensitive"] = Mixture(
            bits=target, sensitivity=everywhere, formats=FAMILY.mixture
        ).assign(shapes)
        plans[f"mixed {target:g}, fused layers alike"] = fused(
            Mixture(bits=target, sensitivity=measured, formats=FAMILY.mixture), shapes
        )
    coded = {}
    for format in FAMILY.mixture:
        coded[format] = decoded(weights, format)
        note(f"coded as {format}")
    reference, lines = copy.deepcopy(model), []
    for label, plan in plans.items():
        with replaced(weights, {name: coded[format][name] for name, format in plan.items()}):
            records = np.concatenate([found for found, _ in perplexity.score_windows(model, windows, reference=reference)])
        line = {
            "plan": label,
            "bits": sum(stored_bits(plan[name], *shape) for name, shape in shapes.items()) / size,
            "predicted_kl": sum(measured[name] * FAMILY.mixture[format] for name, format in plan.items()),
            **{key: asdict(value) for key, value in perplexity.summarize(records).items()},
        }
        lines.append(line)
        note(
            f"{label:42} {line['bits']:.4f} bits  KL {line['kl']['mean']:.4f} (predicted {line['predicted_kl']:.4f})  "
            f"perplexity {line['perplexity']['mean']:.3f}  same top token {line['top1_agreement']['mean']:.4f}"
        )
    return lines


def fused(mixture: Mixture, shapes: dict[str, tuple[int, int]]) -> dict[str, Format]:
    """A mixture in which layers that serving engines join (q, k, v; gate and up) have one format."""
    groups = defaultdict(list)
    for name in shapes:
        head, _, last = name.rpartition(".")
        groups[f"{head}.{FUSED.get(last, last)}"].append(name)
    joint = Mixture(
        bits=mixture.bits,
        sensitivity={group: sum(mixture.sensitivity[name] for name in names) for group, names in groups.items()},
        formats=FAMILY.mixture,
    )
    chosen = joint.assign(
        {group: (sum(shapes[name][0] for name in names), shapes[names[0]][1]) for group, names in groups.items()}
    )
    return {name: chosen[group] for group, names in groups.items() for name in names}


def decoded(weights: dict[str, Tensor], format: BlockFormat) -> dict[str, Tensor]:
    """All weights by way of their codes, many in one search: rows are coded alone, only the exponent bias is a tensor's."""
    groups = defaultdict(list)
    for name, weight in weights.items():
        groups[weight.shape[1], choose_exponent_bias(weight.abs().max()[None].cpu(), format)].append(name)
    found = {}
    for (_, bias), names in groups.items():
        words, _ = encode_rows(torch.cat([weights[name] for name in names]), bias, format)
        rows = dequantize_rows(words, bias, weights[names[0]].shape[1], format).split([len(weights[name]) for name in names])
        found |= dict(zip(names, rows, strict=True))
    return found


@torch.inference_mode()
def log_probabilities(model: torch.nn.Module, windows: Tensor) -> list[Tensor]:
    batches = windows.to(model.device).split(max(1, 4096 // windows.shape[1]))
    return [model(input_ids=batch, use_cache=False).logits[:, :-1].float().log_softmax(-1) for batch in batches]


@torch.inference_mode()
def divergence(model: torch.nn.Module, windows: Tensor, reference: list[Tensor]) -> float:
    """Mean KL(reference || model) in nats a token."""
    pairs = zip(log_probabilities(model, windows), reference, strict=True)
    total = sum(float((theirs.exp() * (theirs - ours)).sum(-1).double().sum()) for ours, theirs in pairs)
    return total / (windows.numel() - len(windows))


def agreement(guess: dict[str, float], truth: dict[str, float]) -> tuple[float, float]:
    """Spearman's rank correlation, and Pearson's of the logarithms."""
    x, y = (np.array([values[name] for name in truth]) for values in (guess, truth))
    ranks = [values.argsort().argsort() for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1]), float(np.corrcoef(np.log(x), np.log(y.clip(1e-12)))[0, 1])


def note(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
