"""`python -m finback` is `finback`."""

from finback.cli import main

if __name__ == "__main__":
    main()
