"""The packed checkpoint: golden bytes, and one test for each way in which an untrusted folder can be wrong."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from seedlm.codes.block import packing
from seedlm.codes.registry import parse_format
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import CheckpointError, SourceError, TensorError
from seedlm.storage.checkpoint import Checkpoint, PackedInfo, check_codes, stored_name
from seedlm.storage.source import open_source
from tiny_models import SMALL, join, save_tensors, split, tiny_llama

# FORMAT.md, "The checkpoint", spelled out: model.safetensors of a model with one compressed layer, in both presets. These are
# version 1.
GOLDEN = {
    "4": (
        '{"__metadata__":{"format":"pt","seedlm":"{\\"format_version\\":1,\\"tensors\\":{\\"layers.0.up\\":'
        '{\\"shape\\":[2,12],\\"format\\":\\"block-k16-c8-p3-q4-e4\\"}}}"},'
        '"layers.0.up.weight":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]},'
        '"layers.0.up.weight_exponent_bias":{"dtype":"I32","shape":[1],"data_offsets":[16,20]},'
        '"norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[20,24]}}       ',
        "b635742e fea4e42a 2a7f14af 3a53048f  f9ffffff  803f00c0",
    ),
    "3": (
        '{"__metadata__":{"format":"pt","seedlm":"{\\"format_version\\":1,\\"tensors\\":{\\"layers.0.up\\":'
        '{\\"shape\\":[2,24],\\"format\\":\\"block-k16-c12-p4-q4-e4\\"}}}"},'
        '"layers.0.up.weight":{"dtype":"I32","shape":[2,3],"data_offsets":[0,24]},'
        '"layers.0.up.weight_exponent_bias":{"dtype":"I32","shape":[1],"data_offsets":[24,28]},'
        '"norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[28,32]}}      ',
        "71eea419 bf3f444b 30000000  aec444b2 8e6b466e 30000000  f9ffffff  803f00c0",
    ),
}


# The header in version 2, which has the digests. The data are the same.
GOLDEN_2 = {
    "4": (
        '{"__metadata__":{"format":"pt","seedlm":"{\\"format_version\\":2,\\"tensors\\":{\\"layers.0.up\\":'
        '{\\"shape\\":[2,12],\\"format\\":\\"block-k16-c8-p3-q4-e4\\"}},\\"sha256\\":{'
        '\\"norm.weight\\":\\"bd05505f2ba72688a5380c71d962cac9fcb7ce0dbb0f4cd94bb4f47c567bab07\\",'
        '\\"layers.0.up.weight\\":\\"23960aeb1f6f94dab966ae703739c76f3ad463137c647b6dd6ca76c6c81bc632\\",'
        '\\"layers.0.up.weight_exponent_bias\\":\\"9e93e007784629be1bedf0843d0f61d0c6697640f288e7673186fd66668463e0\\"}}"},'
        '"layers.0.up.weight":{"dtype":"I32","shape":[2,2],"data_offsets":[0,16]},'
        '"layers.0.up.weight_exponent_bias":{"dtype":"I32","shape":[1],"data_offsets":[16,20]},'
        '"norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[20,24]}}       '
    ),
    "3": (
        '{"__metadata__":{"format":"pt","seedlm":"{\\"format_version\\":2,\\"tensors\\":{\\"layers.0.up\\":'
        '{\\"shape\\":[2,24],\\"format\\":\\"block-k16-c12-p4-q4-e4\\"}},\\"sha256\\":{'
        '\\"norm.weight\\":\\"bd05505f2ba72688a5380c71d962cac9fcb7ce0dbb0f4cd94bb4f47c567bab07\\",'
        '\\"layers.0.up.weight\\":\\"4cab29acf0572edae311d8a4a495dc0fcefd723bc216e793018fdc35a220efae\\",'
        '\\"layers.0.up.weight_exponent_bias\\":\\"b40151886387b6cb80ed6c92fb6ba6717d69a4888be817689e3ea01561bcc9e2\\"}}"},'
        '"layers.0.up.weight":{"dtype":"I32","shape":[2,3],"data_offsets":[0,24]},'
        '"layers.0.up.weight_exponent_bias":{"dtype":"I32","shape":[1],"data_offsets":[24,28]},'
        '"norm.weight":{"dtype":"BF16","shape":[2],"data_offsets":[28,32]}}      '
    ),
}


SPECS = {"4": "block-k16-c8-p3-q4-e4", "3": "block-k16-c12-p4-q4-e4"}


def golden_bytes(bits: str, version: int = 1) -> bytes:
    header, data = GOLDEN[bits]
    return join(header if version == 1 else GOLDEN_2[bits], bytes.fromhex(data))


def golden_source(bits: str, folder):
    columns = {"4": 12, "3": 24}[bits]
    weight = ((torch.arange(2 * columns) * 37 % 101 - 50) / 64).view(2, columns).half()
    return save_tensors(folder, {"layers.0.up.weight": weight, "norm.weight": torch.tensor([1.0, -2.0]).bfloat16()}), weight


def rows_by_the_book(bits: str) -> list[list[float]]:
    """The golden rows decoded by FORMAT.md's words alone, sharing no code with the package."""
    size, count, words = {"4": (8, 3, 2), "3": (12, 4, 3)}[bits]
    data = bytes.fromhex(GOLDEN[bits][1])
    bias = int.from_bytes(data[8 * words : 8 * words + 4], "little", signed=True)
    rows = []
    for row in range(2):
        stream = int.from_bytes(data[4 * words * row : 4 * words * (row + 1)], "little")
        values: list[float] = []
        while len(values) < {"4": 12, "3": 24}[bits]:
            state, stream = stream & 0xFFFF, stream >> 16
            nibbles = [(stream >> 4 * n & 15 ^ 8) - 8 for n in range(1 + count)]
            stream >>= 4 * len(nibbles)
            exponent, *coefficients = nibbles
            for _ in range(size):
                value = 0
                for q in coefficients:
                    feedback = (state ^ state >> 1 ^ state >> 3 ^ state >> 12) & 1
                    state = state >> 1 | feedback << 15
                    value += (state - 32768) * q
                values.append(value * 2.0 ** (exponent + bias) / 32767)
        rows.append(values[: {"4": 12, "3": 24}[bits]])
    return rows


