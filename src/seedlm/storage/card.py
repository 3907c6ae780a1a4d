"""What a model says of itself to people and to the Hub: the front matter of its README.md, read from a source.

It is a stranger's YAML. So only a few fields are taken, and of those only short texts, or lists of them.
"""

import re
from pathlib import Path
from typing import Any, Final

from seedlm.errors import SourceError
from seedlm.storage.untrusted import read_bytes

CARD_NAME: Final = "README.md"
KEPT: Final = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Fields of a card that hold for a compressed model too."""

_MAX_BYTES: Final = 1 << 20
_MAX_TEXT, _MAX_ITEMS = 200, 100
_FRONT: Final = re.compile(r"\s*---\r?\n(.*?)\r?\n---\s", re.DOTALL)
_SNAPSHOT: Final = re.compile(r"models--([\w.-]+)--([\w.-]+)", re.ASCII)


def read_card(folder: Path) -> dict[str, Any]:
    """The kept fields of a folder's card; none if there is no card, or if its front matter cannot be read."""
    import yaml

    try:
        front = _FRONT.match(read_bytes(folder / CARD_NAME, _MAX_BYTES, SourceError).decode())
        found = yaml.safe_load(front[1]) if front else None
    except (SourceError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    fields = {name: found[name] for name in KEPT if name in found} if isinstance(found, dict) else {}
    return {name: value for name, value in fields.items() if _is_plain(value)}


def repository_of(path: Path) -> str | None:
    """The Hub repository (``owner/name``) whose snapshot in the Hub's cache a folder is; None for any other folder."""
    match = _SNAPSHOT.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None
    return f"{match[1]}/{match[2]}" if match else None


def _is_plain(value: Any) -> bool:
    """Whether it is a short text of printable characters, or a list of such."""
    if isinstance(value, list):
        return 0 < len(value) <= _MAX_ITEMS and all(isinstance(item, str) and _is_plain(item) for item in value)
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()
