"""The command line. Each command parses, calls one function, prints what it returns.

Imports that are slow (torch above all) happen inside the command that needs them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from pipeline.errors import GmpipeError

Command = Callable[..., Any]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Run the command line; errors that a user can mend are shown without a traceback."""
    # Before torch is imported. Threads that spin while they wait for each other crawl as soon as
    # another process wants a core: with one beside it on two cores, a training step took 2.4 to 3
    # times as long. Alone, sleeping costs at most a tenth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        cli()
    except GmpipeError as error:
        _fail(str(error))
    except OSError as error:
        if not _is_no_space(error):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        _fail(
            f"no space left on the device{where} ({error}). What was finished before is whole and "
            "stays; make space and run the same command again."
        )


def _is_no_space(error: OSError) -> bool:
    # HDF5 puts the system's error number into its message only.
    return error.errno in _NO_SPACE or any(f"errno = {n}," in str(error) for n in _NO_SPACE)


def _fail(message: str) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(1)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_name="gmpipe")
def cli() -> None:
    """Classify images into many labels at once by matching their regions to the labels.

    The stages, in order: prepare, detector, extract, train, evaluate, report. `dvc repro` runs
    them all and skips what is up to date; `compare` adds seeds. Settings are in params.yaml.

    The variants: full, without-label-graph, without-instance-graph, without-matching-edges,
    max-pool.
    """


def _common(command: Command) -> Command:
    command = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        help="Override a setting of params.yaml, e.g. train.demo.epochs=5; a run with other train "
        "settings gets a folder of its own. Repeatable.",
    )(command)
    return click.option(
        "--dataset", metavar="NAME", help="Entry of params.yaml.  [default: the first active]"
    )(command)


def _run_options(command: Command) -> Command:
    command = click.option(
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="Seed.  [default: the first of params.yaml]",
    )(command)
    return click.option(
        "--variant", metavar="NAME", default="full", help="The network or an ablation of it."
    )(command)


def _plan(dataset: str | None, overrides: tuple[str, ...], variant: str, seed: int | None) -> Any:
    from stages.params import check_variant, dataset_settings, load_params

    settings = dataset_settings(dataset, overrides)
    checked = check_variant(variant)
    from stages.train import plan_run

    return plan_run(settings, checked, load_params(overrides).seeds[0] if seed is None else seed)


@cli.command()
@_common
def prepare(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Write the manifest: which images, which split, which labels."""
    from stages.params import dataset_settings

    settings = dataset_settings(dataset, overrides)
    from stages import prepare as stage

    click.echo(stage.prepare(settings))


@cli.command()
@_common
def detector(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Fit the detector, or resolve its weights."""
    from stages.params import dataset_settings

    settings = dataset_settings(dataset, overrides)
    from stages import detector as stage

    click.echo(stage.resolve_detector(settings))


@cli.command()
@_common
@click.option("--replace", is_flag=True, help="Drop shards that were made with other settings.")
def extract(dataset: str | None, overrides: tuple[str, ...], replace: bool) -> None:
    """Stage one: write every image's regions to the cache."""
    from stages.params import dataset_settings

    settings = dataset_settings(dataset, overrides)
    from stages import extract as stage

    click.echo(stage.extract(settings, replace=replace))


@cli.command()
@_common
@_run_options
def train(dataset: str | None, overrides: tuple[str, ...], variant: str, seed: int | None) -> None:
    """Stage two: train a network from the cache."""
    run = _plan(dataset, overrides, variant, seed)
    from stages import train as stage

    click.echo(stage.train(run))


@cli.command()
@_common
@_run_options
def evaluate(
    dataset: str | None, overrides: tuple[str, ...], variant: str, seed: int | None
) -> None:
    """Score the test split with a trained run."""
    run = _plan(dataset, overrides, variant, seed)
    from stages import evaluate as stage

    click.echo(stage.evaluate(run))


@cli.command()
@_common
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    help="Repeatable.  [default: params.yaml's]",
)
@click.option(
    "--seed",
    "seeds",
    metavar="N",
    multiple=True,
    type=click.IntRange(min=0),
    help="Repeatable.  [default: 0, 1, 2]",
)
def compare(
    dataset: str | None,
    overrides: tuple[str, ...],
    variants: tuple[str, ...],
    seeds: tuple[int, ...],
) -> None:
    """Train missing variants x seeds; print the table."""
    from stages.params import check_variant, dataset_settings, load_params

    settings = dataset_settings(dataset, overrides)
    chosen = [check_variant(name) for name in variants] or load_params(overrides).variants
    from stages import compare as command

    click.echo(command.compare(settings, chosen, seeds or (0, 1, 2)))


@cli.command()
@_common
def report(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Print the table of params.yaml's runs."""
    from stages.params import dataset_settings, load_params

    settings = dataset_settings(dataset, overrides)
    params = load_params(overrides)
    from stages import report as stage

    click.echo(stage.report(settings, params.variants, params.seeds))
