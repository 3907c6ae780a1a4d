"""A whole model of a real one's shapes through the command line: time, memory, bytes, and the same output on any devices.

    python bench/whole_model.py 7b                            # Llama-2-7B's shapes on every GPU
    python bench/whole_model.py 70b --layers 8 --devices 1,2  # Llama-3-70B's, as many layers as the disk holds
    python bench/whole_model.py tiny                          # a check that this script works, on a CPU

Weights are random (normal, standard deviation 0.02, bfloat16), a shard a layer. For each count of devices, ``seedlm compress``
runs in a process of its own, and its output is compared byte for byte with the first one's. Embeddings and head stay dense,
unless further options, which are those of ``seedlm compress``, say otherwise. Prints a table and, last, one JSON line. With
fewer layers than the model has, the whole is extrapolated from the weights, and called so.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from seedlm.storage.safetensors import TensorInfo, layout

MODELS = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "layers": 80, "heads": 64, "kv_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "layers": 2, "heads": 4, "kv_heads": 2, "vocab_size": 256},
}
_CHUNK = 1 << 26
DENSE = ("--embeddings", "dense", "--head", "dense")
"""As the times that were noted: of layers."""


def shards(model: dict[str, int], layers: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """File name -> tensors and their shapes."""
    hidden, inner, vocab = model["hidden_size"], model["intermediate_size"], model["vocab_size"]
    kv = hidden // model["heads"] * model["kv_heads"]
    files = [{"model.embed_tokens.weight": (vocab, hidden)}]
    for n in range(layers):
        shapes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        files.append({f"model.layers.{n}.{module}.weight": shape for module, shape in shapes.items()})
    files.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)})
    return {f"model-{n:05d}-of-{len(files):05d}.safetensors": file for n, file in enumerate(files, 1)}


def write_model(folder: Path, model: dict[str, int], layers: int) -> None:
    """Write the source, on all GPUs."""
    folder.mkdir(parents=True)
    gpus = torch.cuda.device_count()
    files = shards(model, layers)
    own = threading.local()

    def write(seed: int, name: str) -> None:
        infos = {tensor: TensorInfo("BF16", shape) for tensor, shape in files[name].items()}
        place = layout(infos, {"format": "pt"})
        device = torch.device("cuda", seed % gpus) if gpus else torch.device("cpu")
        generator = torch.Generator(device).manual_seed(seed)
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(_CHUNK, dtype=torch.bfloat16, pin_memory=gpus > 0)
        with open(folder / name, "wb", buffering=0) as file:
            file.write(place.header)
            for info in infos.values():
                count = info.nbytes // 2
                for start in range(0, count, _CHUNK):
                    piece = own.buffer[: min(_CHUNK, count - start)]
                    piece.copy_(torch.randn(len(piece), generator=generator, device=device).mul_(0.02))
                    file.write(piece.view(torch.uint8).numpy().data)

    with ThreadPoolExecutor(8 * max(1, gpus)) as pool:
        list(pool.map(write, range(len(files)), files))
    weight_map = {tensor: name for name, shapes in files.items() for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "num_hidden_layers": layers,
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "tie_word_embeddings": False,
        **{key: model[key] for key in ("hidden_size", "intermediate_size", "vocab_size")},
    }
    (folder / "config.json").write_text(json.dumps(config))


class Watch(threading.Thread):
    """The most memory that a process and its children have resident together, and that is taken on each GPU, by looking."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.host, self.running = pid, 0, True
        self.before, self.gpu = self.taken(), 0

    @staticmethod
    def taken() -> list[int]:
        pairs = [torch.cuda.mem_get_info(n) for n in range(torch.cuda.device_count())]
        return [total - free for free, total in pairs]

    def run(self) -> None:
        while self.running:
            self.host = max(self.host, resident(self.pid))
            self.gpu = max([self.gpu, *(now - then for now, then in zip(self.taken(), self.before, strict=True))])
            time.sleep(0.1)


def resident(pid: int) -> int:
    """Bytes that a process and all below it have resident; 0 where there is no /proc."""
    parents, sizes = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)], sizes[int(path.name)] = int(fields[1]), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # it is gone
            continue
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return sum(sizes.get(member, 0) for member in family)


