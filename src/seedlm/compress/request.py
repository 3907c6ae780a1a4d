"""What a run of `compress_checkpoint` is asked for, refused before work begins if it cannot be.

Arguments, headers, texts and the disk tell it, so no torch is imported, which would take seconds: a command makes its request
before it imports what does the work, which makes the same once more. What only the model's class tells (`modeling.blueprint`),
and which devices are here, is refused later.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seedlm.codes.base import Format
from seedlm.codes.registry import check_settings, family_of, parse_format
from seedlm.compress import plan as plans
from seedlm.compress.allocate import Mixture
from seedlm.compress.feedback import Feedback, no_sensitivities
from seedlm.compress.plan import DTYPES, parse_size
from seedlm.compress.workfolder import check_claimable
from seedlm.device import check_names
from seedlm.errors import BackendError, FormatError, OutputError, SourceError
from seedlm.storage.selection import NO_SURVEY, Wish, as_patterns, check_patterns, may_be_stack
from seedlm.storage.source import Source


def is_ray(device: str) -> bool:
    """Whether a device's name means a cluster: ``ray``, or ``ray://HOST:PORT`` for Ray's client."""
    return device == "ray" or device.startswith("ray://")


def tables_format(format: Format | Mixture) -> Format | None:
    """What embeddings and head get that nothing is said of: their family's `tables` beside layers of no more bits.

    A mixture has its average. What bits a size gives is known later: there the family's stand, unless the size has room for
    dense ones (`plan.by_size`).
    """
    if isinstance(format, Mixture):
        tables, bits = family_of(next(iter(format.formats))).tables, format.bits
    else:
        tables, bits = family_of(format).tables, format.bits_per_weight
    return tables if tables is not None and (bits is None or bits <= tables.bits_per_weight) else None


@dataclass(frozen=True)
class Request:
    """Arguments of `compress_checkpoint`, in the forms that work goes on with.

    candidates   formats that the layers may get
    tables       what is wanted of the embeddings and the output head
    """

    out: Path
    format: Format | Mixture
    candidates: list[Format]
    tables: Wish
    feedback: Feedback
    dtype: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    shard_bytes: int
    device: str
    backend: str
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        out: str | Path,
        *,
        format: str | float | Format | Mixture,
        feedback: str | Path | Feedback,
        dtype: str | None = None,
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        embeddings: str | float | Format | None = None,
        head: str | float | Format | None = None,
        max_shard_size: int | str = "5GB",
        device: str = "auto",
        backend: str = "auto",
        **settings: Any,
    ) -> "Request":
        """The request, checked as far as arguments and the disk tell. Raises as `compress_checkpoint`."""
        out = Path(out).absolute()
        if not out.name:
            raise OutputError(f"{out}: is no place for a new folder")
        format = format if isinstance(format, Mixture) else parse_format(format)
        if dtype is not None and dtype not in DTYPES:
            raise FormatError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if not is_ray(device):
            check_names(device)
        candidates = list(format.formats) if isinstance(format, Mixture) else [format]
        tables = Wish.of(embeddings, head, tables_format(format))
        check_settings([*candidates, *tables.formats], settings)
        known = {name: None for each in (*candidates, *tables.formats) for name in family_of(each).searches}
        if backend != "auto" and known and backend not in known:
            raise BackendError(f"unknown backend {backend!r:.80}; known: auto, {', '.join(known)}")
        wanted = Feedback.parse(feedback).meant_for(candidates)
        wanted.check(candidates)
        if isinstance(format, Mixture) and not format.sensitivity and wanted.kind == "none":
            raise FormatError(no_sensitivities(format, wanted.kind))
        check_claimable(out)
        patterns = as_patterns(include), as_patterns(exclude)
        shard_bytes = parse_size(max_shard_size)
        return cls(out, format, candidates, tables, wanted, dtype, *patterns, shard_bytes, device, backend, settings)

    def check_source(self, source: Source) -> None:
        """Raise SourceError or FormatError for what a source's names and shapes tell.

        The model's class may leave more of its tensors dense than names do, and knows how stacks of experts lie: a model with
        tensors of three dimensions, or with stacks of two, is left to it.
        """
        if any(len(info.shape) > 2 or may_be_stack(name, info) for name, info in source.tensors.items()):
            return
        check_patterns(source.tensors, self.include, self.exclude)
        if not isinstance(self.format, Mixture) or self.format.size is None or any(self.tables.said.values()):
            return
        try:
            selected = plans.choose(source, self.candidates, self.include, self.exclude, found=NO_SURVEY)
        except SourceError:
            return
        default = None if self.tables.said else self.tables.default
        least, most = plans.reach(self.format, source, selected, default, self.dtype, self.shard_bytes)
        dense = 4 * sum(math.prod(info.shape) for info in source.tensors.values())
        if not least <= self.format.size <= max(most, dense):
            raise FormatError(plans.out_of_reach(self.format.size, least, most))
