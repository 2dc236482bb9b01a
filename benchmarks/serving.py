"""How the service of `gmpipe serve` bears many requests, broken and oversized images among them.

`python -m benchmarks.serving RUN PHOTOGRAPHS` starts it on the loopback address and sends requests,
eight at a time. It prints, for each kind of request, how many there were, the status that all of
them got, and the percentiles of the time to the answer; the memory of the service after a fifth of
the requests and at the end; and, last, a line of JSON with these numbers. It fails if an answer has
another status than expected, or the service ends.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tabulate import tabulate

AT_ONCE = 8
IMAGE, FORM = "image/png", "multipart/form-data; boundary=limit"


@dataclass(frozen=True)
class Service:
    """A running service: its process and its port."""

    process: subprocess.Popen[str]
    port: int

    def memory(self) -> float:
        """Resident memory in MB."""
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)


@contextmanager
def serving(run: Path, *options: str) -> Iterator[Service]:
    """Start a service, and end it with SIGTERM; it must then exit with 0."""
    command = [sys.executable, "-m", "stages.cli", "serve", str(run), "--port", "0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline()
            yield Service(process, int(address.rpartition(":")[2]))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, process.returncode
        finally:
            process.kill()


def png_header(width: int, height: int) -> bytes:
    """The PNG file of an image in RGB, without its pixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data
        content += struct.pack(">I", zlib.crc32(kind + data))
    return content


def form(contents: Sequence[bytes]) -> bytes:
    """A form with an image in each part."""
    parts = (
        b'--limit\r\nContent-Disposition: form-data; name="image"\r\n\r\n%b\r\n' % content
        for content in contents
    )
    return b"".join(parts) + b"--limit--\r\n"


@dataclass(frozen=True)
class Kind:
    """A kind of request: its name, content type and body, and the status that it must get.

    Without a status, the client goes away in the middle of the body.
    """

    name: str
    content_type: str
    body: bytes
    status: int | None


def kinds(photographs: Sequence[Path]) -> list[Kind]:
    """Twenty requests: fifteen that are fine, and five that are not."""
    contents = [path.read_bytes() for path in photographs[:15]]
    fine = [Kind("one image", IMAGE, content, 200) for content in contents[:12]]
    fine += [
        Kind("three images", FORM, form(contents[start : start + 3]), 200) for start in (0, 3, 6)
    ]
    broken = contents[0][: len(contents[0]) // 2]
    return [
        *fine,
        Kind("a broken image", IMAGE, broken, 422),
        Kind("a broken one of three", FORM, form([*contents[:2], broken]), 422),
        Kind("too many bytes", IMAGE, bytes(10_000_001), 413),
        Kind("too many pixels", IMAGE, png_header(30_000, 30_000), 413),
        Kind("cut off", IMAGE, contents[0], None),
    ]


def ask(port: int, kind: Kind) -> float:
    """Send a request, check its answer, and return how many seconds it took."""
    start = time.perf_counter()
    if kind.status is None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(kind.body)}\r\n\r\n"
            connection.sendall(head.encode() + kind.body[: len(kind.body) // 2])
        return time.perf_counter() - start
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/predict", kind.body, {"Content-Type": kind.content_type})
        response = connection.getresponse()
        answer = response.read()
    finally:
        connection.close()
    assert response.status == kind.status, (kind.name, response.status, answer[:300])
    json.loads(answer)
    return time.perf_counter() - start


def measure(service: Service, photographs: Sequence[Path], requests: int) -> dict[str, Any]:
    """Send requests, and return the numbers that are printed; a row for each kind of request."""
    each = list(itertools.islice(itertools.cycle(kinds(photographs)), requests))
    first = requests // 5
    start = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        took = list(pool.map(lambda kind: ask(service.port, kind), each[:first]))
        early = service.memory()
        took += pool.map(lambda kind: ask(service.port, kind), each[first:])
    seconds = time.perf_counter() - start
    rows = []
    for name, status in {kind.name: kind.status for kind in each}.items():
        of_kind = [1000 * t for t, kind in zip(took, each, strict=True) if kind.name == name]
        rows.append([name, len(of_kind), status, *np.percentile(of_kind, [50, 95, 99]).tolist()])
    return {
        "rows": rows,
        "requests_per_s": requests / seconds,
        "memory_early_mb": early,
        "memory_late_mb": service.memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="bundle or run to serve")
    parser.add_argument("photographs", type=Path, help="folder of PNG files, at least 15")
    parser.add_argument("--requests", type=int, default=1000)
    options = parser.parse_args()
    photographs = sorted(options.photographs.glob("*.png"))
    with serving(options.run) as service:
        numbers = measure(service, photographs, options.requests)
    headers = ["request", "number", "status", "p50 (ms)", "p95 (ms)", "p99 (ms)"]
    print(tabulate(numbers["rows"], headers, "github", floatfmt=".0f", missingval="-"))
    print(
        f"\n{numbers['requests_per_s']:.1f} requests/s; memory after a fifth of them "
        f"{numbers['memory_early_mb']:.0f} MB, at the end {numbers['memory_late_mb']:.0f} MB\n"
    )
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
