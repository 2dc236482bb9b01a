"""`gmpipe predict`, and loading a run for new photographs."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from builders import write_other_weights
from flows import VARIANTS, Flow
from PIL import Image

from pipeline.api import Prediction, TrainedRun, load_run
from pipeline.errors import GmpipeError, InputError, MissingError
from pipeline.inference import trained
from pipeline.inference.formats import COLUMNS, label_rows
from pipeline.regions.detector import read_description
from stages.commands.predict import find_images

TOLERANCE = 1e-5
"""Of a probability. Batches of other sizes differed by at most 1.2e-6."""


@pytest.fixture(scope="module")
def run(made: Flow) -> TrainedRun:
    return load_run(made / "runs/tiny/full-s0")


def evaluated(flow: Flow, name: str) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Read the test images' paths, (N, C) scores and (N, C) winning regions by `evaluate`."""
    rows = pq.read_table(flow / "data/tiny/prepared/manifest.parquet").to_pylist()
    paths = {row["image_id"]: flow / "data/tiny" / row["path"] for row in rows}
    table = pq.read_table(flow / f"runs/tiny/{name}/predictions.parquet")
    logits, regions = (np.array(table[column].to_pylist()) for column in ("logits", "regions"))
    scores = 1 / (1 + np.exp(-logits))
    return [paths[image_id] for image_id in table["image_id"].to_pylist()], scores, regions


def predicted(run: TrainedRun, paths: list[Path], batch_size: int = 8) -> list[Prediction]:
    """Predict files, all of which can be read."""
    outcomes = list(run.predict_files(paths, batch_size=batch_size))
    assert [path for path, _ in outcomes] == paths
    return [outcome for _, outcome in outcomes if isinstance(outcome, Prediction)]


def check_same(predictions: list[Prediction], scores: np.ndarray, regions: np.ndarray) -> None:
    assert len(predictions) == len(scores)
    difference = np.abs(np.stack([p.scores for p in predictions]) - scores).max()
    assert difference <= TOLERANCE, difference
    assert np.array_equal(np.stack([p.regions for p in predictions]), regions)


# The same as through the pipeline ----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_photograph_scores_as_in_the_pipeline(made: Flow, variant: str, batch_size: int) -> None:
    run = load_run(made / f"runs/tiny/{variant}-s0")
    paths, scores, regions = evaluated(made, f"{variant}-s0")
    predictions = predicted(run, paths, batch_size)
    check_same(predictions, scores, regions)
    for prediction in predictions:
        assert prediction.region_scores.shape == (len(prediction.boxes), len(run.vocabulary))
        assert np.allclose(prediction.region_scores.max(axis=0), prediction.scores, atol=1e-6)
        assert (np.diff(prediction.detector_scores) <= 0).all()
        assert prediction.size == (64, 64)


def test_the_run_decides_and_not_params_yaml(flow: Flow) -> None:
    """A run on fewer regions than the cache has, after params.yaml and the cache have changed."""
    flow.ok("train", "--set", "train.tiny.regions=2")
    flow.ok("evaluate", "--set", "train.tiny.regions=2")
    [name] = [path.name for path in (flow / "runs/tiny").glob("full-s0-*")]
    paths, scores, regions = evaluated(flow, name)
    flow.params(extract__tiny__size=96, extract__tiny__feature_dtype="float32")
    shutil.rmtree(flow / "cache")
    predictions = predicted(load_run(flow / f"runs/tiny/{name}"), paths)
    check_same(predictions, scores, regions)
    assert {len(prediction.boxes) for prediction in predictions} == {2}


