"""`python -m autoshard`: the command line without the installed script."""

from autoshard.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main(prog_name="autoshard")