def compress(source: Path, out: Path, device: str, options: list[str]) -> dict:
    """One run of the command line; its own summary, and what was seen from outside."""
    command = [
        sys.executable,
        "-m",
        "seedlm",
        "compress",
        str(source),
        str(out),
        "--device",
        device,
        "--json",
        *DENSE,
        *options,
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    watch.start()
    summary, _ = process.communicate()
    wall = time.monotonic() - start
    watch.running = False
    watch.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    run = json.loads(summary)
    run.pop("tensors")
    return {**run, "wall_seconds": wall, "host_bytes": watch.host, "gpu_bytes": watch.gpu}


def differing(first: Path, second: Path) -> list[str]:
    """Files of two folders that are not the same."""
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    return sorted(name for name in names if not same(first / name, second / name))


def same(first: Path, second: Path) -> bool:
    if not first.is_file() or not second.is_file() or first.stat().st_size != second.stat().st_size:
        return False
    with open(first, "rb") as a, open(second, "rb") as b:
        while True:
            left, right = a.read(_CHUNK), b.read(_CHUNK)
            if left != right:
                return False
            if not left:
                return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--layers", type=int, help="as many as the disk holds; default: all")
    parser.add_argument("--devices", default="", help="counts of devices, such as 1,2; default: all there are")
    parser.add_argument("--folder", type=Path, help="where there is room; default: a temporary folder")
    parser.add_argument("--source", type=Path, help="write the model there and keep it, or take the one that is there")
    arguments, options = parser.parse_known_args()  # the rest goes to seedlm compress
    model = MODELS[arguments.model]
    layers = arguments.layers or model["layers"]
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    counts = [int(count) for count in (arguments.devices or str(max(1, torch.cuda.device_count()))).split(",")]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        source = arguments.source or folder / "source"
        start = time.monotonic()
        written = not source.exists()
        if written:
            write_model(source, model, layers)
            os.sync()  # or the disk is still at it while the first runs write
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        how = f"written in {time.monotonic() - start:.1f} s" if written else "there already"
        print(f"source: {layers} of {model['layers']} layers, {size / 1e9:.2f} GB {how}", flush=True)
        torch.cuda.empty_cache()
        runs = []
        for place, count in enumerate(counts):
            device = ",".join(f"cuda:{n}" for n in range(count)) if kind == "cuda" else ",".join(["cpu"] * count)
            run = compress(source, folder / f"out{place}", device, options)
            run["differs"] = []
            runs.append(run)
            print_run(device, run, size, model["layers"] / layers)
            if place:
                run["differs"] = differing(folder / "out0", folder / f"out{place}")
                print("    DIFFERS: " + ", ".join(run["differs"]) if run["differs"] else "    the same bytes", flush=True)
                shutil.rmtree(folder / f"out{place}")
    gpu = torch.cuda.get_device_name() if kind == "cuda" else "none"
    print(json.dumps({"model": arguments.model, "layers": layers, "gpu": gpu, "torch": torch.__version__, "runs": runs}))
    if any(run["differs"] for run in runs):
        sys.exit("the outputs differ")


def print_run(device: str, run: dict, source_bytes: int, times: float) -> None:
    phases, wall, written = run["phase_seconds"], run["wall_seconds"], run["bytes"]
    weights, seconds = run["compressed_weights"], phases["compress"]
    parts = {"start": wall - run["seconds"], **phases}
    print(f"{device}: {wall:.1f} s in all: " + ", ".join(f"{name} {part:.1f}" for name, part in parts.items()))
    print(
        f"    {weights:,} weights, {weights / seconds / 1e6:.0f} million/s; read {source_bytes / 1e9:.2f} GB twice, at "
        f"{2 * source_bytes / seconds / 1e9:.2f} GB/s; "
        f"wrote {written / 1e9:.2f} GB, {written / seconds / 1e9:.2f} GB/s"
    )
    print(
        f"    host {run['host_bytes'] / 1e9:.2f} GB, GPU {run['gpu_bytes'] / 1e9:.2f} GB, of which tensors and caches "
        f"{run['peak_device_bytes'] / 1e9:.2f}"
    )
    if times > 1:
        print(f"    the whole model, extrapolated by its layers: {wall + (times - 1) * seconds:.0f} s")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