def test_images_in_memory_score_as_files_do(made: Flow, run: TrainedRun, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned, cut_out = tmp_path / "turned.png", tmp_path / "cut-out.png"
    Image.fromarray(pixels).save(turned, exif=exif)
    clear = Image.fromarray(np.dstack([pixels, rng.integers(0, 255, (50, 90, 1), dtype=np.uint8)]))
    clear.save(cut_out)
    in_files = predicted(run, [turned, cut_out])
    upright = np.rot90(pixels, -1)
    in_memory = run.predict(
        [Image.open(turned), Image.open(cut_out), upright, Image.fromarray(upright)], batch_size=3
    )
    assert [prediction.size for prediction in in_memory] == [(50, 90), (90, 50), (50, 90), (50, 90)]
    for prediction, expected in zip(in_memory, [*in_files, in_files[0], in_files[0]], strict=True):
        assert np.abs(prediction.scores - expected.scores).max() <= TOLERANCE
        assert np.array_equal(prediction.regions, expected.regions)
    assert np.abs(in_files[0].scores - in_files[1].scores).max() > TOLERANCE
    box = in_files[0].boxes[1]
    assert in_files[0].pixel_box(1) == pytest.approx(box * [50, 90, 50, 90])
    assert run.predict([]) == []


def test_other_objects_than_images_are_refused(run: TrainedRun) -> None:
    grey: Any = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"(?s)uint8.*\(H, W, 3\).*\(4, 4\)"):
        run.predict([grey])
    with pytest.raises(ValueError, match=r"(?s)uint8.*float32"):
        run.predict([np.zeros((4, 4, 3), np.float32)])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"(?s)Pillow.*str"):
        run.predict(["photo.jpg"])  # type: ignore[list-item]
    for shape in ((0, 4, 3), (4, 0, 3)):
        with pytest.raises(ValueError, match=rf"(?s)uint8.*\({shape[0]}, {shape[1]}, 3\)"):
            run.predict([np.zeros(shape, np.uint8)])
    with pytest.raises(ValueError, match=r"\(0, 4\)"):
        run.predict([Image.new("RGB", (0, 4))])


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_at_least_one_image(run: TrainedRun, size: int) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={size}\b"):
        run.predict([Image.new("RGB", (4, 4))], batch_size=size)
    with pytest.raises(ValueError, match=rf"batch_size={size}\b"):
        list(run.predict_files([Path("photo.jpg")], batch_size=size))


# Which run, which detector -----------------------------------------------------------------------


def other_detector(made: Flow, folder: Path) -> Path:
    """Make a detector with the same architecture and other weights."""
    folder.mkdir()
    source = made / "data/tiny/detector"
    write_other_weights(source, folder, "rpn.head.bbox_pred.bias", lambda bias: bias.add_(0.5))
    return folder


def test_another_detector_is_refused(made: Flow, tmp_path: Path) -> None:
    other = other_detector(made, tmp_path / "other")
    wanted = read_description(made / "data/tiny/detector").weights_sha256
    with pytest.raises(GmpipeError, match=f'weights_sha256.*"{wanted}"'):
        load_run(made / "runs/tiny/full-s0", other)
    outcome = made.gmpipe("predict", ".", "--run", "runs/tiny/full-s0", "--detector", str(other))
    assert outcome.refused("weights_sha256.*full-s0")


def test_a_run_that_was_moved_needs_its_detector_named(made: Flow, tmp_path: Path) -> None:
    moved = shutil.copytree(made / "runs/tiny/full-s0", tmp_path / "full-s0")
    with pytest.raises(MissingError, match=r"full-s0.*data/tiny/detector"):
        load_run(moved)
    outcome = made.gmpipe("predict", ".", "--run", str(moved))
    assert outcome.refused("data/tiny/detector.*`gmpipe detector --dataset tiny`.*`--detector`")
    paths, scores, regions = evaluated(made, "full-s0")
    check_same(predicted(load_run(moved, made / "data/tiny/detector"), paths), scores, regions)
    linked = tmp_path / "checkout/runs"
    (tmp_path / "checkout").mkdir()
    linked.symlink_to(made / "runs")
    (tmp_path / "checkout/data").symlink_to(made / "data")
    assert load_run(str(linked / "tiny/full-s0")).checkpoint.variant == "full"
    with pytest.raises(GmpipeError, match=r"nothing/checkpoint\.pt"):
        load_run(tmp_path / "nothing")


