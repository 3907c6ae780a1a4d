"""Beats in, chunks of any length up to a maximum out: where rows of words meet a memory that is 64 bytes wide.

A ring of small memories, one for each unit (a word, or an FP16 number) of one or more beats. A chunk starts at any unit; every
memory is read in the ring's row that holds its next unit, and what comes out is rotated into order. Rows of a packed matrix
need no padding this way: the stream is the checkpoint's tensor as it lies in memory.
"""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from seedlm.rtl.parts import Part
from seedlm.rtl.pipeline import Pipeline, Staged

ROWS = 32
"""Rows of the ring: the depth of the smallest LUT memory of the family."""


class Aligner(Part):
    """Ports: an AXI-Stream input, and on the other side

    clear       In: drop everything and accept one more packet; the packet's tlast closes the input again
    take        In: units wanted, at most chunk_units
    available   Out: that many are here; combinational from `take`
    pop         In: take them now; only while available
    chunk       Out: chunk_units units, `latency` clocks after pop; those past `take` are whatever follows
    """

    def __init__(self, module_name: str, *, beat_units: int, chunk_units: int, unit_bits: int):
        self.module_name = module_name
        self.beat_units, self.chunk_units, self.unit_bits = beat_units, chunk_units, unit_bits
        beats = 1
        while beats * beat_units < chunk_units:
            beats *= 2
        self.beats = beats
        self.units = beats * beat_units
        self.latency = 1 + -(-(self.units.bit_length() - 1) // 2)
        super().__init__(
            {
                "s_axis_tvalid": In(1),
                "s_axis_tready": Out(1),
                "s_axis_tdata": In(beat_units * unit_bits),
                "s_axis_tlast": In(1),
                "clear": In(1),
                "take": In(range(chunk_units + 1)),
                "available": Out(1),
                "pop": In(1),
                "chunk": Out(chunk_units * unit_bits),
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        capacity = ROWS * self.units
        level = Signal(range(capacity + 1))
        below = Signal(signed(len(level) + 1))
        full = Signal()
        open_ = Signal(name="open")
        written = Signal(range(ROWS * self.beats))  # counts beats, wraps
        first = Signal(range(capacity))  # the next unit to take, wraps
        accept = Signal()

        m.d.comb += [
            self.s_axis_tready.eq(open_ & ~full),
            accept.eq(self.s_axis_tready & self.s_axis_tvalid),
            below.eq(level - self.take),
            self.available.eq(~below[-1]),
        ]
        # Both next levels side by side: pop comes late and only chooses.
        beat = Mux(accept, self.beat_units, 0)
        m.d.sync += level.eq(Mux(self.pop, below + beat, level + beat))
        # One clock late, hence the room for two beats.
        m.d.sync += full.eq(level > capacity - 3 * self.beat_units)
        with m.If(accept):
            m.d.sync += written.eq(written + 1)
            with m.If(self.s_axis_tlast):
                m.d.sync += open_.eq(0)
        with m.If(self.pop):
            m.d.sync += first.eq(first + self.take)
        with m.If(self.clear):
            m.d.sync += [level.eq(0), written.eq(0), first.eq(0), full.eq(0), open_.eq(1)]

        index = self.units.bit_length() - 1
        offset, row = first[:index], first[index:]
        beat_bit = self.beats.bit_length() - 1
        read = []
        for unit in range(self.units):
            m.submodules[f"unit{unit}"] = memory = Memory(shape=self.unit_bits, depth=ROWS, init=[])
            write, port = memory.write_port(), memory.read_port(domain="comb")
            beat, lane = divmod(unit, self.beat_units)
            m.d.comb += [
                write.addr.eq(written[beat_bit:]),
                write.data.eq(self.s_axis_tdata.word_select(lane, self.unit_bits)),
                write.en.eq(accept & (written[:beat_bit] == beat)),
                port.addr.eq(row + (unit < offset)),
            ]
            read.append(port.data)

        pipe = Pipeline(m)
        data = pipe.stage("read", lambda *units: Cat(units), *map(Staged, read))
        shift = Staged(offset)
        for low in range(0, index, 2):
            high = min(low + 2, index)
            data = pipe.stage(
                "rotated",
                lambda d, n, low=low, high=high: _rotate(d, n[low:high], self.unit_bits << low),
                data,
                shift,
            )
        assert data.time == self.latency
        m.d.comb += self.chunk.eq(data.value[: len(self.chunk)])
        return m


def _rotate(data: Value, amount: Value, step: int) -> Value:
    """Data rotated right by amount * step bits; amount has one or two bits."""
    choices = [data.rotate_right(step * n) for n in range(1 << len(amount))]
    if len(choices) == 2:
        return Mux(amount[0], choices[1], choices[0])
    return Mux(amount[1], Mux(amount[0], choices[3], choices[2]), Mux(amount[0], choices[1], choices[0]))
