"""Statistics of a model larger than the GPU, layer by layer: seconds a layer, and the most memory that it takes.

    python bench/statistics_gpu.py --layers 6 --memory 40 [--pin]

Random weights of Llama-3-70B's shapes, as many layers as are asked for. None of them stays on the GPU, and torch is kept from
using more of its memory than is said. First a small model is held against itself whole. `--pin` locks the weights' memory,
which makes the way to the GPU some times as fast. Two runs with unequal --layers tell what a layer takes forwards.
`--device cpu` runs all of it with the small model's shapes.
"""

import argparse
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from seedlm.calibration.own_text import OwnText, write_text
from seedlm.calibration.placement import nbytes, numbered_layers, place, workspace
from seedlm.calibration.statistics import measure_statistics

LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
BATCH = 8
VOCABULARY = 128256


def build(layers: int, shapes: dict[str, int], device: torch.device, vocabulary: int = VOCABULARY) -> Any:
    """A model of random bfloat16 weights on the CPU, made on the device, matrix by matrix."""
    config = LlamaConfig(
        **shapes, num_hidden_layers=layers, vocab_size=vocabulary, max_position_embeddings=4096, bos_token_id=1
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            values = (values.normal_(std=shapes["hidden_size"] ** -0.5) if parameter.dim() > 1 else values).cpu()
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def nothing_stays(model: Any) -> int:
    """Room for all but the layers, and for one of these."""
    layers = numbered_layers(model).values()
    return nbytes(model) - sum(map(nbytes, layers)) + max(map(nbytes, layers))


def check(device: torch.device) -> None:
    """A small model whose layers come one at a time has the statistics of the same model whole, to the bit."""
    tokens = torch.randint(1000, (16, 64), generator=torch.Generator().manual_seed(0))
    model = build(3, SMALL, device, 1000)
    whole = measure_statistics(model.to(device), tokens)
    assert place(model.cpu(), device, nothing_stays(model)) == sum(map(nbytes, numbered_layers(model).values()))
    found = measure_statistics(model, tokens)
    assert all(torch.equal(read.correlation, found.inputs[name].correlation) for name, read in whole.inputs.items())
    print(f"checked: {len(whole.inputs)} inputs of a small model are the same as with all of it on the device")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--memory", type=float, default=40, help="GB of the GPU that may be used")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--written", type=int, default=9, help="tokens of each sequence that are written, to be timed")
    parser.add_argument("--pin", action="store_true", help="lock the weights' memory")
    parser.add_argument("--device", default="cuda")
    wanted = parser.parse_args()
    device, length = torch.device(wanted.device), 256
    on_gpu = device.type == "cuda"
    check(device)
    model = build(wanted.layers, LARGE if on_gpu else SMALL, device)
    room = int(wanted.memory * 1e9) - workspace(model, wanted.sequences, length, BATCH)
    print(f"weights {nbytes(model) / 1e9:.1f} GB; of {wanted.memory:g} GB, {room / 1e9:.1f} are left for them, at most")
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(wanted.memory * 1e9 / torch.cuda.get_device_properties(device).total_memory)
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    layer = place(model, device, min(room, nothing_stays(model)), host=(1 << 50) * wanted.pin) / wanted.layers
    write_text(model, OwnText(sequences=wanted.sequences, length=2))
    start = time.perf_counter()
    write_text(model, OwnText(sequences=wanted.sequences, length=wanted.written))
    seconds = (time.perf_counter() - start) / wanted.written / wanted.layers
    print(f"writing: {seconds:.3f} s a layer and token ({layer / seconds / 1e9:.1f} GB/s); 70B: {seconds * 80 * length:.0f} s")
    marks: list[float] = []
    tokens = torch.randint(VOCABULARY, (wanted.sequences, length), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    found = measure_statistics(model, tokens, batch=BATCH, on_progress=lambda *_: marks.append(time.perf_counter() - start))
    total, forwards = time.perf_counter() - start, marks[-(-wanted.sequences // BATCH)]
    print(f"statistics of {len(found.inputs)} inputs: {forwards:.2f} s forwards, embedding and head included, and "
          f"{(total - forwards) / wanted.layers:.2f} s a layer backwards")  # fmt: skip
    if on_gpu:
        print(f"most memory of the GPU: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
