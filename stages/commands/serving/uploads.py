"""From the body of an HTTP request to images, within limits; a refusal is an `HTTPException`.

The statuses: 400 for a body that breaks its form, 408 for one that comes too slowly, 413 for what
is larger than the limits, 415 for another kind of content, 422 for an image that can't be decoded.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from pipeline.image_metadata import JPEG
from pipeline.images import TooManyPixels, decode, read_header, reason

READ_SECONDS = 30
"""In which the body of a request must have come. Until then it takes the place of another one."""

_FORM = "multipart/form-data"

_MOST_SCANS = 100
"""Scans of a JPEG that are decoded. A progressive one has about ten, each of which goes over all
pixels, and a scan that changes nothing takes a few bytes. libtiff has the same limit."""
_SCAN = b"\xff\xda\x00"
"""The marker of a scan, and the high byte of its length, which is 14 at most. The compressed pixels
of a JPEG never have it."""


@dataclass(frozen=True)
class Limits:
    """What the service takes at most; together they bound its memory: docs/guides/serving.md.

    Attributes:
        max_images: in a request.
        max_megabytes: of an image's file, in 1,000,000 bytes.
        max_megapixels: of an image, in 1,000,000 pixels. While it is decoded, a pixel takes 16
            bytes, or 24 in a WebP with transparency.
        max_requests: that are read, wait or are answered at the same time.
    """

    max_images: int
    max_megabytes: int
    max_megapixels: int
    max_requests: int


@dataclass(frozen=True)
class Upload:
    """The file of an image: its name, or its number in the request, from 1; and its bytes."""

    name: str
    content: bytes


async def read_uploads(request: Request, limits: Limits) -> list[Upload]:
    """Read the images of a request: its body, or the parts of a form. Nothing touches the disk.

    Raises:
        HTTPException: 400, 408, 413 or 415.
        ClientDisconnect: the client has gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    try:
        async with asyncio.timeout(READ_SECONDS):
            if kind == _FORM:
                uploads = await _parts(request.stream(), options.get("boundary", ""), limits)
            elif kind in ("", "application/octet-stream") or kind.startswith("image/"):
                uploads = [Upload("1", await _body(request, limits))]
            else:
                raise HTTPException(
                    415,
                    f"The content is {kind}. Send an image as the body, with the content type "
                    f"image/* or application/octet-stream, or several in a form ({_FORM}).",
                )
    except TimeoutError:
        problem = f"The request did not arrive within {READ_SECONDS} s. Send smaller images."
        raise HTTPException(408, problem) from None
    if not uploads:
        raise HTTPException(400, "The form has no image. Send one or more.")
    if empty := [upload.name for upload in uploads if not upload.content]:
        raise HTTPException(400, f"The image {empty[0]} is empty. Send its file.")
    return uploads


async def _body(request: Request, limits: Limits) -> bytes:
    """The whole body, unless it is larger than an image may be."""
    most = limits.max_megabytes * 1_000_000
    if int(request.headers.get("content-length", 0)) > most:
        raise _too_large(limits)
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise _too_large(limits)
    return bytes(content)


async def _parts(stream: AsyncIterator[bytes], boundary: str, limits: Limits) -> list[Upload]:
    """The parts of a form, each of which must be an image."""
    uploads: list[Upload] = []
    name, content = "", bytearray()
    try:
        with PushMultipartParser(
            boundary,
            max_segment_size=limits.max_megabytes * 1_000_000,
            max_segment_count=limits.max_images,
        ) as parser:
            async for chunk in stream:
                if not chunk:  # the last of a stream, which the parser would take for a closed one
                    continue
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        name, content = event.filename or str(len(uploads) + 1), bytearray()
                    elif event is not None:
                        content += event
                    else:
                        uploads.append(Upload(name, bytes(content)))
    except ParserLimitReached:
        raise _too_large(limits) from None
    except MultipartError as error:
        problem = f"The form can't be read ({error}). Send each image as a file in {_FORM}."
        raise HTTPException(400, problem) from None
    return uploads


def _too_large(limits: Limits) -> HTTPException:
    return HTTPException(
        413,
        f"The request is too large: expected at most {limits.max_images} images of at most "
        f"{limits.max_megabytes} MB each. Send fewer or smaller images.",
    )


def _check_scans(upload: Upload) -> None:
    """Refuse a JPEG that would be decoded again and again.

    Raises:
        HTTPException: 422.
    """
    scans = upload.content.count(_SCAN) if upload.content.startswith(JPEG) else 0
    if scans > _MOST_SCANS:
        raise HTTPException(
            422,
            f"The image {upload.name} has {scans} scans: expected at most {_MOST_SCANS}. Save it "
            "as a baseline JPEG, or as a PNG.",
        )


def decoded(upload: Upload, limits: Limits) -> Image.Image:
    """Decode an image to RGB, upright, without metadata.

    Raises:
        HTTPException: 413 for too many pixels, 422 for too many scans or what can't be decoded.
    """
    try:
        (width, height), _ = read_header(io.BytesIO(upload.content))
        if width * height > limits.max_megapixels * 1_000_000:
            raise TooManyPixels(f"{width} x {height} pixels")
        _check_scans(upload)
        image = decode(io.BytesIO(upload.content))
    except (MemoryError, HTTPException):  # not the file's fault
        raise
    except (TooManyPixels, Image.DecompressionBombError) as error:
        raise HTTPException(
            413,
            f"The image {upload.name} is too large ({error}): expected at most "
            f"{limits.max_megapixels} million pixels. Send a smaller one.",
        ) from None
    except Exception as error:  # Pillow raises whatever its parsing of a damaged file runs into
        raise HTTPException(
            422,
            f"The image {upload.name} can't be decoded ({reason(error)}). Send a JPEG or PNG.",
        ) from None
    image.info.clear()  # or its orientation would be applied again
    return image
