"""How fast a model writes on a user's own device: packed as it is, dequantized, and in bitsandbytes' NF4.

Every row goes through `model.generate`, batch 1, greedy, from the same random prompt, as `seedlm generate` asks for
it: with a static cache where tokens then go through our own decoder ("unfused" says why not). A streamer notes when each token
arrives, as who reads along sees it: the first token's time is that from the call on, tokens per second are those after it, of
the same run. A run waits for nothing more by that: `generate` brings each token to the host anyway, to know whether it was the
last. The graph or the record of a text's steps is made after its first token, so it counts among the others.

Memory is that of all weights, and on CUDA the most that torch had allocated while generating. On a CPU it is that of the
process when its first row is done, as `bench/memory_cpu.py` counts it after `malloc_trim`. A later row has none: pages of the
packed file, kernels and perhaps a compiler are still there then, which a process of its own would not have.
"""

import gc
import statistics
import sys
from collections import Counter
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

from seedlm.codes.base import Format
from seedlm.codes.registry import parse_format, reason_no_product
from seedlm.device import choose_device, resident_memory
from seedlm.errors import BackendError, EvaluationError
from seedlm.evaluation.settings import SpeedSettings as Settings
from seedlm.evaluation.settings import check_room, no_compiler
from seedlm.inference import backend
from seedlm.integrations.transformers import models
from seedlm.integrations.transformers.decoder import fuse_decoding, static_cache
from seedlm.integrations.transformers.decoder_reasons import reason_unfused
from seedlm.modeling.quantize import backends_used, choose_modules, dequantize_model, set_backend
from seedlm.progress import Progress
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.source import locate
from seedlm.version import __version__


def measure_speed(model: str, settings: Settings | None = None, on_progress: Progress | None = None) -> dict[str, Any]:
    """The table of a model, packed or not.

    on_progress   told how far it is, in runs of each row
    returns   what it was measured with; "rows", what was measured of "packed", "dense", "nf4"; "left_out", why others were not.
              "process_bytes" is None in all rows but a CPU's first; numba and LLVM are in it, as "compiler" says, where kernels
              were compiled: 100 to 160 MB that later processes do not have, on Linux
    Raises EvaluationError, SourceError, CheckpointError or BackendError.
    """
    settings = settings or Settings()
    device, path = choose_device(settings.device), locate(model)
    if settings.compiled and device.type != "cuda":
        raise EvaluationError(no_compiler(device))
    progress, trust = on_progress or (lambda phase, done, total: None), settings.trust_remote_code
    progress("load", 0, 0)
    network = models.load_model(path, device=device, dtype=settings.dtype, packed=True, trust_remote_code=trust)
    check_room(models.longest_text(network), settings)
    fuse_decoding(network)
    rows, left_out = [], {}
    if settings.backend != backend.AUTO:
        set_backend(network, settings.backend)
    if used := backends_used(network):
        rows.append({"what": "packed", "backends": used, **_time(network, settings, "packed", progress)})
        dequantize_model(network, network.dtype)
    else:
        left_out["packed"] = "the model is not compressed"
    rows.append({"what": "dense", **_time(network, settings, "dense", progress)})
    if reason := _reason_no_nf4(device):
        left_out["nf4"] = reason
    else:
        _to_nf4(network)
        rows.append({"what": "nf4", **_time(network, settings, "nf4", progress)})
    for row in rows[1:]:
        row["process_bytes"] = None  # what the rows before it left is in it
    return {
        "model": model,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "versions": {"seedlm": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": str(network.dtype).removeprefix("torch."),
        "tokens": settings.tokens,
        "prompt_tokens": settings.prompt_tokens,
        "compiled": settings.compiled,
        "rows": rows,
        "left_out": left_out,
    }


def explain_backends(model: str, device: str = "auto", name: str = backend.AUTO) -> list[dict[str, Any]]:
    """For each format and shape of a compressed folder: how many weights have it, which backend a name takes, why not others.

    Only the files' headers are read. Raises SourceError, CheckpointError or BackendError.
    """
    where = choose_device(device)
    kinds: Counter[tuple[Format, tuple[int, int]]] = Counter(
        (info.format, info.shape) for info in Checkpoint.open(locate(model)).packed.values()
    )
    if reason := reason_no_product(name, {format.family for format, _ in kinds}):
        raise BackendError(reason)
    found = []
    for (format, shape), count in kinds.items():
        reasons = backend.explain(where, format, shape)
        asked = name if name in reasons else backend.AUTO  # as `set_backend` leaves a family that has none of that name
        chosen = backend.choose(asked, where, format, shape).name
        others = {other: reason or f"works here, by --backend {other}" for other, reason in reasons.items() if other != chosen}
        found.append({"format": format.spec, "shape": [*shape], "weights": count, "backend": chosen, "others": others})
    return found


@torch.inference_mode()
def _time(network: Any, settings: Settings, row: str, progress: Progress) -> dict[str, Any]:
    """The numbers of one row."""
    device = network.device
    known = network.config.get_text_config(decoder=True).vocab_size
    prompt = torch.randint(known, (1, settings.prompt_tokens), generator=torch.Generator().manual_seed(0)).to(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        progress(row, 0, 1 + settings.repeats)
        _generate(network, prompt, settings.tokens if settings.compiled else 2, settings.compiled)
        firsts, rates = [], []
        for done in range(1, 1 + settings.repeats):
            progress(row, done, 1 + settings.repeats)
            first, rest = _generate(network, prompt, settings.tokens, settings.compiled)
            firsts.append(first)
            rates.append((settings.tokens - 1) / rest)
        progress(row, 1 + settings.repeats, 1 + settings.repeats)
    except torch.OutOfMemoryError:
        raise EvaluationError(f"generating does not fit into the memory of {device}") from None
    states = (getattr(parameter, "quant_state", None) for parameter in network.parameters())  # bitsandbytes' scales
    scales = [scale for state in states if state for scale in (state.absmax, state.state2.absmax, state.state2.code)]
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*network.parameters(), *network.buffers(), *scales)}
    return {
        "unfused": reason_unfused(network),
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_range": [min(rates), max(rates)],
        "first_token_seconds": statistics.median(firsts),
        "first_token_seconds_range": [min(firsts), max(firsts)],
        "prompt_tokens_per_second": settings.prompt_tokens / statistics.median(firsts),
        "weight_bytes": sum(weights.values()),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "process_bytes": resident_memory() if device.type == "cpu" else None,
        "compiler": "llvmlite" in sys.modules,
    }