@pytest.mark.parametrize("bits", ["4", "3"])
class TestGolden:
    def test_a_run_writes_these_bytes(self, tmp_path, bits):
        source, _ = golden_source(bits, tmp_path / "m")
        compress_checkpoint(source, tmp_path / "out", format=SPECS[bits], backend="torch")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == golden_bytes(bits, version=2)

    def test_its_digests_are_those_of_the_format(self, bits):
        """By FORMAT.md's words alone: a line of JSON that says what a tensor is, then its bytes."""
        header, data = json.loads(GOLDEN_2[bits]), bytes.fromhex(GOLDEN[bits][1])
        described = json.loads(header["__metadata__"]["seedlm"])
        weight = described["tensors"]["layers.0.up"]
        for name, known in described["sha256"].items():
            entry = header[name]
            facts = [name, entry["dtype"], entry["shape"]]
            facts += [weight["format"], weight["shape"]] if name.startswith("layers.0.up.") else []
            line = json.dumps(facts, separators=(",", ":")) + "\n"
            assert hashlib.sha256(line.encode() + data[slice(*entry["data_offsets"])]).hexdigest() == known

    @pytest.mark.parametrize("version", [1, 2])
    def test_these_bytes_are_read_as_these_weights(self, tmp_path, bits, version):
        source, weight = golden_source(bits, tmp_path / "m")
        compress_checkpoint(source, tmp_path / "out", format=SPECS[bits], backend="torch")
        (tmp_path / "out" / "model.safetensors").write_bytes(golden_bytes(bits, version))
        edit_json(tmp_path / "out" / "config.json", lambda data: data["quantization_config"].update(format_version=version))
        Checkpoint.open(tmp_path / "out").verify()
        found = Checkpoint.open(tmp_path / "out").tensor("layers.0.up").dequantize()
        expected = torch.tensor(rows_by_the_book(bits), dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=0)
        assert (found - weight).norm() < 0.25 * weight.float().norm()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A sound checkpoint of two shards."""
    root = tmp_path_factory.mktemp("packed")
    tiny_llama(root / "m", layers=1)
    compress_checkpoint(root / "m", root / "out", format=SMALL, backend="torch", max_shard_size="8KB")
    assert len(list((root / "out").glob("*.safetensors"))) == 2
    return root / "out"


@pytest.fixture
def folder(packed, tmp_path):
    """A copy of it, to be spoiled."""
    return shutil.copytree(packed, tmp_path / "copy")


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shard_of(folder, tensor):
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def edit_header(folder, tensor, change):
    """Change the header of the shard that holds a tensor."""
    path = shard_of(folder, tensor)
    header, data = split(path)
    change(header)
    path.write_bytes(join(header, data))


def edit_described(folder, change):
    """Change what the metadata of UP's shard says, as a decoded JSON object."""

    def within(header):
        data = json.loads(header["__metadata__"]["seedlm"])
        change(data)
        header["__metadata__"]["seedlm"] = json.dumps(data)

    edit_header(folder, stored_name(UP, "words"), within)


