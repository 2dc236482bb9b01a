"""Extraction as it is run: workers, photographs that are broken, kills, clusters.

The finished flow of 60 rows in 6 shards of 10 is what each test starts from.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from distributed import Client, LocalCluster
from flows import BIN, Flow, write_params
from PIL import Image

from pipeline.datasets.manifest import read_manifest
from pipeline.errors import GmpipeError
from pipeline.machine import cores
from pipeline.regions.detector import TORCHVISION_WEIGHTS, build_model
from pipeline.settings import ArchitectureSettings
from pipeline.shards.failures import Failure, read_failures
from pipeline.shards.reader import RegionCache, map_shard, read_header, whole_shards
from stages.workers.cluster import open_cluster, run_tasks, threads_of_worker

SHARDS = [f"regions-{n:05d}.h5" for n in range(6)]


def image(flow: Flow, name: str) -> Path:
    return flow / "data/tiny/prepared/images" / f"{name}.png"


def rows_of(folder: Path) -> dict[tuple[str, int], bytes]:
    """Every row of the cache's shards, all its fields as bytes, by image and view."""
    found: dict[tuple[str, int], bytes] = {}
    for path in whole_shards(folder):
        _, rows, _ = map_shard(path)
        for row in range(len(rows)):
            key = rows.image_id[row].decode(), int(rows.view[row])
            assert key not in found
            arrays = (rows.features, rows.boxes, rows.scores, rows.classes, rows.count)
            found[key] = b"".join(array[row].tobytes() for array in arrays)
    return found


# Broken photographs ------------------------------------------------------------------------------


