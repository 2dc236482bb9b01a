"""pipeline.datasets.check: which images can't be decoded or are duplicates."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.datasets.check import Findings, check_files
from pipeline.datasets.manifest import COLUMNS, Manifest, full_counts


def check_contents(root: Path, contents: dict[str, bytes]) -> Findings:
    """Check files with these contents; the last is in test, all others in train."""
    rows = [
        {
            "image_id": name,
            "path": f"i/{name}",
            "split": "train" if number < len(contents) - 1 else "test",
            "labels": [0],
            "ignored": [],
        }
        for number, name in enumerate(contents)
    ]
    (root / "i").mkdir(parents=True)
    for name, content in contents.items():
        (root / "i" / name).write_bytes(content)
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    manifest = Manifest("pets", "own", ("cat",), {}, full_counts(table), table)
    seen: list[int] = []
    findings = check_files(manifest, root, seen.append)
    assert sum(seen) == findings.images == len(contents)
    return findings


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
        content = bytearray(encode("BMP", side=4))
        content[18:26] = side.to_bytes(4, "little") * 2
        return bytes(content)

    findings = check_contents(tmp_path, {"large": header(11_000), "bomb": header(40_000)})
    [(image, reason)] = findings.unreadable
    assert image.image_id == "bomb"
    assert re.search("DecompressionBombError: .*1600000000 pixels", reason)
