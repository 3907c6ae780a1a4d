"""For the site: docstrings keep their columns of names and meanings, which Markdown would run together."""

import re

import griffe

_COLUMNS = re.compile(r"(?m)^\w[^\n]*?\S {2,}\S")


class Columns(griffe.Extension):
    """Paragraphs with columns become preformatted text."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of whatever was found."""
        if obj.docstring is None:
            return
        paragraphs = obj.docstring.value.split("\n\n")
        obj.docstring.value = "\n\n".join(f"```text\n{part}\n```" if _COLUMNS.search(part) else part for part in paragraphs)
