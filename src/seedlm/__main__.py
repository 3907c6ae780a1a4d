"""`python -m seedlm` is the command line."""

from seedlm.cli import main

main()
