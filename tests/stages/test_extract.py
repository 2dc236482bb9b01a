"""Extraction on broken and changed photographs, and what it drops: nothing without being told.

Each test starts from the finished flow of 60 rows in 6 shards of 10. The worker is a thread of this
process; tests/workers has those in which the process matters.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from caches import rows_of
from clusters import worker_in_this_process
from flows import Flow
from PIL import Image

from pipeline.datasets.manifest import read_manifest
from pipeline.errors import MissingError
from pipeline.files import sha256_file
from pipeline.regions.detector import TORCHVISION_WEIGHTS, build_model
from pipeline.settings import ArchitectureSettings
from pipeline.shards.failures import Failure, read_failures, write_failures
from pipeline.shards.reader import RegionCache
from pipeline.shards.shard import read_header, whole_shards


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with worker_in_this_process():
        yield


def image(flow: Flow, name: str) -> Path:
    return flow / "data/tiny/prepared/images" / f"{name}.png"


# Broken photographs ------------------------------------------------------------------------------


def test_a_broken_photograph_is_listed_and_the_others_are_extracted(flow: Flow) -> None:
    """Two broken training images and one broken test image, in an otherwise fresh cache."""
    shutil.rmtree(flow / "cache/tiny")
    whole = image(flow, "train-00003").read_bytes()
    image(flow, "train-00003").write_bytes(whole[: len(whole) // 2])
    image(flow, "train-00007").write_bytes(b"")
    image(flow, "test-00011").write_text("not an image")

    failed = flow.gmpipe("extract")
    assert "cache/tiny: 55 rows, 55 of them extracted now\n" in failed.out
    assert failed.refused(
        r"^Error: 3 images .* cache/tiny/failures\.parquet:\n"
        r"  \S*test-00011\.png.*\n  .*train-00003\.png.*\n  .*train-00007\.png.*\n"
        r"All other.*--max-failures 3.*max_failures: 3"
    )
    listed = pq.read_table(flow / "cache/tiny/failures.parquet").to_pylist()
    assert [row["image_id"] for row in listed] == ["test-00011", "train-00003", "train-00007"]
    assert listed[0]["path"] == "prepared/images/test-00011.png"
    assert all(row["path"] in row["reason"] for row in listed)
    cache = RegionCache.open(flow / "cache/tiny")
    assert len(cache) == 55
    assert not {row["image_id"] for row in listed} & set(cache.ids)
    times = (flow / ".state/times/tiny.csv").read_text()
    assert times.splitlines()[-1].split(",")[-2] == "55"  # before the checksum

    # The next run tries only these again, and succeeds once they are tolerated.
    refused = flow.gmpipe("extract", "--max-failures", "2")
    assert refused.refused(r"3 images .* cache/tiny/failures\.parquet")
    assert "0 of them extracted" in refused.out
    assert "resumed" not in refused.out  # it tried only these, and nothing had been stopped
    said = flow.ok("extract", "--max-failures", "3")
    assert "55 rows, 0 of them extracted now" in said
    assert re.search(r"^3 images .* cache/tiny/failures\.parquet", said, re.MULTILINE)
    assert "waited" not in said + refused.out
    assert (flow / ".state/times/tiny.csv").read_text() == times
    assert len(read_failures(flow / "cache/tiny")) == 3

    # Training and evaluation leave them out and say so.
    assert "2 images without regions" in flow.ok("train")
    assert "1 image without regions left out" in flow.ok("evaluate")
    assert (flow.metrics()["images"], flow.metrics()["left_out"]) == (11, 1)
    scored = pq.read_table(flow / "runs/tiny/full-s0/predictions.parquet")["image_id"].to_pylist()
    assert sorted(scored) == [f"test-{n:05d}" for n in range(11)]

    # One that is fixed costs only its own rows.
    before = flow.bytes("cache/tiny")
    image(flow, "train-00003").write_bytes(whole)
    refused = flow.gmpipe("extract")
    assert refused.refused("2 images .* cache/tiny/failures")
    assert "57 rows, 2 of them extracted now" in refused.out
    after = flow.bytes("cache/tiny")
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: content for name, content in before.items() if name.endswith(".h5")
    }
    image(flow, "train-00007").write_bytes(whole)
    image(flow, "test-00011").write_bytes(whole)
    assert "60 rows, 3 of them extracted now" in flow.ok("extract")
    assert "60 rows, 0 of them extracted now; nothing to extract\n" in flow.ok("extract")
    assert not (flow / "cache/tiny/failures.parquet").exists()


def test_where_no_image_of_a_split_has_regions_the_images_are_to_blame(flow: Flow) -> None:
    """`gmpipe extract` alone would not help: it has tried each of them."""
    failures = [Failure(f"test-{n:05d}", "x.png", "broken") for n in range(12)]
    write_failures(flow / "cache/tiny", failures)
    outcome = flow.gmpipe("evaluate")
    assert outcome.refused(r"12 images of the test split .*failures\.parquet.*[Ff]ix the images")


def test_without_any_readable_image_there_is_no_shard(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    for path in (flow / "data/tiny/prepared/images").iterdir():
        path.write_bytes(b"broken")
    refused = flow.gmpipe("extract")
    assert refused.refused("36 images .* cache/tiny/failures")
    assert refused.out == "cache/tiny: 0 rows, 0 of them extracted now\n"
    assert sorted(path.name for path in (flow / "cache/tiny").iterdir()) == ["failures.parquet"]
    assert flow.gmpipe("train").refused(r"index\.parquet.*gmpipe extract")


def test_train_names_the_split_of_which_no_image_is_left(flow: Flow) -> None:
    manifest = read_manifest(flow / "data/tiny/prepared/manifest.parquet")
    ids = manifest.image_ids("train")
    write_failures(flow / "cache/tiny", [Failure(name, "x.png", "broken") for name in ids])
    assert flow.gmpipe("train").refused("24 images of the train split.*failures")


def test_unusual_photographs_are_extracted(flow: Flow) -> None:
    """They replace images of the demo and keep their names: Pillow looks at the content."""
    shutil.rmtree(flow / "cache/tiny")
    noise = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    kinds: list[Callable[[Path], None]] = [
        lambda path: picture.convert("CMYK").save(path, "JPEG"),
        lambda path: picture.convert("L").save(path, "JPEG"),
        lambda path: Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(path, "PNG"),
        lambda path: picture.convert("P").save(path, "PNG", transparency=3),
        lambda path: picture.save(path, "GIF", save_all=True, append_images=[picture]),
        lambda path: picture.convert("RGBA").save(path, "PNG"),
        lambda path: Image.new("RGB", (30000, 1), "red").save(path, "PNG"),
    ]
    for number, write in enumerate(kinds):
        write(image(flow, f"test-{number:05d}"))
    assert "60 rows, 60 of them extracted now" in flow.ok("extract")


# What is dropped ---------------------------------------------------------------------------------


def test_a_changed_photograph_costs_its_own_shard(flow: Flow, made: Flow) -> None:
    shutil.copy(image(flow, "train-00000"), image(flow, "train-00009"))  # rows 18 and 19
    before = flow.bytes("cache/tiny")
    size = len(before["cache/tiny/regions-00001.h5"]) / 1000
    told = rf"1 shard \(10 rows, {size:.3g} kB\).*regions-00001\.h5"
    assert flow.gmpipe("extract").refused(
        rf"{told}.*`gmpipe extract --dataset tiny --replace`.*dvc repro"
    )
    assert flow.bytes("cache/tiny") == before
    said = flow.ok("extract", "--replace")
    assert len(re.findall(told, said, re.DOTALL)) == 1
    assert "regions-00000" not in said
    assert "60 rows, 10 of them extracted now" in said
    now, then = rows_of(flow / "cache/tiny"), rows_of(made / "cache/tiny")
    assert {key for key in then if now[key] != then[key]} == {
        ("train-00009", 0),
        ("train-00009", 1),
    }
    # What was trained on the old photograph is not evaluated on the new one.
    assert flow.gmpipe("evaluate").refused(r"full-s0/checkpoint\.pt.*images is")


def test_an_added_photograph_costs_its_own_rows(flow: Flow, made: Flow) -> None:
    """Further scenes of the demo do not change the others."""
    flow.params(prepare__tiny__train=26)
    flow.ok("prepare")
    assert "64 rows, 4 of them extracted now" in flow.ok("extract")
    now, then = rows_of(flow / "cache/tiny"), rows_of(made / "cache/tiny")
    assert {key: now[key] for key in then} == then
    # An image that the data set no longer has makes its shard stale, but runs can read the cache.
    flow.params()
    flow.ok("prepare")
    removed = flow.gmpipe("extract")
    assert removed.refused(r"1 shard \(4 rows.*regions-00006\.h5.*'train-00024'.*\nTo drop them ")
    assert removed.refused("`gmpipe train` and `gmpipe evaluate` can")
    flow.ok("train")
    flow.ok("evaluate")
    # They can't without an index.
    index = flow / "cache/tiny/index.parquet"
    whole = index.read_bytes()
    index.unlink()
    assert "gmpipe train" not in flow.gmpipe("extract").err
    index.write_bytes(whole)
    assert "60 rows, 0 of them extracted now" in flow.ok("extract", "--replace")


def test_other_settings_drop_all_shards_and_say_so_once(flow: Flow) -> None:
    other = ("--set", "extract.tiny.regions=3")
    before = flow.bytes("cache/tiny")
    told = (
        r"6 shards \(60 rows, [\d.]+ kB\).*regions-00000\.h5 and 5 more.*regions is 4, expected 3"
    )
    assert flow.gmpipe("extract", *other).refused(
        rf"{told}.*`gmpipe extract --dataset tiny --set extract\.tiny\.regions=3 --replace`"
    )
    assert flow.bytes("cache/tiny") == before
    said = flow.ok("extract", *other, "--replace")
    assert len(re.findall(told, said, re.DOTALL)) == 1
    assert RegionCache.open(flow / "cache/tiny").regions == 3


def test_a_cache_without_whole_views_is_kept_or_replaced_on_request(flow: Flow, made: Flow) -> None:
    """As version 0.1 made it. What differs is named, with the setting that keeps the cache."""
    flow.params(extract__tiny__whole=False)
    flow.ok("extract", "--replace")
    cache = RegionCache.open(flow / "cache/tiny")
    assert (cache.has_whole, cache.recipe["format_version"]) == (False, 1)
    former = flow.bytes("cache/tiny")

    flow.params()
    advice = (
        r"`gmpipe extract --dataset tiny --replace`.*"
        r"To keep them.*`extract\.tiny\.whole: false` in params\.yaml"
    )
    assert flow.gmpipe("extract").refused(rf"6 shards.*whole is absent, expected true.*{advice}")
    shard = flow / "cache/tiny/regions-00001.h5"
    shard.write_bytes(former["cache/tiny/regions-00001.h5"][:3000])
    assert flow.gmpipe("cache", "verify", "--repair").refused(rf"whole is absent.*{advice}")
    shard.write_bytes(former["cache/tiny/regions-00001.h5"])
    # Not promised for regions that differ in more.
    further = flow.gmpipe("extract", "--set", "extract.tiny.regions=3")
    assert further.refused("whole is absent.*--replace`")
    assert "whole: false" not in further.err
    # Runs read it, unless their head needs what it lacks.
    whole = ("--set", "train.tiny.network.whole_region=true")
    assert flow.gmpipe("train", *whole).refused(
        r"`\w[\w-]*` \(head `.*cache/tiny.*`extract\.tiny\.whole: true` in params\.yaml.*"
        r"`gmpipe extract --dataset tiny --replace`"
    )
    assert flow.gmpipe("compare", *whole).refused(r"`extract\.tiny\.whole: true`")
    flow.ok("train")
    assert flow.bytes("cache/tiny") == former
    flow.params(extract__tiny__whole=False)
    assert "nothing to extract" in flow.ok("extract")
    assert flow.bytes("cache/tiny") == former

    flow.params()
    assert "60 of them extracted now" in flow.ok("extract", "--replace")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


def test_nothing_is_dropped_that_can_not_be_extracted_again(flow: Flow) -> None:
    other = ("--set", "extract.tiny.regions=3", "--replace")
    before = flow.bytes("cache/tiny")

    def refused(*patterns: str, arguments: tuple[str, ...] = ()) -> None:
        outcome = flow.gmpipe("extract", *other, *arguments)
        assert all(map(outcome.refused, patterns))
        assert flow.bytes("cache/tiny") == before

    path = image(flow, "train-00004")
    path.rename(path.with_suffix(".away"))
    refused("train-00004", "1 of 36 images", "gmpipe prepare")
    path.with_suffix(".away").rename(path)

    weights = flow / "data/tiny/detector/weights.pt"
    weights.rename(weights.with_suffix(".away"))
    refused("gmpipe detector")
    weights.with_suffix(".away").rename(weights)

    # Whoever may not read a photograph; tests/regions has the check itself.
    unreadable = MissingError("train-00004.png can't be read (Permission denied).")
    with mock.patch("stages.extract.check_readable", side_effect=unreadable):
        refused("train-00004", "Permission denied")

    with mock.patch("stages.workers.cluster._CONNECT_SECONDS", 0.5):
        refused("tcp://127.0.0.1:9", arguments=("--scheduler", "tcp://127.0.0.1:9"))


def test_a_damaged_shard_is_named_and_replaced(flow: Flow, made: Flow) -> None:
    path = flow / "cache/tiny/regions-00001.h5"
    path.write_bytes(path.read_bytes()[:3000])
    assert flow.gmpipe("extract").refused(r"1 shard .*regions-00001\.h5.*--replace")
    assert "60 rows, 10 of them extracted now" in flow.ok("extract", "--replace")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


# Stopped -----------------------------------------------------------------------------------------


def test_a_stopped_extraction_keeps_whole_shards(flow: Flow, made: Flow) -> None:
    """As after Ctrl-C, which the test in tests/workers presses in a real process."""
    from stages.workers import cluster

    shutil.rmtree(flow / "cache/tiny")
    run_tasks = cluster.run_tasks

    def stopped_after_the_first(*arguments: object, **options: object) -> Iterator[object]:
        for number, done in enumerate(run_tasks(*arguments, **options)):  # type: ignore[arg-type]
            if number == 1:
                raise KeyboardInterrupt
            yield done

    with mock.patch.object(cluster, "run_tasks", stopped_after_the_first):
        outcome = flow.gmpipe("extract")
    assert outcome.code == 130, outcome
    assert "cache/tiny" in outcome.err
    assert "Traceback" not in outcome.err
    assert whole_shards(flow / "cache/tiny") != []
    for path in whole_shards(flow / "cache/tiny"):
        read_header(path)
    flow.ok("extract")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


@pytest.mark.parametrize("number", [28, 122])  # ENOSPC, EDQUOT
def test_a_full_disk_is_named_and_what_was_finished_is_kept(
    flow: Flow, made: Flow, number: int
) -> None:
    for shard in (1, 4):
        (flow / f"cache/tiny/regions-{shard:05d}.h5").unlink()
    kept = flow.bytes("cache/tiny")
    full = OSError(number, "No space left on device")
    with mock.patch("pipeline.shards.shard.map_shard", side_effect=full):  # before the rename
        assert flow.gmpipe("extract").refused(r"regions-0000[14]\.h5.*run the same command again")
    left = {name: content for name, content in flow.bytes("cache/tiny").items() if "h5" in name}
    assert left == {name: content for name, content in kept.items() if "h5" in name}
    assert "60 rows, 20 of them extracted now" in flow.ok("extract")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


# Weights -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_named_weights_and_the_same_from_a_file_give_the_same_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full network, under the name that torchvision would download, and as any file."""
    torch.manual_seed(0)
    model = build_model(
        ArchitectureSettings(), 91, size=64, regions=1, score_threshold=0, nms_threshold=0.5
    )
    saved = tmp_path / "hub/checkpoints/saved.pth"
    saved.parent.mkdir(parents=True)
    torch.save(model.state_dict(), saved)
    named = saved.rename(saved.with_name(f"weights-{sha256_file(saved)[:8]}.pth"))
    published = SimpleNamespace(
        url=f"https://example.org/{named.name}", meta=TORCHVISION_WEIGHTS.meta
    )
    monkeypatch.setattr("pipeline.regions.detector.TORCHVISION_WEIGHTS", published)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    caches = []
    for source in ({"source": "torchvision"}, {"source": "file", "weights": str(named)}):
        flow = Flow(tmp_path / source["source"])
        flow.folder.mkdir()
        flow.params(
            prepare__tiny={"source": "scenes", "train": 10, "test": 1, "size": 64},
            detector__tiny=source,
        )
        flow.ok("prepare")
        flow.ok("detector")
        flow.ok("extract")
        caches.append(flow.bytes("cache/tiny"))
    assert caches[0] == caches[1]
    assert len(caches[0]) == 4
