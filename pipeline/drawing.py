"""Figures whose texts are shown as they are: no formulas, and a font for each letter.

matplotlib takes a text between two `$` for a formula, and draws a letter that its font lacks as a
box. `drawing` switches the first off, and `choose_fonts` adds installed fonts for the second.
"""

from __future__ import annotations

import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from pipeline.formats.text import printable

_log = logging.getLogger(__name__)

FONT = "DejaVu Sans"
"""The first font of all figures. It comes with matplotlib."""

_MOST_SHOWN = 12  # letters that a note lists
_SYMBOLS = ("So", "Sk", "Cn")  # categories of emoji; Cn: newer than Python's tables
_CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")


@contextmanager
def drawing(style: dict[Any, Any]) -> Iterator[None]:
    """Draw figures in the block with texts as they are, and matplotlib's settings ``style``."""
    from matplotlib import rc_context

    plain: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "font.family": [FONT]}
    with rc_context({**style, **plain}), warnings.catch_warnings():
        # `missing_letters` says once what matplotlib says for each letter that has no font.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        yield


def choose_fonts(figure: Any) -> None:
    """Choose fonts that have the letters of a finished figure, as far as any are installed.

    In an SVG, whose texts the reader's program draws, its own `sans-serif` follows them.

    Args:
        figure: of matplotlib, with everything in it but not drawn yet, in a block of `drawing`.
    """
    from matplotlib import rcParams
    from matplotlib.axis import Axis
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter

    texts = figure.findobj(Text)
    shown = [text.get_text() for text in texts]
    for axis in figure.findobj(Axis):  # whose texts are made when it is drawn
        formatter = axis.get_major_formatter()
        if isinstance(formatter, FixedFormatter):
            shown += formatter.seq
    families, _ = _fonts(_letters(shown))
    rcParams["font.family"] = [*families, "sans-serif"]
    for text in texts:
        text.set_fontfamily([*families, "sans-serif"])


def missing_letters(texts: Iterable[str]) -> str | None:
    """Log which letters of the texts no installed font has, and what to install.

    Returns:
        what was logged; None if fonts have them all.
    """
    missing = _fonts(_letters(map(printable, texts)))[1]
    if not missing:
        return None
    note = _note(missing)
    _log.warning("%s", note)
    return note


def _letters(texts: Iterable[str]) -> frozenset[str]:
    """The characters that need a glyph: no marks that only change how others are drawn."""
    return frozenset(
        letter
        for letter in set().union(*texts)
        if not letter.isspace()
        and unicodedata.category(letter) not in ("Cc", "Cf")
        and not unicodedata.name(letter, "").startswith("VARIATION SELECTOR")
    )


@lru_cache
def _fonts(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """The fewest families that have the letters, `FONT` first, and the letters that none has."""
    from matplotlib.font_manager import findfont, fontManager, get_font

    families, missing = [FONT], _lacking(get_font(findfont(FONT)), letters)
    fonts = _installed() if missing else {}
    while missing and fonts:
        path = min(fonts, key=lambda one: len(_lacking(fonts[one], missing)))
        rest = _lacking(fonts[path], missing)
        if rest == missing:
            break
        # matplotlib's own list of fonts may be older than the font.
        fontManager.addfont(path)
        families.append(fonts[path].family_name)
        missing = rest
    return tuple(families), missing


def _lacking(font: Any, letters: frozenset[str]) -> frozenset[str]:
    return frozenset(letter for letter in letters if not font.get_char_index(ord(letter)))


@lru_cache
def _installed() -> dict[str, Any]:
    """Path -> font of those that matplotlib can draw with, upright ones of regular weight first."""
    from matplotlib.font_manager import findSystemFonts
    from matplotlib.ft2font import FT2Font

    fonts = {}
    for path in sorted(findSystemFonts()):
        try:
            font = FT2Font(path)
        except (OSError, RuntimeError):  # no font, or damaged
            continue
        bitmaps = not font.scalable or "color" in font.family_name.casefold()  # as those of emoji
        if not bitmaps:
            fonts[path] = font
    styles = ("Regular", "Book", "Normal")
    return dict(sorted(fonts.items(), key=lambda entry: entry[1].style_name not in styles))


def _note(missing: frozenset[str]) -> str:
    letters = sorted(missing)
    listed = " ".join(letters[:_MOST_SHOWN]) + (" ..." if len(letters) > _MOST_SHOWN else "")
    packages = " ".join(sorted({_package(letter) for letter in letters}))
    return (
        f"No installed font has these letters, so pictures (PNG) show boxes instead: {listed}. "
        f"Install fonts that have them (on Debian and Ubuntu: `apt install {packages}`; without an "
        "administrator, copy font files to ~/.local/share/fonts), and make the pictures again."
    )


def _package(letter: str) -> str:
    """Name the package of Debian and Ubuntu whose fonts have a letter."""
    if unicodedata.name(letter, "").startswith(_CJK):
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(letter) in _SYMBOLS else "fonts-noto-core"


def set_log_scale(axes: Any) -> None:
    """Scale the y axis by logarithms. (matplotlib's own numbers for it are formulas.)"""
    from matplotlib.ticker import LogFormatter

    class PlainNumbers(LogFormatter):
        """The same choice of numbers, written as 0.01 and 1000."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PlainNumbers())
    axes.yaxis.set_minor_formatter(PlainNumbers())
