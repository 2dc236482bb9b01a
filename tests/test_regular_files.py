"""Only regular files are read, wherever a path of the user's is opened.

Opening a named pipe waits for a writer for ever, and a device may never end.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from refusals import refused
from trees import draw_image, make_coco, make_nuswide, make_voc

from pipeline.datasets.check import check_files
from pipeline.datasets.listing import listed_manifest, make_manifest
from pipeline.datasets.readers.coco import read_coco
from pipeline.datasets.readers.nuswide import read_nuswide
from pipeline.datasets.readers.table import read_table
from pipeline.datasets.readers.voc import read_voc
from pipeline.datasets.readers.yolo import read_yolo
from pipeline.errors import DamagedError, InputError, MissingError
from pipeline.files import sha256_file
from pipeline.labels.vectors import load_label_vectors
from pipeline.regions.detector import load_state
from pipeline.regions.plan import ViewPlan, check_readable, image_digests
from pipeline.regions.transforms import load_image
from pipeline.settings import (
    CocoSettings,
    NuswideSettings,
    TableSettings,
    VocSettings,
    YoloSettings,
)
from pipeline.shards.imports import BottomUpFiles, NpzFile, ParquetFiles
from pipeline.shards.mapping import MappedFiles
from pipeline.shards.shard import read_header
from stages.checkout.params import read_params

SECONDS = 5  # much longer than any of these takes


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def pipe_by_link(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


THINGS = {
    "named pipe": pipe,
    "link to a named pipe": pipe_by_link,
    "socket": bound_socket,
    "device": device,
    "folder": Path.mkdir,
}


def nuswide(root: Path, form: str) -> object:
    return read_nuswide(root, NuswideSettings.model_validate({"source": "nuswide", "form": form}))


def table(root: Path, file: str) -> object:
    return read_table(root, TableSettings(source="table", file=file))


def voc(root: Path, labels: str) -> object:
    return read_voc(root, VocSettings.model_validate({"source": "voc", "labels": labels}))


def coco(root: Path) -> object:
    return read_coco(root, CocoSettings(source="coco"))


def vectors(path: Path) -> object:
    return load_label_vectors(["sun"], str(path))


def no_tree(root: Path) -> None:
    """Nothing but the odd thing is there."""


VOC = "VOCdevkit/VOC2007"
Reader = Callable[[Path], object]
PLACES: dict[str, tuple[Callable[[Path], object], Reader]] = {
    "params.yaml": (no_tree, lambda root: read_params(root / "params.yaml")),
    "labels.csv": (no_tree, lambda root: table(root, "labels.csv")),
    "labels.parquet": (no_tree, lambda root: table(root, "labels.parquet")),
    "annotations/instances_train2014.json": (make_coco, coco),
    f"{VOC}/ImageSets/Main/trainval.txt": (make_voc, lambda root: voc(root, "annotations")),
    f"{VOC}/ImageSets/Main/cat_test.txt": (make_voc, lambda root: voc(root, "lists")),
    f"{VOC}/Annotations/000004.xml": (make_voc, lambda root: voc(root, "annotations")),
    "ImageList/TrainImagelist.txt": (make_nuswide, lambda root: nuswide(root, "official")),
    "Concepts81.txt": (make_nuswide, lambda root: nuswide(root, "official")),
    "nus_wid_data.csv": (no_tree, lambda root: nuswide(root, "csv")),
    "database.txt": (make_nuswide, lambda root: nuswide(root, "multi-hot")),
    "a.jpg": (no_tree, lambda root: load_image(root / "a.jpg")),
    "c.jpg": (no_tree, lambda root: sha256_file(root / "c.jpg")),
    "vectors.npz": (no_tree, lambda root: vectors(root / "vectors.npz")),
    "glove.txt": (no_tree, lambda root: vectors(root / "glove.txt")),
    "glove.zip": (no_tree, lambda root: vectors(root / "glove.zip")),
    "regions.npz": (no_tree, lambda root: NpzFile.open(root / "regions.npz")),
    "regions.tsv": (no_tree, lambda root: BottomUpFiles.open([root / "regions.tsv"])),
    "regions.parquet": (no_tree, lambda root: ParquetFiles.open([root / "regions.parquet"])),
    "data.yaml": (
        no_tree,
        lambda root: read_yolo(root, YoloSettings(source="yolo"), lambda text, *_: text),
    ),
    "weights.pt": (no_tree, lambda root: load_state(root / "weights.pt")),
}
"""Path below a folder -> what makes the files around it, and what reads it."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def stop(*_: object) -> None:
        raise AssertionError(f"still waiting after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("thing", THINGS)
@pytest.mark.parametrize("place", PLACES)
def test_only_regular_files_are_read(tmp_path: Path, place: str, thing: str) -> None:
    prepare, read = PLACES[place]
    root = tmp_path / "root"
    prepare(root)
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    THINGS[thing](path)
    with time_limit(), refused(InputError, str(path)):
        read(root)


@pytest.mark.parametrize("thing", THINGS)
def test_a_shard_is_a_regular_file(tmp_path: Path, thing: str) -> None:
    path = tmp_path / "regions-00000.h5"
    THINGS[thing](path)
    with time_limit(), refused(DamagedError, str(path)):
        read_header(path)
    with time_limit(), pytest.raises((DamagedError, MissingError), match=str(path)):
        MappedFiles([8]).map(0, path)


@pytest.mark.parametrize("thing", THINGS)
def test_a_check_lists_what_is_no_regular_file(tmp_path: Path, thing: str) -> None:
    """`prepare --check` says which images are missing, and goes on."""
    images = tmp_path / "images"
    for number in range(3):
        draw_image(images / f"{number}.jpg", number)
    (images / "0.jpg").unlink()
    THINGS[thing](images / "0.jpg")
    table = "image,labels,split\n0.jpg,a,train\n1.jpg,a,train\n2.jpg,a,test\n"
    (tmp_path / "labels.csv").write_text(table)
    settings = TableSettings(source="table", images="images")
    manifest = listed_manifest(read_table(tmp_path, settings), "pets", settings)
    with time_limit():
        findings = check_files(manifest, tmp_path)
    assert [image.image_id for image in findings.missing] == ["0.jpg"]
    assert not findings.unreadable
    with time_limit(), refused(MissingError, "'0.jpg'"):
        make_manifest(read_table(tmp_path, settings), "pets", tmp_path, settings)
    with time_limit(), refused(MissingError, "'0.jpg'"):
        image_digests(manifest, tmp_path, contents=True, threads=1)
    plan = ViewPlan(manifest, 1)
    with time_limit(), refused(MissingError, "0.jpg"):
        check_readable(plan, np.arange(3), tmp_path, threads=1)
