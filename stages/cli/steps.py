"""The six stages that `dvc repro` runs, as commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from stages.cli.exit_codes import FAILED
from stages.cli.options import check_variants, request_options, run_options
from stages.console.messages import say

if TYPE_CHECKING:
    from stages.checkout.params import Request
    from stages.checkout.plans import RunPlan


@click.command()
@request_options
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing. List the images that are missing, unreadable, duplicate or unlabelled, "
    "and count the labels. Fails if more images are missing or unreadable than `drop_missing` and "
    "`max_failures` in params.yaml allow.",
)
@click.option(
    "--list",
    "list_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --check: write a CSV of all images that are missing, unreadable or unlabelled.",
)
@click.pass_context
def prepare(context: click.Context, request: Request, check: bool, list_file: Path | None) -> None:
    """Write the manifest: images, splits and labels."""
    from stages import prepare as stage

    if list_file and not check:
        raise click.UsageError("`--list` needs `--check`: add it to the command.")
    if not check:
        say(stage.prepare(request))
        return
    findings, sound = stage.check(request, list_file)
    click.echo(findings)
    if not sound:
        context.exit(FAILED)


@click.command()
@request_options
def detector(request: Request) -> None:
    """Fit the detector, or find or download its weights."""
    from stages import detector as stage

    say(stage.resolve_detector(request))


@click.command()
@request_options
@click.option("--replace", is_flag=True, help="Drop shards that were made with other settings.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tolerate up to N undecodable images.  [default: `max_failures` in params.yaml]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Address of a Dask scheduler whose workers share this file system.  [default: a cluster "
    "on this machine, with one worker per GPU, or without a GPU one worker for all cores]",
)
@click.option(
    "--resource",
    "resources",
    metavar="NAME=AMOUNT",
    multiple=True,
    help="Dask resource that a worker needs to extract a shard, e.g. GPU=1. Repeatable.",
)
def extract(
    request: Request,
    replace: bool,
    max_failures: int | None,
    scheduler: str | None,
    resources: tuple[str, ...],
) -> None:
    """Write every image's regions to the cache.

    An extraction that was killed continues with the missing shards. If the cache was made with
    other settings, this fails unless --replace is given.
    """
    if max_failures is not None:
        request = request.overriding(f"extract.{request.dataset}.max_failures={max_failures}")
    amounts = dict(_resource(text) for text in resources)
    from stages import extract as stage

    say(stage.extract(request, replace=replace, workers=stage.Workers(scheduler, amounts)))


def _resource(text: str) -> tuple[str, float]:
    """A Dask resource and its amount, from `NAME=AMOUNT`."""
    name, _, amount = text.partition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected NAME=AMOUNT, e.g. GPU=1", param_hint="--resource"
        ) from None


@click.command()
@request_options
@run_options
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Also write loss, gradient norm, learning rate and validation mAP of each epoch to the "
    "folder `tensorboard` of the run.",
)
def train(request: Request, variant: str, seed: int | None, tensorboard: bool) -> None:
    """Train a network on the cached regions.

    A training that was killed resumes where it stopped. `torchrun --no-python --nproc-per-node N
    gmpipe train` trains with N processes, each of which takes `batch_size` images per step.
    """
    run = _plan(request, variant, seed)
    from stages import train as stage

    line = stage.train(run, tensorboard=tensorboard)
    if line is not None:  # only the first of several processes reports
        say(line)


@click.command()
@request_options
@run_options
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Put the scores of another model beside the runs, instead of a run: a CSV, TSV or Parquet "
    "file with a column `image_id` and a column per label, probabilities of all test images.",
)
@click.option("--logits", is_flag=True, help="With --scores: the scores are logits.")
@click.option(
    "--average",
    metavar="RUN",
    multiple=True,
    help="Put the average of runs beside them, instead of a run: the mean of the probabilities of "
    "the runs of these names, such as full-s0. Repeat it for each of two or more runs.",
)
@click.option(
    "--name",
    metavar="NAME",
    help="With --scores or --average: what tables call it.  [default: the name of FILE, or "
    "average]",
)
@click.pass_context
def evaluate(
    context: click.Context,
    request: Request,
    variant: str,
    seed: int | None,
    scores: Path | None,
    logits: bool,
    average: tuple[str, ...],
    name: str | None,
) -> None:
    """Score a trained run on the test split.

    --scores and --average measure other scores of it. What they make is in
    runs/<dataset>/entries/NAME/. `gmpipe compare` and `gmpipe report` show it beside the runs.
    """
    if scores is None and not average:
        if logits or name is not None:
            raise click.UsageError("`--logits` and `--name` are for `--scores` or `--average`.")
        run = _plan(request, variant, seed)
        from stages import evaluate as stage

        say(stage.evaluate(run))
        return
    chosen = context.get_parameter_source("variant") is not ParameterSource.DEFAULT
    if chosen or seed is not None or request.overrides or (scores is not None and average):
        raise click.UsageError(
            "`--scores` and `--average` can't be combined with each other or with `--variant`, "
            "`--seed` or `--set`: leave one out."
        )
    if average and logits:
        raise click.UsageError("`--logits` is for `--scores`: leave it out.")
    from stages.commands.runs import beside

    if scores is not None:
        say(beside.evaluate_scores(request, scores, name, logits=logits))
    else:
        say(beside.evaluate_average(request, average, name))


def _plan(request: Request, variant: str, seed: int | None) -> RunPlan:
    """Plan the run that the options of `run_options` ask for."""
    check_variants(request, [variant])
    from stages.checkout.plans import plan_run

    return plan_run(request, variant, request.params.seeds[0] if seed is None else seed)


@click.command()
@request_options
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1000,
    metavar="N",
    help="Largest number of test images in the gallery; if there are more, a random sample is "
    "shown.",
)
def report(request: Request, images: int) -> None:
    """Write a page about a data set's runs; print its tables.

    The page is reports/<dataset>/index.html. Open it in a browser: it needs no server, and its
    folder can be moved or zipped.
    """
    from stages import report as stage

    params = request.params
    tables, page = stage.report(request, params.variants, params.seeds, images=images)
    click.echo(tables)
    say(str(page))


STAGES = (prepare, detector, extract, train, evaluate, report)
"""The stages in the order in which `dvc repro` runs them."""
