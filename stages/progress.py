"""Progress bars, on stderr; rare when nobody watches."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Any = None, **options: Any) -> Any:
    """tqdm with rate and time left; every 30 s only, where stderr is no terminal."""
    return tqdm(iterable, mininterval=0.2 if sys.stderr.isatty() else 30, **options)
