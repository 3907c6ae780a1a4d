"""What GGUF metadata says of rotary embeddings, in the terms of transformers' ``rope_parameters``.

transformers reads the base frequency alone. The rest changes what a model computes at every position, so it is carried over
exactly or the file is refused:

    rope.scaling.type linear, yarn    with their factors
    rope_freqs.weight                 a divisor for each frequency: as Llama 3.1's formula if that gives the same numbers, else
                                      as the table itself, which transformers' "longrope" takes
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from seedlm.errors import SourceError

_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NEUTRAL: Final = {"finetuned", "type", "factor", "original_context_length", "yarn_ext_factor"}


def rope_parameters(
    scaling: Mapping[str, Any], freqs: Sequence[float] | None, theta: float, positions: int, where: str
) -> dict[str, Any]:
    """The parameters of transformers for what a file says, without the base frequency; empty for plain rotary embeddings.

    scaling     the entries ``ARCH.rope.scaling.*`` by what follows; ``scale_linear`` is the older form of a linear factor
    freqs       the values of ``rope_freqs.weight``
    positions   the model's context length
    Raises SourceError, beginning with `where`, for what cannot be said.
    """
    kind = str(scaling.get("type", "none"))
    factor = float(scaling.get("factor", 1.0) or 1.0)
    if kind == "none" and float(scaling.get("scale_linear", 1.0)) != 1.0:
        kind, factor = "linear", float(scaling["scale_linear"])
    if freqs is not None:
        if kind != "none" and factor != 1.0:
            raise _refuse(where, "scales rotary frequencies twice, by a table and by a factor")
        return _from_table(freqs, theta, positions, where)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    known = _NEUTRAL | ({"attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"} if kind == "yarn" else set())
    if unknown := sorted(set(scaling) - known - {"scale_linear"}):
        raise _refuse(where, f"scales rotary embeddings by rope.scaling.{unknown[0]}")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or float(scaling.get("yarn_ext_factor", 1.0)) not in (1.0, -1.0):
        raise _refuse(where, f"scales rotary embeddings in a way ({kind}) that is not carried over")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    if original := scaling.get("original_context_length"):
        found["original_max_position_embeddings"] = int(original)
    for name in ("beta_fast", "beta_slow"):
        if f"yarn_{name}" in scaling:
            found[name] = float(scaling[f"yarn_{name}"])
    attention = float(scaling.get("yarn_attn_factor", scaling.get("attn_factor", 1.0)))
    if attention != 1.0:  # llama.cpp's is on top of what transformers takes where none is given
        found["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return found


def _from_table(freqs: Sequence[float], theta: float, positions: int, where: str) -> dict[str, Any]:
    """A divisor for each frequency, lowest dimension first."""
    if not all(0 < value < math.inf for value in freqs):
        raise SourceError(f"{where}: rope_freqs.weight must be positive numbers, got {min(freqs)} to {max(freqs)}")
    if all(value == 1.0 for value in freqs):
        return {}
    factor = max(freqs)
    if all(
        math.isclose(found, wanted, rel_tol=1e-4)
        for found, wanted in zip(freqs, _llama3(len(freqs), theta, factor), strict=True)
    ):
        return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3}
    table = [float(value) for value in freqs]
    return {
        **{"rope_type": "longrope", "short_factor": table, "long_factor": table},
        **{"factor": 1.0, "attention_factor": 1.0, "original_max_position_embeddings": positions},
    }


def _llama3(half: int, theta: float, factor: float) -> list[float]:
    """The divisors of Llama 3.1: none for short wavelengths, `factor` for long ones, and what is between between them."""
    low, high, context = (_LLAMA3[name] for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    found = []
    for index in range(half):
        wavelength = 2 * math.pi * theta ** (index / half)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        found.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return found


def _refuse(where: str, what: str) -> SourceError:
    return SourceError(f"{where}: {what}; start from the original model's safetensors, a conversion would lose it too")