def test_a_run_of_the_same_name_is_suggested(flow: Flow) -> None:
    for words in (("predict", "."), ("explain", "a.png", "-o", "b.png"), ("export",)):
        path = "runs/tni/full-s0"
        assert flow.gmpipe(*words, "--run", path).refused(f"{path}.* runs/tiny/full-s0")
    shutil.copytree(flow / "runs/tiny/full-s0", flow / "runs/other/full-s0")
    assert flow.gmpipe("export", "--run", "runs/tni/full-s0").refused(
        "runs/other/full-s0.*runs/tiny/full-s0"
    )
    (flow / "runs/tiny/max-pool-s0/checkpoint.pt").unlink()
    assert flow.gmpipe("export", "--run", "max-pool-s0").refused(r"max-pool-s0/checkpoint\.pt")


def test_a_run_on_imported_regions_has_no_detector(small: Flow) -> None:
    small.ok("train")
    outcome = small.gmpipe("predict", ".", "--run", "runs/voc2007/full-s0")
    assert outcome.code == 1
    photo = small / "photo.png"
    Image.new("RGB", (9, 9)).save(photo)
    outcome = small.gmpipe("predict", "photo.png", "--run", "runs/voc2007/full-s0")
    assert outcome.refused("full-s0.*imported.*evaluated, reported")


# Many photographs --------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """Make a PNG that declares its size and has no pixels."""

    def chunk(content: bytes) -> bytes:
        length, check = struct.pack(">I", len(content) - 4), struct.pack(">I", zlib.crc32(content))
        return length + content + check

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR" + size) + chunk(b"IDAT") + chunk(b"IEND")


