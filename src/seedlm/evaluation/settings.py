"""What measurements are asked for, refused before work begins if it cannot be. Imports no torch, which would take seconds."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from seedlm.compress.workfolder import check_unlocked
from seedlm.device import check_names
from seedlm.errors import EvaluationError, extra
from seedlm.evaluation.methods import parse_baseline
from seedlm.evaluation.records import records_path
from seedlm.evaluation.text import Text
from seedlm.integrations.transformers.before import check_dtype
from seedlm.storage.untrusted import check_text
from seedlm.storage.written import check_free

TASKS: Final = ("arc_easy", "arc_challenge", "hellaswag", "winogrande", "boolq")
"""The five of the paper, by the harness' names."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How `run.evaluate` scores a text.

    context      tokens in a window; the papers' is 2048
    limit        at most this many windows, from the start of the text; None for all
    batch_size   windows in one forward pass
    device       "auto", or a torch device
    dtype        "auto" (each model as it is stored; float32 for GGUF) or another of `files.DTYPES`
    packed       leave packed weights packed, instead of dequantizing them once: less memory, slower
    backend      how the model's packed layers multiply (`modeling.quantize.set_backend`), not those of the reference
    baseline     quantise the model by another method first, one of `methods.baseline_names`
    calibration  UTF-8 file of text for a baseline that is calibrated
    tasks        zero-shot tasks to do after the text, or groups of them, as the harness names them
    task_data    folder of local files for them; None for the Hub
    task_limit   at most this many questions of each
    task_batch   questions' answers in one forward pass
    prompts      texts to continue with the most likely tokens, by the model and by the reference
    new_tokens   tokens to continue each by
    layers       windows on which every layer is held against the reference's; 0 leaves the layers out
    trust_remote_code   run code that comes with the models
    Raises EvaluationError for a value that cannot be.
    """

    context: int = 2048
    limit: int | None = None
    batch_size: int = 1
    device: str = "auto"
    dtype: str = "auto"
    packed: bool = False
    backend: str = "auto"
    baseline: str | None = None
    calibration: str | None = None
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    task_limit: int | None = None
    task_batch: int = 8
    prompts: tuple[str, ...] = ()
    new_tokens: int = 48
    layers: int = 2
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("batch_size", 1),
            ("limit", 1),
            ("task_limit", 1),
            ("task_batch", 1),
            ("new_tokens", 1),
            ("layers", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"{name} must be at least {least}, got {value}")
        check_dtype(self.dtype)
        check_names(self.device)
        if self.backend != "auto" and not self.packed:
            raise EvaluationError("a backend multiplies by packed weights, which are dequantized here: add --packed")
        if self.baseline is not None:
            _, method, _ = parse_baseline(self.baseline)
            if method.calibrated != (self.calibration is not None):
                raise EvaluationError(f"{self.baseline} takes {'a' if method.calibrated else 'no'} calibration text")
        elif self.calibration is not None:
            raise EvaluationError("calibration text is for a baseline that is calibrated, and none was chosen")
        if self.tasks and find_spec("lm_eval") is None:
            raise EvaluationError(f"zero-shot tasks need lm-evaluation-harness: {extra('eval')}")
        if self.task_data is not None and not Path(self.task_data).is_dir():
            raise EvaluationError(f"{self.task_data}: no such folder of local files for the tasks")


def check_request(text: Text, settings: Settings, out: Path | None, tokens_out: Path | None) -> None:
    """Raise OutputError for an output that cannot be, EvaluationError for a text shorter than a window, if bytes tell."""
    for path in filter(None, (out, out and records_path(out), tokens_out)):
        check_free(path)
    if out is not None:
        check_unlocked(out.with_name(out.name + ".partial"))
    texts = [text] if settings.calibration is None else [text, Text.from_file(settings.calibration)]
    for each in texts:
        remedy = "choose a shorter context (--context) or a longer text"
        check_text(each.content, settings.context, EvaluationError, each.path, remedy)


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What `speed.measure_speed` measures.

    tokens          new tokens, at least 2
    prompt_tokens   random tokens before them
    repeats         runs of which the median is taken, and the least and the most, after one that does not count
    compiled        a static cache, for which transformers compiles the model and uses CUDA graphs: CUDA only
    device, dtype   as for `generate`
    backend         how packed layers multiply (`modeling.quantize.set_backend`)
    Raises EvaluationError for a value that cannot be.
    """

    tokens: int = 128
    prompt_tokens: int = 512
    repeats: int = 3
    compiled: bool = False
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("prompt_tokens", 1), ("repeats", 1)):
            if (value := getattr(self, name)) < least:
                raise EvaluationError(f"{name} must be at least {least}, got {value}")
        check_dtype(self.dtype)
        check_names(self.device)
        if self.compiled and self.device.partition(":")[0] not in ("auto", "cuda"):
            raise EvaluationError(no_compiler(self.device))


def no_compiler(device: object) -> str:
    """Why a model is not compiled."""
    return f"transformers compiles for CUDA devices only, this is {device}"


def check_room(longest: int | None, settings: SpeedSettings) -> None:
    """Raise EvaluationError for more tokens than a model has positions for; None if it does not say."""
    needed = settings.prompt_tokens + settings.tokens
    if longest is not None and needed > longest:
        raise EvaluationError(
            f"the model knows {longest} positions, prompt and new tokens are {needed}: fewer --prompt-tokens or --tokens"
        )


def check_context(longest: int | None, settings: Settings) -> None:
    """The same of a text's windows."""
    if longest is not None and settings.context > longest:
        raise EvaluationError(
            f"the model knows {longest} positions, a window has {settings.context}: choose a shorter context (--context)"
        )
