"""Command `serve`: label photographs over HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import InputError, MissingError
from stages.checkout.models import note_undecided, open_run
from stages.console.messages import echo, say

_LONGEST_SHUTDOWN = 60  # seconds for the answers to requests that have come before
_MOMENT = 1  # second, in which an idle thread ends


def serve(folder: Path, host: str, port: int, **limits: int) -> None:
    """Serve a run or bundle until the process is told to stop; see `make_service`.

    Args:
        folder: of the run or bundle.
        host, port: to listen on.
        limits: of `Limits`.

    Raises:
        MissingError: the packages that serve are not installed.
        InputError: the address can't be listened on.
        GmpipeError: as `open_run`.
    """
    try:
        import uvicorn

        from stages.commands.serving.service import make_service
        from stages.commands.serving.uploads import Limits
    except ImportError as error:
        raise MissingError(
            f"Serving needs the packages `starlette`, `uvicorn` and `multipart`: {error}.",
            "Run `pip install --editable '.[serve]'` in the checkout.",
        ) from error
    thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
    with _bound(host, port) as address:
        run = open_run(folder, None)
        note_undecided(run, "The answers give the scores of all labels.")
        server = uvicorn.Server(
            uvicorn.Config(
                make_service(run, Limits(**limits), thread),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_LONGEST_SHUTDOWN,
            )
        )
        address.listen()  # so that whoever reads the next line can connect
        name = f"[{host}]" if ":" in host else host
        say(f"{folder}: http://{name}:{address.getsockname()[1]}")
        # When it has stopped, uvicorn sends the signal again, which would then count as a failure.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[address])
    _end(thread)


def _end(thread: ThreadPoolExecutor) -> None:
    """End a thread of which nobody waits for results any more: with the process, if it is busy.

    Otherwise the process would stay until the work is done, since Python waits for such threads.
    """
    last = thread.submit(int)  # comes after all other work
    try:
        last.result(_MOMENT)
    except TimeoutError:
        echo("Ended, although images of a request were still being labelled.", err=True)
        os._exit(0)
    thread.shutdown()


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Reserve an address, before the time is spent that loading takes. Nobody listens there yet.

    Raises:
        InputError: the system refuses it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as address:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            address.bind((host, port))
        except OSError as error:
            raise InputError(
                f"{host}, port {port}, can't be listened on ({error.strerror}).",
                "Choose another address of this machine with `--host`, or another port with "
                "`--port`.",
            ) from error
        yield address
