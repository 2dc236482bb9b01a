"""The command line. Each command parses, calls one function, prints what it returns.

What was asked for is printed with `click.echo`, a line on what was done and where it went with
`say`, which is silent under `--quiet`.

Imports that are slow (torch above all) happen inside the command that needs them.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.errors import GmpipeError, Stopped
from pipeline.files import naming_a_full_disk
from stages.cli.completion import (
    SHELLS,
    complete_dataset,
    complete_run,
    complete_setting,
    complete_train_setting,
    complete_variant,
    script,
)
from stages.console.messages import QUIET, VERBOSE, is_verbose, say, set_level, speaking

Command = Callable[..., Any]
_AnyCommand = TypeVar("_AnyCommand", bound=click.Command)

DONE, FAILED, STOPPED = 0, 1, 130
"""Exit codes, beside click's 2 for wrong usage; 130 is what shells give for Ctrl-C."""


def main() -> None:
    """Run the command line; errors that a user can mend are shown without a traceback."""
    # Before torch is imported. Threads that spin while they wait for each other crawl as soon as
    # another process wants a core: with one beside it on two cores, a training step took 2.4 to 3
    # times as long. Alone, sleeping costs at most a tenth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with speaking():
        sys.exit(_run())


def _run() -> int:
    """Run the command; its exit code."""
    try:
        with naming_a_full_disk():
            code: int | None = cli.main(prog_name="gmpipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # what click makes of Ctrl-C
        return _fail("stopped. What was finished stays; the same command goes on.", STOPPED)
    except Stopped as error:
        return _fail(str(error), STOPPED)
    except GmpipeError as error:
        return _fail(str(error))
    return code or DONE


def _fail(message: str, code: int = FAILED) -> int:
    if is_verbose():
        traceback.print_exc()
    click.echo(f"Error: {message}", err=True)
    return code


def _choose_level(context: click.Context, parameter: click.Parameter, chosen: bool) -> None:
    if chosen:
        levels = context.meta.setdefault(f"{__name__}.levels", set())
        levels.add(QUIET if parameter.name == "quiet" else VERBOSE)
        if len(levels) > 1:
            raise click.UsageError("--quiet and --verbose: choose one of them.", context)
        set_level(*levels)


def _level_options(command: _AnyCommand) -> _AnyCommand:
    for name, help_text in (
        ("quiet", "Say nothing but errors and the results that were asked for."),
        ("verbose", "Also say what is read and written, and where an error comes from."),
    ):
        command = click.option(
            f"--{name}",
            f"-{name[0]}",
            is_flag=True,
            expose_value=False,
            callback=_choose_level,
            help=help_text,
        )(command)
    return command


class _Commands(click.Group):
    """A group whose commands all take `--quiet` and `--verbose` as well."""

    group_class = type

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        super().add_command(_level_options(cmd), name)


@_level_options
@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="gmpipe")
def cli() -> None:
    """Classify images into many labels at once by matching their regions to the labels.

    The stages, in order: prepare, detector, extract, train, evaluate, report. `dvc repro` runs
    them all and skips what is up to date; `compare` adds seeds, `sweep` varies a setting. Settings
    are in params.yaml.

    The variants: full, without-label-graph, without-instance-graph, without-matching-edges,
    max-pool.

    Exit codes: 0 done; 1 failed, and the message says why; 2 wrong usage; 130 stopped by Ctrl-C.

    Progress goes to stderr: bars in a terminal; elsewhere lines, at the start, every 30 s and at
    the end. --quiet and --verbose can stand before or after the command.
    """


_dataset_option = click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=complete_dataset,
    help="Entry of params.yaml.  [default: the first of `datasets`]",
)


def _common(command: Command) -> Command:
    command = click.option(
        "--set",
        "overrides",
        metavar="KEY=VALUE",
        multiple=True,
        shell_complete=complete_setting,
        help="Override a setting of params.yaml, e.g. train.demo.epochs=5; a run with other train "
        "settings gets a folder of its own. Repeatable.",
    )(command)
    return _dataset_option(command)


