"""README.md of a compressed model, a card as the Hub reads it: what it is, how to load it, what was measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from seedlm.storage.card import CARD_NAME, repository_of
from seedlm.storage.inspect import Report
from seedlm.storage.source import Source
from seedlm.version import __version__

_TEXT: Final = """\
# {name}, {bits:.2f} bits a weight

{origin}, compressed by seedlm {version}. The weights of its linear layers{outside} are not stored:
they are regrown from a few bits each. The folder loads with transformers once `seedlm` is imported.

| | |
|---|---|
| compressed weights | {compressed:,}, in {bits:.4f} bits each, every stored bit counted |
| left as they were | {dense:,}{left} |
| size | {size}{before} |
| format | {formats} |
| errors were weighed by | {feedback} |
| relative error of the weights | {error} |

## Load it

```python
import seedlm
from transformers import {opens}, AutoTokenizer

model = {opens}.from_pretrained("PATH_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY")
```

The package `seedlm` has to be installed. At the command line: `seedlm generate PATH TEXT`, `seedlm serve PATH` for OpenAI
clients, and `seedlm run lm_eval ...` for other programs.

## What was measured

The error of the weights above, and nothing else. What it means for the text that the model writes is measured by
`seedlm evaluate PATH --reference ORIGINAL --text FILE`: perplexity, and how far its predictions are from the original's.
"""

_FEEDBACK: Final = {"none": "the weights alone, no data", "own text": "a text that the model wrote itself, no other data"}


def card(report: Report, source: Source, path: Path, record: Mapping[str, Any]) -> str:
    """The card of a model, the same wherever its source lies and whatever the folder is called.

    report   what is in it
    path     where the source is: a folder, a GGUF file, a snapshot in the Hub's cache
    record   settings of encoding, as config.json holds them
    """
    repository = repository_of(path)
    front: dict[str, Any] = dict(source.about)
    if repository:
        front |= {"base_model": repository, "base_model_relation": "quantized"}
    made = next(iter(source.config.get("architectures") or []), str(source.config.get("model_type") or "model"))
    if made.endswith("ForCausalLM"):
        front.setdefault("pipeline_tag", "text-generation")
    front |= {"library_name": "transformers", "tags": ["seedlm"]}
    name = repository.rpartition("/")[2] if repository else made
    link = f"[{repository}](https://huggingface.co/{repository})" if repository else f"A local model, {_code(made)}"
    other_inputs = made.endswith("ForConditionalGeneration") and made.isidentifier()  # AutoModelForCausalLM knows few of these
    text = _TEXT.format(
        opens=made if other_inputs else "AutoModelForCausalLM",
        name=_code(name),
        origin=link,
        version=__version__,
        bits=report.bits_per_weight,
        compressed=report.compressed_weights,
        dense=report.dense_weights,
        outside="".join(f" and of `{_code(tensor.module)}`" for tensor in report.outside),
        left="" if report.outside else ": embeddings, head, norms, biases",
        size=_megabytes(report.bytes),
        before=f", the original's files {_megabytes(report.source_bytes)}" if report.source_bytes else "",
        formats=", ".join(sorted({f"`{tensor.format}`" for tensor in report.tensors})),
        feedback=_FEEDBACK.get(record.get("feedback", "none"), f"a text, `{_code(str(record.get('feedback')))}`"),
        error=f"{report.relative_error:.4f}" if report.relative_error is not None else "not known",
    )
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---", "", text])


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _code(text: str) -> str:
    """A name that Markdown and HTML leave alone."""
    return "".join(c for c in text if c.isprintable() and c not in "`<>|[]")


__all__ = ["CARD_NAME", "card"]
