"""`gmpipe doubts`: the list, what it is kept for, and what refuses."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flows import Flow
from PIL import Image
from toys import LABELS, N_TRAIN, copied, make_checkout

from pipeline.datasets.manifest import read_manifest, write_manifest
from pipeline.doubts.listing import read_doubts
from pipeline.errors import DamagedError, MismatchError
from pipeline.learning.splits import SplitData
from pipeline.report.doubts import SHOWN, write_doubt_pictures
from stages.report import check_doubts

MANIFEST = "data/toy/prepared/manifest.parquet"
TABLE = "runs/toy/doubts/doubts.csv"
DOUBTED = {("image-7", "cat"): 9.0, ("image-30", "dog"): 5.0, (f"image-{N_TRAIN + 1}", "owl"): 7.0}
"""Image and label -> how sure the networks are of the opposite, as a logit."""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    return make_checkout(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def flow(checkout: Flow, tmp_path: Path) -> Flow:
    return copied(checkout, tmp_path)


class Networks:
    """Stands for the networks of the folds: they agree with the labels, but for `DOUBTED`.

    Attributes:
        trained: how many were trained.
        stop_at: the number of the training at which the process ends.
    """

    def __init__(self) -> None:
        self.trained = 0
        self.stop_at: int | None = None

    def __call__(
        self,
        split: SplitData,
        held_out: np.ndarray,
        others: Sequence[SplitData],
        *_: Any,
        **__: Any,
    ) -> list[np.ndarray]:
        if self.trained == self.stop_at:
            raise KeyboardInterrupt
        self.trained += 1
        return [self.logits(one) for one in (split.take(np.flatnonzero(held_out)), *others)]

    def logits(self, images: SplitData) -> np.ndarray:
        logits = np.where(images.truth == 1, 2.0, -2.0).astype(np.float32)
        for row, image_id in enumerate(images.image_ids):
            for column, label in enumerate(LABELS):
                if (image_id, label) in DOUBTED:
                    logits[row, column] *= -DOUBTED[image_id, label] / 2
        return logits


@pytest.fixture
def networks() -> Iterator[Networks]:
    made = Networks()
    with mock.patch("stages.commands.doubts.finding.score_fold", made):
        yield made


def rows_of(flow: Flow) -> list[dict[str, str]]:
    with (flow / TABLE).open() as stream:
        return list(csv.DictReader(stream))


def given_in(flow: Flow) -> Callable[[str, str], str]:
    manifest = read_manifest(flow / MANIFEST)
    rows = {row["image_id"]: row["labels"] for row in manifest.table.to_pylist()}
    return lambda image, label: "present" if LABELS.index(label) in rows[image] else "absent"


def test_the_list_has_what_the_networks_doubt(flow: Flow, networks: Networks) -> None:
    printed = flow.ok("doubts", "--folds", "4", "--top", "1")
    assert networks.trained == 4
    given, rows = given_in(flow), rows_of(flow)
    expected = sorted(DOUBTED, key=lambda key: -DOUBTED[key])
    assert [(row["image_id"], row["label"]) for row in rows] == expected
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert [row["split"] for row in rows] == ["train", "test", "train"]
    assert [row["given"] for row in rows] == [given(*key) for key in expected]
    for row, key in zip(rows, expected, strict=True):
        probability = 1 / (1 + np.exp(-DOUBTED[key]))
        score = 1 - probability if row["given"] == "present" else probability
        assert float(row["score"]) == pytest.approx(score, abs=1e-4)
        assert row["path"] == f"{row['image_id'].removeprefix('image-')}.png"
    first = next(row["image_id"] for row in rows if row["given"] == rows[0]["given"])
    assert f" {first} " in printed
    assert TABLE in printed


def test_finished_folds_and_lists_are_kept(flow: Flow, networks: Networks) -> None:
    networks.stop_at = 2
    assert flow.gmpipe("doubts").code == 130
    assert len(list((flow / ".state").glob("fold-*"))) == 2
    networks.stop_at = None
    flow.ok("doubts")
    assert networks.trained == 5
    assert not list((flow / ".state").glob("*.pt"))
    flow.ok("doubts", "--top", "3")
    assert networks.trained == 5
    flow.ok("doubts", "--seed", "1")
    assert networks.trained == 10


def test_folds_of_another_precision_are_not_used(flow: Flow, networks: Networks) -> None:
    """`auto` means what the machine has units for."""
    words = ("doubts", "--set", "train.toy.precision=auto")
    units = "pipeline.learning.training.has_bfloat16_units"
    networks.stop_at = 2
    with mock.patch(units, return_value=False):
        assert flow.gmpipe(*words).code == 130
    networks.stop_at = None
    with mock.patch(units, return_value=True):
        flow.ok(*words)
    assert networks.trained == 2 + 5
    flow.ok("doubts", "--set", "train.toy.precision=bfloat16")
    assert networks.trained == 2 + 5


def test_a_corrected_label_leaves_the_list(flow: Flow, networks: Networks) -> None:
    options = ("--variant", "full", "--folds", "3", "--seed", "2")
    flow.ok("doubts", *options)
    manifest = read_manifest(flow / MANIFEST)
    rows = manifest.table.to_pylist()
    own = next(row for row in rows if row["image_id"] == "image-30")
    own["labels"] = sorted({*own["labels"]} ^ {LABELS.index("dog")})
    table = manifest.table.from_pylist(rows, schema=manifest.table.schema)
    write_manifest(flow / MANIFEST, replace(manifest, table=table))
    with chdir(flow.folder), pytest.raises(MismatchError, match="train_sha256"):
        check_doubts(read_doubts(Path("runs/toy/doubts/doubts.parquet")))
    command = f"gmpipe doubts --dataset toy {' '.join(options)}"
    assert re.search(f"out of date.*`{command}`", flow.gmpipe("verify").out)
    with mock.patch.dict(DOUBTED):
        del DOUBTED["image-30", "dog"]
        flow.ok(*command.split()[1:])
    assert networks.trained == 6
    assert "image-30" not in {row["image_id"] for row in rows_of(flow)}


def test_equal_photographs_share_a_fold_and_are_named(flow: Flow, networks: Networks) -> None:
    test_image = N_TRAIN + 1
    for number in (7, 9, test_image):
        Image.new("RGB", (8, 8)).save(flow / f"data/toy/{number}.png")
    folds: list[np.ndarray] = []
    with mock.patch(
        "stages.commands.doubts.finding.score_fold",
        lambda split, held_out, *rest, **more: (
            folds.append(held_out),
            networks(split, held_out, *rest, **more),
        )[1],
    ):
        printed = flow.ok("doubts")
    assert all(held_out[7] == held_out[9] for held_out in folds)
    copies = {row["image_id"]: row["duplicate_of"] for row in rows_of(flow)}
    assert copies["image-7"].split() == ["image-9", f"image-{test_image}"]
    assert copies["image-30"] == ""
    assert f"image-7 = image-9 = image-{test_image}" in printed


def test_a_copy_of_a_training_image_is_judged_by_no_network_that_learned_it(
    flow: Flow, networks: Networks
) -> None:
    """A network that was trained on the copy agrees with the labels, which it has learned."""
    copy, other = f"image-{N_TRAIN + 1}", f"image-{N_TRAIN + 2}"
    for number in (7, N_TRAIN + 1):
        Image.new("RGB", (8, 8)).save(flow / f"data/toy/{number}.png")

    def score_fold(
        split: SplitData, held_out: np.ndarray, others: Sequence[SplitData], *_: Any, **__: Any
    ) -> list[np.ndarray]:
        own, of_test = networks(split, held_out, others)
        return [own, of_test if held_out[7] else np.where(others[0].truth == 1, 9.0, -9.0)]

    with (
        mock.patch("stages.commands.doubts.finding.score_fold", score_fold),
        mock.patch.dict(DOUBTED, {(other, "owl"): 7.0}),
    ):
        flow.ok("doubts")
    scores = {row["image_id"]: float(row["score"]) for row in rows_of(flow)}
    assert min(scores[copy], 1 - scores[copy]) == pytest.approx(1 / (1 + np.exp(7)), abs=1e-4)
    assert other not in scores  # one network in five doubts it


def test_changed_and_cleaned(flow: Flow, networks: Networks) -> None:
    flow.ok("doubts")
    path = flow / "runs/toy/doubts/doubts.parquet"
    assert "runs/toy/doubts: sound" in flow.ok("verify")
    path.write_bytes(path.read_bytes()[:-9] + b"x" + path.read_bytes()[-8:])
    with pytest.raises(DamagedError):
        read_doubts(path)
    assert flow.gmpipe("doubts").refused("doubts.parquet")
    assert "runs/toy/doubts: damaged" in flow.gmpipe("verify").out
    flow.ok("clean", "toy", "--yes")
    assert not path.parent.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--variant", "pla"], "pla.*max-pool"),
        (["--variant", "hcp-published"], "softmax-squared.*max-pool"),
        (["--folds", "43"], "42.*43.*--folds"),
    ],
)
def test_what_can_not_be_judged_is_refused(
    checkout: Flow, networks: Networks, arguments: list[str], named: str
) -> None:
    assert checkout.gmpipe("doubts", *arguments).refused(named)
    assert networks.trained == 0


def test_too_few_images_are_refused(checkout: Flow, networks: Networks) -> None:
    with mock.patch("pipeline.doubts.ranking.FEWEST", 40):
        assert checkout.gmpipe("doubts").refused("toy")
    assert networks.trained == 0


def test_the_page_shows_the_photographs(flow: Flow, networks: Networks, tmp_path: Path) -> None:
    (flow / "data/toy/images").mkdir()
    Image.new("RGB", (900, 600)).save(flow / "data/toy/7.png")
    flow.ok("doubts")
    found = read_doubts(flow / "runs/toy/doubts/doubts.parquet")
    page = tmp_path / "page"
    (page / "pictures").mkdir(parents=True)
    inputs: Any = SimpleNamespace(doubts=found, root=flow / "data/toy", source="scenes")

    def phase(*_: Any) -> Any:
        return nullcontext(lambda images: None)

    shown = write_doubt_pictures(page, inputs, phase)
    assert shown is not None
    given = given_in(flow)
    cards = {card["rank"]: card for kind in ("present", "absent") for card in shown[kind]["shown"]}
    assert [cards[rank]["image_id"] for rank in (1, 2, 3)] == ["image-7", "image-43", "image-30"]
    assert sum(shown[kind]["count"] for kind in ("present", "absent")) == len(DOUBTED) <= SHOWN
    assert cards[1] in shown[given("image-7", "cat")]["shown"]
    assert cards[2]["picture"] is cards[3]["picture"] is None
    assert cards[1]["size"] == [400, 267]
    with Image.open(page / cards[1]["picture"]) as picture:
        assert picture.size == (400, 267)
    inputs.doubts = None
    assert write_doubt_pictures(page, inputs, phase) is None