_variant_option = click.option(
    "--variant",
    metavar="NAME",
    default="full",
    shell_complete=complete_variant,
    help="The network or an ablation of it.",
)


def _run_options(command: Command) -> Command:
    command = click.option(
        "--seed",
        type=click.IntRange(min=0),
        metavar="N",
        help="Seed.  [default: the first of params.yaml]",
    )(command)
    return _variant_option(command)


def _seeds_option(default: str) -> Callable[[Command], Command]:
    return click.option(
        "--seed",
        "seeds",
        metavar="N",
        multiple=True,
        type=click.IntRange(min=0),
        help=f"Repeatable.  [default: {default}]",
    )


def _jobs_option(command: Command) -> Command:
    return click.option(
        "--jobs",
        type=click.IntRange(min=1),
        metavar="N",
        help="Runs to make at a time, in processes of one thread each.  [default: one a core; on "
        "a GPU 1]",
    )(command)


def _plan(dataset: str | None, overrides: tuple[str, ...], variant: str, seed: int | None) -> Any:
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    request.variant(variant, "--variant")
    from stages.checkout.plans import note_other_regions, note_unused_overrides, plan_run

    note_other_regions(request)
    note_unused_overrides(request, [variant])
    return plan_run(request, variant, request.params.seeds[0] if seed is None else seed)


@cli.command()
@_common
@click.option(
    "--check",
    is_flag=True,
    help="Open every image's header, and the whole of a JPEG or PNG file that seems cut off; say "
    "which are missing, unreadable, duplicate or unlabelled, and count labels; write nothing. "
    "Fails if any is missing or unreadable.",
)
def prepare(dataset: str | None, overrides: tuple[str, ...], check: bool) -> None:
    """Write the manifest: images, split, labels."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages import prepare as stage

    if check:
        text, sound = stage.check(request)
        click.echo(text)
        sys.exit(DONE if sound else FAILED)
    say(stage.prepare(request))


@cli.command()
@_common
def detector(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Fit the detector, or resolve its weights."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages import detector as stage

    say(stage.resolve_detector(request))


@cli.command()
@_common
@click.option("--replace", is_flag=True, help="Drop shards that were made with other settings.")
@click.option(
    "--max-failures",
    type=click.IntRange(min=0),
    metavar="N",
    help="Undecodable images to go on without.  [default: params.yaml's max_failures]",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Dask scheduler whose workers share this file system.  [default: a cluster on this "
    "machine, a worker for each GPU, or one for all cores]",
)
@click.option(
    "--resource",
    "resources",
    metavar="NAME=AMOUNT",
    multiple=True,
    help="Dask resource that a shard's worker must have, e.g. GPU=1. Repeatable.",
)
def extract(
    dataset: str | None,
    overrides: tuple[str, ...],
    replace: bool,
    max_failures: int | None,
    scheduler: str | None,
    resources: tuple[str, ...],
) -> None:
    """Stage one: write every image's regions to the cache."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    if max_failures is not None:
        request = request.overriding(f"extract.{request.dataset}.max_failures={max_failures}")
    from stages import extract as stage

    line = stage.extract(
        request,
        replace=replace,
        workers=stage.Workers(scheduler, dict(_resource(text) for text in resources)),
    )
    say(line)


