"""Options that several commands have, each written once."""

from typing import Annotated

import typer


def device_names(value: str) -> str:
    """For an option: refuses what is no device anywhere."""
    from seedlm.device import check_names

    check_names(value)
    return value


def _dtype(value: str) -> str:
    from seedlm.integrations.transformers.before import check_dtype

    check_dtype(value)
    return value


def _backend(value: str) -> str:
    from seedlm.integrations.transformers.before import check_backend

    check_backend(value)
    return value


Device = Annotated[
    str, typer.Option(help="Where to run: auto (the GPU if there is one), cpu, cuda, cuda:1, ...", callback=device_names)
]
Dtype = Annotated[
    str,
    typer.Option(help="Of everything that is not packed: auto (as stored), bfloat16, float16, float32.", callback=_dtype),
]
Dequantize = Annotated[
    bool,
    typer.Option(
        "--dequantize",
        "--expand",
        help="Dequantize once after loading: full size in memory; faster without AVX-512, and with many tokens at once.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        help="How packed layers multiply: auto, or a name that `seedlm bench MODEL --explain` lists. cuda-int8 and "
        "numba-int8 round the activations of few tokens to 8 bits: faster, for a little loss.",
        metavar="NAME",
        callback=_backend,
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. It can do anything.")
]

# How tokens are drawn.
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.", min=0.0, max=1.0)]
DrawingSeed = Annotated[int, typer.Option(help="Seed of the drawing.")]
