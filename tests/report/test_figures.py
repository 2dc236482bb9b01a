"""Figures show names as they are: no formulas, no broken files, and fonts that have the letters."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from pipeline.drawing import missing_letters
from pipeline.evaluation.diagnostics import co_occurrence
from pipeline.report import figures

LABELS = ["$5 bill$", "US$ note", "a_b^{c}\\frac%", "_x", "\x1b[31m\0", "line\nbreak", "\udcff"]
LABELS += ["</text><script>", "&amp;", "كلب", "猫 沙发", "कुत्ता", "😀", "\ufffe"]
SHOWN = [re.sub(r"[\x00-\x1f]", lambda m: f"\\x{ord(m[0]):02x}", label) for label in LABELS]
SHOWN[6], SHOWN[-1] = r"\xff", r"\xef\xbf\xbe"

RNG = np.random.default_rng(0)
AP = {variant: {label: float(RNG.random()) for label in LABELS} for variant in ("a", "b")}
LINE = np.linspace(0, 1, 5)
SHARES = co_occurrence(
    RNG.random((9, len(LABELS))).astype(np.float32),
    (RNG.random((9, len(LABELS))) < 0.5).astype(np.int8),
)

DRAWINGS: dict[str, Callable[[Path], None]] = {
    "average precision": lambda stem: figures.average_precision_figure(stem, AP, {}),
    "gains": lambda stem: figures.gains_figure(stem, {"b": AP["b"]}, "a", most=len(LABELS)),
    "curves": lambda stem: figures.precision_recall_figure(
        stem, {label: {"a": (LINE, LINE)} for label in LABELS}
    ),
    "co-occurrence": lambda stem: figures.co_occurrence_figure(stem, SHARES, LABELS),
    "label map": lambda stem: figures.label_map_figure(
        stem, {"map": RNG.random((len(LABELS), 2))}, LABELS, {label: [label] for label in LABELS}
    ),
    "sweep": lambda stem: figures.sweep_figure(
        stem, "$k_", {label: [1.0] for label in LABELS}, title="$t$_\x1b", numeric=False
    ),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_labels_are_text(name: str, tmp_path: Path) -> None:
    DRAWINGS[name](tmp_path / "figure")
    root = ElementTree.parse(tmp_path / "figure.svg").getroot()
    texts = {"".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert set(SHOWN) <= texts
    assert not any("script" in one.tag for one in root.iter())
    with Image.open(tmp_path / "figure.png") as image:
        assert image.width > 300


def test_a_sweep_names_its_metric_and_leaves_gaps(tmp_path: Path) -> None:
    def texts(name: str) -> set[str]:
        root = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        return {"".join(one.itertext()).strip() for one in root.iter() if "text" in one.tag}

    numbers: dict[str, list[float | None]] = {
        "1": [50.0, 52.0],
        "2": [None, None],
        "3": [None, 4.0],
    }
    drawn = {"title": "here", "numeric": True, "metric": "OF1"}
    figures.sweep_figure(tmp_path / "alone", "epochs", numbers, **drawn)
    assert {"OF1 (%)", "1", "2", "3"} <= texts("alone")
    validation = {"1": [60.0], "2": [62.0], "3": [61.0]}
    figures.sweep_figure(tmp_path / "both", "epochs", numbers, validation, **drawn)
    assert "percent" in texts("both")
    assert {"validation mAP", "test OF1"} <= {text.partition(" mean")[0] for text in texts("both")}


def test_a_run_of_one_epoch_is_a_mark(tmp_path: Path) -> None:
    figures.learning_figure(tmp_path / "one", {"full": [[{"epoch": 1, "train_loss": 0.5}]]})
    root = ElementTree.parse(tmp_path / "one.svg").getroot()
    uses = root.iter("{http://www.w3.org/2000/svg}use")
    marks = [one for one in uses if figures.COLOURS[0] in one.get("style", "")]
    assert len(marks) == 2  # the run's, and the legend's
    texts = [" ".join(one.itertext()).strip() for one in root.iter() if "text" in one.tag]
    assert "1" in texts
    assert not [text for text in texts if text.startswith(("0.9", "1.0"))]


def test_numbers_on_a_logarithmic_axis_are_no_formulas(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "train_loss": 10.0 ** (2 - epoch)} for epoch in range(5)]
    figures.learning_figure(tmp_path / "figure", {"full": [rows]})
    text = " ".join(ElementTree.parse(tmp_path / "figure.svg").getroot().itertext())
    assert {"100", "1", "0.01"} <= set(text.split())
    assert "$" not in text


def test_a_letter_without_a_font_is_named_with_a_package(caplog: pytest.LogCaptureFixture) -> None:
    assert missing_letters(["cat", "كلب", "$x$", "a\u200db\n"]) is None
    unassigned = "\U000c1234"  # of a private use area: no font of a distribution has it
    note = missing_letters(["cat", unassigned])
    assert note is not None
    assert unassigned in note
    assert "apt install fonts-" in note
    assert note in caplog.text


@pytest.mark.slow
def test_an_installed_font_is_used(tmp_path: Path) -> None:
    """A font with one letter, installed after matplotlib made its list of fonts."""
    pen = TTGlyphPen(None)
    for corner in ((100, 0), (100, 700), (600, 700), (600, 0)):
        (pen.lineTo if pen.points else pen.moveTo)(corner)
    pen.closePath()
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "one"])
    font.setupCharacterMap({0xC1234: "one"})
    font.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "one": pen.glyph()})
    font.setupHorizontalMetrics({".notdef": (700, 0), "one": (700, 100)})
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "One Letter", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    (tmp_path / "fonts").mkdir()
    font.save(tmp_path / "fonts/one.ttf")
    code = (
        "from pathlib import Path\n"
        "from pipeline.drawing import missing_letters\n"
        "from pipeline.report.figures import sweep_figure\n"
        "assert missing_letters(['\\U000c1234']) is None\n"
        "values = {'\\U000c1234': [1.0]}\n"
        "sweep_figure(Path('figure'), 'key', values, title='cat', numeric=False)\n"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    svg = (tmp_path / "figure.svg").read_text()
    assert re.search(r"'DejaVu Sans', '?One Letter'?, .*sans-serif", svg)
