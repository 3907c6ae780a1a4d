"""The CPU kernels' code for ARM: compiled everywhere, and run where an emulator is installed.

    apt-get install qemu-user-static
    python -m pytest -rs tests/codes/test_cpu_arm.py

Without it code is compiled and linked, and the tests are skipped with that reason. Everything that is emitted by hand is run:
what numba makes of Python's own statements around it is the same on every processor. It is linked by `linking`, as kernels are.

Norms, gates and attention are numba's as a whole: it compiles and links these kernels in a process that it is told is an ARM
one's (`COMPILE`), as it would do there, and they are entered as there, with a job.
"""

import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_cpu_products import BLOCK, parts_of

from seedlm.codes.block import codec as block_codec
from seedlm.codes.registry import parse_format
from seedlm.codes.trellis import codec as trellis_codec

pytest.importorskip("numba")

from llvmlite import binding, ir
from numba import types

from seedlm.codes import hadamard_numba, linking, processor, simd, vectors
from seedlm.codes.block.kernels import lanes
from seedlm.codes.block.kernels import numba_product as block_product
from seedlm.codes.trellis.kernels import numba_product, numba_weights, numba_windows, records

ARM = "aarch64-unknown-linux-gnu"
PROCESSORS = {"dot": ("neon", "dotprod"), "plain": ("neon",)}
MODELS = {"dot": "max", "plain": "cortex-a53"}
"""What is emulated: the latter has no product of bytes, and would stop at one."""

EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
RATES = [(rate, 16) for rate in range(1, 9)] + [(3, 12), (6, 12)]


CODE, MEMORY, ROOM = 1 << 22, 1 << 28, 1 << 20
"""Where code and memory are, and bytes of the latter."""

KERNELS = {
    "norm": "seedlm.codes.trellis.kernels.numba_source",
    "gate": "seedlm.codes.trellis.kernels.numba_source",
    "attend": "seedlm.inference.attend_numba",
}
"""Makers of kernels that numba compiles as a whole, and their modules."""

COMPILE = """
import importlib, sys

from llvmlite import binding

binding.initialize_all_targets()
binding.initialize_all_asmprinters()
binding.get_process_triple = lambda: sys.argv[1]

from seedlm.codes import machine_code

machine_code.loads = lambda: True
for module, maker in zip(sys.argv[2::2], sys.argv[3::2]):
    print(getattr(importlib.import_module(module), maker)().hex())
"""

_READ, _WRITE, _EXIT = 63, 64, 93
_RETURN = 0xD65F03C0
_SYSTEM = 0xAA0303E8, 0xD4000001, _RETURN
"""A function of three arguments and the number of a call to Linux: mov x8, x3; svc #0; ret. llvmlite has no ARM assembler."""


@cache
def kernels():
    """Those of `KERNELS`, as `compiled.to_machine_code` makes them on an ARM processor. None of them multiplies bytes."""
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+neon"}
    makers = [word for maker, module in KERNELS.items() for word in (module, maker)]
    command = [sys.executable, "-c", COMPILE, ARM, *makers]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = dict(zip(KERNELS, map(bytes.fromhex, done.stdout.split()), strict=True))
    assert all(struct.pack("<I", _RETURN) in code for code in found.values())
    return found


