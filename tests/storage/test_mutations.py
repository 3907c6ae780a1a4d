"""Damaged packed folders by every way in: refused in our words, or no bit is other. `bench/fuzz.py` goes through all of it."""

import json
import os
import shutil
import time

import pytest

from mutations import INDEX, Mutation, attempt, by_evaluate, by_reader, by_transformers, outcome, sample, table
from seedlm.errors import CheckpointError, SeedLMError, SourceError
from seedlm.storage.checkpoint import Checkpoint, stored_name
from seedlm.storage.safetensors import TensorFiles
from tiny_models import join, run, split, tiny_model

UP = "model.layers.0.mlp.up_proj"
WORDS, BIAS = stored_name(UP, "words"), stored_name(UP, "exponent_bias")
WAYS = {"reader": by_reader, "transformers": by_transformers, "evaluate": by_evaluate}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A packed folder of two shards, one with stacked experts, one of the trellis code with float parts."""
    root = tmp_path_factory.mktemp("mutations")
    tiny_model("llama", num_hidden_layers=1).save_pretrained(root / "m")
    run(root / "m", root / "packed", max_shard_size="16KB")
    tiny_model("gpt_oss", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1).save_pretrained(root / "e")
    run(root / "e", root / "stacked")
    layers = {"embeddings": "dense", "head": "dense"}
    run(root / "m", root / "trellis", format="3-fast", backend="auto", feedback="none", **layers)
    return {name: root / name for name in ("packed", "stacked", "trellis")}


@pytest.fixture(scope="module")
def sound(folders):
    """What each way in makes of the sound ones."""
    return {(name, way): call(folder) for name, folder in folders.items() for way, call in WAYS.items()}


@pytest.mark.parametrize(("way", "count"), [("reader", 200), ("transformers", 50), ("evaluate", 50)])
@pytest.mark.parametrize("name", ["packed", "stacked", "trellis"])
def test_no_damage_passes_in_silence(folders, sound, tmp_path, name, way, count):
    wrong = []
    for mutation in sample(table(folders[name]), count):
        spoiled = attempt([mutation], folders[name], tmp_path / "copy")
        start = time.monotonic()
        result, message = outcome(WAYS[way], spoiled, sound[name, way])
        if result == "foreign" and way == "transformers" and mutation.name.startswith("config.json"):
            continue  # which transformers reads itself, before it knows whose folder it is
        if result not in ("refused", "same") or time.monotonic() - start > 20:
            wrong.append((mutation.name, result, message))
    assert wrong == []


def flip(name, bit, place=0):
    """One bit of a stored tensor."""

    def apply(folder):
        entry = TensorFiles.open(folder, SourceError).entries[name]
        data = bytearray(entry.path.read_bytes())
        data[entry.offset + place] ^= 1 << bit
        entry.path.write_bytes(data)

    return apply


def edit_header(name, change):
    """Change the header of the file that holds a tensor."""

    def apply(folder):
        path = TensorFiles.open(folder, SourceError).entries[name].path
        header, data = split(path)
        change(header)
        path.write_bytes(join(header, data))

    return apply


def exchange(one, other):
    def change(header):
        header[one], header[other] = header[other], header[one]

    return change


NORM, OTHER_NORM = "model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"
GATE = stored_name("model.layers.0.mlp.gate_proj", "words")


def both_formats(folder):
    """A format with the same sizes, in config.json and in the metadata: nothing contradicts it but the digests."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"].update(seed_bits=4, exponent_bits=8)
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.safetensors"):
        header, data = split(path)
        described = header["__metadata__"]["seedlm"]
        header["__metadata__"]["seedlm"] = described.replace("block-k8-c8-p3-q4-e4", "block-k4-c8-p3-q4-e8")
        path.write_bytes(join(header, data))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "damage",
    [
        flip(WORDS, 6),
        flip(BIAS, 1),
        flip(NORM, 6, 1),
        flip("lm_head.weight", 0, 77),
        edit_header(NORM, lambda header: header[NORM].update(dtype="U32")),
        edit_header(NORM, exchange(NORM, OTHER_NORM)),
        edit_header(WORDS, exchange(WORDS, GATE)),
        both_formats,
    ],
    ids=["codes", "bias", "dense", "last-bit", "relabelled", "exchanged", "codes-exchanged", "another-format"],
)
def test_a_digest_finds_what_nothing_else_contradicts(folders, tmp_path, way, damage):
    spoiled = attempt([Mutation("", damage)], folders["packed"], tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"is not what was written \(its SHA-256 differs"):
        WAYS[way](spoiled)


def test_an_override_that_the_files_contradict_is_refused(folders, tmp_path):
    spoiled = attempt([], folders["packed"], tmp_path / "copy")
    config = json.loads((spoiled / "config.json").read_text())
    section = config["quantization_config"]
    section["overrides"] = {UP: {**section["format"], "coefficient_bits": 3, "exponent_bits": 7}}
    (spoiled / "config.json").write_text(json.dumps(config))
    for way in WAYS.values():
        with pytest.raises(
            CheckpointError, match=r"up_proj is stored as block-k8-c8-p3-q4-e4, config.json says block-k8-c8-p3"
        ):
            way(spoiled)


def test_a_file_is_verified_while_it_is_new_or_changed(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SEEDLM_VERIFY")
    counted = []
    monkeypatch.setattr(Checkpoint, "verify", lambda self, names=None, threads=None: counted.append(len(names)))
    copy = attempt([], folders["packed"], tmp_path / "copy")
    for _ in range(2):
        by_transformers(copy)
    total = len(Checkpoint.open(copy).files.entries)
    assert counted == [total]
    path = TensorFiles.open(copy, SourceError).entries[WORDS].path
    times = path.stat()
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    by_transformers(copy)
    assert 0 < counted[1] < total
    monkeypatch.setenv("SEEDLM_VERIFY", "1")
    by_transformers(copy)
    assert counted[2] == total


def test_verifying_while_loading_can_be_turned_off(folders, tmp_path, monkeypatch):
    spoiled = attempt([Mutation("", flip(NORM, 6, 1))], folders["packed"], tmp_path / "copy")
    monkeypatch.setenv("SEEDLM_VERIFY", "0")
    by_transformers(spoiled)
    with pytest.raises(CheckpointError, match="SHA-256"):
        Checkpoint.open(spoiled).verify()


def test_a_cut_download_is_called_one(folders, tmp_path):
    spoiled = attempt([], folders["stacked"], tmp_path / "copy")
    path = spoiled / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for way in WAYS.values():
        with pytest.raises(CheckpointError, match=r"truncated, .* was its download cut short"):
            way(spoiled)


def test_a_snapshot_in_the_cache_of_the_hub_links_to_its_blobs(folders, sound, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folders["packed"].iterdir():
        (blobs / f"blob-{path.name}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    for way, call in WAYS.items():
        assert outcome(call, snapshot, sound["packed", way]) == ("same", "")


def test_an_index_of_nothing_is_refused(folders, tmp_path):
    shutil.copytree(folders["packed"], tmp_path / "copy")
    (tmp_path / "copy" / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"weight_map lists no tensor"):
        Checkpoint.open(tmp_path / "copy")


@pytest.mark.parametrize("name", ["packed", "trellis"])
def test_an_option_that_commands_a_terminal_is_shown_as_text(folders, tmp_path, name):
    shutil.copytree(folders[name], tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    config["quantization_config"]["\x1b[2Jx"] = "y"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    for way in (by_transformers, by_evaluate):
        with pytest.raises(SeedLMError, match=r"x1b\[2Jx") as refusal:
            way(tmp_path / "copy")
        assert str(refusal.value).isprintable()
