"""`gmpipe prepare --check`: missing, unreadable, duplicate and unlabelled images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkouts import IMAGES, Checkout, make_checkout
from flows import Flow
from trees import VOC_TEST, VocObject, draw_image, make_voc


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return make_checkout(tmp_path / "checkout")


def sections(lines: list[str]) -> dict[str, list[str]]:
    """Title and number of images of each section, e.g. `missing: 2`, and the entries below it."""
    found: dict[str, list[str]] = {}
    title = ""
    for line in lines:
        if line.startswith("  "):
            found[title].append(line.strip())
        elif line.rpartition(": ")[2].isdigit():
            title = line
            found[title] = []
    return found


def test_valid_images(checkout: Checkout) -> None:
    code, lines = checkout.check()
    assert code == 0
    assert "voc" in lines[0]
    assert "5 images" in lines[0]
    assert sections(lines) == {
        "missing: 0": [],
        "unreadable: 0": [],
        "duplicates across splits: 0": [],
        "duplicates within a split: 0": [],
        "unlabelled: 1": ["2008_000003 (train), VOCdevkit/VOC2007/JPEGImages/2008_000003.jpg"],
    }
    assert ["label", "train", "test"] in [line.split() for line in lines]


@pytest.mark.parametrize("drop", [False, True])
def test_broken_images(checkout: Checkout, drop: bool) -> None:
    checkout.params(voc={"drop_missing": drop})
    train = {f"{number:06d}": [VocObject("cat")] for number in range(1, 11)}
    shutil.rmtree(checkout / "data/voc")
    make_voc(checkout / "data/voc", train, {"000020": [], "000021": [VocObject("dog")]})
    images = checkout / IMAGES
    (images / "000001.jpg").unlink()
    whole = (images / "000002.jpg").read_bytes()
    (images / "000002.jpg").write_bytes(whole[:-20])
    (images / "000003.jpg").write_text("a photograph, believe me\n")
    (images / "000004.jpg").write_bytes(b"")
    (images / "000005.jpg").write_bytes(whole[:100])
    shutil.copy(images / "000006.jpg", images / "000020.jpg")
    shutil.copy(images / "000007.jpg", images / "000008.jpg")
    code, lines = checkout.check()
    assert code == 1
    assert "12 images" in lines[0]

    def named(image_id: str, split: str = "train") -> str:
        return f"{image_id} ({split}), {IMAGES.removeprefix('data/voc/')}/{image_id}.jpg"

    report = sections(lines)
    unreadable = report.pop("unreadable: 4")
    for entry, image_id in zip(unreadable, ["000002", "000003", "000004", "000005"], strict=True):
        assert entry.startswith(f"{named(image_id)}: ")
    assert "truncated" in unreadable[0]
    assert "empty" in unreadable[2]
    assert report == {
        "missing: 1": [named("000001")],
        "duplicates across splits: 2": [f"{named('000006')} = {named('000020', 'test')}"],
        "duplicates within a split: 2": [f"{named('000007')} = {named('000008')}"],
        "unlabelled: 1": [named("000020", "test")],
    }
    *_, missing_step, unreadable_step = lines
    assert "`prepare.voc.drop_missing: true`" in missing_step
    assert missing_step.startswith("To do: ") == (not drop)
    assert ("data/voc" in missing_step) == (not drop)
    assert "`extract.voc.max_failures: 4`" in unreadable_step


def test_what_the_settings_allow_is_no_failure(checkout: Checkout) -> None:
    """The diary's row: the check asked for a setting that was set."""
    images = checkout / IMAGES
    shutil.copy(images / "000001.jpg", images / "000004.jpg")
    (images / "000004.jpg").write_text("not a photograph")
    allowed = ("--set", "extract.voc.max_failures=1")
    code, out, _ = checkout.run("--dataset", "voc", "--check", *allowed)
    assert code == 0
    assert "unreadable: 1" in out
    assert "To do" not in out
    assert "`extract.voc.max_failures: 1`" in out.splitlines()[-1]
    (images / "000001.jpg").unlink()
    code, out, _ = checkout.run("--dataset", "voc", "--check", *allowed)
    assert (code, "drop_missing: true" in out) == (1, True)
    drop = (*allowed, "--set", "prepare.voc.drop_missing=true")
    code, out, _ = checkout.run("--dataset", "voc", "--check", *drop)
    assert (code, "To do" in out) == (0, False)
    assert "1 missing image" in out
    checkout.run("--dataset", "voc", *drop)  # does what the check promised


def test_a_split_that_would_be_empty_is_a_failure_although_images_may_miss(
    checkout: Checkout,
) -> None:
    checkout.params(voc={"drop_missing": True})
    for image_id in VOC_TEST:
        (checkout / f"{IMAGES}/{image_id}.jpg").unlink()
    code, lines = checkout.check()
    assert code == 1
    assert "'test'" in lines[-1]
    assert checkout.run("--dataset", "voc")[0] == 1


