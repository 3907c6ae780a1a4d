"""Runs of `seedlm evaluate` side by side: what each model costs, how well it predicts, and what it does differently.

`load_runs` reads the results and refuses what cannot be compared, `compare_runs` joins them into one JSON object, and that is
all that `to_markdown` and `to_html` get to see.
"""

from seedlm.compare.join import compare_runs
from seedlm.compare.markdown import to_markdown
from seedlm.compare.page import to_html
from seedlm.compare.runs import Run, load_runs

__all__ = ["Run", "compare_runs", "load_runs", "to_html", "to_markdown"]