def edit_data(folder, tensor, position, value):
    """Overwrite one int32 of a stored tensor."""
    path = shard_of(folder, tensor)
    header, data = split(path)
    start = header[tensor]["data_offsets"][0] + 4 * position
    path.write_bytes(join(header, data[:start] + value.to_bytes(4, "little", signed=True) + data[start + 4 :]))


UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"
WORDS, BIAS = stored_name(UP, "words"), stored_name(UP, "exponent_bias")


def test_the_sound_checkpoint_opens(folder):
    checkpoint = Checkpoint.open(folder)
    for module in checkpoint.packed:
        checkpoint.tensor(module)


def config(change):
    return lambda folder: edit_json(folder / "config.json", lambda data: change(data["quantization_config"]))


CONFIG = {
    "no-section": (
        lambda f: edit_json(f / "config.json", lambda d: d.pop("quantization_config")),
        "has no quantization_config",
    ),
    "other-method": (config(lambda q: q.update(quant_method="awq")), "quant_method must be 'seedlm', got 'awq'"),
    "newer-version": (config(lambda q: q.update(format_version=5)), "format_version 5 is newer than this package reads"),
    "no-version": (config(lambda q: q.pop("format_version")), "format_version must be a positive integer, got None"),
    "bool-version": (config(lambda q: q.update(format_version=True)), "format_version must be a positive integer, got True"),
    "family": (config(lambda q: q["format"].update(family="nix")), "unknown format family 'nix'"),
    "format-range": (config(lambda q: q["format"].update(seed_bits=99)), "seed_bits must be an integer from 2 to 24, got 99"),
    "format-keys": (config(lambda q: q["format"].update(extra=1)), "a block format has the keys"),
    "format-type": (config(lambda q: q.update(format=7)), "a format must be a JSON object, got int"),
    "rounding": (config(lambda q: q.update(rounding="up")), "rounding must be one of best, nearest, got 'up'"),
    "setting": (config(lambda q: q.update(surprise=1)), "quantization_config: block codes have no option 'surprise'"),
    "dense-list": (config(lambda q: q.update(modules_to_not_convert=[1])), "modules_to_not_convert must be a list of names"),
    "overrides": (config(lambda q: q.update(overrides=[])), "overrides must map modules to formats"),
    "stray-override": (config(lambda q: q.update(overrides={"nix": q["format"]})), "gives nix a format, but it is not"),
    "other-format": (
        config(lambda q: q["format"].update(num_coefficients=2)),
        "is stored as block-k8-c8-p3-q4-e4, config.json says block-k8-c8-p2-q4-e4",
    ),
    "twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        "config.json: the key 'a' stands twice",
    ),
    "not-an-object": (lambda f: (f / "config.json").write_text("[]"), "must be a JSON object, got list"),
    "not-json": (lambda f: (f / "config.json").write_bytes(b"\xff"), "not valid JSON"),
    "nested": (lambda f: (f / "config.json").write_text("[" * 100_000), "not valid JSON"),
    "missing": (lambda f: (f / "config.json").unlink(), "has no config.json; it is not a model folder, or a run"),
}


def index(change):
    return lambda folder: edit_json(folder / "model.safetensors.index.json", lambda data: change(data["weight_map"]))


def link_out(folder):
    path = shard_of(folder, WORDS)
    os.replace(path, folder.parent / "stolen.safetensors")
    path.symlink_to(folder.parent / "stolen.safetensors")


