"""Commands on the cache of regions, and the import of regions into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stages.cli.exit_codes import FAILED
from stages.cli.options import (
    CommandGroup,
    dataset_option,
    dataset_options,
    request_options,
    set_option,
)
from stages.console.messages import say

if TYPE_CHECKING:
    from stages.checkout.params import Request
    from stages.commands.regions.forms import Form


@click.group(cls=CommandGroup)
def cache() -> None:
    """Inspect and repair the cache of regions."""


@cache.command()
@request_options
def info(request: Request) -> None:
    """Show what the cache holds and the settings it was made with."""
    from stages.commands import cache as command

    click.echo(command.cache_info(request.dataset))


@cache.command()
@request_options
@click.option("--repair", is_flag=True, help="Extract the damaged and missing rows.")
def verify(request: Request, repair: bool) -> None:
    """List damaged, missing and unexpected parts of the cache.

    This compares the cache with its own index. To compare it with params.yaml, run `extract`.
    """
    from stages.commands import cache as command

    click.echo(command.verify(request, repair=repair))


@cache.command()
@request_options
@click.option(
    "--probe",
    type=click.IntRange(min=0),
    default=32,
    metavar="N",
    help="Number of images to decode and run through the detector to measure its rate; 0 for none.",
)
def estimate(request: Request, probe: int) -> None:
    """Estimate the size of the cache and the time to extract it."""
    from stages.commands import cache as command

    click.echo(command.estimate(request, probe=probe))


@cache.command("export")
@request_options
@click.option(
    "--to",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="FILE",
    help="File to write, for other programs and for `import-regions`: .npz, with labels and "
    "splits, .parquet, or the .tsv of bottom-up attention.",
)
def export_(request: Request, path: Path) -> None:
    """Write the regions to a file that other programs read."""
    from stages.commands.regions.export import export_regions

    click.echo(export_regions(request.dataset, path))


@click.command("verify")
@dataset_options
@click.option(
    "--images",
    is_flag=True,
    help="Also read all photographs, and compare them with those that the cache was made from.",
)
@click.pass_context
def verify_all(context: click.Context, request: Request, images: bool) -> None:
    """Check all that was made for a data set.

    Nothing is changed. Each thing has a line: sound, out of date, missing, damaged, or
    unreadable. Fails if something is damaged or unreadable.
    """
    from stages.commands import verify as command

    text, sound = command.verify(request, images=images)
    click.echo(text)
    if not sound:
        context.exit(FAILED)


@click.command("import-regions")
@click.argument(
    "files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@dataset_option
@set_option
@click.option(
    "--form",
    type=click.Choice(["npz", "bottom-up", "parquet", "npz-folder", "npy-folder"]),
    help="Form of FILE. npz: one file with arrays and labels. bottom-up: one or more TSV files, as "
    "published for bottom-up attention. parquet: one or more files. npz-folder: folders with an "
    "npz for each image. npy-folder: a folder with a .npy for each array, and ids.txt.  [default: "
    "by the suffix, or by the files in a folder]",
)
@click.option("--replace", is_flag=True, help="Drop shards that were made from something else.")
def import_regions(
    files: tuple[Path, ...],
    dataset: str | None,
    overrides: tuple[str, ...],
    form: Form | None,
    replace: bool,
) -> None:
    """Import regions that were made elsewhere into the cache."""
    from stages.checkout.params import read_request
    from stages.commands import import_regions as command

    # First, since its message shows a whole block for a data set that params.yaml lacks.
    chosen = command.check_described(dataset, overrides, files, form)
    request = read_request(dataset, overrides)
    say(command.import_regions(request, files, chosen, replace=replace))
