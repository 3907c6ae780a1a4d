"""GGUF headers that lie, refused before gguf-py or transformers see the file."""

import struct

import numpy as np
import pytest

from seedlm.errors import SourceError
from seedlm.storage.gguf_check import check_decoder, read_gguf_header
from seedlm.storage.source import open_source
from tiny_models import tiny_gguf

gguf = pytest.importorskip("gguf")
SIZES = gguf.GGML_QUANT_SIZES


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tiny_gguf(path)
    check_decoder([read_gguf_header(path, SIZES)])
    return path.read_bytes()


@pytest.fixture
def refused(sound, tmp_path):
    """Write a changed file; what the reader says of it."""

    def change(data):
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        with pytest.raises(SourceError) as caught:
            check_decoder([read_gguf_header(path, SIZES)])
        with pytest.raises(SourceError):
            open_source(path)
        return str(caught.value)

    return change


def text(value):
    return struct.pack("<Q", len(value)) + value


def after(data, key):
    """Where the value of a key begins, after its type."""
    return data.index(text(key)) + len(text(key)) + 4


def with_keys(data, *keys):
    """More entries in front of the first, and one that fills them up to a multiple of 32 bytes: tensors stay aligned."""
    filler = text(b"filler") + struct.pack("<I", 8)
    size = sum(map(len, keys)) + len(filler) + 8
    count = struct.unpack_from("<Q", data, 16)[0] + len(keys) + 1
    return data[:16] + struct.pack("<Q", count) + b"".join(keys) + filler + text(b"x" * (-size % 32)) + data[24:]


def with_number(data, key, value):
    place = after(data, key)
    return data[:place] + struct.pack("<I", value) + data[place + 4 :]


def tensor_field(data, name, field, value):
    """Change ("dim", number), "kind" or "offset" of a tensor's entry."""
    place = data.index(text(name)) + len(text(name))
    dimensions = struct.unpack_from("<I", data, place)[0]
    at = {"dims": (place, "<I"), "kind": (place + 4 + 8 * dimensions, "<I"), "offset": (place + 8 + 8 * dimensions, "<Q")}
    position, kind = at[field] if isinstance(field, str) else (place + 4 + 8 * field[1], "<Q")
    return data[:position] + struct.pack(kind, value) + data[position + struct.calcsize(kind) :]


NUMBERS = [
    (b"llama.block_count", 2, "declares 2 layers, and has tensors of 1"),
    (b"llama.block_count", 0xFFFFFFFF, "declares 4294967295 layers, and has tensors of 1"),
    (b"llama.block_count", 0, "llama.block_count must be a positive integer, got 0"),
    (b"llama.embedding_length", 65, r"token_embd.weight must be [32, 65] by its metadata, got [32, 64]"),
    (b"llama.feed_forward_length", 97, "blk.0.ffn_gate.weight must be [97, 64]"),
    (b"llama.attention.head_count", 3, "3 attention heads cannot share 2"),
    (b"llama.attention.head_count", 6, "a width of 64 cannot be divided among 6 attention heads"),
    (b"llama.attention.head_count", 64, "heads of even size, got 1"),
    (b"llama.attention.head_count_kv", 4, "blk.0.attn_k.weight must be [64, 64]"),
    (b"llama.vocab_size", 33, "token_embd.weight must be [33, 64]"),
]


@pytest.mark.parametrize(("key", "value", "message"), NUMBERS, ids=lambda value: str(value)[:40])
def test_metadata_is_held_against_the_tensors(sound, refused, key, value, message):
    assert message in refused(with_number(sound, key, value))


FIELDS = [
    (b"blk.0.ffn_up.weight", ("dim", 0), 0, "has the impossible shape [96, 0]"),
    (b"blk.0.ffn_up.weight", ("dim", 0), 1 << 63, "has the impossible shape"),
    (b"blk.0.ffn_up.weight", ("dim", 0), 65, "has the impossible shape [96, 65]"),
    (b"blk.0.ffn_up.weight", ("dim", 1), 1 << 39, "truncated"),
    (b"blk.0.ffn_up.weight", "dims", 9, "has 9 dimensions"),
    (b"blk.0.ffn_up.weight", "kind", 999, "is of an unknown type 999"),
    (b"blk.0.ffn_up.weight", "offset", 0, "lies over the tensor before it"),
    (b"blk.0.ffn_up.weight", "offset", 7, "starts at 7, which is no multiple of 32"),
    (b"blk.0.ffn_up.weight", "offset", (1 << 64) - 32, "truncated"),
]