def _resource(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        return name, float(amount)
    except ValueError:
        raise click.BadParameter(
            f"{text!r}: expected NAME=AMOUNT, e.g. GPU=1", param_hint="--resource"
        ) from None


@cli.command()
@_common
def labels(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Print what each label's vector was taken from."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages.commands import labels as command

    click.echo(command.labels(request))


@cli.command("import-regions")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@_common
@click.option(
    "--form",
    type=click.Choice(["npz", "bottom-up"]),
    help="What FILE is: an npz of arrays, or bottom-up-attention TSV, of which several can be "
    "named.  [default: by its suffix, .npz or .tsv]",
)
@click.option("--replace", is_flag=True, help="Drop shards that were made from something else.")
def import_regions(
    files: tuple[Path, ...],
    dataset: str | None,
    overrides: tuple[str, ...],
    form: Any,
    replace: bool,
) -> None:
    """Bring regions that were made elsewhere into the cache."""
    from stages.checkout.params import read_request
    from stages.commands import import_regions as stage

    chosen = stage.check_described(dataset, overrides, files, form)
    request = read_request(dataset, overrides)
    say(stage.import_regions(request, files, chosen, replace=replace))


@cli.command()
@_common
@_run_options
@click.option(
    "--tensorboard",
    is_flag=True,
    help="Also write loss, gradient norm, learning rate and validation mAP of each epoch to the "
    "run's folder `tensorboard`.",
)
def train(
    dataset: str | None,
    overrides: tuple[str, ...],
    variant: str,
    seed: int | None,
    tensorboard: bool,
) -> None:
    """Stage two: train a network from the cache.

    A killed training continues where it was. `torchrun --no-python --nproc-per-node N gmpipe
    train` trains with N processes, each with a batch of its own.
    """
    run = _plan(dataset, overrides, variant, seed)
    from stages import train as stage

    line = stage.train(run, tensorboard=tensorboard)
    if line is not None:  # of several processes one speaks
        say(line)


@cli.command()
@_common
@_run_options
def evaluate(
    dataset: str | None, overrides: tuple[str, ...], variant: str, seed: int | None
) -> None:
    """Score the test split with a trained run."""
    run = _plan(dataset, overrides, variant, seed)
    from stages import evaluate as stage

    say(stage.evaluate(run))


@cli.command()
@_common
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_variant,
    help="Repeatable.  [default: params.yaml's]",
)
@_seeds_option("0, 1, 2")
@_jobs_option
def compare(
    dataset: str | None,
    overrides: tuple[str, ...],
    variants: tuple[str, ...],
    seeds: tuple[int, ...],
    jobs: int | None,
) -> None:
    """Train missing variants x seeds; print tables.

    They tell mean, spread, and each variant's difference in mAP to `full` with its 95 % interval
    over the test images.

    Runs beside each other have one thread each, a run alone has all. The number of threads changes
    how sums are rounded, and with it the last digits of a run's numbers.
    """
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    for name in variants:
        request.variant(name, "--variant")
    chosen = variants or request.params.variants
    from stages.checkout.plans import note_other_regions, note_unused_overrides

    note_other_regions(request)
    note_unused_overrides(request, chosen)
    from stages.commands import compare as command

    click.echo(command.compare(request, chosen, seeds or (0, 1, 2), jobs=jobs))


@cli.command()
@click.argument("setting", metavar="KEY=VALUE,VALUE,...", shell_complete=complete_train_setting)
@_common
@_variant_option
@_seeds_option("those of params.yaml")
@_jobs_option
def sweep(
    setting: str,
    dataset: str | None,
    overrides: tuple[str, ...],
    variant: str,
    seeds: tuple[int, ...],
    jobs: int | None,
) -> None:
    """Train with several values of a setting.

    KEY is any setting of train.<dataset>, e.g. regions=2,4,6,8,10 or network.modules=1,2,3,4 (the
    paper's Figure 4). Prints a table, and writes it with a figure of mAP to
    runs/<dataset>/sweeps/KEY/. Runs that are there already are reused.

    Runs beside each other have one thread each, a run alone has all. The number of threads changes
    how sums are rounded, and with it the last digits of a run's numbers.
    """
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    request.variant(variant, "--variant")
    from stages.checkout.plans import note_other_regions, note_unused_overrides

    note_other_regions(request)
    note_unused_overrides(request, [variant])
    chosen = seeds or request.params.seeds
    from stages.commands import sweep as command

    table, where = command.sweep(setting, request, variant, chosen, jobs=jobs)
    click.echo(table)
    say(f"\n{where}")


@cli.command()
@_common
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1000,
    metavar="N",
    help="Test images that the gallery shows at most; of more, a random sample.",
)
def report(dataset: str | None, overrides: tuple[str, ...], images: int) -> None:
    """Write the page of a data set's runs; print its tables.

    The page is reports/<dataset>/index.html: open it in a browser. It needs no server, and its
    folder can be moved and zipped.
    """
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages import report as stage

    params = request.params
    text, page = stage.report(request, params.variants, params.seeds, images=images)
    click.echo(text)
    say(str(page))


