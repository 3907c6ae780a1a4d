"""Hostile files of less than a megabyte, of every kind that is read, and what it costs to refuse them.

`write` leaves them in a folder. ``python small_files.py FOLDER`` opens each in a process of its own, forked from one that has
imported all there is to import, and prints a line of JSON for each: name, "refused" or what else came of it, seconds of
processor time, kilobytes of memory that were not there before, and the message.
"""

import gzip
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
import time
from pathlib import Path

INDEX = "model.safetensors.index.json"
LONG = "x" * 900_000
LIMIT_SECONDS, LIMIT_BYTES = 30, 4 << 30
"""Where a case that gets out of hand is ended."""


def _edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _config(**values):
    return lambda folder: _edit(folder / "config.json", lambda config: config.update(values))


def _section(change):
    return lambda folder: _edit(folder / "config.json", lambda config: change(config["quantization_config"]))


def _text(name, content):
    def write(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(content)

    return write


def _metadata(change):
    """Change the seedlm metadata of model.safetensors."""

    def write(folder):
        from tiny_models import join, split

        header, data = split(folder / "model.safetensors")
        table = json.loads(header["__metadata__"]["seedlm"])
        change(table)
        header["__metadata__"]["seedlm"] = json.dumps(table, separators=(",", ":"))
        (folder / "model.safetensors").write_bytes(join(header, data))

    return write


def _index(weight_map):
    def write(folder):
        (folder / "model.safetensors").rename(folder / "m.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return write


def _stacks(table):
    """Two hundred stacks that claim 65,536 matrices each."""
    module = next(iter(table["tensors"].values()))
    table["stacks"] = {f"s{n}": {"shape": [65536, *module["shape"]], "transposed": False} for n in range(200)}
    table["tensors"] |= {f"s{n}.0": module for n in range(200)}


def _formats(folder):
    """Two thousand matrices of a format each, and five thousand dense tensors."""
    from tiny_models import join

    header, table, overrides, position = {"__metadata__": {}}, {}, {}, 0
    for number, (k, c, q) in enumerate([(k, c, q) for k in range(8, 24) for c in range(1, 65) for q in (2, 3)][:2000]):
        table[f"a.{number}"] = {"shape": [1, 1], "format": f"block-k{k}-c{c}-p1-q{q}-e1"}
        sizes = {"seed_bits": k, "block_size": c, "num_coefficients": 1, "coefficient_bits": q, "exponent_bits": 1}
        overrides[f"a.{number}"] = {"family": "block", **sizes}
        for name, shape in ((f"a.{number}.weight", [1, 1]), (f"a.{number}.weight_exponent_bias", [1])):
            header[name] = {"dtype": "I32", "shape": shape, "data_offsets": [position, position + 4]}
            position += 4
    header |= {f"d{n}": {"dtype": "U8", "shape": [0], "data_offsets": [position, position]} for n in range(5000)}
    header["__metadata__"]["seedlm"] = json.dumps({"format_version": 2, "tensors": table})
    (folder / "model.safetensors").write_bytes(join(header, bytes(position)))
    _section(lambda section: section.update(overrides=overrides))(folder)
    (folder / "seedlm_report.json").write_text("{}")  # refused after everything else was read


PACKED = {
    "stacks": _metadata(_stacks),
    "formats": _formats,
    "repeated-key": _text("config.json", "{" + '"a":1,' * 140_000 + '"b":1}'),
    "many-keys": _text("config.json", "{" + ",".join(f'"{n}":1' for n in range(80_000)) + "}"),
    "objects": _text("config.json", '{"a":[' + '{"":0},' * 130_000 + "0]}"),
    "half-pairs": _text("config.json", '{"a":"' + "\\ud800" * 150_000 + '"}'),
    "long-number": _text("config.json", '{"a":' + "9" * 900_000 + "}"),
    "deep": _text("config.json", "[" * 900_000),
    "fifo-config": lambda folder: ((folder / "config.json").unlink(), os.mkfifo(folder / "config.json")),
    "zero-index": lambda folder: ((folder / "model.safetensors").unlink(), (folder / INDEX).symlink_to("/dev/zero")),
    "empty-lists": lambda folder: (_index({})(folder), _text(INDEX, '{"weight_map":[' + "[]," * 300_000 + "[]]}")(folder)),
    "long-override": _section(lambda section: section.update(overrides={LONG: section["format"]})),
    "long-format-key": _section(lambda section: section["format"].update({LONG: 1})),
    "long-version": _section(lambda section: section.update(format_version=10**4000)),
    "long-report": _text("seedlm_report.json", json.dumps({"format_version": 1, "source_bytes": 1, "tensors": {LONG: {}}})),
    "long-module": _metadata(lambda table: table["tensors"].update({LONG: {"shape": [0, 1], "format": "z"}})),
    "long-shape": _metadata(lambda table: table["tensors"].update(x={"shape": [1] * 300_000, "format": "z"})),
    "long-stack": _metadata(lambda table: table.update(stacks={LONG: {"shape": [4, 44, 32], "transposed": False}})),
    "long-tensor": _index({LONG: "m.safetensors"}),
    "long-file": _index({"a": LONG + ".safetensors"}),
    "many-files": _index({str(n): f"{n}.safetensors" for n in range(30_000)}),
}
PART = {"model_type": "gemma3_text", "num_hidden_layers": 10**8}
SOURCES = {
    "layers": _config(num_hidden_layers=1000, layer_types=None),
    "many-layers": _config(num_hidden_layers=10**9),
    "layers-of-a-part": _config(model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"], text_config=PART),
    "labels": _config(num_labels=10**8),
    "vocabulary": _config(vocab_size=10**8),
    "long-type": _config(model_type=[LONG]),
    "deep-parts": _text("config.json", '{"a":' * 900 + '{"quantization_config":{}}' + "}" * 900),
    "folders": _text("modules.json", json.dumps([{"path": "."}] * 60_000)),
    "long-folder": _text("modules.json", json.dumps([{"path": LONG}])),
}


def _list(name, kind, count, data):
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<IIQ", 9, kind, count) + data


GGUF = {
    "numbers": [_list("x.y", 0, 900_000, bytes(900_000))],
    "texts": [_list("x.y", 8, 110_000, bytes(880_000))],
    "tokenizer": [_list("tokenizer.x", 8, 110_000, bytes(880_000))],
    "keys": [struct.pack("<Q5sIB", 5, b"%05d" % n, 0, 7) for n in range(50_000)],
}
RECORDS = {
    "lists": ('"records_version":1,"tokens":{"token_ids":[', "[],", "[]]}}"),
    "objects": ('"records_version":1,"prompts":[', '{"":0},', "0]}"),
    "large-objects": ('"records_version":1,"prompts":[', '{"":0,"a":1.5,"b":1.50001},', "0]}"),
    "texts": ('"records_version":1,"layers":{"linears":[],"hidden":[', '"ab",', "1.5]}}"),
    "numbers": ('"records_version":1,"layers":{"linears":[],"hidden":[', "1.5,", '"x"]}}'),
}


def _records(prefix, unit, end):
    """As much of `unit` as records of under a megabyte can become, beside a text that cannot be packed."""
    noise = bytes(random.Random(0).choices(range(48, 123), k=1_050_000)).replace(b"\\", b"a")
    head = b'{"noise":"' + noise + b'",' + prefix.encode()
    count = (8_500_000 - len(head)) // len(unit)
    return gzip.compress(head + unit.encode() * count + end.encode(), 6)


def _statistics(path, names, tokens, reads):
    from tiny_models import join

    facts = {"model": "m", "text": "t", "source": "own text", "sequences": 1, "length": 1, "weighting": "none"}
    content = {"statistics_version": 1, "facts": facts, "reads": reads, "tokens": tokens}
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    path.write_bytes(join({"__metadata__": {"statistics": json.dumps(content)}, **header}, b""))


def _with_keys(data, keys):
    """A GGUF file with more entries in front of the first, filled up so that tensors stay aligned."""
    filler = struct.pack("<Q6sI", 6, b"filler", 8)
    size = sum(map(len, keys)) + len(filler) + 8
    count = struct.unpack_from("<Q", data, 16)[0] + len(keys) + 1
    pad = b"x" * (-size % 32)
    return data[:16] + struct.pack("<Q", count) + b"".join(keys) + filler + struct.pack("<Q", len(pad)) + pad + data[24:]


def write(folder):
    """All of them, each under KIND-NAME."""
    from synthetic_runs import original_run, synthetic
    from synthetic_runs import write as write_run
    from tiny_models import run, tiny_gguf, tiny_llama

    tiny_llama(folder / "m", layers=1)
    run(folder / "m", folder / "out")
    for kind, origin, cases in (("packed", "out", PACKED), ("source", "m", SOURCES), ("load", "m", SOURCES)):
        for name, damage in cases.items():
            shutil.copytree(folder / origin, folder / f"{kind}-{name}")
            damage(folder / f"{kind}-{name}")
    tiny_gguf(folder / "sound.gguf")
    for name, keys in GGUF.items():
        for kind in ("source", "load"):
            (folder / f"{kind}-{name}.gguf").write_bytes(_with_keys((folder / "sound.gguf").read_bytes(), keys))
    _statistics(folder / "statistics-rows", [f"rows.{n}" for n in range(8000)], {"a": 1}, {str(n): "a" for n in range(8000)})
    _statistics(folder / "statistics-long", [LONG], {}, {})
    _statistics(folder / "statistics-tokens", [], {"a": 10**4000}, {})
    for name, content in RECORDS.items():
        packed, place = _records(*content), folder / f"runs-{name}"
        write_run(place, "a", *original_run())
        write_run(place, "b", *synthetic(1))
        (place / "b.records.json.gz").write_bytes(packed)
        named = {"file": "b.records.json.gz", "sha256": hashlib.sha256(packed).hexdigest()}
        _edit(place / "b.json", lambda results, named=named: results.update(records=named))
    for kind in ("text", "prompts"):
        os.mkfifo(folder / f"{kind}-fifo")
        (folder / f"{kind}-zero").symlink_to("/dev/zero")
    for name, values in (("long", {LONG: -1}), ("large", {"a": 10**4000})):
        content = {"sensitivity_version": 1, "model": "m", "sensitivity": values}
        (folder / f"sensitivity-{name}").write_text(json.dumps(content))


def _ways():
    """Kind -> what opens a path; all that they will import is imported."""
    import gguf
    import transformers.conversion_mapping
    import transformers.modeling_gguf_pytorch_utils
    from transformers import AutoConfig, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import seedlm.codes.block.family
    import seedlm.codes.trellis.family
    import seedlm.modeling.places
    import seedlm.storage.source_gguf
    from seedlm.codes.registry import parse_format
    from seedlm.compare import load_runs
    from seedlm.compress import plan
    from seedlm.evaluation.prompts import read_prompts
    from seedlm.evaluation.text import Text
    from seedlm.integrations.transformers.opening import open_language_model
    from seedlm.storage.inspect import inspect_checkpoint
    from seedlm.storage.sensitivity import read_sensitivity
    from seedlm.storage.source import open_source
    from seedlm.storage.statistics import Statistics

    assert all((gguf, AutoConfig, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast, transformers, seedlm))
    return {
        "packed": inspect_checkpoint,
        "source": lambda path: plan.choose(open_source(path), [parse_format("4")], (), ()),
        "load": open_language_model,
        "statistics": Statistics.load,
        "runs": lambda path: load_runs([path / "a.json", path / "b.json"]),
        "text": Text.from_wikitext,
        "prompts": read_prompts,
        "sensitivity": read_sensitivity,
    }


def _peak():
    """Kilobytes: the most that this process had resident. (`getrusage` tells the parent's peak where it was larger.)"""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def _measure(way, path):
    """In a child: open it, and say what that took."""
    from seedlm.errors import SeedLMError

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what is resident now
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS, LIMIT_SECONDS))
    before, start = _peak(), time.process_time()
    try:
        way(path)
        result, message = "accepted", ""
    except SeedLMError as error:
        result, message = "refused", str(error)
    except BaseException as error:
        result, message = f"{type(error).__name__}: {error}"[:500], ""
    return [result, time.process_time() - start, _peak() - before, message]


def main(folder):
    """Open all files of a folder."""
    ways = _ways()
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES * 4, LIMIT_BYTES * 4))
    for path in sorted(folder.glob("*-*")):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.write(writing, json.dumps(_measure(ways[path.name.split("-")[0]], path)).encode()[:60_000])
            os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        line = json.loads(found) if found else ["ended", LIMIT_SECONDS, LIMIT_BYTES >> 10, ""]
        print(json.dumps([path.name.removesuffix(".gguf"), *line]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
