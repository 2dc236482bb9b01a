"""The exit codes of `gmpipe`, beside click's 2 for wrong usage."""

from __future__ import annotations

DONE = 0
FAILED = 1
STOPPED = 130  # what shells report for Ctrl-C
