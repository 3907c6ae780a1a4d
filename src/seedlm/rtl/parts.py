"""How a module takes in another: as a submodule in simulation, as a named instance in Verilog.

Amaranth writes every submodule out anew. A chunk of 16 blocks would be 16 copies of the decoder, which nobody wants to read or
to synthesise. Given a `Library` as its platform, `place` leaves an instance and the library keeps one module for each name.
"""

from amaranth.hdl import ClockSignal, Instance, Module, ResetSignal
from amaranth.lib import wiring


class Part(wiring.Component):
    """A component with flat ports.

    module_name   its Verilog module; two parts of one name must be equal
    latency       clocks from an input to the output that depends on it, where that is fixed
    """

    module_name: str
    latency: int


class Leaf(Part):
    """A part of gates and registers only, laid out as it is made, so that its latency is known at once."""

    def __init__(self, ports: dict[str, wiring.Member]):
        super().__init__(ports)
        self.m = Module()
        self.m._MustUse__silence = True  # likewise: see `place`

    def elaborate(self, platform: object) -> Module:
        return self.m


class Library:
    """The platform of Verilog output: collects the parts that were placed, by module name."""

    def __init__(self) -> None:
        self.parts: dict[str, Part] = {}


def place(m: Module, name: str, part: Part, platform: object) -> None:
    """Make `part` a submodule of `m`, or an instance of a library's module."""
    if not isinstance(platform, Library):
        m.submodules[name] = part
        return
    platform.parts.setdefault(part.module_name, part)
    part._MustUse__silence = True  # of equal parts one is written; Amaranth would warn of the others
    ports = {
        ("i_" if member.flow == wiring.In else "o_") + port: getattr(part, port)
        for port, member in part.signature.members.items()
    }
    m.submodules[name] = Instance(part.module_name, i_clk=ClockSignal(), i_rst=ResetSignal(), **ports)
