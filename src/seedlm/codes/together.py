"""Work that threads hand in one by one and that is done together, because it takes as long for many as for one.

A thread hands in its piece. If fewer threads work than may, it becomes one that does: it takes its piece and the like of it
that wait, does them in one go, and gives everybody their part. Else it waits. So nobody waits for others to come: pieces
gather while the ones before are being done.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any


class _Piece:
    """What a thread has handed in: taken when somebody does it, done when its result, or what was raised, is there."""

    def __init__(self, work: Any, size: int) -> None:
        self.work, self.size = work, size
        self.taken = self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class Together:
    """Does pieces that have the same key in one go.

    most    of the sizes of pieces that are done together
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._changed = threading.Condition()
        self._waiting: dict[Hashable, list[_Piece]] = {}
        self._working = 0

    def do(self, key: Hashable, work: Any, size: int, run: Callable[[list[Any]], Sequence[Any]], threads: int) -> Any:
        """The result of `work`, which is run alone or with others.

        size      what it counts of `most`; a larger piece is done alone
        run       does several pieces of this key, on one thread: a result for each, in order. What it raises, all of them get
        threads   that may work at once
        """
        piece = _Piece(work, size)
        with self._changed:
            self._waiting.setdefault(key, []).append(piece)
            while not piece.done and (piece.taken or self._working >= threads):
                self._changed.wait()
            if piece.done:
                return self._given(piece)
            pieces = self._take(key, piece)
            self._working += 1
        error: BaseException | None = None
        results: Sequence[Any] = [None] * len(pieces)
        try:
            results = run([each.work for each in pieces])
        except BaseException as reason:
            error = reason
        with self._changed:
            self._working -= 1
            for each, result in zip(pieces, results, strict=True):
                each.result, each.error, each.done = result, error, True
            self._changed.notify_all()
        return self._given(piece)

    def _take(self, key: Hashable, first: _Piece) -> list[_Piece]:
        """A piece, and those that fit beside it in the order in which they came."""
        pieces, left = [first], self._most - first.size
        for piece in self._waiting[key]:
            if piece is not first and piece.size <= left:
                pieces.append(piece)
                left -= piece.size
        rest = [piece for piece in self._waiting[key] if piece not in pieces]
        if rest:
            self._waiting[key] = rest
        else:
            del self._waiting[key]
        for piece in pieces:
            piece.taken = True
        return pieces

    @staticmethod
    def _given(piece: _Piece) -> Any:
        if piece.error is not None:
            raise piece.error
        return piece.result


class Room:
    """Bytes that threads share: one waits until what it wants is free, or nobody has any."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes, self._used = nbytes, 0
        self._changed = threading.Condition()

    def enter(self, nbytes: int) -> None:
        with self._changed:
            while self._used and self._used + nbytes > self._nbytes:
                self._changed.wait()
            self._used += nbytes

    def leave(self, nbytes: int) -> None:
        with self._changed:
            self._used -= nbytes
            self._changed.notify_all()