@pytest.mark.parametrize(("name", "field", "value", "message"), FIELDS, ids=lambda value: str(value)[:40])
def test_tensors_lie_apart_and_inside(sound, refused, name, field, value, message):
    assert message in refused(tensor_field(sound, name, field, value))


def test_counts_are_held_against_the_bytes_that_are_left(sound, refused):
    place = after(sound, b"tokenizer.ggml.tokens")
    assert "texts in" in refused(sound[: place + 4] + struct.pack("<Q", 0x1FFFFF) + sound[place + 12 :])
    assert "at most 2097152 are read" in refused(sound[: place + 4] + struct.pack("<Q", 0xFFFFFFFF) + sound[place + 12 :])
    scores = struct.pack("<IIQ", 9, 6, 0x1FFFFF)
    assert "with 2097151 entries takes 8388604 bytes" in refused(with_keys(sound, text(b"tokenizer.ggml.scores") + scores))
    refused(sound[:16] + struct.pack("<Q", 1 << 60) + sound[24:])  # keys, tensors: whatever comes next does not fit
    refused(sound[:8] + struct.pack("<Q", 1 << 60) + sound[16:])


NUMBER = struct.pack("<IB", 0, 7)
LISTS = [
    ("numbers", [text(b"x.y") + struct.pack("<IIQ", 9, 0, 900_000) + bytes(900_000)], "x.y has 900000 entries, at most 4096"),
    ("texts", [text(b"x.y") + struct.pack("<IIQ", 9, 8, 100_000) + bytes(800_000)], "x.y has 100000 entries, at most 4096"),
    (
        "tokenizer",
        [text(b"tokenizer.x") + struct.pack("<IIQ", 9, 0, 900_000) + bytes(900_000)],
        "tokenizer.x has 900000 entries, for 32 tokens",
    ),
    ("keys", [text(b"%x" % n) + NUMBER for n in range(50_000)], "keys, at most 1024 are read"),
    (
        "frequencies",
        [text(b"llama.rope.dimension_count") + struct.pack("<II", 4, 8)],
        "rope_freqs.weight must be [4] by its metadata, got [8]",
    ),
]


@pytest.mark.parametrize(("keys", "message"), [case[1:] for case in LISTS], ids=[case[0] for case in LISTS])
def test_what_takes_long_to_parse_is_refused_before(refused, tmp_path, keys, message):
    tiny_gguf(tmp_path / "f.gguf", **{"rope_freqs.weight": ((8,), gguf.GGMLQuantizationType.F32)})
    assert message in refused(with_keys((tmp_path / "f.gguf").read_bytes(), *keys))


def test_frequencies_are_positive(sound, tmp_path):
    tiny_gguf(tmp_path / "f.gguf", **{"rope_freqs.weight": np.zeros(8, np.float32)})
    with pytest.raises(SourceError, match=r"rope_freqs.weight must be positive numbers, got 0.0 to 0.0"):
        open_source(tmp_path / "f.gguf")


def test_integers_are_no_weights(tmp_path):
    tiny_gguf(tmp_path / "f.gguf", **{"blk.0.attn_q.weight": np.zeros((64, 64), np.int32)})
    with pytest.raises(SourceError, match=r"blk.0.attn_q.weight is of type I32, which is not dequantized here"):
        open_source(tmp_path / "f.gguf")


def test_what_stands_twice_is_refused(sound, refused):
    assert "holds 'blk.0.attn_k.weight' twice" in refused(sound.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1))


def test_a_cut_file_is_called_one(sound, refused):
    assert "was its download cut short" in refused(sound[:-1000])
    assert "truncated" in refused(sound[:200])
    assert "does not begin with GGUF" in refused(b"")


def test_a_missing_or_further_tensor_is_named(sound, refused):
    assert "lacks blk.0.ffn_up.weight" in refused(sound.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    assert "declares 1 layers, and has tensors of 2" in refused(sound.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"))
