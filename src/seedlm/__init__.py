"""SeedLM: large language models whose weights are regrown from seeds (Shafipour et al., ICLR 2025)."""

__version__ = "0.1.0"

from seedlm import hf as _hf

_hf.register()