def program_file(path, image):
    """An ELF program of an image, which `MEMORY` of `ROOM` bytes belongs to. There may be code in both."""
    head = struct.pack("<16s2HI3QI6H", b"\x7fELF\2\1\1", 2, 183, 1, CODE + image.entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    parts = struct.pack("<2I6Q", 1, 5, 1 << 12, CODE, CODE, len(image.code), len(image.code), 1 << 12)
    parts += struct.pack("<2I6Q", 1, 7, 0, MEMORY, MEMORY, 0, ROOM, 1 << 12)
    path.write_bytes((head + parts).ljust(1 << 12, b"\0") + image.code)
    path.chmod(0o700)


class Program:
    """Code for ARM that works on some memory: `main` is where to emit it, `run` returns the memory afterwards."""

    def __init__(self, monkeypatch, way):
        self.way, self._functions = way, {}
        found = frozenset(PROCESSORS[way])
        for module in (processor, numba_windows, hadamard_numba, block_product):
            monkeypatch.setattr(module, "features", lambda: found)
        monkeypatch.setattr(simd, "get_host_cpu_features", lambda: dict.fromkeys(found, True))
        assert processor.byte_products() == way
        self._module = ir.Module()
        self._module.triple = ARM
        function = ir.Function(self._module, ir.FunctionType(ir.VoidType(), []), "_start")
        self.main = ir.IRBuilder(function.append_basic_block())
        self._memory, self._places = bytearray(), []
        self._start = ir.Constant(vectors.I64, MEMORY)
        system = ir.GlobalVariable(self._module, ir.ArrayType(vectors.I32, len(_SYSTEM)), "system")
        system.initializer, system.section, system.global_constant = (
            ir.Constant(system.type.pointee, _SYSTEM),
            ".text.system",
            True,
        )
        kind = ir.FunctionType(vectors.I64, [vectors.I64] * 4)
        self._call = self.main.bitcast(system, kind.as_pointer())
        self._system(_READ, 0, self._start, ROOM)

    def _system(self, call, *numbers):
        self.main.call(self._call, [each if isinstance(each, ir.Value) else self.number(each) for each in (*numbers, call)])

    def place(self, array, align=64):
        """The address of an array's copy. Beside it lie bytes that are no numbers: nobody may have a use for them."""
        self._memory += b"\xff" * 256
        self._memory += b"\xff" * (-len(self._memory) % align)
        self._places.append((len(self._memory), array))
        self._memory += np.ascontiguousarray(array).tobytes()
        return self.number(self._places[-1][0], self._start)

    def address(self, array):
        """The same as a number, for a job."""
        self.place(array)
        return MEMORY + self._places[-1][0]

    def number(self, value, more=None):
        value = ir.Constant(vectors.I64, value)
        return value if more is None else self.main.add(more, value)

    def call(self, intrinsic, *arguments):
        """Call what an intrinsic emits, a function of its own; arguments that are no values are its constants."""
        values = [each for each in arguments if isinstance(each, ir.Value)]
        constants = [types.literal(each) for each in arguments if not isinstance(each, ir.Value)]
        if (key := (intrinsic, *constants)) not in self._functions:
            kind = ir.FunctionType(ir.VoidType(), [each.type for each in values])
            function = self._functions[key] = ir.Function(self._module, kind, f"called{len(self._functions)}")
            function.attributes.add("noinline")
            builder = ir.IRBuilder(function.append_basic_block())
            kinds = [types.float32 if each.type == vectors.F32 else types.intp for each in values]
            signature, codegen = intrinsic._defn(None, *kinds, *constants)
            codegen(SimpleNamespace(get_dummy_value=lambda: None), builder, signature, function.args)
            builder.ret_void()
        self.main.call(self._functions[key], values)

    def load(self, maker):
        """Where to call a kernel of `KERNELS`: `machine_code.load`, done by the program."""
        head, _, image = kernels()[maker].partition(b"\n")
        entry, *functions = head.decode().split()
        at = self.place(np.frombuffer(image, np.uint8), 1 << 12)  # where memory for code begins: with a page
        for number, name in enumerate(functions):
            function = self.main.ptrtoint(self._c_function(name), vectors.I64)
            vectors.store(self.main, function, at, 8 * number)
        kind = ir.FunctionType(ir.VoidType(), [vectors.I64])
        return self.main.inttoptr(self.number(int(entry), at), kind.as_pointer())

    def _c_function(self, name):
        """One of the C library that fills or copies memory, byte by byte."""
        assert name in ("memset", "memcpy")
        if name in self._functions:
            return self._functions[name]
        kind = ir.FunctionType(vectors.I64, [vectors.I64] * 3)
        function = self._functions[name] = ir.Function(self._module, kind, name)
        function.linkage = "internal"  # so that its address is a distance
        to, source, count = function.args
        first, loop, body, after = (function.append_basic_block() for _ in range(4))
        ir.IRBuilder(first).branch(loop)
        builder = ir.IRBuilder(loop)
        place = builder.phi(vectors.I64)
        builder.cbranch(builder.icmp_unsigned("<", place, count), body, after)
        builder = ir.IRBuilder(body)
        byte = source if name == "memset" else vectors.load(builder, builder.add(source, place), vectors.I8)
        vectors.store(builder, builder.trunc(byte, vectors.I8) if name == "memset" else byte, builder.add(to, place))
        place.add_incoming(self.number(0), first)
        place.add_incoming(builder.add(place, self.number(1)), body)
        builder.branch(loop)
        ir.IRBuilder(after).ret(to)
        return function

    def start(self, kernel, *numbers):
        """Call a kernel with a job, as two threads would one after the other. The job is placed last."""
        job = self.place(np.array([0, *numbers], np.int64))
        for _ in range(2):
            self.main.call(kernel, [job])

    def run(self, folder, instruction=None):
        """The arrays that were placed, as they are afterwards."""
        self._memory += b"\xff" * 256
        assert len(self._memory) <= ROOM
        self._system(_WRITE, 1, self._start, len(self._memory))
        self._system(_EXIT, 0, 0, 0)
        self.main.unreachable()
        binding.initialize_all_targets()
        binding.initialize_all_asmprinters()
        features = ",".join(f"+{name}" for name in PROCESSORS[self.way])
        target = binding.Target.from_triple(ARM)
        machine = target.create_target_machine(cpu="generic", features=features, opt=3, reloc="pic", codemodel="small")
        parsed = binding.parse_assembly(str(self._module))
        parsed.verify()
        if instruction:
            assert (instruction in machine.emit_assembly(parsed)) == (self.way == "dot")
        program_file(folder / "code", linking.link(machine.emit_object(parsed), "_start"))
        if not EMULATOR:
            pytest.skip("compiled and linked, not run: needs qemu-aarch64 (qemu-user-static)")
        (folder / "input").write_bytes(self._memory)
        with (folder / "input").open("rb") as given, (folder / "output").open("wb") as output:  # files: all in one call
            command = [EMULATOR, "-cpu", MODELS[self.way], folder / "code"]
            subprocess.run(command, stdin=given, stdout=output, check=True, timeout=60)
        memory = (folder / "output").read_bytes()
        assert len(memory) == len(self._memory)
        return [np.frombuffer(memory, array.dtype, array.size, at).reshape(array.shape) for at, array in self._places]


@pytest.fixture(params=PROCESSORS)
def program(monkeypatch, request):
    return Program(monkeypatch, request.param)


@pytest.mark.parametrize(("rate", "state_bits", "exact"), [(*each, True) for each in RATES] + [(3, 16, False), (4, 16, False)])
def test_the_trellis_products(program, tmp_path, rate, state_bits, exact):
    """A segment of a strip of two with three tokens, of which two share a decoding: quantized, multiplied, put in order."""
    width, tokens, levels = 389, 3, records.LEVELS if exact else 127
    draw = np.random.default_rng(rate)
    words = draw.integers(-(2**31), 2**31, (2, width * rate)).astype(np.int32)
    format = parse_format(f"trellis-r{rate}-l{state_bits}-t64-h128")
    weights = trellis_codec.decode_values(torch.from_numpy(words), format, (64, width)).numpy().astype(np.int64)
    rows = np.zeros((tokens, 512), np.float32)
    rows[:, :width] = draw.standard_normal((tokens, width))
    largest = np.abs(rows).reshape(tokens, 2, 256).max(-1)
    inverses, scales = np.float32(levels) / largest, largest / np.float32(levels)
    stride = records.records(width)
    activations = np.full((tokens, stride), 255, np.uint8)
    for token in range(tokens):
        for group in range(2):
            at = records.HEADER + records.RECORD * group
            activations[token, at : at + 4].view(np.float32)[0] = scales[token, group]
    columns, count = vectors.LANES // rate, len(numba_product._rows(rate, state_bits))

    at_rows, at_records = program.place(rows), program.place(activations)
    for token in range(tokens):
        for group in range(2):
            record = program.number(token * stride + records.HEADER + records.RECORD * group, at_records)
            row = program.number(4 * (512 * token + 256 * group), at_rows)
            inverse = ir.Constant(vectors.F32, float(inverses[token, group]))
            program.call(numba_product._quantize, row, inverse, record, exact)
    for segment in range(2):
        own, after = program.place(words[segment]), program.place(words[1 - segment])
        sums = program.place(np.zeros((tokens, count), np.float32))
        found = program.place(np.full((tokens, 32), np.nan, np.float32))
        for group, used in enumerate((256, width - 256)):
            steps, at = -(-used // columns), 256 * rate * group
            end, left = steps - 1, rate * (used - columns * (steps - 1))
            tail = np.full((2, numba_windows.TAIL), -1, np.int32)
            for part, which in enumerate((segment, 1 - segment)):
                first = at + rate * columns * end
                tail[part, :left] = words[which, first : first + left]
            tail = program.place(tail)
            for first, some in ((0, 2), (2, 1)):
                record = records.HEADER + records.RECORD * group + stride * first
                numbers = [program.number(4 * at, own), program.number(4 * at, after), program.number(record, at_records)]
                numbers += [program.number(steps), program.number(stride), program.number(4 * count * first, sums)]
                numbers += [program.number(end), tail]
                program.call(numba_product._multiply, *numbers, rate, state_bits, exact, some)
        for token in range(tokens):
            places = program.number(4 * count * token, sums), program.number(128 * token, found)
            program.call(numba_product._in_order, *places, rate, state_bits)
    found = program.run(tmp_path, "sdot")[5::6]

    integers = np.rint(rows.reshape(tokens, 2, 256) * inverses[..., None]).reshape(tokens, 512)[:, :width].astype(np.int64)
    for segment in range(2):
        expected = np.zeros((tokens, 32), np.float32)
        for group in range(2):
            part = slice(256 * group, min(width, 256 * group + 256))
            exact_sums = integers[:, part] @ weights[32 * segment : 32 * segment + 32, part].T
            assert np.abs(exact_sums).max() < 2**31
            expected = expected + exact_sums.astype(np.float32) * scales[:, group, None]
        assert np.array_equal(found[segment], expected)


@pytest.mark.parametrize(("rate", "state_bits"), RATES)
def test_the_trellis_weights(program, tmp_path, rate, state_bits):
    columns, tile = vectors.LANES // rate, numba_weights._TILE
    steps = 7
    width = steps * columns - (columns > 1)
    words = np.random.default_rng(rate).integers(-(2**31), 2**31, (1, width * rate)).astype(np.int32)
    tail = np.full((2, numba_windows.TAIL), -1, np.int32)
    left = words[0, rate * columns * (steps - 1) :]
    tail[:, : len(left)] = left
    own, found, tail = program.place(words), program.place(np.zeros((32, tile), np.float32)), program.place(tail)
    numbers = own, own, program.number(steps), found, program.number(steps - 1), tail
    program.call(numba_weights._values, *numbers, rate, state_bits)
    _, found, _ = program.run(tmp_path, "sdot")
    format = parse_format(f"trellis-r{rate}-l{state_bits}-t32-h128")
    expected = trellis_codec.decode_values(torch.from_numpy(words), format, (32, width)).float()
    assert np.array_equal(found[:, :width], expected.numpy())


@pytest.mark.parametrize("spec", [spec for spec in BLOCK if lanes.serves(parse_format(spec))])
def test_the_block_code(program, tmp_path, spec):
    """Weights to the bit; products of three tokens, whose sums are floats."""
    format, rows, width, tokens = parse_format(spec), 3, 389, 3
    parts = parts_of(format, (rows, width))
    words, bias = parts["words"].numpy(), int(parts["exponent_bias"])
    c, count, numbers = format.block_size, lanes.groups(format, width), format.block_bits // 2
    constants = (format.seed_bits, c, format.num_coefficients, format.coefficient_bits, format.exponent_bits)
    scales = lanes.scales(bias, format).numpy()
    scales = np.pad(scales, (0, 16 - len(scales)))
    draw = np.random.default_rng(0)
    x = np.zeros((tokens, count * 16 * c), np.float32)
    x[:, :width] = draw.standard_normal((tokens, width))
    arranged = np.ascontiguousarray(x.reshape(tokens, count, 16, c).swapaxes(2, 3))
    loaded = 16 if numbers <= 16 else 32
    length = words.shape[1]
    end = max(0, min(count, (length - loaded) // numbers + 1)) if length >= loaded else 0

    x_at, scales, tables = program.place(arranged), program.place(scales), program.place(lanes.tables(format))
    for row in range(rows):
        ends = np.zeros(256, np.int32)
        ends[: length - numbers * end] = words[row, numbers * end :]
        place, ends = program.place(words[row]), program.place(ends)
        sums, made = program.place(np.zeros(tokens, np.float32)), program.place(np.zeros((count, c, 16), np.float32))
        group = place, program.number(count), program.number(end), ends
        stride = program.number(64 * c * count)
        program.call(block_product._multiply, *group, x_at, stride, scales, tables, sums, *constants, tokens)
        program.call(block_product._form, *group, scales, tables, made, *constants)
    found = program.run(tmp_path)
    weights = block_codec.dequantize_rows(parts["words"], bias, width, format).numpy()
    for row in range(rows):
        *_, sums, made = found[3 + 4 * row : 7 + 4 * row]
        assert np.array_equal(made.swapaxes(1, 2).ravel()[:width], weights[row])
        expected = x[:, :width].astype(np.float64) @ weights[row].astype(np.float64)
        assert np.abs(sums - expected).max() < 1e-6 * np.linalg.norm(x, axis=1).max() * np.linalg.norm(weights[row])


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_the_transform(program, tmp_path, size):
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32)
    program.call(hadamard_numba._chunk, program.place(x), size)
    a, b = x[:16] + np.float32(1), x[:16] + np.float32(2)
    low, high = program.place(a), program.place(b)
    program.call(hadamard_numba._between, low, high)
    found, *pair = program.run(tmp_path)
    assert np.array_equal(pair, [a + b, a - b])
    expected, stride = x.copy(), 1
    while stride < size:
        pairs = expected.reshape(-1, 2, stride)
        expected = np.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).ravel()
        stride *= 2
    assert np.array_equal(found, expected)


def test_bfloat16(program, tmp_path):
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    x[:4] = np.nan, np.inf, 1e-40, 3.4e38
    halves = torch.from_numpy(x).bfloat16()
    source, narrow, wide = program.place(x), program.place(np.zeros(16, np.int16)), program.place(x)
    program.call(vectors._narrow, source, narrow, ir.Constant(vectors.F32, 1.0))
    program.call(vectors._widen, narrow, wide)
    _, narrow, wide = program.run(tmp_path)
    assert np.array_equal(narrow[1:], halves.view(torch.int16).numpy()[1:])  # there are many NaN
    assert np.array_equal(wide, halves.float().numpy(), equal_nan=True)


def test_rounded_products_of_the_search(program, tmp_path):
    a, b = np.random.default_rng(0).integers(-(2**15) + 1, 2**15, (2, 32)).astype(np.int16)
    left, right, to = program.place(a), program.place(b), program.place(a)
    of = ir.VectorType(vectors.I16, 32)
    values = [vectors.load(program.main, each, of) for each in (left, right)]
    _, multiply = simd.mul_q15._defn(None, *[simd.int16x32] * 2)
    vectors.store(program.main, multiply(None, program.main, None, values), to)
    *_, found = program.run(tmp_path)
    assert np.array_equal(found, (a.astype(np.int64) * b + (1 << 14)) >> 15)


def test_functions_of_the_c_library(program, tmp_path, monkeypatch):
    """Calls go by the table at an image's start, here to code that was put behind it: str w1, [x0]; ret."""
    link = linking.link

    def with_functions(object, entry):
        image = link(object, entry)
        assert image.functions == ("memmove", "memset")
        code = image.code + struct.pack("<4I", 0xD65F03C0, 0xD503201F, 0xB9000001, 0xD65F03C0)
        return image._replace(code=struct.pack("<2Q", CODE + len(code) - 16, CODE + len(code) - 8) + code[16:])

    monkeypatch.setattr(linking, "link", with_functions)
    at = program.place(np.zeros(2, np.int32))
    for name, place, value in (("memmove", 0, 1), ("memset", 4, 42), ("memmove", 4, 3)):
        vectors.call(program.main, name, ir.VoidType(), program.number(place, at), ir.Constant(vectors.I32, value))
    assert program.run(tmp_path)[0].tolist() == [0, 42]


def test_constants_of_all_sizes(program, tmp_path):
    """One is read, of others the address is taken: pages and places in them, by units of a number's size."""
    found, expected = [], []

    def constant(value, name):
        made = ir.GlobalVariable(program.main.module, value.type, name)
        made.initializer, made.global_constant, made.linkage = value, True, "internal"
        return made

    index = program.main.load(program.main.inttoptr(program.place(np.array([2])), ir.IntType(64).as_pointer()))
    for bits, kind in ((8, np.int8), (16, np.int16), (32, np.int32), (64, np.int64)):
        of, both = ir.IntType(bits), np.array([11, 7]).astype(kind)
        one, three = (
            constant(ir.Constant(of, 11), f"one{bits}"),
            constant(ir.Constant(ir.ArrayType(of, 3), [3, 5, 7]), f"three{bits}"),
        )
        found.append(len(program._places))
        expected.append(both)
        at = program.place(np.zeros(2, kind))
        vectors.store(program.main, program.main.load(one), at)
        third = program.main.gep(three, [program.number(0), index])
        vectors.store(program.main, program.main.load(third), at, bits // 8)
    everything = program.run(tmp_path)
    assert all(np.array_equal(everything[at], both) for at, both in zip(found, expected, strict=True))


def stored(kind, values):
    """Numbers as kernels read them: float32 (kind 0), or bfloat16 as int16."""
    values = np.asarray(values, np.float32)
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy() if kind else values


def meant(kind, numbers):
    """What these are, in float64."""
    floats = torch.from_numpy(numbers.copy()).view(torch.bfloat16).float().numpy() if kind else numbers
    return floats.astype(np.float64)


def bits(value):
    return int(np.float32(value).view(np.int32))


floats_or_halves = pytest.mark.parametrize("kind", [0, 1], ids=["float32", "bfloat16"])


@floats_or_halves
def test_the_norm(program, tmp_path, kind):
    kernel, draw, epsilon, cases = program.load("norm"), np.random.default_rng(0), 1e-2, []
    for width, added in ((389, True), (389, False), (64, True), (19, True), (3, True)):
        given = [stored(kind, draw.standard_normal(width) * scale) for scale in (1, 0.3, 2)]
        cases.append((len(program._places), width, added, [meant(kind, each) for each in given]))
        h, delta, weight = map(program.address, given)
        to = program.address(np.full(2 * width, np.nan, np.float32))
        program.start(kernel, width, bits(epsilon), h, delta if added else 0, weight, kind, to)
    found = program.run(tmp_path)
    for at, width, added, (h, delta, weight) in cases:
        left, _, _, floats, job = found[at : at + 5]
        assert np.array_equal(left, stored(kind, h + delta if added else h))
        x = meant(kind, left)
        expected = x / np.sqrt((x * x).mean() + epsilon) * weight
        assert np.abs(floats[:width] - expected).max() < 1e-6 * np.abs(expected).max()
        assert job[0] == 2


@floats_or_halves
def test_the_gate(program, tmp_path, kind):
    kernel, draw, cases = program.load("gate"), np.random.default_rng(0), []
    for width in (389, 64, 3):
        gate, up = draw.standard_normal((2, width))
        gate *= 20
        gate[:3] = -100, 88, 0
        given = [stored(kind, each) for each in (gate, up)]
        cases.append((len(program._places), width, *(meant(kind, each) for each in given)))
        to = program.address(np.full(2 * width, np.nan, np.float32))
        program.start(kernel, width, *map(program.address, given), kind, to)
    found = program.run(tmp_path)
    for at, width, gate, up in cases:
        floats, _, _, job = found[at : at + 4]
        expected = gate / (1 + np.exp(-gate)) * up
        assert (np.abs(floats[:width] - expected) <= 1e-6 * np.abs(expected) + 1e-38).all()
        assert job[0] == 2


@floats_or_halves
def test_the_attention_of_a_token(program, tmp_path, kind):
    """Over caches in which all that comes after the token is NaN. In the last two a key has inf or NaN."""
    kernel, draw, heads, length, scaling, cases = program.load("attend"), np.random.default_rng(0), 2, 21, 0.125, []
    for group, width, now in ((3, 40, 0), (3, 40, 13), (1, 64, 20), (4, 6, 20), (4, 32, 8), (4, 32, 9)):
        shapes = [(heads, group, width), (heads, width), (heads, width), (width,), (width,)]  # q, k, v, cosines, sines
        drawn = [draw.standard_normal(shape) for shape in shapes + 2 * [(heads, length, width)]]
        for each in drawn[5:]:
            each[:, now:] = np.nan
        if now in (8, 9):
            drawn[5][1, 4, 0] = np.inf if now == 8 else np.nan
        given = [stored(kind, each) for each in drawn]
        cases.append((len(program._places), now, given))
        tensors = [*map(program.address, given), program.address(stored(kind, np.zeros(shapes[0])))]
        floats = program.address(np.full(heads * (group * (width + length) + 4 * width), np.nan, np.float32))
        position = program.address(np.array([now]))
        program.start(kernel, heads, group, width, length, bits(scaling), kind, position, *tensors, floats)
    found = program.run(tmp_path)

    for at, now, given in cases:
        *_, keys, values, out, _, _, job = found[at : at + 11]
        q, k, v, cosines, sines, past, valued = (meant(kind, each) for each in given)

        def turned(x, cosines=cosines, sines=sines):
            first, second = np.split(x, 2, -1)
            return x * cosines + np.concatenate((-second, first), -1) * sines

        past, valued = past[:, : now + 1], valued[:, : now + 1]
        past[:, now], valued[:, now] = turned(k), v
        for after, before, whole in ((keys, given[5], past), (values, given[6], valued)):
            others = np.arange(length) != now
            assert np.array_equal(after[:, others], before[:, others], equal_nan=not kind)
            off = np.abs(meant(kind, after)[:, now] - whole[:, now])
            assert (off <= (1e-6, 2**-8)[kind] * np.abs(whole[:, now]).max()).all()
        with np.errstate(invalid="ignore"):
            scores = scaling * turned(q) @ past.swapaxes(1, 2)
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            expected = shares / shares.sum(-1, keepdims=True) @ valued
        out = meant(kind, out)
        assert np.isnan(expected).any() == (now in (8, 9))
        assert np.array_equal(np.isnan(out), np.isnan(expected))
        assert np.nanmax(np.abs(out - expected)) < (2e-6, 2**-8)[kind] * np.nanmax(np.abs(expected))
        assert job[0] == heads + 2