def test_a_broken_photograph_is_listed_and_the_rest_goes_on(flow: Flow) -> None:
    """Two broken training images and one of the test split, in an otherwise fresh cache."""
    shutil.rmtree(flow / "cache/tiny")
    whole = image(flow, "train-00003").read_bytes()
    image(flow, "train-00003").write_bytes(whole[: len(whole) // 2])
    image(flow, "train-00007").write_bytes(b"")
    image(flow, "test-00011").write_text("not an image")

    failed = flow.gmpipe("extract")
    assert failed.refused(
        r"55 rows, 55 of them extracted.*undecodable images: 3, see cache/tiny/failures\.parquet"
        r".*The first: .*test-00011\.png can't be decoded.*--max-failures 3.*max_failures: 3"
    )
    listed = pq.read_table(flow / "cache/tiny/failures.parquet").to_pylist()
    assert [row["image_id"] for row in listed] == ["test-00011", "train-00003", "train-00007"]
    assert listed[0]["path"] == "prepared/images/test-00011.png"
    assert all("can't be decoded" in row["reason"] for row in listed)
    cache = RegionCache.open(flow / "cache/tiny")
    assert len(cache) == 55
    assert not {row["image_id"] for row in listed} & set(cache.ids)
    times = (flow / ".state/times/tiny.csv").read_text()
    assert times.endswith(",55\n")

    # The next run tries only these again; with leave it succeeds.
    assert flow.gmpipe("extract", "--max-failures", "2").refused("0 of them extracted")
    said = flow.ok("extract", "--max-failures", "3")
    assert "55 rows, 0 of them extracted now" in said
    assert "undecodable images: 3" in said
    assert (flow / ".state/times/tiny.csv").read_text() == times
    assert len(read_failures(flow / "cache/tiny")) == 3

    # Training and evaluation leave them out and say so.
    assert "2 images without regions left out" in flow.ok("train")
    assert "1 images without regions left out" in flow.ok("evaluate")
    assert (flow.metrics()["images"], flow.metrics()["left_out"]) == (11, 1)
    scored = pq.read_table(flow / "runs/tiny/full-s0/predictions.parquet")["image_id"].to_pylist()
    assert sorted(scored) == [f"test-{n:05d}" for n in range(11)]

    # A mended one costs its own rows only.
    before = flow.bytes("cache/tiny")
    image(flow, "train-00003").write_bytes(whole)
    assert flow.gmpipe("extract").refused(r"57 rows, 2 of them extracted now.*images: 2")
    after = flow.bytes("cache/tiny")
    assert {name: after[name] for name in before if name.endswith(".h5")} == {
        name: content for name, content in before.items() if name.endswith(".h5")
    }
    image(flow, "train-00007").write_bytes(whole)
    image(flow, "test-00011").write_bytes(whole)
    assert "60 rows, 3 of them extracted now" in flow.ok("extract")
    assert not (flow / "cache/tiny/failures.parquet").exists()
    flow.ok("train")


def test_an_image_that_nobody_can_decode_leaves_no_shard(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    for path in (flow / "data/tiny/prepared/images").iterdir():
        path.write_bytes(b"broken")
    assert flow.gmpipe("extract").refused(r"0 rows, 0 of them.*undecodable images: 36")
    assert whole_shards(flow / "cache/tiny") == []
    assert flow.gmpipe("train").refused(r"no index of regions.*gmpipe extract")


def test_train_says_when_nothing_is_left(flow: Flow) -> None:
    from pipeline.shards.failures import write_failures

    manifest = read_manifest(flow / "data/tiny/prepared/manifest.parquet")
    ids = manifest.image_ids("train")
    write_failures(flow / "cache/tiny", [Failure(name, "x.png", "broken") for name in ids])
    assert flow.gmpipe("train").refused(
        "none of the 24 images of the train split has regions.*failures"
    )


def test_odd_photographs_are_extracted(flow: Flow) -> None:
    """Written over images of the demo, under their names: Pillow looks at the content."""
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


# Photographs that change -------------------------------------------------------------------------


def test_a_changed_photograph_costs_its_own_shard(flow: Flow, made: Flow) -> None:
    shutil.copy(image(flow, "train-00000"), image(flow, "train-00009"))  # rows 18 and 19
    assert flow.gmpipe("extract").refused(
        r"regions-00001\.h5 was made with other settings: images is.*--replace"
    )
    said = flow.ok("extract", "--replace")
    assert said.count("It was dropped.") == 1
    assert "60 rows, 10 of them extracted now" in said
    now, then = rows_of(flow / "cache/tiny"), rows_of(made / "cache/tiny")
    assert {key for key in then if now[key] != then[key]} == {
        ("train-00009", 0),
        ("train-00009", 1),
    }
    # What was trained on the old photograph is not evaluated on the new one.
    assert flow.gmpipe("evaluate").refused(r"full-s0/checkpoint\.pt.*images is")


def test_an_added_photograph_costs_its_own_rows(flow: Flow, made: Flow) -> None:
    """The demo's further scenes leave the others as they are."""
    flow.params(prepare__tiny__train=26)
    flow.ok("prepare")
    assert "64 rows, 4 of them extracted now" in flow.ok("extract")
    now, then = rows_of(flow / "cache/tiny"), rows_of(made / "cache/tiny")
    assert {key: now[key] for key in then} == then
    # And one that the data set no longer has is in the way of its shard.
    flow.params()
    flow.ok("prepare")
    assert flow.gmpipe("extract").refused(r"holds image 'train-00024', which the manifest lacks")
    assert "60 rows, 0 of them extracted now" in flow.ok("extract", "--replace")


# Killed ------------------------------------------------------------------------------------------


def start(flow: Flow, *arguments: str) -> subprocess.Popen[str]:
    """`gmpipe extract` in a process group of its own."""
    return subprocess.Popen(
        [BIN / "gmpipe", "extract", *arguments],
        cwd=flow.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # What runs in a shell's background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> bool:
    """Until ``condition`` holds; false if the run ends before."""
    while not condition():
        if run.poll() is not None:
            return condition()
        time.sleep(0.0005)
    return True


def shards(flow: Flow) -> list[str]:
    return sorted(path.name for path in (flow / "cache/tiny").glob("regions-*.h5"))


def test_ctrl_c_leaves_whole_shards(flow: Flow, made: Flow) -> None:
    for _ in range(10):  # the run may end before the signal comes
        shutil.rmtree(flow / "cache/tiny")
        run = start(flow)
        assert wait_for(lambda: len(shards(flow)) >= 1, run)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the workers as well
        said, _ = run.communicate(timeout=60)
        if run.returncode != 0:
            break
    assert run.returncode == 130, said
    assert re.search(r"Error: stopped\. .*the same command goes on", said)
    assert "Traceback" not in said
    for path in whole_shards(flow / "cache/tiny"):
        read_header(path)
    flow.ok("extract")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


def workers_of(run: subprocess.Popen[str]) -> list[psutil.Process]:
    """The worker processes of a command."""
    found = []
    for process in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended in between
            if "spawn_main" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_a_killed_worker_is_replaced_and_its_shards_done_again(flow: Flow, made: Flow) -> None:
    for _ in range(10):  # the run may end before its worker is killed
        shutil.rmtree(flow / "cache/tiny")
        run = start(flow)
        # Looked for beforehand: from the first shard to the last it is a blink.
        assert wait_for(lambda run=run: bool(workers_of(run)), run)
        workers = workers_of(run)
        assert wait_for(lambda: len(shards(flow)) >= 1, run)
        workers[0].kill()
        done = shards(flow) == SHARDS
        said, _ = run.communicate(timeout=120)
        assert run.returncode == 0, said
        if not done:
            break
    assert len(workers) == 1
    assert not done
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")


@pytest.mark.slow
def test_killed_at_any_moment_the_next_run_completes(flow: Flow, made: Flow) -> None:
    """SIGKILL at 20 seeded moments, half of them while a shard is open, half of each kind to the
    whole group and half to the command alone, whose workers then outlive it for a moment."""
    chance = random.Random(0)
    folder = flow / "cache/tiny"
    kills = dict.fromkeys(("open", "between"), 0)
    redone = 0
    while sum(kills.values()) < 20:
        wanted = "open" if kills["open"] <= kills["between"] else "between"
        if shards(flow) == SHARDS or not folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
        before = shards(flow)
        run = start(flow)

        def is_open() -> bool:
            return any(folder.glob("regions-*.tmp"))

        target = len(before) + chance.randrange(len(SHARDS) - len(before))
        late = chance.random() * 0.05
        assert wait_for(lambda n=target: len(shards(flow)) >= n, run)
        if wanted == "open":
            caught = wait_for(is_open, run)
        else:
            time.sleep(late)
            caught = any(folder.iterdir()) and not (folder / "index.parquet").exists()
        if chance.random() < 0.5:
            os.killpg(run.pid, signal.SIGKILL)
        else:
            run.kill()
        run.communicate()
        kills[wanted] += caught
        for path in whole_shards(folder):
            read_header(path)
        # What was whole stays whole, byte for byte.
        now = flow.bytes("cache/tiny")
        then = made.bytes("cache/tiny")
        assert all(now[f"cache/tiny/{name}"] == then[f"cache/tiny/{name}"] for name in before)
        redone += len(before)
    flow.ok("extract")
    assert rows_of(folder) == rows_of(made / "cache/tiny")
    assert flow.bytes("cache/tiny") == made.bytes("cache/tiny")
    assert redone > 0


# Clusters ----------------------------------------------------------------------------------------


def test_a_worker_uses_all_cores() -> None:
    """Dask sets OMP_NUM_THREADS=1 for its workers; the extraction asks for Dask's own count."""
    with open_cluster(None, {}) as client:
        assert client.submit(threads_of_worker).result() == max(2, cores())
        environment = client.submit(os.environ.get, "OMP_NUM_THREADS").result()
        assert environment == "1"


def test_a_worker_ends_without_a_last_look_for_garbage(tmp_path: Path) -> None:
    """Which takes seconds with torch, and Dask kills a worker that takes 4 s, with a warning."""
    path = tmp_path / "frozen"

    def note_at_the_end() -> None:
        atexit.register(lambda: path.write_text(str(gc.get_freeze_count())))

    with open_cluster(None, {}) as client:
        client.run(note_at_the_end)
    assert int(path.read_text()) > 100_000


def test_the_detector_of_a_worker_gets_its_threads(flow: Flow) -> None:
    """In a real worker, where Dask has set OMP_NUM_THREADS=1."""
    from stages import extract as stage

    shutil.rmtree(flow / "cache/tiny")
    with open_cluster(None, {}) as client:
        flow.ok("extract", "--scheduler", client.scheduler.address)
        after = client.submit(torch.get_num_threads, pure=False).result()
        loaded = client.submit(lambda: len(stage._loaded), pure=False).result()
    assert (after, loaded) == (max(2, cores()), 1)


def test_an_existing_cluster_gives_the_same_cache(flow: Flow, made: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        dashboard_address="127.0.0.1:0",
        resources={"GPU": 1},
    ) as cluster:
        address = cluster.scheduler_address
        with Client(cluster) as client:
            client.wait_for_workers(2)
            wrong = flow.gmpipe("extract", "--scheduler", address, "--resource", "GPU=2")
            assert wrong.refused(r"a shard's worker must have GPU=2.*2 workers.*'GPU': 1")
            assert shards(flow) == []
            said = flow.ok("extract", "--scheduler", address, "--resource", "GPU=1")
            assert "60 rows, 60 of them extracted now" in said
            loaded = client.run(loaded_detectors)
            assert list(loaded.values()) == [1, 1]
    # On one thread a worker, so that sums are rounded in another order.
    caches = [RegionCache.open(one / "cache/tiny") for one in (flow, made)]
    found, expected = (cache.gather(range(len(cache))) for cache in caches)
    assert found.image_id.tolist() == expected.image_id.tolist()
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_allclose(found.features, expected.features, atol=2e-3)


def loaded_detectors() -> int:
    from stages import extract as stage

    return len(stage._loaded)


def test_a_scheduler_that_is_not_there_is_named(flow: Flow) -> None:
    shutil.rmtree(flow / "cache/tiny")
    assert flow.gmpipe("extract", "--scheduler", "tcp://127.0.0.1:9").refused(
        r"--scheduler tcp://127\.0\.0\.1:9: no scheduler with a worker answered.*dask worker"
    )
    usage = flow.gmpipe("extract", "--resource", "GPU")
    assert usage.code == 2
    assert "expected NAME=AMOUNT" in usage.err


def test_a_worker_that_sees_other_files_is_named(flow: Flow) -> None:
    """As on a cluster without a shared file system: the cache is another folder there."""
    from stages import extract as stage

    job = stage._Extraction.__new__(stage._Extraction)
    for name, value in {
        "folder": flow / "cache/tiny",
        "root": flow / "data/tiny",
        "detector": flow / "data/tiny/detector",
        "turn": "another",
        "versions": {},
    }.items():
        object.__setattr__(job, name, value)
    assert "does not see the cache" in (stage._problem_of_worker(job) or "")
    job.versions["h5py"] = "0.1"
    assert "it has h5py" in (stage._problem_of_worker(job) or "")


def die_once(marker: str) -> str:
    path = Path(marker)
    if not path.exists():
        path.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_once(marker: str) -> str:
    path = Path(marker)
    if not path.exists():
        path.touch()
        raise OSError("a disk that is gone for a moment")
    return "done"


def test_a_task_is_tried_again(tmp_path: Path) -> None:
    markers = iter([str(tmp_path / "a")])
    with open_cluster(None, {}) as client:
        done = run_tasks(
            client, fail_once, markers, topic="t", resources={}, on_message=lambda _: None
        )
        assert [outcome for _, outcome in done] == ["done"]


@pytest.mark.slow
def test_a_task_that_kills_every_worker_is_an_error() -> None:
    with open_cluster(None, {}) as client, pytest.raises(GmpipeError, match="a worker died at eac"):
        list(run_tasks(client, die, iter([1]), topic="t", resources={}, on_message=lambda _: None))


# Memory ------------------------------------------------------------------------------------------

MEMORY_PROBE = Path(__file__).parents[1] / "support/memory_probe.py"


@pytest.mark.slow
def test_memory_hardly_grows_with_the_rows(tmp_path: Path) -> None:
    """Anonymous memory of `extract` and of a reader at 1,000, 10,000 and 100,000 rows."""
    peaks: dict[str, list[int]] = {"extract": [], "read": []}
    for rows in (1_000, 10_000, 100_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        write_params(folder)
        for what, found in peaks.items():
            done = subprocess.run(
                [sys.executable, MEMORY_PROBE, what, str(rows)],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            found.append(int(done.stdout.splitlines()[-1]))
        shutil.rmtree(folder)
    for what, found in peaks.items():
        growth = (found[2] - found[1]) / 90_000
        print(what, found, f"{growth:.0f} bytes a row")
        assert growth < 300, (what, found)


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
    named = tmp_path / "hub/checkpoints" / Path(TORCHVISION_WEIGHTS.url).name
    named.parent.mkdir(parents=True)
    torch.save(model.state_dict(), named)
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
