"""Command `predict`: label photographs with a trained run, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import glob
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from pipeline.errors import GmpipeError, InputError
from pipeline.formats.text import counted, markdown_table, printable_lines
from pipeline.images import describe_passed_over, files_below, suffixes
from pipeline.inference.formats import TEXT_WRITERS, Row, Write, file_writer, label_rows
from stages.checkout.models import advising_on_scores, note_undecided, open_run
from stages.console.messages import note, say
from stages.console.progress import progress_bar


def predict(
    names: Sequence[str],
    run_folder: Path,
    detector: Path | None,
    labels: Sequence[str] = (),
    *,
    threshold: float | None,
    top: int | None,
    batch_size: int,
    stdout: str | None,
    output: Path | None,
) -> tuple[int, int]:
    """Print or write the labels of photographs; name on stderr those that can't be read.

    Args:
        names: photographs, folders and patterns.
        run_folder, detector: as `open_run` takes them.
        labels: the only labels to list, which the run need not have been trained with; empty for
            all labels of the run.
        threshold, top: as `label_rows` takes them.
        batch_size: images that the detector processes at once.
        stdout: `json` or `csv`; None for a table, unless a file is written.
        output: file to write: .json, .csv or .parquet.

    Returns:
        how many photographs were labelled, and how many could not be read.

    Raises:
        InputError: a folder or pattern holds no photograph; or no photograph could be read, and
            ``output`` is left as it was.
        NotFinite: what is computed for a photograph is not finite. ``output`` is left as it was.
        GmpipeError: as `open_run`.
    """
    paths = _named_images(names)
    run = open_run(run_folder, detector, labels)
    note_undecided(run, "`--threshold 0 --top 3` gives each photograph's three best labels.")
    labelled = failures = 0
    with ExitStack() as stack:
        column = "probability" if run.checkpoint.decisions else "score"
        writers = [stack.enter_context(writer) for writer in _writers(stdout, output, column)]
        stack.enter_context(advising_on_scores(run.checkpoint.dataset))
        bar = stack.enter_context(progress_bar(total=len(paths), desc="predict", unit="image"))
        for path, outcome in run.predict_files(paths, batch_size=batch_size):
            bar.update(1)
            if isinstance(outcome, GmpipeError):
                failures += 1
                tqdm.write(printable_lines(str(outcome)), file=sys.stderr)
                continue
            rows = label_rows(path, outcome, run, threshold, top, labels)
            for write in writers:
                write(rows)
            labelled += 1
        bar.close()  # before the writers print the rest
        if failures and not labelled and output is not None:
            raise unread(failures, labelled)  # so that a former file stays
    if output is not None and stdout is None:  # with both, the line would mix with the results
        say(f"{output}: {counted(labelled, 'image')}")
    return labelled, failures


def _writers(
    stdout: str | None, output: Path | None, column: str
) -> Iterator[AbstractContextManager[Write]]:
    """What writes the results, as `predict` describes it; ``column`` is for `_table_writer`."""
    if stdout is not None:
        yield TEXT_WRITERS[stdout](sys.stdout)
    elif output is None:
        yield _table_writer(sys.stdout, column)
    if output is not None:
        yield file_writer(output)


def unread(failures: int, labelled: int) -> InputError:
    """Make the error for photographs that can't be read."""
    photographs = counted(failures, "photograph")
    rest = "all others are labelled" if labelled else "none is labelled"
    return InputError(f"{photographs} can't be read, for the reasons above; {rest}.")


def _named_images(names: Sequence[str]) -> list[Path]:
    """`find_images`, with a note on the files of folders that are passed over."""
    images, passed_over = find_images(names)
    if passed_over:
        note(describe_passed_over(passed_over))
    return images


def find_images(names: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """List the photographs that names stand for, each once, in the order of the names.

    A folder stands for the photographs in it and its subfolders, which are known by their suffix.
    A pattern (`*`, `?`, `[...]`, `**`) that is not the name of a file stands for what it matches.
    Any other name stands for itself, whether the file exists or not.

    Returns:
        the photographs; and the number of other files in the folders, by their suffix in lower
        case.

    Raises:
        InputError: a folder or pattern stands for no photograph.
    """
    images: dict[Path, None] = {}
    others: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        matches = [path]
        if glob.has_magic(name) and not path.exists():
            # Path.glob takes no absolute patterns.
            matches = [Path(m) for m in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        of_name: list[Path] = []
        passed_over: list[Path] = []
        for match in matches:
            if not match.is_dir():
                of_name.append(match)
                continue
            for file in files_below(match):
                known = file.suffix.lower() in suffixes()
                (of_name if known else passed_over).append(file)
        if not of_name:
            problem = "The folder holds no photograph" if path.is_dir() else "Nothing matches"
            found = f" {describe_passed_over(_by_suffix(passed_over))}" if passed_over else ""
            raise InputError(
                f"{problem}: {name}.{found}", "Name photographs, or a folder that holds some."
            )
        images.update(dict.fromkeys(of_name))
        others.update(dict.fromkeys(passed_over))
    return list(images), _by_suffix(file for file in others if file not in images)


def _by_suffix(files: Iterable[Path]) -> Counter[str]:
    return Counter(file.suffix.lower() for file in files)


@contextmanager
def _table_writer(stream: TextIO, column: str) -> Iterator[Write]:
    """Print a table of predicted labels; of an image without any, its best label marked `none`.

    Args:
        stream: to print to.
        column: what the probabilities are called: `score` if the run has fitted no other ones.
    """
    lines: list[list[str]] = []

    def write(rows: list[Row]) -> None:
        predicted = [row for row in rows if row["predicted"]]
        for row in predicted:
            lines.append([row["image"], row["label"], f"{row['probability']:.3f}"])
        if not predicted:
            best = rows[0]
            shown = f"{best['probability']:.3f}"
            lines.append([best["image"], f"none; best: {best['label']}", shown])

    yield write
    if lines:
        stream.write(f"{markdown_table(['image', 'label', column], lines)}\n")
