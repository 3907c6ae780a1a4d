"""A whole Llama-shaped model on one CUDA GPU, batch 1: dense FP16 beside the trellis code, through the same stack.

    python bench/generate_gpu.py [--bits 4,3,2] [--shapes 8b] [--new 128] [--prompt 512] [--stacks decoder,transformers]
        [--tables trellis-r6-l12-t256-h128] [--json]

Weights are random and made on the GPU: speed does not depend on them, and any word is a valid code. Embedding and head are
FP16, in packed rows too unless `--tables` names their format. One token is one CUDA graph, captured by hand: the model with a
static cache, argmax, the next token back into its buffer. Stacks, the first three the same for dense and packed:

    transformers   the model's own forward, kernel by kernel as transformers launches them
    decoder        `decoder_steps.step`, by which packed models decode on a GPU; in dense rows with norms and gates that
                   torch.compile makes one kernel each, where packed layers make their input themselves
    compile        torch.compile(fullgraph=True) of the model's own forward; minutes of compilation, so not by default
    generate       plain `model.generate(cache_implementation="static")` of packed rows, its own loop included; beside the
                   dense row's `decoder`, since a dense model's generate compiles for minutes

Before a time is taken: logits of a 2-layer model of the same widths are held against the same model dequantized (prompt, and
token by token in each stack), and the graph's tokens of the whole model against the eager loop's; after it what `generate`
wrote against transformers' own forward of the whole text. The prompt runs eagerly, without a graph. Memory is what torch has
allocated. The last line is JSON. `--device cpu --tiny` runs everything but the graph.
"""

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from gpu_times import copy_bandwidth, seconds, synchronize
from seedlm.codes.base import CODES
from seedlm.codes.registry import parse_format
from seedlm.codes.trellis.format import TrellisFormat
from seedlm.inference import backend
from seedlm.integrations.transformers import decoder_steps
from seedlm.integrations.transformers.decoder import fuse_decoding
from seedlm.integrations.transformers.sampling import most_likely
from seedlm.modeling.embedding import SeedEmbedding
from seedlm.modeling.linear import SeedLinear
from seedlm.modeling.quantize import dequantize_model, seed_linears, share_inputs

SHAPES: dict[str, dict[str, int]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 256, "intermediate_size": 448, "num_hidden_layers": 3, "num_attention_heads": 8},
}
WEIGHT = 0.02
CODE = 148.0
"""Standard deviation of the trellis code's values before scaling."""
TOLERANCE = 2e-2
BELOW = 0.1
"""By how many standard deviations of the logits a token's may be below the largest, by another forward in FP16. Any token's is
about 4 below."""
COMPARED = 16
"""Tokens of the whole model that the graph and the eager loop write."""


def config_of(shapes: str, layers: int | None = None) -> LlamaConfig:
    sizes = dict(SHAPES[shapes])
    sizes |= (
        {"num_key_value_heads": 2, "vocab_size": 1000} if shapes == "tiny" else {"num_key_value_heads": 8, "vocab_size": 128256}
    )
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = LlamaConfig(**sizes, max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    config._attn_implementation = "sdpa"
    return config


def build(config: LlamaConfig, format: TrellisFormat | None, options: argparse.Namespace) -> Any:
    """A model with random weights, made where they stay. format: of its layers, None for a dense model."""
    device, dtype, tables = options.device, options.dtype, options.tables if format else None
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for path, module in list(model.named_modules()):
        coded = tables if path == "lm_head" or isinstance(module, nn.Embedding) else format
        if isinstance(module, nn.Linear | nn.Embedding) and coded is not None:
            if isinstance(module, nn.Embedding):
                packed: Any = SeedEmbedding(module, coded, dtype=dtype, device=device)
            else:
                sizes = module.in_features, module.out_features
                packed = SeedLinear(*sizes, coded, dtype=dtype, device=device, backend=options.backend)
            packed.parts[CODES].random_(-(2**31), 2**31)
            packed.parts["scales"].copy_((torch.rand(module.weight.shape[0], device=device) + 0.5) * (WEIGHT / CODE))
            packed.parts["scale"].fill_(1.0)
            model.set_submodule(path, packed)
        elif isinstance(module, nn.Linear | nn.Embedding):
            weight = torch.empty(module.weight.shape, dtype=dtype, device=device).normal_(0, WEIGHT)
            module.weight = nn.Parameter(weight, requires_grad=False)
        elif "weight" in module._parameters:
            module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=dtype, device=device), requires_grad=False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    share_inputs(model)
    return model.eval()


