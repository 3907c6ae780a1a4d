"""GGUF headers that lie, refused before gguf-py or transformers see the file."""

import struct

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
    assert "texts in" in refused(sound[: place + 4] + struct.pack("<Q", 0xFFFFFFFF) + sound[place + 12 :])
    scores = text(b"tokenizer.ggml.scores") + struct.pack("<IIQ", 9, 6, 0xFFFFFFFF)
    keys = struct.unpack_from("<Q", sound, 16)[0]
    more = sound[:16] + struct.pack("<Q", keys + 1) + scores + sound[24:]
    assert "with 4294967295 entries takes 17179869180 bytes" in refused(more)
    refused(sound[:16] + struct.pack("<Q", 1 << 60) + sound[24:])  # keys, tensors: whatever comes next does not fit
    refused(sound[:8] + struct.pack("<Q", 1 << 60) + sound[16:])


def test_what_stands_twice_is_refused(sound, refused):
    assert "holds 'blk.0.attn_k.weight' twice" in refused(sound.replace(b"blk.0.attn_q.weight", b"blk.0.attn_k.weight", 1))


def test_a_cut_file_is_called_one(sound, refused):
    assert "was its download cut short" in refused(sound[:-1000])
    assert "truncated" in refused(sound[:200])
    assert "does not begin with GGUF" in refused(b"")


def test_a_missing_or_further_tensor_is_named(sound, refused):
    assert "lacks blk.0.ffn_up.weight" in refused(sound.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    assert "declares 1 layers, and has tensors of 2" in refused(sound.replace(b"blk.0.ffn_up.weight", b"blk.1.ffn_up.weight"))
