"""A whole Llama-shaped model on a CPU, batch 1: dense beside packed, through transformers, and llama.cpp where it is given.

    python bench/generate_cpu.py [--shapes smollm2|1b] [--bits 4,3] [--tables 6] [--new 32] [--threads 2] [--repeats 5]
        [--prompt 512] [--llama-cpp FOLDER --gguf MODEL.gguf] [--json results/generate_cpu.json]

Speed does not depend on weights: dense ones are all alike, codes random, since any word is a valid trellis code. Before a
time is taken, every kind of packed layer is held against its dequantized weight. Then all rows take turns. A row's times are
that of the prompt with the first new token, and those of a token, from the difference between runs of some new tokens and runs
of one: of the shortest and of the median on the clock, and of the least processor time, which on a machine that other work
shares is the only one that is the program's own.

    + tables     embeddings and head, which are tied, in codes too (`--tables`, bits)
    static       the same model with `cache_implementation="static"`, by which its tokens go through our decoder
    int8         with the backend numba-int8, 8-bit activations: static cache, and products
    products     the packed layers of a token alone, one call for those that share an input, as the model calls them
    int4         torch's own product, which torchao calls, for the same layers: round to nearest, a scale for each 128
                 weights (SmolLM2: 64), bfloat16
    llama.cpp    its own whole token, from the libraries in FOLDER (libllama, libggml), which no Python package is needed for
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from products_cpu import int4
from seedlm.codes.processor import byte_products
from seedlm.codes.registry import parse_format
from seedlm.inference import ops
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.integrations.transformers.decoder_reasons import reason_unfused
from seedlm.integrations.transformers.decoder_steps import CACHE, step
from seedlm.modeling.embedding import SeedEmbedding, replace_embedding
from seedlm.modeling.linear import SeedLinear
from seedlm.modeling.quantize import seed_linears, set_backend, share_inputs

SHAPES = {
    "smollm2": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "1b": LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=8192,
    ),
    "tiny": LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
}  # fmt: skip


def dense(shapes: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """All weights alike, since random ones take minutes to make."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    makers = (nn.Linear, "reset_parameters"), (nn.Embedding, "reset_parameters"), (LlamaForCausalLM, "_init_weights")
    with ExitStack() as patched:
        for owner, name in makers:
            patched.enter_context(mock.patch.object(owner, name))
        model = LlamaForCausalLM(SHAPES[shapes]).eval()
    torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    return model


def packed(shapes: str, dtype: torch.dtype, bits: str, tables: str | None) -> LlamaForCausalLM:
    """Random codes in all linear layers but the head, each kind of which is checked; in embeddings and head if asked for."""
    model, checked = dense(shapes, dtype), set()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        layer = SeedLinear(module.in_features, module.out_features, parse_format(bits), dtype=dtype)
        layer.weight_words.random_(-(2**31), 2**31 - 1)
        layer.weight_scales.fill_(0.02 / 148)
        layer.weight_scale.fill_(1.0)
        model.set_submodule(name, layer)
        kind = (module.in_features, module.out_features)
        if kind not in checked:
            checked.add(kind)
            x = torch.randn(2, module.in_features).to(dtype)
            expected = x.double() @ layer.dequantize().double().T
            error = float((layer(x).double() - expected).norm() / expected.norm())
            assert error < (1e-4 if dtype == torch.float32 else 5e-3), (name, error)
    if tables:
        packed_tables = SeedEmbedding(model.model.embed_tokens, parse_format(tables), dtype=dtype)
        packed_tables.weight_words.random_(-(2**31), 2**31 - 1)
        packed_tables.weight_scales.fill_(0.02 / 148)
        packed_tables.weight_scale.fill_(1.0)
        replace_embedding(model, "model.embed_tokens", packed_tables)
    share_inputs(model)
    return model.eval()


def generate(model: LlamaForCausalLM, prompt: torch.Tensor, cache: str | None, count: int) -> None:
    options = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), cache_implementation=cache, **options)


def check_decoder(model: LlamaForCausalLM, prompt: torch.Tensor, tolerance: float) -> None:
    """Hold a packed model's logits by the decoder, token by token, against those of transformers' forward of the whole text."""
    assert reason_unfused(model) is None
    cache, rest = StaticCache(config=model.config, max_cache_len=prompt.shape[1]), 8
    model(input_ids=prompt[:, :-rest], use_cache=True, **{CACHE: cache})
    found = [step(model, token, cache)[0] for token in prompt[:, -rest:].split(1, dim=1)]
    expected = model(input_ids=prompt, use_cache=False).logits[0, -rest:].double()
    off = ((torch.cat(found).double() - expected).norm() / expected.norm()).item()
    assert off < tolerance, f"logits by the decoder are off by {off:.2g}"


