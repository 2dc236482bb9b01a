"""What a file is that should hold weights and does not, by its first bytes."""

from __future__ import annotations

import io
import shlex
import zipfile
from pathlib import Path

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes -> the program that unpacks it with the options `-dc`."""

_OF_OTHERS = {
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x93NUMPY": "an array of NumPy",
}

_PAGES = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")


def foreign_format(path: Path, stored: bytes, use_others: str, name_it: str) -> tuple[str, str]:
    """Name the format of a file that torch did not write, and say what to do about it.

    Args:
        path: of the file, for messages.
        stored: its bytes.
        use_others: the advice for weights of other programs.
        name_it: the end of a sentence, which tells where to name the weights.

    Returns:
        what the file is, and the remedy; empty texts if that is not known.
    """
    again = "Copy or download the file again."
    if not stored:
        return "it is empty", again
    if stored[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        what = "it is a web page, not weights: the download failed or needs a login"
        return what, f"Open its address in a browser, download the weights themselves{name_it}"
    if stored.startswith(b"version https://git-lfs"):
        what = "it is a pointer of Git LFS, whose content was not fetched"
        return what, (
            "Run `git lfs pull` in the repository that it came from, and copy the file again."
        )
    if stored[8:10] == b'{"':
        return "it is a safetensors file", (
            "Convert it, `import torch, safetensors.torch; torch.save("
            f"safetensors.torch.load_file({str(path)!r}), 'weights.pt')`{name_it}"
        )
    for start, program in _PACKED.items():
        if stored.startswith(start):
            # Into another file, since the shell empties its target before the program reads.
            target = "unpacked.pt" if path.name == "weights.pt" else "weights.pt"
            return f"it is packed by {program}", (
                f"Unpack it, `{program} -dc {shlex.quote(str(path))} > {target}`"
                f"{name_it.replace('weights.pt', target)}"
            )
    if stored[257:262] == b"ustar":
        return "it is a tar archive", f"Unpack it, `tar -xf {shlex.quote(str(path))}`{name_it}"
    for start, what in _OF_OTHERS.items():
        if stored.startswith(start):
            return f"it is {what}", use_others
    # Of ONNX's two first fields, each begins with its number: a version and the producer's name.
    if stored[:1] == b"\x08" and stored[2:3] == b"\x12":
        return "it is an ONNX file", use_others
    return _other_zip(stored, use_others, name_it)


def _other_zip(stored: bytes, use_others: str, name_it: str) -> tuple[str, str]:
    """As `foreign_format`, for a zip without torch's members."""
    try:
        with zipfile.ZipFile(io.BytesIO(stored)) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "", ""
    if any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        return "", ""
    if names and all(name.endswith(".npy") for name in names):
        return "it is an npz of NumPy", use_others
    what = f"it is a zip of other files: {', '.join(names[:3]) or 'none'}"
    return what, f"If the weights are among them, unpack it{name_it}"
