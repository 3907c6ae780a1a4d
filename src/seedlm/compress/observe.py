"""Statistics of a model in a file of their own, for any number of runs with any bits (`compress_checkpoint`, feedback=FILE)."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from seedlm.codes.registry import DEFAULT, parse_format
from seedlm.compress import plan as plans
from seedlm.compress.feedback import Feedback, check_observation
from seedlm.compress.statistics import gather
from seedlm.compress.workfolder import WorkFolder, sync
from seedlm.device import choose_device
from seedlm.progress import Progress
from seedlm.storage.source import locate, open_source

if TYPE_CHECKING:
    from seedlm.storage.statistics import Statistics


def observe_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    text: Feedback | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> "Statistics":
    """Observe a model on a text, or go on with a run that was stopped.

    source    local folder of safetensors, GGUF file or Hub repository (`source.open_source`)
    out       file to be created, ``.safetensors``; ``OUT.partial`` beside it keeps the text of an unfinished run
    text      which, and how much of it; by default the model's own
    device    to run the model on; layers that do not fit come to it one at a time
    trust_remote_code   run code that comes with the model
    on_note   told what a user should know, a line each time
    returns   what is in the file
    Raises SourceError for a model that cannot be read or run, OutputError if the output exists, FormatError, BackendError.
    """
    out, wanted = Path(out).absolute(), text or Feedback("own")
    check_observation(out, wanted)
    where, path = choose_device(device), locate(source, revision=revision).absolute()
    model = open_source(path)
    selected = plans.choose(model, [parse_format("4", DEFAULT)], (), (), code=path if trust_remote_code else None)
    from seedlm.storage.statistics import Statistics

    with WorkFolder.claim(out) as work:
        progress, tell = on_progress or (lambda phase, done, total: None), on_note or (lambda note: None)
        formats = [parse_format("4", DEFAULT)]
        observed = gather(work, wanted, formats, model, path, selected.modules, [where], progress, tell, trust_remote_code)
        assert observed.file is not None
        with open(observed.file, "r+b") as file:
            sync(file)
        os.replace(observed.file, out)
        work.remove()
    return Statistics.load(out)
