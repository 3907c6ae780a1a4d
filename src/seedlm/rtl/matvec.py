"""The whole product, y = W x: streams, controller and data path, the same for both designs.

    s_axis_cmd   one `design.Command` for each product
    s_axis_x     FP16 activations, a packet of whole beats
    s_axis_w     the stored matrix, row after row without a gap, a packet of whole beats
    m_axis_y     one float32 for each row; tlast with the last

A product goes through LOAD (activations converted and written), RUN (one chunk of weights a clock as long as they come) and
DRAIN (results leave). A chunk is issued only if the result it may end in has a place in the output FIFO: that is the only
way in which anything downstream holds back, so the data path itself never stops.
"""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from seedlm.rtl.activations import ActivationMemory, Activations
from seedlm.rtl.aligner import Aligner
from seedlm.rtl.decoder import Decoder
from seedlm.rtl.design import COMMAND_BITS, HALF_BITS, MANTISSA_BITS, RESULT_FIFO, SHARED_BITS, Command, Design, SeedDesign
from seedlm.rtl.lanes import HalfLanes, SeedLanes
from seedlm.rtl.parts import Part, place
from seedlm.rtl.pipeline import Pipeline, Staged
from seedlm.rtl.result import RowSum, ToFloat


class MatVec(Part):
    """The top module. `busy` is high from a command to the last result it asks for."""

    def __init__(self, design: Design):
        self.design = design
        self.module_name = f"{design.prefix}_matvec"
        ports: dict = {}
        for name, bits in (("s_axis_cmd", sum(COMMAND_BITS)), ("s_axis_x", design.beat_bits), ("s_axis_w", design.beat_bits)):
            ports |= {f"{name}_tvalid": In(1), f"{name}_tready": Out(1), f"{name}_tdata": In(bits)}
            if name != "s_axis_cmd":
                ports[f"{name}_tlast"] = In(1)
        ports |= {"m_axis_y_tvalid": Out(1), "m_axis_y_tready": In(1), "m_axis_y_tdata": Out(32), "m_axis_y_tlast": Out(1)}
        super().__init__(ports | {"busy": Out(1)})

        prefix, load_units = design.prefix, design.load_blocks * design.block_size
        self.x_aligner = Aligner(
            f"{prefix}_x_aligner", beat_units=design.beat_bits // HALF_BITS, chunk_units=load_units, unit_bits=HALF_BITS
        )
        self.w_aligner = Aligner(
            f"{prefix}_w_aligner", beat_units=design.beat_units, chunk_units=design.chunk_units, unit_bits=design.unit_bits
        )
        self.activations = [Activations(design.block_size) for _ in range(design.load_blocks)]
        self.row_bits = design.block_size * MANTISSA_BITS + SHARED_BITS
        self.memory = ActivationMemory(
            f"{prefix}_x_memory", banks=design.banks, bank_bits=design.load_blocks * self.row_bits, depth=design.depth
        )
        self.decoders: list[Decoder] = []
        self.lanes: list[SeedLanes] | list[HalfLanes]
        if isinstance(design, SeedDesign):
            self.decoders = [Decoder(design.format) for _ in range(design.blocks)]
            decoder = self.decoders[0]
            self.lanes = [SeedLanes(design, decoder.sum_bits, design.format.exponent_bits) for _ in self.decoders]
        else:
            self.lanes = [HalfLanes(design) for _ in range(design.blocks)]
        self.row_sum = RowSum(design)
        self.to_float = ToFloat(design)

    def elaborate(self, platform: object) -> Module:
        m = Module()
        pipe = Pipeline(m)
        place(m, "x_aligner", self.x_aligner, platform)
        place(m, "w_aligner", self.w_aligner, platform)
        place(m, "x_memory", self.memory, platform)
        place(m, "row_sum", self.row_sum, platform)
        place(m, "to_float", self.to_float, platform)
        for name, parts in (("activations", self.activations), ("decoder", self.decoders), ("lanes", self.lanes)):
            for i, part in enumerate(parts):
                place(m, f"{name}{i}", part, platform)
        for name, aligner in (("s_axis_x", self.x_aligner), ("s_axis_w", self.w_aligner)):
            m.d.comb += [
                aligner.s_axis_tvalid.eq(getattr(self, f"{name}_tvalid")),
                aligner.s_axis_tdata.eq(getattr(self, f"{name}_tdata")),
                aligner.s_axis_tlast.eq(getattr(self, f"{name}_tlast")),
                getattr(self, f"{name}_tready").eq(aligner.s_axis_tready),
            ]

        command: Any = Command(*(Signal(bits, name=f"cmd_{name}") for name, bits in COMMAND_BITS._asdict().items()))
        start, load, run = Signal(), Signal(), Signal()
        loaded, x_invalid = self.load(m, pipe, command, start, load)
        issued, finished, drained = self.run(m, pipe, command, start, run, x_invalid)

        m.d.comb += [self.x_aligner.clear.eq(start), self.w_aligner.clear.eq(start)]
        with m.FSM(name="state"):
            with m.State("IDLE"):
                m.d.comb += self.s_axis_cmd_tready.eq(1)
                with m.If(self.s_axis_cmd_tvalid):
                    m.d.sync += Cat(command).eq(self.s_axis_cmd_tdata)
                    m.next = "START"
            with m.State("START"):
                m.d.comb += [start.eq(1), self.busy.eq(1)]
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.comb += [load.eq(1), self.busy.eq(1)]
                with m.If(loaded):
                    m.next = "RUN"
            with m.State("RUN"):
                m.d.comb += [run.eq(1), self.busy.eq(1)]
                with m.If(issued & finished):
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                m.d.comb += self.busy.eq(1)
                with m.If(drained):
                    m.next = "IDLE"
        return m

    def load(self, m: Module, pipe: Pipeline, command: Any, start: Signal, load: Signal) -> tuple[Value, Signal]:
        """Converts activations into their memory, zeros past the last column. Returns (done, an Inf or NaN was met)."""
        design, aligner = self.design, self.x_aligner
        units = design.load_blocks * design.block_size
        left = Signal(range(design.depth * design.lanes + 1))
        row = Signal(range(design.depth + 1))
        bank = Signal(design.banks, init=1)  # one-hot
        more, pop = Signal(), Signal()
        take = Signal.like(aligner.take, name="take_x")
        next_left = Mux(load, left - take, command.columns)
        rows_left = Signal.like(row)
        last = bank[-1] & (rows_left == 1)
        m.d.comb += [aligner.take.eq(take), pop.eq(load & more & aligner.available), aligner.pop.eq(pop)]
        with m.If(pop):
            m.d.sync += [bank.eq(bank.rotate_left(1)), row.eq(row + bank[-1]), rows_left.eq(rows_left - bank[-1])]
            with m.If(last):
                m.d.sync += more.eq(0)
        with m.If(start):
            m.d.sync += [row.eq(0), rows_left.eq(command.chunks), bank.eq(1), more.eq(1)]
        with m.If(start | pop):
            m.d.sync += [left.eq(next_left), take.eq(Mux(next_left > units, units, next_left))]

        halves = taken_halves(pipe, aligner)
        converted, invalid = [], []
        for i, part in enumerate(self.activations):
            m.d.comb += part.halves.eq(halves.value.word_select(i, design.block_size * HALF_BITS))
            converted.append(Cat(part.mantissas, part.shared))
            invalid.append(part.invalid)
        time = halves.time + self.activations[0].latency
        write = pipe.at(Staged(pop, reset=True), time)
        x_invalid = Signal()
        m.d.comb += [
            self.memory.write_data.eq(Cat(converted)),
            self.memory.write_address.eq(pipe.at(Staged(row), time)),
            self.memory.write_enable.eq(Mux(write, pipe.at(Staged(bank), time), 0)),
        ]
        with m.If(write & Cat(invalid).any()):
            m.d.sync += x_invalid.eq(1)
        with m.If(start):
            m.d.sync += x_invalid.eq(0)
        return pipe.at(Staged(pop & last, reset=True), time), x_invalid

    def run(
        self, m: Module, pipe: Pipeline, command: Any, start: Signal, run: Signal, x_invalid: Signal
    ) -> tuple[Value, Value, Value]:
        """Issues chunks and takes results. Returns (a chunk is issued, it is the last one, no result is outstanding)."""
        design, aligner = self.design, self.w_aligner
        chunk = Signal(range(design.depth + 1))
        rows_left = Signal(COMMAND_BITS.rows)
        take = Signal.like(aligner.take, name="take_w")
        first, last, last_row, room, go = (Signal(name=n) for n in ("first", "last", "last_row", "room", "go"))
        outstanding = Signal(range(RESULT_FIFO + 1))
        accepted = self.m_axis_y_tvalid & self.m_axis_y_tready

        m.d.comb += [aligner.take.eq(take), go.eq(run & aligner.available & room), aligner.pop.eq(go)]
        chunks_left = Signal.like(chunk)
        next_last = Mux(start | last, command.chunks == 1, chunks_left == 2)
        with m.If(go | start):
            m.d.sync += [
                chunk.eq(Mux(start | last, 0, chunk + 1)),
                chunks_left.eq(Mux(start | last, command.chunks, chunks_left - 1)),
                first.eq(start | last),
                last.eq(next_last),
                take.eq(Mux(next_last, command.tail_units, design.chunk_units)),
            ]
        with m.If(go & last):
            m.d.sync += [rows_left.eq(rows_left - 1), last_row.eq(rows_left == 2)]
        with m.If(start):
            m.d.sync += [rows_left.eq(command.rows), last_row.eq(command.rows == 1)]
        # `room` is two clocks old when it is used: leave places for what those issued.
        m.d.sync += [outstanding.eq(outstanding + (go & last) - accepted), room.eq(outstanding < RESULT_FIFO - 2)]

        time = self.operands(m, pipe, aligner, chunk)
        invalid = Cat(part.invalid for part in self.lanes).any() | x_invalid
        issue = Staged(go, reset=True)
        ended = Staged(go & last, reset=True)
        m.d.comb += [
            self.row_sum.terms.eq(Cat(part.term for part in self.lanes)),
            self.row_sum.invalid.eq(invalid),
            self.row_sum.first.eq(pipe.at(Staged(first), time)),
            self.row_sum.enable.eq(pipe.at(issue, time)),
            self.to_float.total.eq(self.row_sum.total),
            self.to_float.invalid.eq(self.row_sum.total_invalid),
            self.to_float.bias.eq(command.bias.as_signed()),
        ]
        time += self.row_sum.latency + self.to_float.latency
        m.submodules.results = results = SyncFIFOBuffered(width=33, depth=RESULT_FIFO)
        m.d.comb += [
            results.w_data.eq(Cat(self.to_float.result, pipe.at(Staged(last_row), time))),
            results.w_en.eq(pipe.at(ended, time)),
            results.r_en.eq(self.m_axis_y_tready),
            self.m_axis_y_tvalid.eq(results.r_rdy),
            Cat(self.m_axis_y_tdata, self.m_axis_y_tlast).eq(results.r_data),
        ]
        return go, last & last_row, outstanding == 0

    def operands(self, m: Module, pipe: Pipeline, aligner: Aligner, chunk: Signal) -> int:
        """Brings a chunk's codes and activations to the lanes. Returns the clocks from issue to the lanes' terms."""
        design = self.design
        stored = Staged(aligner.chunk, aligner.latency)
        if not self.decoders:  # an Inf or NaN of the next row is not this one's
            stored = taken_halves(pipe, aligner)
        codes = [stored.value.word_select(i, design.block_bits) for i in range(design.blocks)]
        time = stored.time
        if self.decoders:
            for decoder, lane, code in zip(self.decoders, self.lanes, codes, strict=True):
                m.d.comb += [decoder.code.eq(code), lane.sums.eq(decoder.sums), lane.exponent.eq(decoder.exponent)]
            time += self.decoders[0].latency
        else:
            for lane, code in zip(self.lanes, codes, strict=True):
                m.d.comb += lane.code.eq(code)
        m.d.comb += self.memory.address.eq(pipe.at(Staged(chunk), time - self.memory.latency))
        for i, lane in enumerate(self.lanes):
            row = self.memory.data.word_select(i, self.row_bits)
            m.d.comb += Cat(lane.mantissas, lane.shared).eq(row)
        return time + self.lanes[0].latency


def taken_halves(pipe: Pipeline, aligner: Aligner) -> Staged:
    """An aligner's FP16 numbers, those past `take` set to zero."""

    def mask(chunk: Value, take: Value) -> Value:
        return Cat(Mux(i < take, chunk.word_select(i, HALF_BITS), 0) for i in range(aligner.chunk_units))

    return pipe.stage("halves", mask, Staged(aligner.chunk, aligner.latency), Staged(aligner.take))
