"""`python -m stages.cli`: the command `gmpipe` of the interpreter that runs it."""

from __future__ import annotations

from stages.cli.main import main

if __name__ == "__main__":  # spawned worker processes import this module under another name
    main()
