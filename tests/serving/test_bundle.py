"""`gmpipe export --bundle`, and using a bundle far from the checkout that it was made in."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from flows import Flow

from pipeline.api import load_bundle, load_run
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.inference.bundle import BUNDLE_FILE, write_bundle

FILES = ("checkpoint.pt", "detector/detector.json", "detector/weights.pt")
RUN = "runs/tiny/full-s0"


@pytest.fixture(scope="module")
def exported(made: Flow, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle; to be read only."""
    folder = tmp_path_factory.mktemp("bundles") / "tiny.bundle"
    assert str(folder) in made.ok("export", "--run", RUN, "--bundle", str(folder))
    return folder


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle far from its checkout, to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "elsewhere/tiny.bundle"))


def test_a_bundle_labels_as_its_run(made: Flow, bundle: Path) -> None:
    photographs = sorted((made / "data/tiny/prepared/images").glob("test-*"))[:3]
    of_run, of_bundle = load_run(made / RUN), load_bundle(str(bundle))
    assert of_bundle.vocabulary == of_run.vocabulary
    assert of_bundle.checkpoint.sha256 == of_run.checkpoint.sha256
    # The commands take it as a run, in a folder with nothing else.
    outcomes = [
        flow.gmpipe("predict", "--json", "--run", str(run), *map(str, photographs))
        for flow, run in ((made, made / RUN), (Flow(bundle.parent), bundle.name))
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert outcomes[0].out == outcomes[1].out
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_it_holds_the_runs_files_and_their_checksums_alone(made: Flow, exported: Path) -> None:
    originals = [made / RUN / "checkpoint.pt", *(made / "data/tiny" / name for name in FILES[1:])]
    for name, original in zip(FILES, originals, strict=True):
        assert (exported / name).read_bytes() == original.read_bytes()
    found = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    assert found == {BUNDLE_FILE, *FILES}
    content = json.loads((exported / BUNDLE_FILE).read_text())
    assert (content["version"], content["dataset"], content["run"]) == (1, "tiny", "full-s0")
    digests = {name: hashlib.sha256((exported / name).read_bytes()).hexdigest() for name in FILES}
    assert content["files"] == digests


def test_the_same_run_gives_the_same_bytes(made: Flow, exported: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    for _ in range(2):  # the second one replaces the first
        write_bundle(again, made / RUN, made / "data/tiny/detector")
    for name in (BUNDLE_FILE, *FILES):
        assert (again / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.parametrize("name", [BUNDLE_FILE, *FILES])
def test_a_changed_byte_is_found(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(DamagedError, match=name):
        load_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(DamagedError, match=rf"tiny\.bundle.*{name}"):
        load_bundle(bundle)


def test_another_version_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.inference.bundle.BUNDLE_VERSION", 2)
    with pytest.raises(DamagedError, match=r"bundle\.json.*\b1\b.*\b2\b"):
        load_bundle(bundle)


def test_what_is_no_bundle_is_neither_loaded_nor_replaced(made: Flow, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "letter.txt").write_text("x")
    with pytest.raises(MissingError, match=rf"own.*{BUNDLE_FILE}"):
        load_bundle(own)
    assert made.gmpipe("export", "--run", RUN, "--bundle", str(own)).refused("own")
    assert [path.name for path in own.iterdir()] == ["letter.txt"]
    (own / BUNDLE_FILE).write_text("{}")  # another program's
    with pytest.raises(InputError, match=r"own.*letter\.txt"):
        write_bundle(own, made / RUN)
    assert {path.name for path in own.iterdir()} == {"letter.txt", BUNDLE_FILE}
    (own / "letter.txt").unlink()
    with pytest.raises(InputError, match=rf"own.*{BUNDLE_FILE}"):
        write_bundle(own, made / RUN)
    assert (own / BUNDLE_FILE).read_text() == "{}"
    for folder in ("runs/tiny/other", "data/tiny/other"):
        outcome = made.gmpipe("export", "--run", RUN, "--bundle", folder)
        assert outcome.code == 2
        assert folder in outcome.err


def test_a_bundle_with_a_file_of_somebody_is_not_replaced(made: Flow, bundle: Path) -> None:
    (bundle / "detector/thesis.tex").write_text("x")
    with pytest.raises(InputError, match=r"detector/thesis\.tex"):
        write_bundle(bundle, made / RUN)
    assert (bundle / "detector/thesis.tex").read_text() == "x"
    load_bundle(bundle)


def test_a_bundle_is_not_exported_again(bundle: Path) -> None:
    outcome = Flow(bundle.parent).gmpipe("export", "--run", bundle.name, "--bundle", "other")
    assert outcome.refused(r"tiny\.bundle")


def test_options_that_exclude_each_other(made: Flow) -> None:
    for words in (
        ("--bundle", "b", "--output", "x.onnx"),
        ("--detector", "data/tiny/detector"),
    ):
        outcome = made.gmpipe("export", "--run", RUN, *words)
        assert outcome.code == 2
        assert words[0] in outcome.err


def test_a_run_on_imported_regions_has_no_bundle(small: Flow) -> None:
    small.ok("train")
    outcome = small.gmpipe("export", "--run", "runs/voc2007/full-s0", "--bundle", "out")
    assert outcome.refused("full-s0.*imported")
    assert not (small / "out").exists()
    with pytest.raises(InputError, match="imported"):
        load_run(small / "runs/voc2007/full-s0")
