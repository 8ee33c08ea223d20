"""`python -m finback` is `finback`."""

from finback.cli import main

main()