def _trained_options(command: Command) -> Command:
    command = click.option(
        "--detector",
        metavar="FOLDER",
        type=click.Path(path_type=Path),
        help="The detector whose regions the run was trained on.  [default: "
        "data/<dataset>/detector of the run's checkout]",
    )(command)
    return _trained_option(command)


_trained_option = click.option(
    "--run",
    "run_folder",
    metavar="RUN",
    required=True,
    type=click.Path(path_type=Path),
    shell_complete=complete_run,
    help="Folder of a trained run, e.g. runs/demo/full-s0.",
)


def _written(*suffixes: str) -> Callable[[Any, Any, Path | None], Path | None]:
    """A check of an option that names a file to write."""

    def check(context: Any, option: Any, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in suffixes:
            raise click.BadParameter(
                f"{path}: expected a name that ends in {' or '.join(suffixes)}"
            )
        return path

    return check


@cli.command()
@click.argument("images", metavar="IMAGE|FOLDER|GLOB...", nargs=-1, required=True)
@_trained_options
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1),
    default=0.5,
    metavar="SCORE",
    help="A label is predicted if its score is above; 0 is all labels.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help="Predict an image's N best labels at most.  [default: any number]",
)
@click.option("--json", "stdout", flag_value="json", help="Print JSON: a list of images.")
@click.option("--csv", "stdout", flag_value="csv", help="Print CSV: a row a label of an image.")
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_written(".json", ".csv", ".parquet"),
    help="Write a file instead of a table: .json, .csv or .parquet.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    default=8,
    metavar="N",
    help="Images that the detector takes at once.",
)
def predict(
    images: tuple[str, ...],
    run_folder: Path,
    detector: Path | None,
    threshold: float,
    top: int | None,
    stdout: str | None,
    output: Path | None,
    batch_size: int,
) -> None:
    """Label photographs with a trained run.

    Folders are searched with their subfolders. The table on the terminal has the predicted labels;
    JSON, CSV and Parquet have all labels, whether each is predicted, and the region that won it
    with its box in pixels.

    A photograph that can't be read is named on stderr, the others go on, and the exit code is 1.
    """
    from stages.commands import predict as command
    from stages.commands.runs import check_run

    check_run(run_folder)
    labelled, failures = command.predict(
        images,
        run_folder,
        detector,
        threshold=threshold,
        top=top,
        batch_size=batch_size,
        stdout=stdout,
        output=output,
    )
    if failures:
        number = "1 photograph" if failures == 1 else f"{failures} photographs"
        rest = "all others are labelled" if labelled else "none is labelled"
        raise GmpipeError(f"{number} can't be read, for the reasons above; {rest}.")


@cli.command()
@click.argument("image", metavar="IMAGE", type=click.Path(path_type=Path))
@_trained_options
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_written(".png"),
    help="Picture to write: .png.",
)
def explain(image: Path, run_folder: Path, detector: Path | None, output: Path) -> None:
    """Show what a photograph's labels are owed to.

    For each label with a score above 0.5, or the best one if there is none: the region that won
    it, and how its score changes when the label graph, the instance graph or a region is taken
    away. The network really runs without them.
    """
    from stages.commands import explain as command
    from stages.commands.runs import check_run

    check_run(run_folder)
    click.echo(command.explain(image, run_folder, detector, output))
    say(f"\n{output}")


