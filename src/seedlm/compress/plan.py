"""What a run will do, before it does anything: each tensor's fate, its place in the output, and the arguments to hold a
resumed run against. All of it follows from headers, arguments and, for mixed precision, statistics; no weight is read. What
can be refused by arguments and headers alone is refused by `request`, which needs no torch for it, as nothing here does but the
survey of the model.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from seedlm.codes.base import Format, stored_bits
from seedlm.codes.registry import family_of
from seedlm.compress.allocate import Mixture, most_common
from seedlm.compress.items import Destination, Item, Target
from seedlm.errors import FormatError, OutputError, SourceError
from seedlm.storage import checkpoint
from seedlm.storage.checkpoint import PackedInfo, stored_name
from seedlm.storage.metadata import UNKNOWN_DIGEST, reason_like_part, side_endings
from seedlm.storage.safetensors import SINGLE_NAME, Layout, TensorInfo, layout
from seedlm.storage.selection import (
    DENSE,
    Survey,
    Wish,
    dense_linears,
    groups_of,
    largest_left,
    matrices_of,
    select,
    stack_of,
    tables_by_default,
    tables_by_names,
    tables_of,
)
from seedlm.storage.source import Source
from seedlm.version import __version__

NO_WISH: Final = Wish()
SizeOf = Callable[[Mapping[str, Format]], int]
DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Selected:
    """Which matrices of a model are compressed.

    modules   module -> (out_features, in_features)
    dense     linear modules that are not
    notes     what a user should know of it, a line each
    tables    the embeddings and the output head, as far as they are compressed, each in a format of its own
    observed  of those: the layer whose statistics errors are fed back by. Embeddings have some if a head is tied to them: the
              head's errors cost ten times what those of the rows that are looked up do (docs/log/quality.md)
    """

    modules: Mapping[str, tuple[int, int]]
    dense: list[str]
    notes: list[str]
    survey: Survey
    tables: Mapping[str, PackedInfo]
    observed: Mapping[str, str]

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """All layers whose statistics are of use -> (out_features, in_features)."""
        return {**self.modules, **{layer: self.tables[module].shape for module, layer in self.observed.items()}}


@dataclass(frozen=True)
class Plan:
    """A run, decided.

    format      of most matrices of the layers; `formats` has all
    shards      file -> what it holds, in order
    layouts     file -> its header and every tensor's place
    arguments   that the result depends on besides the source, as JSON
    """

    format: Format
    formats: Mapping[str, Format]
    shards: Mapping[str, list[Item]]
    layouts: Mapping[str, Layout]
    arguments: dict[str, Any]
    source: Any

    @property
    def overrides(self) -> dict[str, Format]:
        """The formats that are not that of most."""
        return {module: other for module, other in self.formats.items() if other != self.format}

    @property
    def nbytes(self) -> int:
        """Of all weight files."""
        return sum(layout.nbytes for layout in self.layouts.values())

    @property
    def items(self) -> list[Item]:
        """All tensors, in the order of the files."""
        return [item for shard in self.shards.values() for item in shard]

    def to_dict(self) -> dict[str, Any]:
        """What is kept beside an unfinished run."""
        return {"seedlm": __version__, "arguments": self.arguments, "source": self.source}

    def destinations(self) -> dict[Item, Destination]:
        """Where each item goes, in the order of the work: that of the files, one format after the other."""
        places = {
            item: Destination(file, {name: self.layouts[file].offsets[name] for name in item.stored})
            for file, shard in self.shards.items()
            for item in shard
        }
        return dict(sorted(places.items(), key=lambda pair: pair[0].target.packed.format.spec if pair[0].target else ""))

    def headings(self) -> dict[str, bytes]:
        return {name: line for item in self.items for name, line in item.headings.items()}


def choose(
    source: Source,
    candidates: Iterable[Format],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    wish: Wish = NO_WISH,
    code: Path | None = None,
    found: Survey | None = None,
) -> Selected:
    """What `selection` and the model's own class say of a source, whose folder `code` is, if code in it is to be run.

    found   what the model's class says, where that is known; `NO_SURVEY` does without, which saves seconds
    Raises SourceError and FormatError as they do.
    """
    widest = max(candidates, key=lambda candidate: candidate.bits_per_weight)
    if found is None:
        from seedlm.modeling.blueprint import survey

        found = survey(source.config, source.tensors, code)
    modules, left = select(source.tensors, source.config, widest, include, exclude, found)
    tables, lacks = tables_by_default(source.tensors, found, wish, modules, exclude)
    tables |= tables_of(source.tensors, found, wish.said, exclude)
    for option, format in wish.said.items():
        if format is None and (named := f"{getattr(found.tables, option)}").removesuffix(".weight") in modules:
            raise SourceError(f"{named}: is included, and --{option} {DENSE} leaves it as it is; leave one of them out")
    left = {name: reason for name, reason in left.items() if name.removesuffix(".weight") not in tables}
    matrices = matrices_of(modules, source.tensors, source.config, found)
    dense = dense_linears(source.tensors, left, found)
    observed = {module: module for module, info in tables.items() if not info.embedding}
    if found.tables.embeddings == found.tables.head and tables:
        dense = [name for name in dense if name != "lm_head"]
        observed = dict.fromkeys(tables, f"{found.tables.layer}")
    return Selected(
        {module: shape for module, (_, shape, _) in matrices.items() if module not in tables},
        dense,
        [*source.notes, *found.notes, *largest_left(source.tensors, left), *lacks],
        found,
        tables,
        observed,
    )


def check_reach(mixture: Mixture, selected: Selected, size_of: SizeOf) -> None:
    """Raise FormatError if no mixture for this model has such a size, or so many bits, or if it is another model's."""
    if mixture.sensitivity:
        mixture.check_sensitivity(selected.modules)
    if mixture.size is None:
        mixture.check_bits(selected.modules)
        return
    low, high = (size_of(dict.fromkeys(selected.modules, format)) for format in mixture.extremes(selected.modules))
    if not low <= mixture.size <= high:
        raise FormatError(out_of_reach(mixture.size, low, high))


