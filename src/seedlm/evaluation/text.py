"""A text to be predicted, and how it is made of a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from seedlm.errors import EvaluationError
from seedlm.storage.untrusted import read_text

_ROWS: Final = "the lines as dataset rows (a blank line is an empty row), joined by a blank line: '\\n\\n'.join(rows)"
_AS_IS: Final = "the file as it is"


@dataclass(frozen=True)
class Text:
    """A text to be predicted: its content, the file that it came from, and how it was made of that file."""

    content: str
    path: str
    form: str

    @classmethod
    def from_file(cls, path: str | Path) -> "Text":
        """A UTF-8 file as it is."""
        return cls(read_text(path, EvaluationError), str(path), _AS_IS)

    @classmethod
    def from_wikitext(cls, path: str | Path) -> "Text":
        r"""The raw WikiText-2 file, ``wiki.test.raw``, as papers of the GPTQ line score it.

        They join the rows of the Hugging Face data set ``wikitext-2-raw-v1`` by a blank line. A row there is a line of the
        file with its line end, a blank line (" \n" in the file) the row "". Llama-2's tokenizer makes 341,469 tokens of it,
        the 166 windows of the papers, and GPT-2's 287,644.
        """
        lines = read_text(path, EvaluationError).replace("\r\n", "\n").split("\n")
        rows = [f"{line}\n" if line.strip() else "" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
        return cls("\n\n".join(rows), str(path), _ROWS)