INDEX = {
    "absolute": (index(lambda m: m.update({WORDS: "/etc/passwd"})), "'/etc/passwd' is not the plain name"),
    "parent": (index(lambda m: m.update({WORDS: "../copy/x.safetensors"})), "is not the plain name of a .safetensors file"),
    "sub-folder": (index(lambda m: m.update({WORDS: "sub/x.safetensors"})), "paths are refused"),
    "backslash": (index(lambda m: m.update({WORDS: "..\\x.safetensors"})), "paths are refused"),
    "drive": (index(lambda m: m.update({WORDS: "C:x.safetensors"})), "paths are refused"),
    "pickle": (index(lambda m: m.update({WORDS: "pytorch_model.bin"})), "is not the plain name of a .safetensors file"),
    "link": (link_out, "stolen.safetensors, outside of the folder"),
    "no-file": (index(lambda m: m.update({WORDS: "gone.safetensors"})), "gone.safetensors: is missing or not a file"),
    "not-names": (index(lambda m: m.update({WORDS: 3})), "weight_map must map tensor names to file names"),
    "no-map": (lambda f: edit_json(f / "model.safetensors.index.json", lambda d: d.pop("weight_map")), "weight_map must map"),
    "wrong-shard": (
        index(lambda m: m.update({WORDS: next(file for file in sorted(set(m.values())) if file != m[WORDS])})),
        "up_proj.weight' in model-0000.-of-00002.safetensors, which does not hold it",
    ),
    "ghost": (index(lambda m: m.update({"ghost": m[WORDS]})), "places 'ghost' in .*, which does not hold it"),
    "unlisted": (index(lambda m: m.pop(WORDS)), "up_proj.weight', which model.safetensors.index.json does not list"),
    "twice": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x", "a": "y"}}'),
        "the key 'a' stands twice",
    ),
    "both": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        "has both model.safetensors and model.safetensors.index.json",
    ),
    "neither": (lambda f: (f / "model.safetensors.index.json").unlink(), "has no model.safetensors and no"),
    "same-tensor-in-two": (
        lambda f: shutil.copy(f / "model-00001-of-00002.safetensors", f / "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors: holds '.*', which model-00001-of-00002.safetensors holds too",
    ),
}


def bytes_of(change):
    def spoil(folder):
        path = shard_of(folder, WORDS)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def header(change):
    return lambda folder: edit_header(folder, WORDS, change)


def shift(header):
    for item in header.values():
        if "data_offsets" in item:
            item["data_offsets"] = [n + 4 for n in item["data_offsets"]]


FILE = {
    "empty": (bytes_of(lambda b: b""), "truncated, 0 bytes cannot hold a safetensors header"),
    "cut-header": (bytes_of(lambda b: b[:100]), "truncated, a header of [0-9]+ bytes does not fit a file of 100"),
    "cut-data": (bytes_of(lambda b: b[:-1]), "truncated, its header describes [0-9]+ bytes"),
    "overlong": (bytes_of(lambda b: b + b"\0"), "overlong, its header describes [0-9]+ bytes"),
    "huge-header": (bytes_of(lambda b: b"\xff" * 8 + b[8:]), "claims a header of 18446744073709551615 bytes"),
    "not-json": (bytes_of(lambda b: b[:8] + b"x" + b[9:]), "header: not valid JSON"),
    "list": (bytes_of(lambda b: join("[]", b"")), "the header must be a JSON object, got list"),
    "duplicate": (
        bytes_of(lambda b: join('{"a": {}, "a": {}}', b"")),
        "header: the key 'a' stands twice",
    ),
    "metadata-type": (header(lambda h: h["__metadata__"].update(x=1)), "__metadata__ must map strings to strings"),
    "dtype": (header(lambda h: h[WORDS].update(dtype="I33")), "has the unknown dtype 'I33'"),
    "dtype-type": (header(lambda h: h[WORDS].update(dtype=[])), r"has the unknown dtype \[\]"),
    "negative-shape": (header(lambda h: h[WORDS].update(shape=[-44, -4])), r"has the impossible shape \[-44, -4\]"),
    "float-shape": (header(lambda h: h[WORDS].update(shape=[44.0, 4])), "has the impossible shape"),
    "overflow-shape": (header(lambda h: h[WORDS].update(shape=[1 << 62, 4])), "which takes 73786976294838206464 bytes"),
    "offsets": (header(lambda h: h[WORDS].update(data_offsets=[0])), "has the impossible data_offsets"),
    "size-and-shape": (header(lambda h: h[WORDS].update(shape=[44, 2])), "takes 352 bytes, its data_offsets span 528"),
    "missing-key": (header(lambda h: h[WORDS].pop("dtype")), "must have dtype, shape and data_offsets"),
    "hole": (header(shift), "starts at byte 4, the tensors before it end at 0"),
    "not-a-tensor": (header(lambda h: h.update(x=3)), "tensor 'x' must have dtype, shape and data_offsets"),
}


def described(change):
    return lambda folder: edit_described(folder, change)


