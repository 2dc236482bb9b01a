"""pipeline.datasets.check: which images can't be decoded or are duplicates."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from trees import check_contents


def encode(kind: str, seed: int = 0, side: int = 90, **options: Any) -> bytes:
    """A square image of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, kind, **options)
    return stream.getvalue()


def test_duplicates_have_equal_content(tmp_path: Path) -> None:
    """Files of equal size, or of equal size with equal ends, may differ in between."""
    image = encode("BMP")
    assert len(image) > 3 * 4096
    middle = bytearray(image)
    middle[len(image) // 2] ^= 1
    other = bytearray(image)
    other[-1] ^= 1
    contents = {"a": image, "b": bytes(middle), "c": bytes(other), "d": image, "e": bytes(middle)}
    findings = check_contents(tmp_path, contents)
    groups = [[image.image_id for image in group] for group in findings.duplicates]
    assert sorted(groups) == [["a", "d"], ["b", "e"]]
    assert {image.split for image in findings.duplicates[1]} == {"train", "test"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_images_are_found_and_appended_bytes_accepted(tmp_path: Path, kind: str) -> None:
    whole = encode(kind)
    contents = {
        "whole": whole,
        "more": whole + b"\0" * 10_000,
        "cut": whole[: len(whole) // 2],
        "cut-at-the-end": whole[:-100],
        "last": encode(kind, 1),
    }
    findings = check_contents(tmp_path, contents)
    assert [image.image_id for image, _ in findings.unreadable] == ["cut", "cut-at-the-end"]


def test_end_of_a_thumbnail_is_not_the_end_of_the_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "\xff\xd9".encode("latin-1") * 30
    whole = encode("JPEG", exif=exif)
    assert whole.count(b"\xff\xd9") > 30
    findings = check_contents(tmp_path, {"cut": whole[:-3000], "whole": whole})
    assert [image.image_id for image, _ in findings.unreadable] == ["cut"]


def test_large_images_are_accepted_and_decompression_bombs_refused(tmp_path: Path) -> None:
    def header(side: int) -> bytes:
        content = bytearray(encode("JPEG", side=8))
        size = content.index(b"\xff\xc0") + 5  # precision, then height and width
        content[size : size + 4] = side.to_bytes(2, "big") * 2
        return bytes(content)

    contents = {"large": header(13_000), "huge": header(14_000), "bomb": header(40_000)}
    (huge, reason), (bomb, other) = check_contents(tmp_path, contents).unreadable
    assert (huge.image_id, bomb.image_id) == ("huge", "bomb")
    assert re.search("14000 x 14000 pixels", reason)
    assert re.search("1600000000 pixels", other)
