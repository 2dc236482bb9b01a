"""The HTTP service of `gmpipe serve`, without a network; test_load.py has it in its own process."""

from __future__ import annotations

import asyncio
import io
import json
import os
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from flows import Flow
from PIL import Image
from starlette.testclient import TestClient

from benchmarks.serving import png_header
from pipeline.api import TrainedRun, load_run
from pipeline.learning.prediction import NotFinite
from stages.commands.serving import uploads
from stages.commands.serving.service import make_service
from stages.commands.serving.uploads import Limits
from stages.console.messages import QUIET, speaking

LIMITS = Limits(max_images=3, max_megabytes=1, max_megapixels=1, max_requests=2)
PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def run(made: Flow) -> TrainedRun:
    return load_run(made / "runs/tiny/full-s0")


@pytest.fixture(scope="module")
def client(run: TrainedRun) -> TestClient:
    return client_of(run)


def client_of(run: TrainedRun, **limits: int) -> TestClient:
    service = make_service(run, replace(LIMITS, **limits), ThreadPoolExecutor(1))
    return TestClient(service, raise_server_exceptions=False)


@pytest.fixture(scope="module")
def photographs(made: Flow) -> list[Path]:
    return sorted((made / "data/tiny/prepared/images").glob("test-*"))[:3]


def form(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("image", (f"{number}.png", content)) for number, content in enumerate(contents)]


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    return str(response.json()["error"])


# Answers ------------------------------------------------------------------------------------------


def test_it_answers_as_predict_does(
    made: Flow, client: TestClient, photographs: list[Path]
) -> None:
    printed = made.ok("predict", "--json", "--run", "runs/tiny/full-s0", *map(str, photographs))
    expected = json.loads(printed)
    contents = [path.read_bytes() for path in photographs]
    files = [("image", (str(path), path.read_bytes())) for path in photographs]
    response = client.post("/predict", files=files)
    assert response.status_code == 200
    assert response.json() == expected
    for content, image in zip(contents, expected, strict=True):
        for headers in (PNG, {"Content-Type": "application/octet-stream"}, {}):
            [alone] = client.post("/predict", content=content, headers=headers).json()
            assert alone["image"] == "1"
            assert [label["label"] for label in alone["labels"]] == [
                label["label"] for label in image["labels"]
            ]
            scores = [[label["score"] for label in one["labels"]] for one in (alone, image)]
            assert np.allclose(*scores, atol=1e-5)


def test_a_photograph_is_turned_once(client: TestClient, run: TrainedRun, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "webp", "tiff"):
        path = tmp_path / f"turned.{suffix}"
        Image.fromarray(pixels).save(path, exif=exif)
        [(_, expected)] = run.predict_files([path])
        [answer] = client.post("/predict", content=path.read_bytes()).json()
        assert (answer["width"], answer["height"]) == (50, 90)
        best = answer["labels"][0]
        assert best["label"] == run.vocabulary[expected.logits.argmax()]  # type: ignore[union-attr]
        assert best["score"] == pytest.approx(expected.scores.max(), abs=1e-5)  # type: ignore[union-attr]


def test_many_images_go_through_the_detector_in_batches(
    run: TrainedRun, photographs: list[Path]
) -> None:
    content, most = photographs[0].read_bytes(), 0

    def watch(module: Any, inputs: Any) -> None:
        nonlocal most
        most = max(most, len(inputs[0]))

    with run.detector.backbone.register_forward_pre_hook(watch):
        response = client_of(run, max_images=20).post("/predict", files=form(*20 * [content]))
    assert len(response.json()) == 20
    assert 1 < most <= 8


def test_health_names_the_run(client: TestClient, run: TrainedRun) -> None:
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert health["labels"] == list(run.vocabulary)
    assert health["checkpoint_sha256"] == run.checkpoint.sha256
    assert [health[name] for name in ("dataset", "variant", "seed")] == ["tiny", "full", 0]
    assert health["limits"]["max_images"] == 3


# Refusals -----------------------------------------------------------------------------------------