def add_tensor(name, dtype, shape, size):
    def change(header):
        end = max(item["data_offsets"][1] for key, item in header.items() if key != "__metadata__")
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}

    def spoil(folder):
        path = shard_of(folder, WORDS)
        edit_header(folder, WORDS, change)
        path.write_bytes(path.read_bytes() + bytes(size))
        index(lambda m: m.update({name: path.name}))(folder)

    return spoil


def drop_bias(folder):
    """Rename the exponent bias, in file and index, to a dense tensor's name."""
    edit_header(folder, BIAS, lambda h: h.update({"other": h.pop(BIAS)}))
    index(lambda m: m.update(other=m.pop(BIAS)))(folder)


METADATA = {
    "not-json": (header(lambda h: h["__metadata__"].update(seedlm="{")), "metadata, seedlm: not valid JSON"),
    "duplicate": (header(lambda h: h["__metadata__"].update(seedlm='{"a":1,"a":1}')), "the key 'a' stands twice"),
    "keys": (described(lambda d: d.update(x=1)), "seedlm must not have 'x'"),
    "no-tensors": (described(lambda d: d.pop("tensors")), "seedlm must have format_version and tensors"),
    "digests-in-version-1": (described(lambda d: d.update(format_version=1)), "seedlm must not have 'sha256'"),
    "digest-type": (described(lambda d: d["sha256"].update({WORDS: 7})), "the sha256 of .*up_proj.weight must be 64 digits"),
    "digest-digits": (described(lambda d: d["sha256"].update({WORDS: "F" * 64})), "must be 64 digits of 0-9a-f, got 'FFF"),
    "digest-of-nothing": (described(lambda d: d["sha256"].update(gone="0" * 64)), "gone is missing, the metadata has its SHA"),
    "version": (described(lambda d: d.update(format_version=9)), "format_version 9 is newer than this package reads"),
    "item": (described(lambda d: d["tensors"].update({UP: []})), "up_proj must have shape and format"),
    "shape-type": (described(lambda d: d["tensors"][UP].update(shape=[44, "32"])), "impossible shape"),
    "shape-zero": (described(lambda d: d["tensors"][UP].update(shape=[0, 32])), r"impossible shape \[0, 32\]"),
    "shape-huge": (described(lambda d: d["tensors"][UP].update(shape=[44, 1 << 40])), "impossible shape"),
    "format": (described(lambda d: d["tensors"][UP].update(format="zip")), "unknown format 'zip'"),
    "format-alias": (described(lambda d: d["tensors"][UP].update(format="4")), "the format must be written '.*', got '4'"),
    "other-shape": (
        described(lambda d: d["tensors"][UP].update(shape=[44, 48])),
        r"up_proj.weight must be I32 \[44, 5\] for a weight \[44, 48\], got I32 \[44, 3\]",
    ),
    "undescribed": (
        described(lambda d: d["tensors"].pop(UP)),
        "up_proj.weight(_exponent_bias)? looks like part of a compressed weight that no metadata describes",
    ),
    "described-only": (
        described(lambda d: d["tensors"].update(ghost={"shape": [8, 8], "format": SMALL})),
        "ghost.weight is missing, it holds the words of ghost",
    ),
    "no-bias": (drop_bias, "up_proj.weight_exponent_bias is missing, it holds the exponent_bias"),
    "bias-shape": (header(lambda h: h[BIAS].update(shape=[])), r"must be I32 \[1\] for a weight \[44, 32\], got I32 \[\]"),
    "words-dtype": (header(lambda h: h[WORDS].update(dtype="F32")), r"must be I32 \[44, 3\].*got F32 \[44, 3\]"),
    "stray-bias": (add_tensor("x.weight_exponent_bias", "I32", [1], 4), "x.weight_exponent_bias looks like part of"),
    "stray-words": (add_tensor("x.weight", "I32", [2, 1], 8), "x.weight looks like part of a compressed weight"),
    "two-shards-differ": (
        lambda f: edit_header(
            f,
            "model.embed_tokens.weight" if shard_of(f, "model.embed_tokens.weight") != shard_of(f, WORDS) else "lm_head.weight",
            lambda h: h["__metadata__"].update(
                seedlm=json.dumps({"format_version": 1, "tensors": {UP: {"shape": [44, 31], "format": SMALL}}})
            ),
        ),
        "describes model.layers.0.mlp.up_proj otherwise than another shard does",
    ),
}


def cases(**groups):
    return [pytest.param(*case, id=f"{group}-{name}") for group, table in groups.items() for name, case in table.items()]


