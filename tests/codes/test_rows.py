"""Rows that are looked up in codes: those of the dequantized weight, bit for bit, and none of the others."""

import pytest
import torch

import toy_family  # noqa: F401 (registers its family)
from random_codes import random_words
from seedlm.codes.block.format import parse_spec as block
from seedlm.codes.registry import family_of, parse_format
from seedlm.codes.trellis import codec
from seedlm.errors import BackendError, TensorError
from seedlm.inference import ops

BLOCK = "block-k8-c8-p3-q4-e4"


def random_parts(spec, shape):
    """Codes of a weight that nobody has encoded."""
    format, generator = parse_format(spec), torch.Generator().manual_seed(len(spec) + shape[0])
    if format.family == "block":
        return {"words": random_words(block(spec), *shape, seed=3), "exponent_bias": torch.tensor([-9], dtype=torch.int32)}
    kinds = format.parts(*shape)
    words = torch.randint(-(2**31), 2**31, kinds["words"].shape, generator=generator).to(torch.int32)
    scales = torch.rand(shape[0], generator=generator)
    return {"words": words, "scales": scales.half(), "scale": torch.tensor([0.01])}


CASES = [
    *((f"trellis-r{rate}-l{bits}-t32-h8", (70, 20)) for bits in (12, 16) for rate in (1, 3, 6)),
    ("trellis-r8-l16-t32-h8", (70, 20)),
    ("trellis-r4-l12-t256-h128", (600, 200)),  # two strips and a short third
    ("trellis-r7-l16-t64-h16", (33, 9)),  # one strip, padded, of less than its rows
    ("trellis-r3-l16-t4096-h1", (40, 3)),
    (BLOCK, (10, 20)),
    ("block-k16-c12-p4-q4-e4", (7, 30)),
]


def definition(parts, format, shape, indices):
    """What a look-up is where nothing compiles it."""
    if format.family == "block":
        return family_of(format).rows(parts, format, shape, indices)
    return codec.dequantize_rows(parts["words"], parts["scales"], parts["scale"], format, shape, indices)


def look_up(parts, format, shape, indices):
    return family_of(format).rows(parts, format, shape, indices)


@pytest.mark.parametrize("rows_of", [look_up, definition])
@pytest.mark.parametrize(("spec", "shape"), CASES, ids=str)
def test_rows_are_those_of_the_dequantized_weight(spec, shape, rows_of):
    format, parts = parse_format(spec), random_parts(spec, shape)
    weight = family_of(format).dequantize(parts, format, shape)
    for indices in (
        torch.arange(shape[0]),
        torch.randint(shape[0], (3, 5)),
        torch.tensor(shape[0] - 1),
        torch.zeros(0, 2).long(),
        torch.arange(shape[0])[::3],
    ):
        rows = rows_of(parts, format, shape, indices)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, weight[indices])
        assert torch.equal(rows_of(parts, format, shape, indices.int()), rows)


@pytest.mark.parametrize("spec", ["trellis-r4-l12-t256-h128", BLOCK])
def test_only_the_rows_asked_for_are_decoded(spec, monkeypatch):
    """A table of 2^14 rows would take 2^20 values; a look-up of three rows never has more than a few hundred in a tensor."""
    shape, format = (1 << 14, 64), parse_format(spec)
    parts = random_parts(spec, shape)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not any(out.data_ptr() == part.data_ptr() for part in parts.values()):
                largest = max(largest, out.numel())
            return out

    for rows_of in (look_up, definition):
        rows_of(parts, format, shape, torch.tensor([1]))  # tables are made once
        largest = 0
        with Watch():
            rows_of(parts, format, shape, torch.tensor([5, 9000, (1 << 14) - 1]))
        assert 0 < largest < 5000


def test_many_rows_are_decoded_in_pieces(monkeypatch):
    shape, format = (70, 20), parse_format("trellis-r3-l12-t32-h8")
    parts = random_parts(format.spec, shape)
    indices = torch.randint(70, (4, 11))
    expected = definition(parts, format, shape, indices)
    monkeypatch.setattr(codec, "_ROW_VALUES", 60)
    assert torch.equal(definition(parts, format, shape, indices), expected)