def test_no_image(client: TestClient) -> None:
    error_of(client.post("/predict"), 400)
    assert "1.png" in error_of(client.post("/predict", files=form(b"x", b"")), 400)
    empty = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/predict", content=b"--x--\r\n", headers=empty), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no form",
        b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\ncut off',
        b"--x\r\n\r\nno disposition\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: attachment\r\n\r\nx\r\n--x--\r\n",
    ],
)
def test_a_broken_form(client: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert "multipart/form-data" in error_of(
        client.post("/predict", content=body, headers=headers), 400
    )
    headers = {"Content-Type": "multipart/form-data"}
    error_of(client.post("/predict", content=body, headers=headers), 400)


def test_too_large(client: TestClient) -> None:
    big = os.urandom(1_000_001)
    assert "1 MB" in error_of(client.post("/predict", content=big, headers=PNG), 413)
    chunks = (big[start : start + 10_000] for start in range(0, len(big), 10_000))
    error_of(client.post("/predict", content=chunks, headers=PNG), 413)  # of unknown length
    error_of(client.post("/predict", files=form(big)), 413)
    assert "3 images" in error_of(client.post("/predict", files=form(*4 * [png_header(1, 1)])), 413)


@pytest.mark.parametrize("size", [(1001, 1000), (20_000, 20_000), (40_000, 10_000)])
def test_many_pixels_in_a_small_file(client: TestClient, size: tuple[int, int]) -> None:
    """The second and third are over the limits of gmpipe and of Pillow."""
    with mock.patch("stages.commands.serving.uploads.decode", side_effect=AssertionError):
        response = client.post("/predict", files=form(png_header(*size)))
    assert "0.png" in error_of(response, 413)


def test_what_is_no_image_is_named(client: TestClient, photographs: list[Path]) -> None:
    whole = photographs[0].read_bytes()
    for broken in (b"x" * 1000, whole[: len(whole) // 2], b"\xff\xd8\xff"):
        assert "1.png" in error_of(client.post("/predict", files=form(whole, broken)), 422)
        error_of(client.post("/predict", content=broken, headers=PNG), 422)


def test_a_jpeg_of_very_many_scans(client: TestClient) -> None:
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "jpeg", progressive=True)
    whole = file.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    own = whole.count(b"\xff\xda")
    allowed, refused = (whole[:-2] + (most - own) * last + whole[-2:] for most in (100, 101))
    assert client.post("/predict", content=allowed).status_code == 200
    with mock.patch("stages.commands.serving.uploads.decode", side_effect=AssertionError):
        message = error_of(client.post("/predict", files=form(refused)), 422)
    assert "0.png" in message
    assert "101" in message
    assert "100" in message


def test_another_kind_of_content(client: TestClient) -> None:
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        response = client.post("/predict", content=b"{}", headers={"Content-Type": kind})
        message = error_of(response, 415)
        assert kind in message
        assert "multipart/form-data" in message


def test_another_path_or_method(client: TestClient) -> None:
    error_of(client.get("/other"), 404)
    error_of(client.get("/predict"), 405)


def test_a_request_that_does_not_arrive(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "READ_SECONDS", 0.01)
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": []}
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(10)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app({**scope, "query_string": b""}, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_numbers_that_are_not_finite(run: TrainedRun, photographs: list[Path]) -> None:
    with mock.patch.object(run, "predict", side_effect=NotFinite("of image 0", "Restore")):
        response = client_of(run).post("/predict", content=photographs[0].read_bytes())
    assert "image 0" in error_of(response, 500)


def test_an_unexpected_error_says_nothing_of_the_inside(
    run: TrainedRun, photographs: list[Path]
) -> None:
    client = client_of(run)
    with mock.patch.object(run, "predict", side_effect=KeyError("secret")):
        response = client.post("/predict", content=photographs[0].read_bytes())
    assert "secret" not in error_of(response, 500)
    assert client.post("/predict", content=photographs[0].read_bytes()).status_code == 200


# Many at once -------------------------------------------------------------------------------------


def test_one_request_is_labelled_at_a_time(run: TrainedRun, photographs: list[Path]) -> None:
    client, content = client_of(run, max_requests=4), photographs[0].read_bytes()
    inside: list[int] = []
    most = 0
    predict = run.predict

    def watched(*inputs: Any, **options: Any) -> Any:
        nonlocal most
        inside.append(1)
        most = max(most, len(inside))
        time.sleep(0.02)
        inside.pop()
        return predict(*inputs, **options)

    with mock.patch.object(run, "predict", watched), ThreadPoolExecutor(4) as pool:
        posts = [pool.submit(client.post, "/predict", content=content) for _ in range(4)]
        assert [one.result().status_code for one in posts] == 4 * [200]
    assert most == 1


def test_more_requests_than_may_wait(run: TrainedRun, photographs: list[Path]) -> None:
    client, content = client_of(run, max_requests=1), photographs[0].read_bytes()
    begun, go_on = threading.Event(), threading.Event()
    predict = run.predict

    def waiting(*inputs: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return predict(*inputs, **options)

    with mock.patch.object(run, "predict", waiting), ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(client.post, "/predict", content=content)
        assert begun.wait(10)
        refused = client.post("/predict", content=content)
        assert client.get("/health").status_code == 200
        go_on.set()
        assert accepted.result().status_code == 200
    assert "1" in error_of(refused, 503)
    assert int(refused.headers["Retry-After"]) >= 1
    error_of(client.post("/predict", content=b"x"), 422)  # and leaves its place
    assert client.post("/predict", content=content).status_code == 200


def test_each_request_is_a_line_on_stderr(
    client: TestClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.post("/predict", content=b"x", headers=PNG)
    client.request(1000 * "\n", "/o%0Ather" + 1000 * "x")
    first, second = capsys.readouterr().err.splitlines()
    assert "POST /predict 422" in first
    assert " %0A%0A%0A% /o%0Ather" in second
    assert len(second) < 120
    with speaking(QUIET):
        client.get("/health")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("busy", [True, False])
def test_it_ends_although_images_are_being_labelled(
    made: Flow, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def waiting(*inputs: Any, **options: Any) -> Any:
        begun.set()
        assert go_on.wait(10)
        return []

    def run_server(server: Any, sockets: Any) -> None:
        """Give up a request, as uvicorn does after the longest shutdown."""
        if busy:
            client = TestClient(server.config.app, raise_server_exceptions=False)
            pool.submit(client.post, "/predict", content=photographs[0].read_bytes())
            assert begun.wait(10)

    monkeypatch.setattr("uvicorn.Server.run", run_server)
    monkeypatch.setattr(TrainedRun, "predict", waiting)
    monkeypatch.setattr("stages.commands.serving.serve._MOMENT", 0.1)
    ended = mock.Mock(side_effect=lambda code: go_on.set())
    monkeypatch.setattr("os._exit", ended)
    with ThreadPoolExecutor(1) as pool:
        made.ok("serve", "runs/tiny/full-s0", "--port", "0")
    assert ended.mock_calls == ([mock.call(0)] if busy else [])


# The command --------------------------------------------------------------------------------------


def test_an_address_in_use_is_refused_before_the_run_is_loaded(made: Flow) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        mock.patch("stages.commands.serving.serve.open_run", side_effect=AssertionError),
    ):
        port = str(other.getsockname()[1])
        outcome = made.gmpipe("serve", "runs/tiny/full-s0", "--port", port)
        assert outcome.refused(f"127.0.0.1.*{port}.*--port")
        assert made.gmpipe("serve", "runs/tiny/full-s0", "--host", "no.host.").refused("no.host")


def test_without_the_packages_it_names_them(made: Flow) -> None:
    with mock.patch.dict(sys.modules, {"uvicorn": None}):
        outcome = made.gmpipe("serve", "runs/tiny/full-s0")
    assert outcome.refused(r"uvicorn.*pip install --editable '\.\[serve\]'")
