"""`python -m distfit`, the same as the command `distfit`."""

from distfit.cli import main

main()
