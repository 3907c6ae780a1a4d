"""Options that several commands have, each written once."""

from typing import Annotated

import typer

Dtype = Annotated[str, typer.Option(help="Of everything that is not packed: auto, bfloat16, float16, float32.")]
Dequantize = Annotated[
    bool,
    typer.Option("--dequantize", "--expand", help="Dequantize once after loading: faster on a CPU, full size in memory."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. It can do anything.")
]

# How tokens are drawn.
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token; above, tokens are drawn.", min=0.0)]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.", max=1.0)]
DrawingSeed = Annotated[int, typer.Option(help="Of the drawing.")]
