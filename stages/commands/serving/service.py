"""The HTTP service: a Starlette application around a trained run.

    POST /predict   images; answers with the JSON of `gmpipe predict --json`
    GET  /health    answers once the run is loaded, and says which run it is

A request passes three steps: it is let in, unless too many are inside already (503); its body is
read, on the event loop; and its images are decoded and labelled, in one thread, request after
request. So what the service holds in memory is bounded by `Limits`.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.inference.formats import image_json, label_rows
from pipeline.inference.trained import TrainedRun
from pipeline.learning.prediction import NotFinite
from stages.commands.serving.uploads import Limits, Upload, decoded, read_uploads
from stages.console.messages import echo, is_quiet

_LONGEST_METHOD, _LONGEST_PATH = 10, 80  # characters in the log, escaped


def make_service(run: TrainedRun, limits: Limits, thread: Executor) -> Starlette:
    """Make the application.

    Args:
        run: that labels the images.
        limits: of a request, and of the number of requests.
        thread: a single one, which decodes and labels images.
    """
    service = _Service(run, limits, thread)
    return Starlette(
        routes=[
            Route("/predict", service.predict, methods=["POST"]),
            Route("/health", service.health, methods=["GET"]),
        ],
        middleware=[Middleware(_Log)],
        exception_handlers={
            HTTPException: _refuse,
            ClientDisconnect: _nobody_listens,
            NotFinite: _not_finite,
            Exception: _unexpected,
        },
    )


class _Service:
    def __init__(self, run: TrainedRun, limits: Limits, thread: Executor) -> None:
        self._run = run
        self._limits = limits
        self._thread = thread
        self._inside = 0

    async def predict(self, request: Request) -> JSONResponse:
        if self._inside >= self._limits.max_requests:
            raise HTTPException(
                503,
                f"{self._inside} requests are being answered, which is the limit. Try again later.",
                {"Retry-After": "1"},
            )
        self._inside += 1
        try:
            uploads = await read_uploads(request, self._limits)
            loop = asyncio.get_running_loop()
            return JSONResponse(await loop.run_in_executor(self._thread, self._label, uploads))
        finally:
            self._inside -= 1

    def _label(self, uploads: list[Upload]) -> list[dict[str, Any]]:
        # One after another, since only the small view of an image is kept.
        images = (decoded(upload, self._limits) for upload in uploads)
        predictions = self._run.predict(images)
        return [
            image_json(label_rows(Path(one.name), prediction, self._run, None, None))
            for one, prediction in zip(uploads, predictions, strict=True)
        ]

    async def health(self, request: Request) -> JSONResponse:
        checkpoint = self._run.checkpoint
        return JSONResponse(
            {
                "status": "ok",
                "run": self._run.name,
                "dataset": checkpoint.dataset,
                "variant": checkpoint.variant,
                "seed": checkpoint.seed,
                "checkpoint_sha256": checkpoint.sha256,
                "labels": checkpoint.vocabulary,
                "limits": asdict(self._limits),
            }
        )


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, error.headers)


async def _not_finite(request: Request, error: Exception) -> JSONResponse:
    echo(str(error), err=True)
    return _error(500, str(error))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette raises it again, so that the server logs its traceback.
    return _error(500, "The service failed. Its log says why.")


async def _nobody_listens(request: Request, error: Exception) -> Response:
    return Response(status_code=400)


def _error(status: int, problem: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": problem}, status, headers)


class _Log:
    """Prints a line on stderr for each request, unless quiet: method, path, status and time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_quiet():
            await self._app(scope, receive, send)
            return
        status, start = 500, time.perf_counter()

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            took = (time.perf_counter() - start) * 1000
            method = quote(scope["method"])[:_LONGEST_METHOD]
            path = quote(scope["path"])[:_LONGEST_PATH]
            echo(f"{time.strftime('%H:%M:%S')} {method} {path} {status} {took:.0f} ms", err=True)
