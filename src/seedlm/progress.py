"""How work that takes long tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told (phase, done, total), in the unit of the phase: tokens of ``text``, ``statistics``, ``sensitivity`` and ``evaluate``,
bytes of ``read``, weights of ``compress``. A phase's first call says where it starts, which is not 0 when an earlier run is
gone on with. From several threads, one call at a time."""

Tell = Callable[[int], None]
"""Told how many more are done, any number of times: weights, unless it is said otherwise."""