class TestWhatIsNotAsItIsStored:
    """A kernel reads memory by its address: whatever else parts and indices may be is left to the definition."""

    SPEC, SHAPE = "trellis-r3-l12-t32-h8", (70, 20)

    @pytest.fixture
    def parts(self):
        return random_parts(self.SPEC, self.SHAPE)

    def rows(self, parts, indices):
        return look_up(parts, parse_format(self.SPEC), self.SHAPE, indices)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("words", torch.Tensor.long),
            ("words", lambda words: words.T.contiguous().T),
            ("words", lambda words: words.as_subclass(torch.nn.Buffer)),
            ("scales", torch.Tensor.float),
            ("scale", torch.Tensor.half),
        ],
        ids=["int64", "columns first", "a subclass", "float32", "float16"],
    )
    def test_other_parts(self, parts, name, change):
        indices = torch.arange(70)
        parts[name] = change(parts[name])
        found, expected = self.rows(parts, indices), definition(parts, parse_format(self.SPEC), self.SHAPE, indices)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)

    def test_words_that_are_too_few(self, parts):
        with pytest.raises(IndexError):
            self.rows({**parts, "words": parts["words"][:1]}, torch.tensor([69]))

    def test_parts_without_memory(self, parts):
        with pytest.raises(RuntimeError):
            self.rows({name: part.to("meta") for name, part in parts.items()}, torch.tensor([1]))

    def test_indices_without_memory(self, parts):
        indices = torch.tensor([3, 5])
        found = torch.func.functionalize(lambda given: self.rows(parts, given) + 1)(indices)
        assert torch.equal(found, self.rows(parts, indices) + 1)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float32], ids=str)
    def test_indices_that_are_none(self, parts, dtype):
        with pytest.raises(RuntimeError, match="dtype"):
            self.rows(parts, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("spec", ["trellis-r3-l12-t32-h8", BLOCK])
@pytest.mark.parametrize("index", [-1, 70])
def test_an_index_that_is_no_row_is_refused(spec, index):
    format = parse_format(spec)
    with pytest.raises(IndexError, match="out of range"):
        family_of(format).rows(random_parts(spec, (70, 20)), format, (70, 20), torch.tensor([0, index]))


class TestOperator:
    SPEC, SHAPE = "trellis-r3-l12-t32-h8", (70, 20)

    @pytest.fixture
    def parts(self):
        return random_parts(self.SPEC, self.SHAPE)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_it_rounds_once(self, parts, dtype):
        indices = torch.randint(70, (2, 7))
        rows = ops.rows(indices, list(parts.values()), f"{self.SPEC} 70x20", dtype)
        format = parse_format(self.SPEC)
        assert torch.equal(rows, family_of(format).dequantize(parts, format, self.SHAPE)[indices].to(dtype))

    def test_it_is_an_operator_that_compilers_can_hold(self, parts):
        arguments = (torch.randint(70, (2, 7)), list(parts.values()), f"{self.SPEC} 70x20", torch.bfloat16)
        torch.library.opcheck(torch.ops.seedlm.rows.default, arguments)

    @pytest.mark.parametrize(
        ("indices", "code", "dtype", "error", "message"),
        [
            (torch.zeros(2), "trellis-r3-l12-t32-h8 70x20", torch.float32, TensorError, "int32 or int64, got float32"),
            (torch.zeros(2).long(), "trellis-r3-l12-t32-h8 70x20", torch.int8, TensorError, "floating-point dtype, got int8"),
            (torch.zeros(2).long(), "nonsense", torch.float32, BackendError, "got 'nonsense'"),
        ],
        ids=["indices", "dtype", "code"],
    )
    def test_what_is_no_look_up_is_refused(self, parts, indices, code, dtype, error, message):
        with pytest.raises(error, match=message):
            ops.rows(indices, list(parts.values()), code, dtype)
