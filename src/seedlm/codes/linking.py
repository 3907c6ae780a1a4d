"""A linker for what LLVM makes of a kernel: an object file becomes one piece of memory that runs wherever it lies.

Code and constants are laid one behind the other and refer to each other by distance, so all is settled here and nothing is left
to whoever loads it, but the addresses of a few functions of the C library. Those stand in a table at the start, eight bytes
each, and a call of one goes by a jump to what stands there. Only what LLVM's small code model of position-independent code was
seen to need is known, on x86-64 and 64-bit ARM; anything else is refused.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

FUNCTIONS: Final = ("clock_gettime", "memcpy", "memmove", "memset", "sched_yield")
"""Of the C library that kernels may call."""

_X86, _ARM = 62, 183
_CODE_OR_DATA, _RELOCATIONS, _IMPLIED_ADDENDS, _SYMBOLS = 1, 4, 9, 2
_WRITABLE, _IN_MEMORY = 1, 2
_KINDS: Final = (0, 1, 2, 3)
"""Of symbols: none, data, a function, a section."""


class Refused(Exception):
    """Something in an object file that is not understood."""


class Image(NamedTuple):
    """A linked kernel.

    code        with zeros where the functions' addresses belong, at its start
    entry       where its first instruction is
    functions   of the C library, in the order of their addresses
    """

    code: bytes
    entry: int
    functions: tuple[str, ...]

    def packed(self) -> bytes:
        """All of it, as `machine_code.load` reads it."""
        return " ".join((str(self.entry), *self.functions)).encode() + b"\n" + self.code


class _Section(NamedTuple):
    name: str
    type: int
    flags: int
    content: bytes
    link: int
    info: int
    align: int


def link(object: bytes, entry: str) -> Image:
    """The image of an ELF object file for x86-64 or ARM, which is entered at a function. Raises Refused."""
    if object[:6] != b"\x7fELF\x02\x01":
        raise Refused("no 64-bit object file of the lowest byte first")
    (machine,) = struct.unpack_from("<H", object, 18)
    if machine not in _PATCHES:
        raise Refused(f"code for machine {machine}")
    sections = _sections(object)
    symbols, names = _symbols(sections)
    functions = tuple(sorted({name for name, (section, _) in zip(names, symbols, strict=True) if name and section == 0}))
    if unknown := set(functions) - set(FUNCTIONS):
        raise Refused(f"calls {sorted(unknown)}")

    image, places = bytearray(8 * len(functions)), {}
    for number, section in enumerate(sections):
        read_only = section.type == _CODE_OR_DATA and section.flags & (_IN_MEMORY | _WRITABLE) == _IN_MEMORY
        if read_only and section.name != ".eh_frame":  # nothing is thrown
            image += bytes(-len(image) % max(16, section.align))
            places[number] = len(image)
            image += section.content
    stubs = {}
    for number, name in enumerate(functions):
        image += bytes(-len(image) % 16)
        stubs[name] = len(image)
        image += _STUBS[machine](stubs[name], 8 * number)

    def place(symbol: int) -> int:
        section, value = symbols[symbol]
        if section == 0 and names[symbol] in stubs:
            return stubs[names[symbol]]
        if section not in places:
            raise Refused(f"refers to {names[symbol]!r} in {sections[section].name if section < len(sections) else section}")
        return places[section] + value

    for section in sections:
        if section.type == _IMPLIED_ADDENDS and section.info in places:
            raise Refused("relocations without addends")
        if section.type == _RELOCATIONS and section.info in places:
            for offset, info, addend in struct.iter_unpack("<QQq", section.content):
                patch = _PATCHES[machine].get(info & 0xFFFFFFFF)
                if patch is None:
                    raise Refused(f"relocation {info & 0xFFFFFFFF}")
                at = places[section.info] + offset
                (word,) = struct.unpack_from("<I", image, at)
                struct.pack_into("<I", image, at, patch(word, place(info >> 32) + addend, at))
    if entry not in names:
        raise Refused(f"has no {entry}")
    return Image(bytes(image), place(names.index(entry)), functions)


def _sections(object: bytes) -> list[_Section]:
    start, size, count, naming = *struct.unpack_from("<Q", object, 40), *struct.unpack_from("<3H", object, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", object, start + size * number) for number in range(count)]
    contents = [object[head[4] : head[4] + head[5]] for head in heads]
    return [
        _Section(_text(contents[naming], name), type, flags, content, link, info, align)
        for (name, type, flags, _, _, _, link, info, align, _), content in zip(heads, contents, strict=True)
    ]


def _symbols(sections: Sequence[_Section]) -> tuple[list[tuple[int, int]], list[str]]:
    """Each symbol's section (0 where it is another's) and place there, and its name."""
    (table,) = (section for section in sections if section.type == _SYMBOLS)
    found, names = [], []
    for name, info, _, section, value, _ in struct.iter_unpack("<IBBHQQ", table.content):
        if info & 15 not in _KINDS and section:
            section = 0xFFFF  # which is no section: refused if anything refers to it
        found.append((section, value))
        names.append(_text(sections[table.link].content, name))
    return found, names


def _text(table: bytes, at: int) -> str:
    return table[at : table.index(0, at)].decode()


def _whole(value: int, bits: int, unit: int = 1) -> int:
    """A distance in units as so many bits."""
    if value % unit or not -(1 << bits - 1) <= value // unit < 1 << bits - 1:
        raise Refused(f"a distance of {value}")
    return value // unit & (1 << bits) - 1


def _distance(word: int, target: int, at: int) -> int:
    return _whole(target - at, 32)


def _branch(word: int, target: int, at: int) -> int:
    return word & 0xFC000000 | _whole(target - at, 26, 4)


def _page(word: int, target: int, at: int) -> int:
    pages = _whole((target >> 12) - (at >> 12), 21)
    return word & 0x9F00001F | (pages & 3) << 29 | pages >> 2 << 5


def _in_page(unit: int) -> Callable[[int, int, int], int]:
    def patch(word: int, target: int, at: int) -> int:
        return word & ~(0xFFF << 10) | _whole(target & 0xFFF, 13, unit) << 10

    return patch


def _stub_x86(at: int, slot: int) -> bytes:
    return b"\xff\x25" + struct.pack("<i", slot - at - 6)  # jmp [rip + distance]


def _stub_arm(at: int, slot: int) -> bytes:
    return struct.pack("<3I", _page(0x90000010, slot, at), _in_page(8)(0xF9400210, slot, at), 0xD61F0200)  # adrp, ldr, br x16


_PATCHES: Final[dict[int, dict[int, Callable[[int, int, int], int]]]] = {
    _X86: {2: _distance, 4: _distance},  # R_X86_64_PC32, PLT32
    _ARM: {
        261: _distance,  # R_AARCH64_PREL32
        275: _page,  # ADR_PREL_PG_HI21
        277: _in_page(1),  # ADD_ABS_LO12_NC
        278: _in_page(1),  # LDST8_ABS_LO12_NC, and of 16, 32, 64 and 128 bits
        284: _in_page(2),
        285: _in_page(4),
        286: _in_page(8),
        299: _in_page(16),
        282: _branch,  # JUMP26, CALL26
        283: _branch,
    },
}
_STUBS: Final = {_X86: _stub_x86, _ARM: _stub_arm}