@cli.command()
@_trained_option
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_written(".onnx"),
    help="File to write: .onnx.  [default: <dataset>-<run>.onnx in the current folder]",
)
def export(run_folder: Path, output: Path | None) -> None:
    """Write a run's network as ONNX.

    Its inputs are the regions of any number of images, any number of each, as a cache holds them;
    the label vectors are part of it.
    """
    from stages.commands import export as command
    from stages.commands.runs import check_run

    check_run(run_folder)
    say(command.export(run_folder, output))


@cli.group()
def runs() -> None:
    """Look after the runs of a data set."""


@runs.command("list")
@_dataset_option
def list_runs(dataset: str | None) -> None:
    """Print every run, and whether params.yaml names it.

    Of a run with other settings than those of params.yaml (--set, sweep) also these settings.
    """
    from stages.checkout.params import read_request
    from stages.commands import runs as command

    request = read_request(dataset)
    click.echo(command.list_runs(request, request.params.variants, request.params.seeds))


@runs.command()
@_dataset_option
@click.option("--dry-run", is_flag=True, help="Only print what would go.")
def prune(dataset: str | None, dry_run: bool) -> None:
    """Remove runs that params.yaml does not name.

    Those are runs of variants and seeds that it does not list, runs with other settings (--set,
    sweep), and the tables and figures of sweeps. A run that is being made stays, and so does
    everything that gmpipe did not write.
    """
    from stages.checkout.params import read_request
    from stages.commands import runs as command

    request = read_request(dataset)
    said = command.prune(
        request.dataset, request.params.variants, request.params.seeds, dry_run=dry_run
    )
    (click.echo if dry_run else say)(said)


@cli.command()
@click.argument(
    "section",
    metavar="[SECTION]",
    required=False,
    type=click.Choice(["prepare", "detector", "extract", "train"]),
)
def settings(section: str | None) -> None:
    """Print what params.yaml may hold: all, or a section.

    SECTION is prepare, detector, extract or train. The tables are Markdown; all of them are the
    page docs/settings.md.
    """
    from stages.commands.settings_page import settings_page

    click.echo(settings_page(section))


@cli.command()
def doctor() -> None:
    """Say what is here, what is missing, and how to mend it.

    Nothing is downloaded or written. Fails if a data set that params.yaml lists in `datasets` lacks
    something; what other data sets lack is a note.
    """
    from stages.commands import doctor as command

    text, sound = command.doctor()
    click.echo(text)
    sys.exit(DONE if sound else FAILED)


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete gmpipe's words.

    Commands, options, data sets, variants, runs and settings. For now: `eval "$(gmpipe completion
    bash)"`; for every shell that starts, the last line of what is printed says where to put it.
    """
    click.echo(script(shell, cli))


@cli.group()
def cache() -> None:
    """Look after a cache of regions."""


@cache.command()
@_common
def info(dataset: str | None, overrides: tuple[str, ...]) -> None:
    """Print what the cache holds, and what decided it."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages.commands import cache as command

    click.echo(command.cache_info(request.dataset))


@cache.command()
@_common
@click.option("--repair", is_flag=True, help="Extract what is damaged or missing again.")
def verify(dataset: str | None, overrides: tuple[str, ...], repair: bool) -> None:
    """Name all that is damaged, missing or foreign in a cache.

    The cache is held against its own index; whether params.yaml asks for other regions by now is
    what `extract` says.
    """
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages.commands import cache as command

    click.echo(command.verify(request, repair=repair))


@cache.command()
@_common
@click.option(
    "--probe",
    type=click.IntRange(min=0),
    default=32,
    metavar="N",
    help="Images to decode and send through the detector to measure its rate; 0 for none.",
)
def estimate(dataset: str | None, overrides: tuple[str, ...], probe: int) -> None:
    """Print a cache's size and extraction time."""
    from stages.checkout.params import read_request

    request = read_request(dataset, overrides)
    from stages.commands import cache as command

    click.echo(command.estimate(request, probe=probe))
