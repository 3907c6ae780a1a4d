"""``seedlm sensitivity``."""

from pathlib import Path
from typing import Annotated

import typer

from seedlm.cli.console import note, show_progress
from seedlm.cli.options import Device, Dtype, TrustRemoteCode
from seedlm.progress import say
from seedlm.storage.untrusted import printable


def sensitivity(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file, or Hub repository (owner/name).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to create.", metavar="FILE")],
    sequences: Annotated[int, typer.Option(help="Sequences that the model writes and is measured on.", metavar="N")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in each.", metavar="TOKENS")] = 256,
    seed: Annotated[int, typer.Option(help="Seed of what the model writes.", min=0)] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the model on the Hub; default: main.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure where a model's bits matter, for `compress --bits 3.5 --sensitivity FILE`.

    Needs no data: the model writes a text itself, whose gradients tell. All of the model has to fit the device.
    """
    from seedlm.calibration.amount import SensitivityText, check_length
    from seedlm.integrations.transformers.before import find, longest_text
    from seedlm.storage.sensitivity import write_sensitivity
    from seedlm.storage.written import check_free

    check_free(output)
    text = SensitivityText(sequences=sequences, length=length, seed=seed)
    there = find(model, revision, note)
    check_length(longest_text(there.path), length)
    note(f"{model}: {there}; measuring on {sequences} sequences of {length} tokens that it writes")
    with show_progress() as (on_progress, _):
        on_progress("load", 0, 0)
        from transformers.utils import logging  # and torch: what was mistyped has been answered without them

        from seedlm.calibration.sensitivity import measure_sensitivity
        from seedlm.device import choose_device
        from seedlm.integrations.transformers.models import load_model

        logging.disable_progress_bar()
        network = load_model(there.path, device=choose_device(device), dtype=dtype, trust_remote_code=trust_remote_code)
        found = measure_sensitivity(network, text, on_progress)
    write_sensitivity(output, model, text, found)
    most = max(found, key=lambda name: found[name])
    say(printable(f"{output}: {len(found)} weights; the most sensitive is {most}"))
    if unused := sum(not value for value in found.values()):
        say(
            f"{unused} of them were not used: experts to which no token went, taken as the least of the others. "
            "More --sequences reach more"
        )
