"""`python -m stages.cli`: the same as `gmpipe`, for the interpreter that is named."""

from stages.cli.main import main

main()