def by_size(
    mixture: Mixture, tables: Format, coded: Selected, dense: Selected, size_of: Callable[[Selected, Mapping[str, Format]], int]
) -> tuple[Selected, Mixture]:
    """Which of two selections meets a size, tables in their default format or dense ones, and the size for it.

    Dense ones do where layers of as many bits as the default has fit beside them. Else more than the most bits beside coded
    ones is not used up: fewer bits for the layers would cost more than dense tables win.
    """

    def nbytes(selected: Selected, format: Format) -> int:
        return size_of(selected, dict.fromkeys(selected.modules, format))

    assert mixture.size is not None
    alike = min(mixture.formats, key=lambda format: abs(format.bits_per_weight - tables.bits_per_weight))
    if nbytes(dense, alike) <= mixture.size:
        return dense, mixture
    most = mixture.extremes(coded.modules)[1]
    if (used := nbytes(coded, most)) >= mixture.size:
        return coded, mixture
    note = f"{used:,} of {mixture.size:,} bytes are used: layers in {most.spec}, and dense tables would leave them too few"
    return replace(coded, notes=[*coded.notes, note]), replace(mixture, size=used)


def reach(
    mixture: Mixture, source: Source, selected: Selected, tables: Format | None, dtype: str | None, shard_bytes: int
) -> tuple[int, int]:
    """The fewest and the most bytes that all weight files can have, by names.

    tables   the default of embeddings and head, which stay dense for the most
    """
    least, most = mixture.extremes(selected.modules)
    packed = set(selected.modules)
    left = [name for name in source.tensors if name.removesuffix(".weight") not in packed]
    coded = replace(selected, tables=tables_by_names(source.tensors, left, tables)) if tables else selected
    low, high = (
        make(source, each, dict.fromkeys(packed, format), dtype=dtype, shard_bytes=shard_bytes, arguments={}).nbytes
        for each, format in ((coded, least), (selected, most))
    )
    return low, high


def out_of_reach(size: int, low: int, high: int) -> str:
    return f"the weight files of this model can have {low:,} to {high:,} bytes, got {size:,}"


def assign(format: Format | Mixture, selected: Selected, size_of: SizeOf) -> dict[str, Format]:
    """A format for every matrix; modules that are multiplied as one share theirs where the family asks for it.

    size_of   bytes of all weight files with these formats
    """
    if not isinstance(format, Mixture):
        return dict.fromkeys(selected.modules, format)
    fused = any(family_of(each).fused for each in format.formats)
    groups = groups_of(selected.modules) if fused else []
    if format.size is None:
        return format.assign(selected.modules, groups)
    best = formats = dict.fromkeys(selected.modules, format.extremes(selected.modules)[0])
    smallest, tried = _stored(formats, selected), set()
    left = format.size - size_of(formats)
    while (budget := _stored(formats, selected) + 8 * left) >= smallest and budget not in tried:
        tried.add(budget)  # headers name formats, so what is left for codes depends a little on the choice
        formats = format.assign(selected.modules, groups, budget)
        left = format.size - size_of(formats)
        best = formats if left >= 0 and _stored(formats, selected) >= _stored(best, selected) else best
    return best


