"""Pieces of several threads are done in one go, each gets its own result, and panels have the bits that they have alone."""

import threading
import time

import pytest
import torch
from test_trellis_panel import problem

from seedlm.codes.together import Room, Together
from seedlm.codes.trellis import panel as panels
from seedlm.codes.trellis.format import TrellisFormat


def in_threads(*calls):
    """Results, or what was raised, of calls on a thread each."""
    found = [None] * len(calls)

    def run(place, call):
        try:
            found[place] = call()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return found


class Held:
    """A Together whose one worker is busy until so many pieces wait."""

    def __init__(self, most: int, waiting: int) -> None:
        self.together, self.batches = Together(most), []
        self._waiting = waiting

    def do(self, key, work, size, fail=False):
        def run(works):
            self.batches.append(sorted(works))
            while len(self.batches) == 1 and sum(map(len, self.together._waiting.values())) < self._waiting:
                threading.Event().wait(0.001)
            if fail:
                raise ValueError("no")
            return [2 * each for each in works]

        return self.together.do(key, work, size, run, threads=1)


def test_what_waits_is_done_in_one_go_as_far_as_it_fits():
    held = Held(most=4, waiting=5)
    calls = [lambda work=work: held.do("a", work, 1) for work in range(6)]
    assert in_threads(*calls) == [0, 2, 4, 6, 8, 10]
    assert sorted(map(len, held.batches)) == [1, 1, 4]
    assert sorted(work for batch in held.batches for work in batch) == list(range(6))


def test_other_keys_and_large_pieces_are_done_alone():
    held = Held(most=4, waiting=3)
    calls = [lambda: held.do("a", 1, 1), lambda: held.do("a", 2, 9), lambda: held.do("b", 3, 1), lambda: held.do("b", 4, 1)]
    assert in_threads(*calls) == [2, 4, 6, 8]
    assert all(len(batch) == 1 or batch == [3, 4] for batch in held.batches)
    assert [2] in held.batches


def test_what_is_raised_reaches_everybody_whose_piece_it_was():
    held = Held(most=4, waiting=3)
    found = in_threads(*[lambda: held.do("a", 1, 1, fail=True)] * 4)
    assert [str(error) for error in found] == ["no"] * 4
    assert len(held.batches) == 2
    assert held.do("a", 5, 1) == 10


@pytest.mark.parametrize("fed", [True, False])
def test_panels_of_several_threads_have_the_bits_that_they_have_alone(fed, monkeypatch):
    trellis = TrellisFormat(rate=3, state_bits=12).trellis
    problems = [problem(count, 3, 32) for count in (1, 2, 5, 3)]

    def encode(weight, before, coefficients, strips):
        return panels.encode_panel(weight, before if fed else None, coefficients if fed else None, strips, trellis, 16)

    alone = [encode(*each) for each in problems]
    sizes, real, arrived = [], panels._encode, []

    def counted(many, *rest):
        """The first of a round takes until the others are on their way, so that they wait for their turn together."""
        sizes.append(len(many))
        while len(arrived) < len(problems):
            time.sleep(0.01)
        time.sleep(0.05)
        return real(many, *rest)

    monkeypatch.setattr(panels, "_encode", counted)

    def at_once(each):
        arrived.append(each)
        return encode(*each)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            arrived.clear()
            together = in_threads(*[lambda each=each: at_once(each) for each in problems])
            for found, expected in zip(together, alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    assert max(sizes) > 1


def test_room_is_shared_and_never_refused():
    room, inside, most = Room(10), [], []

    def work():
        room.enter(4)
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.01)
        inside.pop()
        room.leave(4)

    in_threads(*[work] * 6)
    assert max(most) <= 2
    room.enter(99)
    room.leave(99)
