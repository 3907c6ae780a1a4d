"""What each rate of the trellis code costs a model: compressed by statistics of its own text, scored against the original.

    python bench/trellis_quality.py MODEL wiki.test.raw --bits 4 3 2 3.5 2.5 3-fast --out results.json

MODEL is a folder or a GGUF file. The model is loaded, writes its text and is observed once; every rate is then what
`seedlm compress MODEL OUT --bits B` makes with those statistics (`--feedback FILE`), and what `seedlm evaluate` measures: KL,
perplexity and agreement over windows of 2,048 tokens of the text as it is. The last line is JSON.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from seedlm import Mixture, compress_checkpoint
from seedlm.calibration.own_text import OwnText, write_text
from seedlm.calibration.statistics import measure_statistics
from seedlm.codes.registry import family, parse_format
from seedlm.evaluation.perplexity import cut_windows, score_windows, summarize
from seedlm.integrations.transformers.opening import open_language_model, open_tokenizer
from seedlm.modeling.quantize import dequantize_model

START = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--bits", nargs="+", default=["4", "3", "2", "3.5", "2.5", "4-fast", "3-fast", "2-fast"])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--windows", type=int, help="the first so many")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False

    with tempfile.TemporaryDirectory() as folder:
        dense, statistics = Path(folder) / "dense", Path(folder) / "statistics.safetensors"
        model = open_language_model(options.model, dtype="float32")
        tokenizer = open_tokenizer(options.model)
        ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False).input_ids[0]
        windows = cut_windows(ids, options.context, options.windows)
        model.hf_quantizer = None  # of a GGUF file, whose tensors are plain by now
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
        model = model.to(device)
        say("loaded")
        tokens = write_text(model, OwnText(sequences=options.sequences, length=256))
        say(f"wrote {tokens.numel():,} tokens")
        measure_statistics(model, tokens).save(statistics)
        say("observed")
        rows = [scored(bits, model, dense, statistics, windows, device) for bits in options.bits]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {
        "model": options.model.name,
        "windows": len(windows),
        "context": options.context,
        "own_text": [options.sequences, 256],
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def scored(bits: str, model, dense: Path, statistics: Path, windows: torch.Tensor, device: torch.device) -> dict:
    """One row: bits counted with everything, seconds, and the measures with their standard errors."""
    out = dense.with_name(f"packed-{bits}")
    code = family("trellis")
    format = parse_format(bits, "trellis") if bits in code.presets else Mixture(bits=float(bits), formats=code.mixture)
    begin = time.monotonic()
    layers = {"embeddings": "dense", "head": "dense"}  # alone: so are the other methods' rows
    report = compress_checkpoint(dense, out, format=format, feedback=statistics, device=str(device), **layers)
    seconds = time.monotonic() - begin
    packed = open_language_model(out, dtype="float32").to(device)
    dequantize_model(packed, torch.float32)
    records = np.concatenate([found for found, _ in score_windows(packed, windows, reference=model)])
    found = summarize(records)
    del packed
    shutil.rmtree(out)
    row = {
        "preset": bits,
        "bits": round(report.bits_per_weight, 4),
        "bytes": report.bytes,
        "relative_error": round(report.relative_error or 0.0, 4),
        "compress_seconds": round(seconds, 1),
        **{name: [value.mean, value.standard_error] for name, value in found.items()},
    }
    kl, perplexity, same = (found[name] for name in ("kl", "perplexity", "top1_agreement"))
    say(
        f"{bits:>7s} {row['bits']:.3f} b  KL {kl.mean:.4f} +- {kl.standard_error or 0:.4f}  perplexity {perplexity.mean:.3f} "
        f"(original {found['reference_perplexity'].mean:.3f})  same top token {same.mean:.4f}  {seconds:.1f} s"
    )
    return row


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