def break_five(folder: Path, jpeg: bytes, png: bytes) -> dict[str, str]:
    """Write broken photographs; return their names, and a word that says what is wrong."""
    broken = {
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "empty.jpg": (b"", "empty"),
        "words.jpg": (b"not a photograph", "jpeg"),
        "cut.png": (png[: len(png) // 2], "truncated"),
        "huge.png": (png_header(16_000, 16_000), "pixels"),
    }
    for name, (content, _) in broken.items():
        (folder / name).write_bytes(content)
    return {name: reason for name, (_, reason) in broken.items()}


def drawn(form: str, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (3, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((80 + seed % 7, 60 + seed % 5))
    stream = io.BytesIO()
    picture.save(stream, form)
    return stream.getvalue()


def check_failures(outcome: Any, broken: dict[str, str]) -> None:
    """Check 5 named failures, each on a line with its reason, and exit code 1."""
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    lines = outcome.err.replace("\r", "\n").splitlines()
    for name, reason in broken.items():
        [line] = [line for line in lines if f"/{name}" in line]
        assert reason in line.lower(), line
    assert len(broken) == 5
    assert re.search(r"Error: .*\b5\b", lines[-1]), lines[-1]


def test_a_folder_of_photographs_of_which_five_are_broken(made: Flow, tmp_path: Path) -> None:
    """There are 35 results, 5 named failures, and exit code 1."""
    (tmp_path / "more/.hidden").mkdir(parents=True)
    for n in range(35):
        form, suffix = (("PNG", "png"), ("JPEG", "JPG"), ("WEBP", "webp"))[n % 3]
        folder = tmp_path / ("more" if n % 2 else "")
        (folder / f"{n:02}.{suffix}").write_bytes(drawn(form, n))
    broken = break_five(tmp_path / "more", drawn("JPEG", 0), drawn("PNG", 0))
    (tmp_path / "notes.txt").write_text("no photograph by its name")
    (tmp_path / "more/._00.png").write_text("nor by its name")
    (tmp_path / "more/.hidden/00.png").write_text("nor here")
    output = tmp_path / "out/labels.parquet"
    run = ("--run", "runs/tiny/full-s0")
    outcome = made.gmpipe("predict", str(tmp_path), *run, "-o", str(output))
    check_failures(outcome, broken)
    assert outcome.out == f"{output}: 35 images\n"
    table = pq.read_table(output)
    assert table.schema == COLUMNS
    labelled = dict.fromkeys(table["image"].to_pylist())
    assert len(table) == 35 * 18
    assert {Path(image).name.split(".")[0] for image in labelled} == {f"{n:02}" for n in range(35)}
    outcome = made.gmpipe("predict", str(tmp_path / "0*"), *run, "--threshold", "0", "--top", "2")
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 2 + 2 * 5  # 00, 02, 04, 06, 08


def test_if_every_photograph_is_broken_none_is_labelled(made: Flow, tmp_path: Path) -> None:
    broken = break_five(tmp_path, drawn("JPEG", 0), drawn("PNG", 0))
    output = tmp_path / "labels.csv"
    outcome = made.gmpipe("predict", str(tmp_path), "--run", "runs/tiny/full-s0", "-o", str(output))
    check_failures(outcome, broken)
    assert outcome.out == ""
    assert not output.exists()


def test_real_photographs_of_which_five_are_broken(
    shared: Path, made: Flow, tmp_path: Path
) -> None:
    photographs = sorted((shared / "data/voc2007-sample").rglob("*.jpg"))[:95]
    assert len(photographs) == 95
    for path in photographs:
        (tmp_path / path.name).symlink_to(path)
    broken = break_five(tmp_path, photographs[0].read_bytes(), drawn("PNG", 0))
    outcome = made.gmpipe("predict", str(tmp_path), "--run", "runs/tiny/full-s0", "--json")
    check_failures(outcome, broken)
    images = json.loads(outcome.out)
    assert [Path(image["image"]).name for image in images] == [path.name for path in photographs]
    for image, path in zip(images, photographs, strict=True):
        with Image.open(path) as photograph:
            assert (image["width"], image["height"]) == photograph.size
        for label in image["labels"]:
            left, top, right, bottom = label["box"]
            assert 0 <= left < right <= image["width"] + 0.01
            assert 0 <= top < bottom <= image["height"] + 0.01


def test_files_are_decoded_ahead_but_not_all_at_once(
    made: Flow, run: TrainedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "cores", lambda: 2)
    [path, *_], _, _ = evaluated(made, "full-s0")
    asked = itertools.count()
    paths = (path for _ in asked)  # endless
    results = run.predict_files(paths, batch_size=4)
    for _ in range(9):
        next(results)
    assert next(asked) <= 3 * 4 + 2 * 4 + 1
    results.close()


# What is named, what is written ------------------------------------------------------------------


def test_names_folders_and_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a/b").mkdir(parents=True)
    Path("none").mkdir()
    for name in ("a/2.png", "a/1.JPEG", "a/b/3.tif", "a/notes.txt", "[x].png"):
        Path(name).touch()
    in_a = [Path("a/1.JPEG"), Path("a/2.png"), Path("a/b/3.tif")]
    assert find_images(["a"]) == (in_a, {".txt": 1})
    assert find_images(["a/2.png", "a", "a/2.png"])[0] == [in_a[1], in_a[0], in_a[2]]
    assert find_images(["a/*.png"]) == ([in_a[1]], {})
    assert find_images(["**/*.tif"])[0] == [in_a[2]]
    assert find_images(["[x].png", "absent.jpg"])[0] == [Path("[x].png"), Path("absent.jpg")]
    assert find_images([str(tmp_path / "a/?.*")])[0] == [
        tmp_path / "a/1.JPEG",
        tmp_path / "a/2.png",
    ]
    assert find_images(["a", "a/notes.txt"]) == ([*in_a, Path("a/notes.txt")], {})
    with pytest.raises(InputError, match="none"):
        find_images(["a", "none"])
    with pytest.raises(InputError, match=r"\*\.gif"):
        find_images(["*.gif"])


def test_all_forms_hold_the_same(made: Flow, run: TrainedRun, tmp_path: Path) -> None:
    paths, scores, regions = evaluated(made, "full-s0")
    names = [str(path.relative_to(made.folder)) for path in paths[:2]]
    call = ("predict", *names, "--run", "runs/tiny/full-s0", "--threshold", "0.4", "--top", "3")
    rows = list(csv.DictReader(io.StringIO(made.ok(*call, "--csv"))))
    images = json.loads(made.ok(*call, "--json"))
    parquet = tmp_path / "labels.parquet"
    assert made.ok(*call, "-o", str(parquet)) == f"{parquet}: 2 images\n"
    assert made.ok("-q", *call, "-o", str(parquet)) == ""
    for suffix in ("csv", "json"):
        file = tmp_path / f"labels.{suffix}"
        printed = made.ok(*call, f"--{suffix}", "-o", str(file))
        assert file.read_text() == printed
    stored = pq.read_table(parquet).to_pylist()
    assert len(rows) == len(stored) == 2 * len(run.vocabulary)
    nested = [(image, label) for image in images for label in image["labels"]]
    for index, (row, kept, (image, label)) in enumerate(zip(rows, stored, nested, strict=True)):
        number, rank = divmod(index, len(run.vocabulary))
        best = np.argsort(-scores[number], kind="stable")[rank]
        predicted = bool(rank < 3 and scores[number, best] > 0.4)
        assert row["image"] == kept["image"] == image["image"] == names[number]
        assert row["label"] == kept["label"] == label["label"] == run.vocabulary[best]
        assert kept["score"] == pytest.approx(scores[number, best], abs=TOLERANCE)
        assert label["score"] == float(row["score"]) == pytest.approx(kept["score"], rel=1e-5)
        assert row["predicted"] == str(predicted).lower()
        assert kept["predicted"] == label["predicted"] == predicted
        assert kept["region"] == label["region"] == int(row["region"]) == regions[number, best]
        box = [kept[side] for side in ("left", "top", "right", "bottom")]
        assert label["box"] == pytest.approx(box, rel=1e-5)
        assert kept["detector_class"] == label["detector_class"] in run.detector_classes
        assert (image["width"], image["height"]) == (kept["width"], kept["height"]) == (64, 64)
    assert sum(row["predicted"] == "true" for row in rows) > 2


def test_the_table_has_predicted_labels_or_the_best_one(made: Flow) -> None:
    paths, scores, _ = evaluated(made, "full-s0")
    name, run = str(paths[0]), ("--run", "runs/tiny/full-s0")
    threshold = f"{(scores[0].min() + scores[0].max()) / 2:.3f}"
    lines = made.ok("predict", name, *run, "--threshold", threshold).splitlines()
    assert lines[0].split() == ["|", "image", "|", "label", "|", "score", "|"]
    assert len(lines) == 2 + (scores[0] > float(threshold)).sum()
    [line] = made.ok("predict", name, *run, "--threshold", "0.99").splitlines()[2:]
    assert "| none; best: " in line
    assert f"| {scores[0].max():.3f} " in line
    outcome = made.gmpipe("predict", name, "absent.jpg", *run)
    assert outcome.code == 1
    assert "absent.jpg" in outcome.err
    assert re.search(r"Error: .*\b1 ", outcome.err), outcome.err
    assert name in outcome.out


def test_a_file_is_written_whole_or_not_at_all(
    made: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, _, _ = evaluated(made, "full-s0")
    output = tmp_path / "labels.json"
    output.write_text("former")

    def fail(*arguments: Any) -> None:
        raise GmpipeError("something else is broken")

    monkeypatch.setattr(trained.TrainedRun, "read", fail)
    call = ("predict", str(paths[0]), "--run", "runs/tiny/full-s0", "-o", str(output))
    assert made.gmpipe(*call).refused("something else is broken")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]
    assert output.read_text() == "former"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["photo.jpg"], "'--run'"),
        (["--run", "runs/tiny/full-s0"], "IMAGE"),
        (["x.jpg", "--run", "r", "-o", "x.txt"], r"x\.txt.*\.json"),
        (["x.jpg", "--run", "r", "--threshold", "2"], "'--threshold'"),
    ],
)
def test_usage(made: Flow, arguments: list[str], message: str) -> None:
    outcome = made.gmpipe("predict", *arguments)
    assert outcome.code == 2
    assert re.search(message, outcome.err, re.DOTALL), outcome.err


# Names that are hard to write --------------------------------------------------------------------


def test_every_name_is_labelled_and_can_be_restored(made: Flow, tmp_path: Path) -> None:
    [photograph, *_], _, _ = evaluated(made, "full-s0")
    names = [b"\xff\xfe.png", b"a\nb\tc\r.png", b"\x1b[31m.png", rb"\xff.png", b"a|`b`<i>$x$_.png"]
    names += [b"=1+1.png", b"-a.png", b"@a.png", b"n" * 251 + b".png", "猫😀.png".encode()]
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for name in names:
        shutil.copy(os.fsencode(photograph), os.fsencode(photographs) + b"/" + name)
    (photographs / os.fsdecode(b"broken\xfd\x1b.png")).write_bytes(b"no picture")
    run = str(made / "runs/tiny/full-s0")
    flow = Flow(photographs)
    arguments = [str(path) for path in sorted(photographs.iterdir())]
    relative = [os.path.relpath(path, photographs) for path in arguments]
    expected = {os.fsdecode(name) for name in names}

    def restored(shown: str) -> str:
        escaped = re.sub(rb"\\x(..)", lambda m: bytes.fromhex(m[1].decode()), shown.encode())
        return os.fsdecode(escaped)

    found = {}
    for suffix in ("json", "csv", "parquet"):
        output = tmp_path / os.fsdecode(b"labels\xfe." + suffix.encode())
        outcome = flow.gmpipe("predict", "--run", run, "-o", str(output), "--", *relative)
        assert outcome.refused("1 photograph")
        assert r"broken\xfd\x1b.png" in outcome.err
        assert outcome.out == f"{tmp_path}/labels\\xfe.{suffix}: {len(names)} images\n"
        if suffix == "json":
            found[suffix] = [image["image"] for image in json.loads(output.read_text())]
        elif suffix == "csv":
            with output.open(newline="") as stream:
                cells = dict.fromkeys(row["image"] for row in csv.DictReader(stream))
            assert {"'=1+1.png", "'-a.png", "'@a.png"} <= set(cells)
            found[suffix] = [re.sub(r"^'(?=[=@-])", "", cell) for cell in cells]
        else:
            with output.open("rb") as stream:
                found[suffix] = list(dict.fromkeys(pq.read_table(stream)["image"].to_pylist()))
    assert {restored(name) for name in found["json"]} == expected
    assert found["csv"] == found["parquet"] == found["json"]
    table = flow.gmpipe("predict", "--run", run, "--threshold", "0.99", "--", *relative).out
    assert len(table.splitlines()) == 2 + len(names)
    assert r"| a\|\`b\`&lt;i>\$x\$\_.png " in table
    assert r"| \xff\xfe.png " in table
    assert "\x1b" not in table


def test_labels_of_equal_probability_are_ranked_by_their_logits(
    made: Flow, run: TrainedRun
) -> None:
    [prediction] = predicted(run, evaluated(made, "full-s0")[0][:1])
    logits = np.linspace(30, 20, len(run.vocabulary)).astype(np.float32)
    random.Random(0).shuffle(logits)
    scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)
    assert len(set(scores.tolist())) == 1
    rows = label_rows(Path("a.jpg"), replace(prediction, logits=logits, scores=scores), run, 0.5, 2)
    assert [row["label"] for row in rows] == [
        run.vocabulary[label] for label in np.argsort(-logits).tolist()
    ]
    assert [row["predicted"] for row in rows][:3] == [True, True, False]
