"""Commands that use a trained run on new images, or write it for other programs and machines."""

from __future__ import annotations

from pathlib import Path

import click

from stages.cli.completion import complete_run
from stages.cli.options import (
    bundle_option,
    dataset_of_run_option,
    detector_option,
    output_option,
    trained_run_options,
)
from stages.console.messages import say


def _label_names(_: click.Context, parameter: click.Parameter, names: str) -> tuple[str, ...]:
    labels = tuple(name.strip() for name in names.split(",")) if names else ()
    if "" in labels:
        raise click.BadParameter(f"{names!r} has an empty name: write commas between labels only")
    return labels


@click.command()
@click.argument("images", metavar="IMAGE|FOLDER|GLOB...", nargs=-1, required=True)
@trained_run_options
@detector_option
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    metavar="SCORE",
    help="Predict the labels with a score (calibrated, if the run has a calibration) above this; 0 "
    "predicts all labels.  [default: the thresholds that the run fitted, else 0.5]",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help="Predict at most the N best labels of an image.  [default: any number]",
)
@click.option(
    "--labels",
    metavar="NAME,NAME,...",
    default="",
    show_default=False,
    callback=_label_names,
    help="List only these labels. The run need not have been trained with them if its head reads "
    "labels by their vectors, as GM-MLIC does.  [default: the labels of the run]",
)
@click.option("--json", "stdout", flag_value="json", help="Print JSON: a list of images.")
@click.option("--csv", "stdout", flag_value="csv", help="Print CSV: one row per image and label.")
@output_option(
    ".json",
    ".csv",
    ".parquet",
    help_text="File to write instead of printing a table: .json, .csv or .parquet.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1, 10_000),
    default=8,
    metavar="N",
    help="Number of images that the detector processes at once.",
)
def predict(
    images: tuple[str, ...],
    run_folder: Path,
    detector: Path | None,
    threshold: float | None,
    top: int | None,
    labels: tuple[str, ...],
    stdout: str | None,
    output: Path | None,
    batch_size: int,
) -> None:
    """Predict the labels of photographs with a trained run.

    Folders and their subfolders are searched for files with the suffix of a supported format.
    The printed table has the predicted labels only. JSON, CSV and Parquet have all labels. For
    each they say whether it is predicted and which region won it, with the region's box in pixels.

    A photograph that can't be read is named on stderr. The others are still labelled, and the exit
    code is 1.
    """
    from stages.commands import predict as command

    labelled, failures = command.predict(
        images,
        run_folder,
        detector,
        labels,
        threshold=threshold,
        top=top,
        batch_size=batch_size,
        stdout=stdout,
        output=output,
    )
    if failures:
        raise command.unread(failures, labelled)


@click.command()
@click.argument("image", metavar="IMAGE", type=click.Path(path_type=Path))
@trained_run_options
@detector_option
@click.option(
    "--label",
    "labels",
    metavar="NAME",
    multiple=True,
    help="Label to explain, whatever its score; may be given several times.  [default: the "
    "predicted labels]",
)
@output_option(".png", required=True, help_text="PNG file to write.")
def explain(
    image: Path,
    run_folder: Path,
    detector: Path | None,
    labels: tuple[str, ...],
    output: Path,
) -> None:
    """Explain which regions and graphs produced the labels.

    Draws the explanation of a photograph and prints it as tables. For each predicted label
    (or for the best one, if none is), they give the region that won it, and how its score
    changes when the label graph, the instance graph or a region is removed. For each change the
    network is run again without that part.

    With `--label`, it explains the labels that you name instead, whatever their scores: for
    instance a label that you expected and that is not predicted.
    """
    from stages.commands import explain as command

    click.echo(command.explain(image, run_folder, detector, output, labels))
    say(f"\n{output}")


@click.command()
@trained_run_options
@detector_option
@output_option(
    ".onnx",
    help_text="File to write: .onnx.  [default: <dataset>-<run>.onnx in the current folder]",
)
@bundle_option
def export(
    run_folder: Path, detector: Path | None, output: Path | None, bundle: Path | None
) -> None:
    """Write a run as an ONNX file or as a bundle.

    An ONNX file has the network of the run without the detector. It takes any number of images,
    each with any number of regions, in the form in which a cache holds them. The label vectors are
    part of the file.

    A bundle is a folder with the run and its detector. It takes the place of a run in `predict`,
    `explain` and `serve`, also on a machine without this checkout.
    """
    from stages.commands import export as command

    if bundle is None and detector is not None:
        raise click.UsageError("--detector is for a bundle: the network alone needs none.")
    if bundle is None:
        say(command.export(run_folder, output))
    elif output is None:
        say(command.export_bundle(run_folder, detector, bundle))
    else:
        raise click.UsageError("--bundle and --output exclude each other.")


@click.command()
@click.argument("run", metavar="BUNDLE|RUN", shell_complete=complete_run)
@dataset_of_run_option
@click.option(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8000,
    metavar="N",
    help="Port to listen on; 0 for any that is free.",
)
@click.option(
    "--max-images",
    type=click.IntRange(1, 1000),
    default=8,
    metavar="N",
    help="Largest number of images in a request.",
)
@click.option(
    "--max-megabytes",
    type=click.IntRange(1, 1000),
    default=10,
    metavar="N",
    help="Largest size of an image's file.",
)
@click.option(
    "--max-megapixels",
    type=click.IntRange(1, 178),
    default=40,
    metavar="N",
    help="Largest number of pixels of an image.",
)
@click.option(
    "--max-requests",
    type=click.IntRange(1, 1000),
    default=16,
    metavar="N",
    help="Largest number of requests at the same time; others are told to come back later.",
)
def serve(run: str, dataset: str | None, host: str, port: int, **limits: int) -> None:
    """Label photographs over HTTP.

    POST photographs to /predict, as the body of a request or as the parts of a form, and get the
    JSON of `gmpipe predict --json`. GET /health says which run it is. There is no encryption and no
    password: put it behind a server that has them.

    Requests are answered one after another. SIGTERM or Ctrl-C ends the service once all accepted
    requests are answered. Each request is a line on stderr, unless --quiet is given.
    """
    from stages.commands.runs.listing import check_run, find_run
    from stages.commands.serving import serve as command

    folder = find_run(run, dataset)
    check_run(folder)
    command.serve(folder, host, port, **limits)