def test_an_orientation_that_can_not_be_read_is_a_note(checkout: Checkout) -> None:
    path = checkout / f"{IMAGES}/000004.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1\0\x0bExif\0\0abc" + content[2:])
    code, lines = checkout.check()
    assert code == 0
    [title] = [title for title in sections(lines) if "EXIF" in title]
    assert title.endswith(": 1")
    assert sections(lines)[title][0].startswith("000004 ")


def test_what_lies_there_instead_is_said_although_it_may_be_left_out(checkout: Checkout) -> None:
    checkout.params(voc={"drop_missing": True})
    path = checkout / f"{IMAGES}/000004.jpg"
    moved = path.parent / "sub/000004.jpg"
    moved.parent.mkdir()
    path.rename(moved)
    code, lines = checkout.check()
    assert code == 0
    assert "sub/000004.jpg" in lines[-1]


def test_one_unreadable_image_fails_the_check(checkout: Checkout) -> None:
    (checkout / f"{IMAGES}/000004.jpg").write_text("not a photograph")
    code, lines = checkout.check()
    assert code == 1
    assert lines[1:3] == ["missing: 0", "unreadable: 1"]
    assert "`extract.voc.max_failures: 1`" in lines[-1]
    assert "drop_missing" not in lines[-1]


def test_only_the_first_few_are_named(checkout: Checkout) -> None:
    train = {f"{number:06d}": [VocObject("cat")] for number in range(1, 10)}
    shutil.rmtree(checkout / "data/voc")
    make_voc(checkout / "data/voc", train, {"000020": [], "000021": []})
    content = (checkout / f"{IMAGES}/000001.jpg").read_bytes()
    for image_id in train:
        (checkout / f"{IMAGES}/{image_id}.jpg").write_bytes(content)
    _, lines = checkout.check()
    [group] = sections(lines)["duplicates within a split: 9"]
    assert group.count(" = ") == 5
    assert group.endswith(" = 4 more")
    shutil.rmtree(checkout / IMAGES)
    code, lines = checkout.check()
    assert code == 1
    missing = sections(lines)["missing: 11"]
    assert missing[4].startswith("000005 (train)")
    assert missing[5:] == ["and 6 more"]
    assert "data/voc" in lines[-1]
    assert "drop_missing" not in lines[-1]


def test_location_of_missing_images_is_suggested(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    draw_image(checkout / "data/coco/photos/a.jpg")
    table = checkout / "data/coco/labels.csv"
    table.write_text("image,labels,split\na.jpg,cat,train\nb.jpg,cat,test\n")
    checkout.params(coco={"source": "table"})
    code, lines = checkout.check("coco")
    assert code == 1
    assert "a.jpg (train)" in sections(lines)["missing: 2"]
    for part in ("data/coco", "data/coco/photos/a.jpg", "`prepare.coco.images: photos`"):
        assert part in lines[-1]


def test_scenes_are_checked_too(checkout: Checkout) -> None:
    command = "`gmpipe prepare --dataset demo`"
    checkout.refused(
        "data/demo/prepared/manifest.parquet",
        "gmpipe prepare",
        dataset="demo",
        options=("--check",),
    )
    line = checkout.prepare("demo")
    for part in ("data/demo/prepared: ", "10 train", "2 test", "18 labels"):
        assert part in line
    before = checkout.everything()
    assert "unchanged" in checkout.prepare("demo")
    assert checkout.everything() == before
    assert checkout.check("demo")[0] == 0
    (checkout / "data/demo/prepared/images/train-00002.png").unlink()
    code, lines = checkout.check("demo")
    assert code == 1
    assert "data/demo/prepared" in lines[-1]
    assert command in lines[-1]
    assert "unchanged" not in checkout.prepare("demo")


def test_a_photograph_that_the_system_refuses_costs_no_work(flow: Flow) -> None:
    """It may be sound: the advice is not to make it again."""
    path = flow / "data/tiny/prepared/images/train-00000.png"
    path.unlink()
    path.symlink_to("/proc/self/mem")  # a regular file that the system does not let us read
    outcome = flow.gmpipe("prepare", "--check")
    assert outcome.code == 1
    assert "prepared/images/train-00000.png: " in outcome.out
    assert "unreadable: 0" in outcome.out
    assert "delete" not in outcome.out
    assert "gmpipe" not in outcome.out.splitlines()[-1]


def test_all_findings_can_be_written_to_a_file(checkout: Checkout, tmp_path: Path) -> None:
    (checkout / IMAGES / "000001.jpg").unlink()
    (checkout / IMAGES / "000004.jpg").write_bytes(b"")
    file = tmp_path / "findings.csv"
    checkout.run("--dataset", "voc", "--check", "--list", str(file))
    folder = "VOCdevkit/VOC2007/JPEGImages"
    assert file.read_text().splitlines() == [
        "kind,image_id,path,split,reason",
        f"missing,000001,{folder}/000001.jpg,train,",
        f"unreadable,000004,{folder}/000004.jpg,test,the file is empty",
        f"unlabelled,2008_000003,{folder}/2008_000003.jpg,train,",
    ]