@pytest.mark.parametrize(("spoil", "message"), cases(config=CONFIG, index=INDEX, file=FILE, metadata=METADATA))
def test_a_wrong_folder_does_not_open(folder, spoil, message):
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert "copy" in str(caught.value)  # says where


@pytest.mark.parametrize(
    ("module", "part", "position", "value", "message"),
    [
        (UP, "exponent_bias", 0, 193, "exponent bias must be -192 .. 192, got 193"),
        (UP, "exponent_bias", 0, -(1 << 31), "exponent bias must be -192 .. 192, got -2147483648"),
        (UP, "words", 3, 0x01FF_FF00, "1 blocks have seed 0, the first at row 1, block 0"),
        (DOWN, "words", 4, 1 << 24, "padding bits must be zero, row 0 has some set"),
    ],
    ids=["bias-high", "bias-low", "zero-seed", "padding"],
)
def test_a_wrong_code_is_not_read(folder, module, part, position, value, message):
    edit_data(folder, stored_name(module, part), position, value)
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match=rf"{module}: {message}"):
        checkpoint.tensor(module)


def test_codes_are_checked_in_every_piece_of_rows():
    """2^20 words are looked at together."""
    rows = (1 << 20) + 3
    parts = {"words": torch.ones(rows, 1, dtype=torch.int32), "exponent_bias": torch.zeros(1, dtype=torch.int32)}
    info = PackedInfo(parse_format(SMALL), (rows, 8))
    check_codes("m", info, parts)
    parts["words"][-2] = 0
    with pytest.raises(CheckpointError, match=r"m: .* at row 1, block 0; seeds start at 1, rows counted from row 1048576"):
        check_codes("m", info, parts)


@pytest.mark.parametrize("call", ["tensor", "dense_tensor"])
def test_what_is_not_there_cannot_be_read(folder, call):
    with pytest.raises(CheckpointError, match=r"has no .*'nix'"):
        getattr(Checkpoint.open(folder), call)("nix")


def test_a_packed_checkpoint_is_no_source(folder):
    with pytest.raises(SourceError, match=r"already quantized \(seedlm\)"):
        open_source(folder)


def test_metadata_may_describe_every_module_in_every_shard(folder):
    """As `save_pretrained` of a loaded model writes it."""
    tables = [json.loads(split(path)[0]["__metadata__"]["seedlm"])["tensors"] for path in folder.glob("*.safetensors")]
    every = json.dumps({"format_version": 1, "tensors": {name: item for table in tables for name, item in table.items()}})
    expected = Checkpoint.open(folder).packed
    for path in folder.glob("*.safetensors"):
        head, data = split(path)
        head["__metadata__"]["seedlm"] = every
        path.write_bytes(join(head, data))
    assert Checkpoint.open(folder).packed == expected


def test_a_module_may_have_a_format_of_its_own(folder):
    other = {
        "family": "block",
        "seed_bits": 6,
        "block_size": 8,
        "num_coefficients": 3,
        "coefficient_bits": 4,
        "exponent_bits": 6,
    }
    described(lambda d: d["tensors"][UP].update(format="block-k6-c8-p3-q4-e6"))(folder)
    config(lambda q: q.update(overrides={UP: other}))(folder)
    assert Checkpoint.open(folder).packed[UP].format.seed_bits == 6


ODD = ["block-k15-c8-p2-q4-e4", "block-k24-c9-p5-q6-e3", "block-k2-c4-p1-q2-e1"]


@pytest.mark.parametrize("spec", [*SPECS.values(), SMALL, *ODD])
def test_a_zero_seed_is_found_in_every_block(spec):
    """Seeds that lie in one word, at its end, and over two words."""
    format = parse_format(spec)
    blocks = 2 * format.blocks_per_group + 1
    shape = (2, blocks)
    q = torch.zeros(*shape, format.num_coefficients, dtype=torch.int8)
    words = packing.pack(torch.full(shape, 1 << (format.seed_bits - 1)), torch.zeros(shape, dtype=torch.int8), q, format)
    packing.check_codes(words, blocks, format)
    for row in range(2):
        for block in range(blocks):
            spoiled = words.clone()
            bit = block * format.block_bits + format.seed_bits - 1  # the one bit that is set
            spoiled[row, bit // 32] ^= torch.tensor(1 << bit % 32).to(torch.int32)
            with pytest.raises(TensorError, match=rf"^1 blocks have seed 0, the first at row {row}, block {block};"):
                packing.check_codes(spoiled, blocks, format)
