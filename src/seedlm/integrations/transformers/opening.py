"""A language model or its tokenizer out of a folder, a GGUF file or a Hub repository, or the reason why there is none.

transformers starts weights that a folder lacks from random values, builds a language model out of a classifier, and asks on
stdin whether code of a repository may run. Here all three are answered by a SourceError.
"""

import os
import re
from contextlib import nullcontext, redirect_stderr
from inspect import signature
from io import StringIO
from pathlib import Path
from typing import Any, Final

from seedlm.errors import SeedLMError, SourceError
from seedlm.integrations.transformers.files import check_model
from seedlm.modeling.blueprint import bounded
from seedlm.storage.untrusted import printable

_NO_HEAD: Final = re.compile(r".*(For\w*Classification|ForQuestionAnswering|ForMultipleChoice|Reward\w*)")
_MASKED: Final = re.compile(r".*For(MaskedLM|PreTraining)")
_WITH_OTHER_INPUTS: Final = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
_OTHER_CLASSES: Final = ("AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")
_SHOWN: Final = 3


def open_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model. Raises SourceError if it has none that can be opened."""
    from transformers import AutoTokenizer

    check_model(Path(model))
    where, options = _arguments(model)
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, **options)
    except Exception as reason:  # transformers raises whatever the missing file led to
        problem = _ask_for_trust(model, reason) or f"{model}: has no tokenizer that can be opened ({_one_line(reason)})"
        raise SourceError(problem) from reason


def open_language_model(model: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A model that predicts the next token, whole, in evaluation mode, on the CPU. One of images or sound is given text alone.

    model               a folder, packed or not, a GGUF file, or what the Hub calls a repository
    dtype               of what is not packed: "auto" (as stored; float32 for a GGUF file) or a torch dtype's name
    trust_remote_code   run code that comes with the model
    Raises SourceError for a model without a head for language, with a weight missing, with code that is not trusted, or that
    cannot be loaded; CheckpointError for a damaged packed one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    opening: Any = AutoModelForCausalLM
    sizes = check_model(Path(model))
    where, options = _arguments(model)
    if options:
        dtype = "float32" if dtype == "auto" else dtype
        options |= _gguf_config(Path(model))
    try:
        if not options:
            config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code)
            _check_kind(model, config)
            opening = _class_of(model, config)
        # Dequantizing a GGUF file shows a bar that has no switch.
        quiet = redirect_stderr(StringIO()) if options else nullcontext()
        with quiet, nullcontext() if sizes is None else bounded(sizes):
            loaded: Any = opening.from_pretrained(
                where, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **options
            )
    except SeedLMError:
        raise
    except Exception as reason:  # transformers raises whatever the config or a file led to
        raise SourceError(_ask_for_trust(model, reason) or f"{model}: cannot be loaded ({_one_line(reason)})") from reason
    network, info = loaded
    _check_whole(model, network, info)
    return network.eval()


def _arguments(model: str | Path) -> tuple[str | Path, dict[str, Any]]:
    """How transformers is told of a folder, a repository, and a GGUF file."""
    path = Path(model)
    return (path.parent, {"gguf_file": path.name}) if os.path.isfile(path) else (model, {})


def _gguf_config(path: Path) -> dict[str, Any]:
    """The configuration of a GGUF file, with what transformers passes over in it; none for an architecture that we do not read.

    Raises SourceError for a file that transformers would compute otherwise with, and for a model in several files.
    """
    from transformers import AutoConfig

    from seedlm.storage.gguf_check import gguf_parts
    from seedlm.storage.source_gguf import GGUFSource, UnreadArchitectureError

    if len(gguf_parts(path)) > 1:
        raise SourceError(f"{path}: is one of several files of a model, which transformers does not join; compress it first")
    try:
        return {"config": AutoConfig.for_model(**GGUFSource(path).config)}
    except UnreadArchitectureError:
        return {}


def _check_kind(model: str | Path, config: Any) -> None:
    """Raise SourceError for a model that is made for something else than predicting the next token."""
    import transformers

    made = str((getattr(config, "architectures", None) or [""])[0])
    if _NO_HEAD.fullmatch(made):
        raise SourceError(f"{model}: is {made}, a model without a language-model head")
    if _MASKED.fullmatch(made):
        raise SourceError(f"{model}: is {made}, which predicts masked tokens and not the next one")
    if getattr(config, "is_encoder_decoder", False) and not made.endswith("ForCausalLM"):
        known = (name for name in _OTHER_CLASSES if type(config) in getattr(transformers, name)._model_mapping)
        raise SourceError(
            f"{model}: is {made or config.model_type}, an encoder and a decoder, of which no text can be asked here; in Python "
            f"transformers.{next(known, 'AutoModel')} opens it"
        )


def _class_of(model: str | Path, config: Any) -> Any:
    """What opens a model: of those that transformers lists under other inputs alone, the class that takes these besides text.

    Raises SourceError for one that goes by more than text, or does not go on from a text token by token.
    """
    import transformers
    from transformers import AutoModelForCausalLM, GenerationMixin

    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    for name in _WITH_OTHER_INPUTS:
        if type(config) not in (known := getattr(transformers, name)._model_mapping):
            continue
        kind = known[type(config)]
        inputs = dict(signature(kind.forward).parameters)
        text = inputs.pop("input_ids", None)
        needed = [each for each, way in inputs.items() if way.default is way.empty and way.kind is way.POSITIONAL_OR_KEYWORD]
        if needed[1:]:  # after self
            raise SourceError(f"{model}: is {kind.__name__}, which takes more than text: {', '.join(needed[1:])}")
        if text is None or not issubclass(kind, GenerationMixin):
            raise SourceError(f"{model}: is {kind.__name__}, which does not go on from a text token by token")
        return getattr(transformers, name)
    return AutoModelForCausalLM  # which says what is wrong, or runs code that comes with the model


def _check_whole(model: str | Path, network: Any, info: Any) -> None:
    """Raise SourceError if weights started from random values, by name."""
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    missing = sorted(name for name in info["missing_keys"] if name in parameters)
    head = network.get_output_embeddings()
    heads = {f"{name}." for name, module in network.named_modules() if module is head}
    kind = type(network).__name__
    if missing and all(name.startswith(tuple(heads)) for name in missing):
        raise SourceError(
            f"{model}: has no language-model head ({', '.join(missing)}); it was saved as a model of another kind"
        )
    wrong = sorted(str(item[0]) if isinstance(item, tuple) else str(item) for item in info["mismatched_keys"])
    for names, what in ((missing, "lacks"), (wrong, "has in another shape")):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise SourceError(f"{model}: {what} {len(names)} weights of {kind}: {shown}")


def _ask_for_trust(model: str | Path, reason: BaseException) -> str | None:
    if "trust_remote_code" not in str(reason):
        return None
    return (
        f"{model}: comes with code of its own (auto_map in its config.json), which is not run unless you say so: read it, then "
        "add --trust-remote-code, in Python trust_remote_code=True"
    )


def _one_line(reason: BaseException) -> str:
    return printable(" ".join(str(reason).split())[:300]) or type(reason).__name__