class Arrivals(BaseStreamer):
    """A streamer that notes when it is given something, in seconds: the prompt, then each token."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: Tensor) -> None:
        self.seconds.append(perf_counter())

    def end(self) -> None:
        """Nothing is left to be noted."""


def _generate(network: Any, prompt: Tensor, count: int, compiled: bool) -> tuple[float, float]:
    """Seconds of a run from its start to the first token, and from there to the last, whatever the model's own settings are."""
    options: dict[str, Any] = static_cache(network, prompt.shape[1] + count)
    if compiled:
        options = {"cache_implementation": "static", "compile_config": transformers.CompileConfig()}
    options |= {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    options |= {"num_beams": 1, "num_return_sequences": 1, "stop_strings": None, "max_time": None}
    arrivals, start = Arrivals(), perf_counter()
    network.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=arrivals, **options)
    tokens = arrivals.seconds[1:]
    if len(tokens) != count:
        raise EvaluationError(
            f"this model gives {len(tokens)} pieces for {count} tokens, so when each comes cannot be measured"
        )
    return tokens[0] - start, tokens[-1] - tokens[0]


def _reason_no_nf4(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"measured on CUDA devices only, this is {device}"
    return None if find_spec("bitsandbytes") else "bitsandbytes is not installed: pip install bitsandbytes"


def _to_nf4(network: Any) -> None:
    """Put bitsandbytes' NF4 layers in place of those that `compress` would take; experts stay dense."""
    import bitsandbytes

    modules = dict(network.named_modules())
    for name in choose_modules(network, parse_format("4")):
        if isinstance(layer := modules.get(name), nn.Linear):
            options: dict[str, Any] = {"compute_dtype": layer.weight.dtype, "quant_type": "nf4", "device": "meta"}
            packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, **options)
            weight = bitsandbytes.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4")
            packed.weight = weight.to(layer.weight.device)
            packed.register_parameter("bias", layer._parameters["bias"])
            network.set_submodule(name, packed)
