"""What the processor can do that CPU kernels are compiled for."""

from functools import cache

from seedlm.codes import machine_code


@cache
def features() -> frozenset[str]:
    """What numba compiles for: the host's features (without AVX if ``NUMBA_ENABLE_AVX=0``), or ``NUMBA_CPU_FEATURES``."""
    found = machine_code.made("seedlm.codes.compiled", "feature_list").decode()
    return frozenset(name[1:] for name in found.split(",") if name.startswith("+"))


def byte_products() -> str:
    """The best way that the processor has to add four products of bytes to a lane.

    "vnni"   four unsigned bytes times four signed ones in an instruction; "vnni512" with registers of 512 bits
    "dot"    four signed ones times four signed ones (ARM)
    "pairs"  only with steps between, and without room for sums of unsigned bytes times signed ones (AVX2, SSSE3)
    "plain"  not at all
    """
    found = features()
    if "avx512vnni" in found and "avx512f" in found:
        return "vnni512"
    if "avxvnni" in found:
        return "vnni"
    if "dotprod" in found:
        return "dot"
    return "pairs" if "ssse3" in found else "plain"