def products(model: LlamaForCausalLM) -> Callable[[int], None]:
    """The packed layers of so many tokens, without a model around them; those that share an input at once, as in a model."""
    inputs: dict[int, torch.Tensor] = {}
    groups: dict[int, list[tuple[ops.Plan, list[torch.Tensor]]]] = {}
    for _, layer in seed_linears(model):
        groups.setdefault(id(layer if layer._shared is None else layer._shared[0]), []).append(layer.prepare())
    steps = []
    for group in groups.values():
        plans, prepared = zip(*group, strict=True)
        width = plans[0].shape[1]
        x = inputs.setdefault(width, torch.randn(1, 1, width).to(model.dtype))
        assert len(plans) == 1 or ops.joins(x, plans, [None] * len(plans))
        steps.append((x, plans, prepared, [None] * len(plans)))

    def run(count: int) -> None:
        for _ in range(count):
            for x, plans, prepared, biases in steps:
                if len(plans) > 1:
                    ops.linears(x, prepared, plans, biases)
                else:
                    ops.linear(x, (), prepared[0], plans[0], None)

    return run


class Int4(nn.Module):
    """Torch's own product by weights of 4 bits."""

    def __init__(self, weight: torch.Tensor, group: int, scales: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.group, self.scales = nn.Parameter(weight, requires_grad=False), group, scales

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.weight, self.group, self.scales)
        return y.unflatten(0, x.shape[:-1])


def int4_model(shapes: str) -> LlamaForCausalLM | None:
    """It in all linear layers but the head; None where torch has no such product."""
    model, made = dense(shapes, torch.bfloat16), {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            shape = module.out_features, module.in_features
            if shape not in made:
                made[shape] = int4(*shape)
            if made[shape] is None:
                return None
            weight, group, scales = made[shape]
            model.set_submodule(name, Int4(weight.clone(), group, 0.01 * scales))
    return model


def int4_products(model: LlamaForCausalLM) -> Callable[[int], None]:
    """Its layers of so many tokens, as `products`."""
    layers = [module for module in model.modules() if isinstance(module, Int4)]
    inputs = [torch.randn(1, 1, layer.scales.shape[0] * layer.group).bfloat16() for layer in layers]

    def run(count: int) -> None:
        for _ in range(count):
            for layer, x in zip(layers, inputs, strict=True):
                layer(x)

    return run


class LlamaCpp:
    """A model in llama.cpp, through its C interface. Parameters are passed on as they are, without knowing their fields."""

    class Opaque(ctypes.Structure):
        _fields_ = (("bytes", ctypes.c_byte * 1024),)

    class Batch(ctypes.Structure):
        _fields_ = (("n_tokens", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))

    def __init__(self, folder: Path, model: Path, threads: int, prompt: int) -> None:
        self._prompt = prompt

        def library(name: str) -> ctypes.CDLL:
            return ctypes.CDLL(str(next(path for path in sorted(folder.glob(f"{name}.*")))), mode=ctypes.RTLD_GLOBAL)

        library("libggml-base"), (ggml := library("libggml"))
        self._llama = llama = library("libllama")
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        llama.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        llama.llama_model_default_params.restype = llama.llama_context_default_params.restype = self.Opaque
        llama.llama_model_load_from_file.restype = llama.llama_init_from_model.restype = ctypes.c_void_p
        llama.llama_model_load_from_file.argtypes = (ctypes.c_char_p, self.Opaque)
        llama.llama_init_from_model.argtypes = (ctypes.c_void_p, self.Opaque)
        llama.llama_batch_get_one.restype = self.Batch
        llama.llama_decode.argtypes = (ctypes.c_void_p, self.Batch)
        llama.llama_get_memory.restype, llama.llama_get_memory.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
        llama.llama_memory_clear.argtypes = (ctypes.c_void_p, ctypes.c_bool)
        llama.llama_set_n_threads.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32)
        loaded = llama.llama_model_load_from_file(str(model).encode(), llama.llama_model_default_params())
        self._context = llama.llama_init_from_model(loaded, llama.llama_context_default_params()) if loaded else None
        if not self._context:
            raise SystemExit(f"llama.cpp cannot open {model}")
        llama.llama_set_n_threads(self._context, threads, threads)

    def generate(self, count: int) -> None:
        """The prompt in one batch, then count - 1 single tokens."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        for size in [self._prompt] + [1] * (count - 1):
            tokens = (ctypes.c_int32 * size)(*range(100, 100 + size))
            assert self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(tokens, size)) == 0
            self._llama.llama_synchronize(ctypes.c_void_p(self._context))


def seconds(run: Callable[[int], None], count: int) -> tuple[float, float]:
    """Of a run, on the clock and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    run(count)
    return time.perf_counter() - start, time.process_time() - used


