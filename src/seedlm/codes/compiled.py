"""Whether what numba compiles is kept for later processes."""

from typing import Final

from numba.core.caching import FunctionCache


def can_be_kept() -> bool:
    """Whether there is a folder for it; numba raises RuntimeError where it is asked to keep a function and finds none.

    It looks for one beside the source, then in the user's home; neither can be written to in many a container. With
    ``NUMBA_CACHE_DIR`` it looks there first.
    """
    try:
        FunctionCache(can_be_kept)
    except RuntimeError:
        return False
    return True


KEPT: Final = can_be_kept()