# ---- Norms and gates of dense rows ----


@torch.compile(dynamic=False, fullgraph=True)
def add_norm(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm of h + delta, which is left in h [1, 1, hidden]."""
    if delta is not None:
        h.add_(delta)
    x = h.float()
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(h.dtype)


@torch.compile(dynamic=False, fullgraph=True)
def gated(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def normed_linears(h: Tensor, delta: Tensor | None, weight: Tensor, eps: float, layers: Sequence[nn.Module]) -> list[Tensor]:
    """As `modeling.fused` has it, for dense layers."""
    x = add_norm(h, delta, weight, eps)
    return [layer(x) for layer in layers]


def compiled_pieces() -> ExitStack:
    """Inside of it `decoder_steps.step` takes the functions above."""
    pieces = ExitStack()
    pieces.enter_context(mock.patch.object(decoder_steps, "normed_linears", normed_linears))
    pieces.enter_context(mock.patch.object(decoder_steps, "gated_linear", lambda gate, up, layer: layer(gated(gate, up))))
    return pieces


# ---- One model that writes ----


class Writer:
    """A model, its static cache, and buffers that stay where they are: the next token, its position, all tokens written."""

    def __init__(self, model: Any, room: int) -> None:
        self.model = model
        self.compiled: Callable[[Writer], Tensor] | None = None
        device = model.lm_head.weight.device
        self.length = -(-room // 64) * 64
        self.cache = StaticCache(config=model.config, max_cache_len=self.length)
        if not all(isinstance(getattr(layer, "cumulative_length", None), Tensor) for layer in self.cache.layers):
            sys.exit(f"the static cache of transformers {transformers.__version__} keeps its length on the host")
        known = inspect.signature(model.forward).parameters
        self.keyword = "cache" if "cache" in known else "past_key_values"
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.written = torch.zeros(self.length, dtype=torch.int64, device=device)
        self.places = torch.arange(self.length, device=device)

    def rewind(self, length: int) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)
        self.position.fill_(length)

    def prompt(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Logits [1, keep or all, vocabulary] of a prompt [1, tokens]; the cache holds it afterwards."""
        self.rewind(0)
        logits = self.model(input_ids=ids, use_cache=True, logits_to_keep=keep, **{self.keyword: self.cache}).logits
        self.position.fill_(ids.shape[1])
        return logits

    def mask(self) -> Tensor:
        """[1, 1, 1, length]: 0 up to the position, then -inf."""
        dtype = self.model.lm_head.weight.dtype
        later = self.places > self.position
        return torch.zeros(self.length, dtype=dtype, device=later.device).masked_fill(later, -torch.inf).view(1, 1, 1, -1)

    def as_it_is(self) -> Tensor:
        """Logits [1, vocabulary] of the next token, the cache one longer."""
        more: dict[str, Any] = {"attention_mask": self.mask(), "position_ids": self.position[None], self.keyword: self.cache}
        return self.model(input_ids=self.token, use_cache=True, **more).logits[:, -1]

    def forward(self, stack: str) -> Tensor:
        """Logits [1, vocabulary] of the token after `self.token`."""
        if stack == "compile":
            self.compiled = self.compiled or torch.compile(Writer.as_it_is, fullgraph=True)
            return self.compiled(self)
        return decoder_steps.step(self.model, self.token, self.cache)[:, -1] if stack == "decoder" else self.as_it_is()

    def step(self, stack: str) -> None:
        """Write one token."""
        self.token.copy_(most_likely(self.forward(stack)))
        self.position.add_(1)
        self.written.index_copy_(0, self.position, self.token[0])

    def captured(self, stack: str) -> Callable[[], None]:
        """`step` as the replay of a graph; the step itself where there are no graphs."""
        if self.token.device.type != "cuda":
            return lambda: self.step(stack)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step(stack)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step(stack)
        return graph.replay

    def write(self, step: Callable[[], None], first: Tensor, start: int, count: int) -> list[int]:
        """Tokens that follow `first` [1, 1], which stands at `start`."""
        self.begin(first, start)
        for _ in range(count):
            step()
        return self.written[start + 1 : start + 1 + count].tolist()

    def begin(self, first: Tensor, start: int) -> None:
        self.rewind(start)
        self.token.copy_(first)
        self.written.zero_()


# ---- Checks and measurements ----


def teacher_forced(writer: Writer, ids: Tensor, prompt: int, stack: str) -> Tensor:
    """Logits [tokens, vocabulary] in float64: of a prompt at once, then of the other tokens one by one."""
    rows = [writer.prompt(ids[:, :prompt], keep=0)[0]]
    for place in range(prompt, ids.shape[1]):
        writer.token.copy_(ids[:, place : place + 1])
        rows.append(writer.forward(stack))
        writer.position.add_(1)
    return torch.cat(rows).double()


def check(options: argparse.Namespace, shapes: str, format: TrellisFormat) -> dict[str, float]:
    """Relative errors of a packed 2-layer model's logits, by stack; exits if one is too large."""
    model = build(config_of(shapes, 2), format, options)
    writer = Writer(model, 64)
    ids = torch.randint(0, model.config.vocab_size, (1, 32), device=options.device)
    found = {stack: teacher_forced(writer, ids, 24, stack) for stack in options.stacks if stack in ("decoder", "transformers")}
    dequantize_model(model, options.dtype)
    reference = teacher_forced(writer, ids, 24, "transformers")
    errors = {}
    for stack, logits in found.items():
        norms = (logits - reference).norm(dim=1) / reference.norm(dim=1)
        errors[stack] = torch.nan_to_num(norms, nan=torch.inf).max().item()
        if not errors[stack] < options.tolerance:
            sys.exit(f"{shapes}, {format.spec}, {stack}: logits are off by {errors[stack]:.3g}, {options.tolerance} is allowed")
    return errors


def weight_bytes(model: Any) -> int:
    """What one token reads of the weights: everything but the embedding, of which it reads a row."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if "embed_tokens" not in name and "rotary" not in name)


def measure(options: argparse.Namespace, shapes: str, format: TrellisFormat | None) -> dict[str, Any]:
    """One model: the time to its first token, tokens per second in each stack, and its memory."""
    device, cuda = options.device, options.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    model = build(config_of(shapes), format, options)
    writer = Writer(model, options.prompt + options.new + 8)
    ids = torch.randint(0, model.config.vocab_size, (1, options.prompt), device=device)
    row: dict[str, Any] = {"shapes": shapes, "what": format.spec if format else str(options.dtype).removeprefix("torch.")}
    row |= {"bits": format.rate if format else 8 * options.dtype.itemsize, "bytes a token": weight_bytes(model)}
    if format:
        layers = [layer for _, layer in seed_linears(model)]
        kinds = {(layer.format, (layer.out_features, layer.in_features)) for layer in layers}
        row["tables"] = options.tables.spec if options.tables else "dense"
        row["backends"] = sorted({backend.choose(options.backend, device, *kind).name for kind in kinds})
    if cuda:
        synchronize(device)
        row["weights GB"] = (torch.cuda.memory_allocated() - before) / 1e9
        torch.cuda.reset_peak_memory_stats()
    row["compile and first prompt s"] = seconds(device, lambda: writer.prompt(ids))
    row["first token ms"] = 1e3 * statistics.median(seconds(device, lambda: writer.prompt(ids)) for _ in range(options.repeats))
    row["prompt tokens/s"] = 1e3 * options.prompt / row["first token ms"]
    first = writer.prompt(ids)[0].argmax(-1, keepdim=True)
    for stack in options.stacks:
        if stack == "generate" and format is None:
            continue
        try:
            with compiled_pieces() if format is None and cuda else ExitStack():
                if stack == "generate":
                    row[stack] = by_generate(options, model, writer, ids, row)
                else:
                    row[stack] = generation(options, writer, stack, first, row)
        except RuntimeError as reason:  # a capture that is refused; the other stacks can still run
            row[stack] = {"failed": " ".join(str(reason).split())[:300], "right": False}
    if cuda:
        row["peak GB"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    return row


def by_generate(options: argparse.Namespace, model: Any, writer: Writer, ids: Tensor, row: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of `model.generate`, from the difference between some new tokens and one."""

    def write(count: int) -> list[int]:
        asked = {"min_new_tokens": count, "max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), cache_implementation="static", **asked)
        return list(whole[0, ids.shape[1] :].tolist())

    fuse_decoding(model)
    found = write(1 + options.new)
    times = {
        count: statistics.median(seconds(options.device, lambda c=count: write(c)) for _ in range(options.repeats))
        for count in (1, 1 + options.new)
    }
    each = (times[1 + options.new] - times[1]) / options.new
    # How far each token's logit is below the largest, in standard deviations: by transformers' forward of the whole text, which
    # multiplies in 16 bits, or where activations are rounded more by single steps that are.
    whole = torch.cat((ids, torch.tensor([found], device=options.device)), dim=1)
    if options.tolerance > TOLERANCE:
        logits = teacher_forced(writer, whole, options.prompt, "decoder")[options.prompt - 1 : -1].float()
    else:
        logits = model(whole, logits_to_keep=len(found) + 1).logits[0, :-1].float()
    below = (logits.amax(-1) - logits[range(len(found)), found]) / logits.std(-1)
    return {
        "tokens/s": 1 / each,
        "ms a token": 1e3 * each,
        "with the prompt tokens/s": options.new / times[1 + options.new],
        "TB/s": row["bytes a token"] / each / 1e12,
        "below the largest logit": below.max().item(),
        "right": below.max().item() < BELOW,
        "compared tokens": len(found),
        "distinct tokens": len(set(found)),
    }


def generation(options: argparse.Namespace, writer: Writer, stack: str, first: Tensor, row: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second of one stack, once its graph has written what its eager loop writes."""
    device, start = options.device, options.prompt
    count = min(COMPARED, options.new)
    eager = writer.write(lambda: writer.step(stack), first, start, count)
    writer.rewind(start)
    step = writer.captured(stack)
    same = writer.write(step, first, start, count) == eager
    if not same:
        print(f"  {stack}: the graph's tokens are not the eager loop's: times below are of a wrong result", flush=True)

    def whole() -> None:
        for _ in range(options.new):
            step()

    times = []
    for _ in range(options.repeats):
        writer.begin(first, start)
        times.append(seconds(device, whole))
    each = statistics.median(times) / options.new
    everything = row["first token ms"] / 1e3 + (options.new - 1) * each
    return {
        "tokens/s": 1 / each,
        "ms a token": 1e3 * each,
        "with the prompt tokens/s": options.new / everything,
        "TB/s": row["bytes a token"] / each / 1e12,
        "right": same,
        "compared tokens": count,
        "distinct tokens": len(set(eager)),
    }


def describe(row: dict[str, Any], dense: dict[str, Any] | None, copy: float, stacks: list[str]) -> None:
    """Add ratios and shares to a row, and print it."""
    bound = copy * 1e12 / row["bytes a token"]
    row["bound tokens/s"] = bound
    memory = f"{row['weights GB']:.2f} GB, peak {row['peak GB']:.2f} GB" if "peak GB" in row else "memory not measured"
    print(
        f"{row['shapes']} {row['what']}: {row['bytes a token'] / 1e9:.3f} GB a token, at most {bound:.0f} tokens/s by copy "
        f"bandwidth; {memory}; first token {row['first token ms']:.1f} ms, {row['prompt tokens/s']:.0f} prompt tokens/s"
    )
    for stack in filter(row.get, stacks):
        found = row[stack]
        if "failed" in found:
            print(f"  {stack:12} failed: {found['failed']}", flush=True)
            continue
        found["share of copy"] = found["TB/s"] / copy
        ratio = ""
        beside = (dense or {}).get("decoder" if stack == "generate" else stack, {"failed": ""})
        if dense is not row and "failed" not in beside:
            found["ratio"] = found["tokens/s"] / beside["tokens/s"]
            found["ratio with the prompt"] = found["with the prompt tokens/s"] / beside["with the prompt tokens/s"]
            ratio = f"{found['ratio']:5.2f}x FP16, "
        print(
            f"  {stack:12} {found['tokens/s']:7.1f} tokens/s, {ratio}{found['ms a token']:.3f} ms, {found['TB/s']:.2f} TB/s = "
            f"{found['share of copy']:.0%} of copy; with the prompt {found['with the prompt tokens/s']:.1f} tokens/s; "
            f"right: {found['right']}",
            flush=True,
        )


def run(options: argparse.Namespace, copy: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All rows, and the errors found by the checks."""
    rows: list[dict[str, Any]] = []
    errors: dict[str, Any] = {}
    began = time.perf_counter()
    for shapes in options.shapes:
        formats = [TrellisFormat(rate=bits) for bits in options.bits]
        for format in formats:
            errors[f"{shapes} {format.spec}"] = found = check(options, shapes, format)
            shown = ", ".join(f"{stack} {error:.1e}" for stack, error in found.items())
            print(f"checked 2 layers of {shapes}, {format.spec}: logits off by {shown}", flush=True)
        dense = None
        for format in [*([] if shapes == "70b" else [None]), *formats]:
            try:
                row = measure(options, shapes, format)
            except torch.OutOfMemoryError as reason:
                print(f"{shapes} {format.spec if format else 'dense'}: does not fit ({str(reason).split('.')[0]})", flush=True)
                continue
            rows.append(row)
            dense = rows[-1] if format is None else dense
            describe(rows[-1], dense, copy, options.stacks)
            print(f"  ({time.perf_counter() - began:.0f} s so far)", flush=True)
    return rows, errors


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--shapes", default="8b", help="8b, 70b (packed alone), or both with a comma between")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--stacks", default="decoder,transformers")
    parser.add_argument("--tables", help="format of embedding and head in packed rows; default: dense")
    parser.add_argument("--backend", default="auto", help="cuda, cuda-int8, ...")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of logits, relative; int8 activations need 0.06")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy's shapes, to try this script")
    parser.add_argument("--json", action="store_true", help="nothing but the last line on stdout, the rest on stderr")
    options = parser.parse_args()
    options.device = torch.device(options.device)
    options.tables = parse_format(options.tables) if options.tables else None
    options.dtype = torch.float16 if options.device.type == "cuda" else torch.float32
    options.bits = [int(bits) for bits in options.bits.split(",") if bits]
    options.shapes = ["tiny"] if options.tiny else options.shapes.split(",")
    options.stacks = options.stacks.split(",")
    return options


def main() -> None:
    options = parse()
    if options.device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device")
    out, sys.stdout = sys.stdout, sys.stderr if options.json else sys.stdout
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    facts: dict[str, Any] = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {
        "cuda": torch.version.cuda,
        "prompt": options.prompt,
        "new": options.new,
        "backend": options.backend,
        "tolerance": options.tolerance,
    }
    facts["copy TB/s"] = copy = copy_bandwidth(options.device)
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}, copy {copy:.2f} TB/s", flush=True)
    rows, errors = run(options, copy)
    print(json.dumps(facts | {"checks": errors, "rows": rows}), file=out, flush=True)
    if not all(row[stack]["right"] for row in rows for stack in options.stacks if stack in row):
        sys.exit("a graph failed or wrote other tokens than its eager loop")


if __name__ == "__main__":
    main()