def two_busy_processes() -> float:
    """Cores that two busy processes get: 2 on a host that nobody else uses."""
    start = time.perf_counter()
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            while time.perf_counter() - start < 2:
                pass
            os._exit(0)
        children.append(child)
    used = [os.wait4(child, 0)[2] for child in children]
    return sum(each.ru_utime for each in used) / (time.perf_counter() - start)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--tables", help="bits of embeddings and head, for further rows")
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the times there, instead of those of these shapes and prompt")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    before = two_busy_processes()
    prompt = torch.randint(SHAPES[options.shapes].vocab_size, (1, options.prompt))
    rows: dict[str, Callable[[int], None]] = {}
    for name in options.dtypes.split(","):
        dtype = getattr(torch, name)
        if not options.no_dense:
            rows[f"dense {name}"] = partial(generate, dense(options.shapes, dtype), prompt, None)
        for bits in options.bits.split(","):
            model = packed(options.shapes, dtype, bits, None)
            rows[f"{bits} bits {name}"] = partial(generate, model, prompt, None)
            if options.tables:
                with_tables = packed(options.shapes, dtype, bits, options.tables)
                fuse_decoding(with_tables)
                check_decoder(with_tables, prompt, 1e-3 if dtype == torch.float32 else 4e-2)
                rows[f"{bits} bits {name} + tables {options.tables}"] = partial(generate, with_tables, prompt, None)
                rows[f"the same, static cache ({bits} bits {name})"] = partial(generate, with_tables, prompt, "static")
            rows[f"{bits} bits {name}, products"] = products(model)
            if options.tables and byte_products() in ("vnni512", "vnni", "dot"):  # else there is no such backend
                coarse = packed(options.shapes, dtype, bits, options.tables)
                set_backend(coarse, "numba-int8")
                fuse_decoding(coarse)
                check_decoder(coarse, prompt, 0.1)
                rows[f"the same, static cache, int8 ({bits} bits {name})"] = partial(generate, coarse, prompt, "static")
                rows[f"{bits} bits {name}, products, int8"] = products(coarse)
        if dtype == torch.bfloat16 and (model := int4_model(options.shapes)) is not None:
            rows["int4 of torch"] = partial(generate, model, prompt, None)
            rows["int4 of torch, products"] = int4_products(model)
    if options.llama_cpp:
        rows["llama.cpp"] = LlamaCpp(options.llama_cpp, options.gguf, options.threads, options.prompt).generate
    for run in rows.values():
        run(2)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {(name, n): [] for name in rows for n in (1, 1 + options.new)}
    for _ in range(options.repeats):
        for name, count in found:
            found[name, count].append(seconds(rows[name], count))
    facts = {
        "shapes": options.shapes,
        "processor": processor(),
        "threads": options.threads,
        "cores that two processes get": [round(before, 2), round(two_busy_processes(), 2)],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt": options.prompt,
        "new": options.new,
        "repeats": options.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'ms':44}{'prompt':>10}{'a token':>10}{'median':>10}{'processor':>10}")
    times = []
    for name in rows:
        (one, used_one), (all, used) = (zip(*found[name, count], strict=True) for count in (1, 1 + options.new))
        shown = min(all) - min(one), statistics.median(all) - statistics.median(one), min(used) - min(used_one)
        of_token = dict(zip(("shortest", "median", "processor"), (1e3 * each / options.new for each in shown), strict=True))
        of_prompt = {"shortest": 1e3 * min(one), "median": 1e3 * statistics.median(one)}
        rounded = ({key: round(each, 2) for key, each in found.items()} for found in (of_prompt, of_token))
        times.append({"name": name} | dict(zip(("prompt ms", "token ms"), rounded, strict=True)))
        print(f"{name:44}{1e3 * min(one):10.1f}" + "".join(f"{each:10.2f}" for each in of_token.values()))
    if options.json:
        runs = json.loads(options.json.read_text()) if options.json.exists() else []
        others = [run for run in runs if (run["shapes"], run["prompt"]) != (options.shapes, options.prompt)]
        options.json.write_text(json.dumps([*others, facts | {"rows": times}], indent=1) + "\n")


if __name__ == "__main__":
    main()
