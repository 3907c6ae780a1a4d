"""Reading ahead of the search: of every tensor its SHA-256, and of those to be compressed whether a search can take them.

A matrix's search needs its largest magnitude, and a weight that is not finite has no codes. Both are known only when all of the
tensor has been read, so it is read twice, soon after each other: the second time from the system's memory. Threads read as far
ahead as that lasts, faster than most searches search, so what must be refused is refused early.
"""

import hashlib
import threading
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from seedlm.compress.items import Item
from seedlm.compress.worker import as_bytes, converted, pieces
from seedlm.errors import TensorError
from seedlm.progress import Tell
from seedlm.storage.safetensors import torch_dtype
from seedlm.storage.source import Source

_PIECE_WEIGHTS: Final = 1 << 22
_THREADS: Final = 16
"""Weights that a thread has in memory at a time, and threads at most. What limits them is SHA-256."""
_AHEAD_BYTES: Final = 16 << 30
"""What a machine of that size still has in memory when it is read again."""

_BITS: Final[Mapping[str, tuple[Any, Any, int]]] = {
    "BF16": (np.int16, np.uint16, 0x7F80),
    "F16": (np.int16, np.uint16, 0x7C00),
    "F32": (np.int32, np.uint32, 0x7F800000),
}
"""A dtype as integers, and infinity as one: the bits of magnitudes are in their order, those of NaN above infinity's."""


@dataclass(frozen=True)
class Scan:
    """What one pass over a tensor tells.

    digest    SHA-256 of its bytes
    largest   magnitude; 0 for tensors that are only copied
    reason    why it cannot be compressed; None if it can
    """

    digest: str
    largest: float = 0.0
    reason: str | None = None


def scan(
    source: Source, items: Iterable[Item], tell: Tell, threads: int, ahead: int = _AHEAD_BYTES
) -> Generator[tuple[Item, Scan]]:
    """Read the items' tensors; yields in their order, as each is asked for. Closed early, it stops reading.

    tell      told the bytes just read, any number of times, from one thread at a time
    threads   to read with: at least 1 and at most 16 are started
    ahead     bytes to read beyond what was asked for
    Raises SourceError; TensorError for a number too large for the dtype that it gets, and for a weight with NaN or Inf values:
    the first is named, and all others are read to say how many more there are.
    """
    lock, stopped = threading.Lock(), False

    def told(count: int) -> None:
        with lock:
            if stopped:
                raise InterruptedError
            tell(count)

    with ThreadPoolExecutor(max(1, min(_THREADS, threads))) as pool:
        started = ((item, pool.submit(_scan, source, item, told)) for item in items)
        waiting: deque[tuple[Item, Future[Scan]]] = deque()
        unasked = 0

        def first() -> tuple[Item, Scan]:
            item, future = waiting.popleft()
            found = future.result()
            if found.reason:
                others = sum(other.result().reason is not None for _, other in (*waiting, *started))
                more = f"; and {others} more tensors like it" if others else ""
                raise TensorError(
                    f"{found.reason}{more}; --exclude MODULE leaves one as it is, --embeddings dense the embeddings"
                )
            return item, found

        try:
            for item, future in started:
                waiting.append((item, future))
                unasked += _nbytes(source, item)
                while unasked > ahead:
                    done, found = first()
                    unasked -= _nbytes(source, done)
                    yield done, found
            while waiting:
                yield first()
        finally:
            stopped = True
            pool.shutdown(cancel_futures=True)


def _nbytes(source: Source, item: Item) -> int:
    stack = item.target.packed.stack if item.target else None
    return source.tensors[item.name].nbytes // (stack.shape[0] if stack else 1)


def _scan(source: Source, item: Item, tell: Tell) -> Scan:
    digest, info = hashlib.sha256(), source.tensors[item.name]
    largest, nan, inf = 0, 0, 0
    if item.target is None:
        for chunk in source.chunks(item.name):
            converted(chunk, info, item.stored[item.name], item.name)
            digest.update(chunk)
            tell(len(chunk))
        return Scan(digest.hexdigest())
    signed, unsigned, infinity = _BITS[info.dtype]
    mask = np.iinfo(signed).max
    for piece in pieces(source, item.name, item.target, _PIECE_WEIGHTS):
        data = as_bytes(piece)
        digest.update(data)
        bits = np.frombuffer(data, signed)
        # The largest positive number is the largest signed integer, the largest negative one the largest unsigned.
        largest = max(largest, int(bits.max()), int(bits.view(unsigned).max()) & mask)
        if largest >= infinity:
            inf += int((bits & mask == infinity).sum())
            nan += int((bits & mask > infinity).sum())
        tell(len(data))
    reason = f"{item.name}: a weight must be finite, got {nan} NaN and {inf} Inf values" if nan or inf else None
    value = torch.from_numpy(np.array([largest], signed)).view(torch_dtype(info.dtype))
    return Scan(digest.hexdigest(), float(value), reason)
