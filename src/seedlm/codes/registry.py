"""The families of codes by name, each imported when it is first asked for, and formats from what people and files write."""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from seedlm.codes.base import Family, Format
from seedlm.errors import FormatError

DEFAULT: Final = "trellis"
"""The family whose presets are meant where a number of bits is given alone."""

FEEDBACK: Final = "feedback"
"""The record of what errors were weighed by, which folders of every family with error feedback may have: "none", "own text", or
the name of a text that was data."""

_HOMES: Final = {"block": "seedlm.codes.block.family", "trellis": "seedlm.codes.trellis.family"}
"""Family -> the module that has it as FAMILY."""

_FAMILIES: Final[dict[str, Family]] = {}


def register(family: Family) -> None:
    """Make a family of another package known. A name that is taken by another family is refused with a FormatError."""
    if family.name in _HOMES or _FAMILIES.get(family.name, family) is not family:
        raise FormatError(f"a family of codes named {family.name!r} exists already")
    _FAMILIES[family.name] = family


def names() -> list[str]:
    """All families that are known, our own first."""
    return list(dict.fromkeys([*_HOMES, *_FAMILIES]))


def family(name: object) -> Family:
    """A family by its name. Raises FormatError for one that is not known."""
    if isinstance(name, str) and name in _HOMES and name not in _FAMILIES:
        _FAMILIES[name] = importlib.import_module(_HOMES[name]).FAMILY
    if not isinstance(name, str) or name not in _FAMILIES:
        raise FormatError(f"unknown format family {name!r:.80}, known: {', '.join(map(repr, names()))}")
    return _FAMILIES[name]


def family_of(format: Format) -> Family:
    """The family of a format."""
    return family(format.family)


def reason_no_product(backend: str, families: Iterable[str]) -> str | None:
    """Why no weight in codes of these families is multiplied by a backend of that name; None if one may be, by "auto" any."""
    known = {product for name in families for product in family(name).products}
    if not known:
        return f"nothing is packed here that a backend could multiply by, so none can be {backend!r:.80}"
    if backend == "auto" or backend in known:
        return None
    return f"no packed layer has a backend {backend!r:.80}, known: {', '.join(['auto', *sorted(known)])}"


def parse_format(format: "str | float | Format", code: str | None = None) -> Format:
    """A format from a preset's bits (``"4"`` or 4) or a specification (``"block-k16-c8-p3-q4-e4"``); one that is there stays.

    code   the family whose preset is meant, `DEFAULT` if None
    Raises FormatError for anything else.
    """
    if isinstance(format, Format):
        return format
    number = isinstance(format, int | float) and -1e9 < format < 1e9
    text = format if isinstance(format, str) else f"{format:g}" if number else f"{type(format).__name__}"
    chosen = family(DEFAULT if code is None else code)
    if text in chosen.presets:
        return chosen.presets[text]
    head = text.partition("-")[0]
    parsed = family(head).parse(text) if head in names() else None
    if parsed is None:
        example = chosen.presets.get("4") or next(iter(chosen.presets.values()))
        raise FormatError(
            f"unknown format {text!r:.80}; presets are {', '.join(chosen.presets)} (bits per weight), "
            f"a specification looks like {example.spec!r}"
        )
    return parsed


def format_from_dict(data: object) -> Format:
    """A format from its JSON form. Raises FormatError if a key is missing, unknown or out of range."""
    if not isinstance(data, Mapping):
        raise FormatError(f"a format must be a JSON object, got {type(data).__name__}")
    return family(data.get("family")).from_dict(data)


def check_settings(formats: "list[Format] | tuple[Format, ...]", settings: Mapping[str, Any]) -> None:
    """Raise FormatError for an option of encoding that none of these formats' families has, or with a wrong value."""
    families = list(dict.fromkeys(format.family for format in formats))
    if not isinstance(found := settings.get(FEEDBACK, ""), str):
        raise FormatError(f"{FEEDBACK} must be a text, got {found!r:.40}")
    for name in settings:
        if not any(name in family(each).defaults or (name == FEEDBACK and family(each).feedback) for each in families):
            known = sorted({option for each in families for option in family(each).defaults})
            raise FormatError(
                f"{' and '.join(families)} codes have no option {name!r:.80}; theirs are {', '.join(known) or 'none'}"
            )
    for each in families:
        mine = {name: value for name, value in settings.items() if name in family(each).defaults}
        family(each).check_settings(mine)
