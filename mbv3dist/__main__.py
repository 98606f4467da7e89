"""`python -m mbv3dist` is the `mbv3dist` command; launchers start it this way."""

from mbv3dist.cli import main

if __name__ == "__main__":
    main()