def _stored(formats: Mapping[str, Format], selected: Selected) -> int:
    return sum(stored_bits(formats[module], *shape) for module, shape in selected.modules.items())


def make(
    source: Source,
    selected: Selected,
    formats: Mapping[str, Format],
    *,
    dtype: str | None,
    shard_bytes: int,
    arguments: Mapping[str, Any],
) -> Plan:
    """The plan for these formats. Raises SourceError if two tensors would be stored under one name."""
    format = most_common(formats)
    formats = {**formats, **{module: info.format for module, info in selected.tables.items()}}
    items = _items(source, formats, DTYPES.get(dtype or ""), selected)
    shards = _shards(items, shard_bytes)
    layouts = {name: file_layout(shard) for name, shard in shards.items()}
    overrides = {module: other.spec for module, other in formats.items() if other != format}
    known = {"format": format.spec, "overrides": overrides, "dtype": dtype, "max_shard_size": shard_bytes, **arguments}
    return Plan(format, formats, shards, layouts, known, source.fingerprint)


def _items(source: Source, formats: Mapping[str, Format], dtype: str | None, selected: Selected) -> list[Item]:
    """What becomes of every tensor, in the source's order. SourceError for a name that is, or looks like, a part's.

    formats   module -> how its weight is to be stored, of every matrix to be compressed
    """
    items: list[Item] = []
    taken: dict[str, str] = {}
    endings = side_endings(set(formats.values()))
    for name, info in source.tensors.items():
        module = name.removesuffix(".weight")
        experts = f"{module}.0" in formats and stack_of(name, source.tensors, source.config, selected.survey)
        if experts:
            found = [_packed(name, expert, PackedInfo(formats[expert], experts.matrix, experts)) for expert in experts.modules]
        elif module in selected.tables and module != name:
            found = [_packed(name, module, selected.tables[module], selected.observed.get(module))]
        elif module in formats and module != name:
            found = [_packed(name, module, PackedInfo(formats[module], (info.shape[0], info.shape[1])))]
        else:
            convert = dtype is not None and info.dtype in DTYPES.values()
            stored = TensorInfo(dtype, info.shape) if dtype and convert else info
            if reason := reason_like_part(name, stored, endings):
                raise SourceError(f"{name}: would be taken for a part of a compressed weight: {reason}")
            found = [Item(name, {name: stored})]
        for key in (key for item in found for key in item.stored):
            if taken.setdefault(key, name) != name:
                raise SourceError(f"{name} and {taken[key]} would both be stored as {key}; --exclude one of them")
        items += found
    return items


def _packed(name: str, module: str, packed: PackedInfo, observed: str | None = None) -> Item:
    stored = {stored_name(module, part): spec for part, spec in packed.stored.items()}
    return Item(name, stored, Target(module, packed, observed))


def _shards(items: list[Item], max_bytes: int) -> dict[str, list[Item]]:
    """Deal the tensors out to files of at most `max_bytes`, in order; a larger tensor has a file of its own."""
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = sum(info.nbytes for info in item.stored.values())
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def file_layout(items: list[Item], digests: Mapping[str, str] | None = None) -> Layout:
    """A file that holds these; the same with zeros for digests that are not known yet."""
    stored = {name: info for item in items for name, info in item.stored.items()}
    packed = {item.target.module: item.target.packed for item in items if item.target}
    return layout(stored, checkpoint.metadata(packed, {name: (digests or {}).get(name, UNKNOWN_DIGEST) for name in stored}))


def parse_size(size: int | str, what: str = "a shard size") -> int:
    """Bytes from a number or a text: ``"5GB"`` is 5 * 10^9, ``"5GiB"`` is 5 * 2^30. Raises OutputError."""
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match and len(match[1]) < 20:
        step = 1024 if match[3] else 1000
        size = int(Decimal(match[1]) * step ** " KMGT".index(match[2].upper() or " "))
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise OutputError(f"{what} must be a positive number of bytes or a text such as '5GB', got {size!r:.40}")
    return size
