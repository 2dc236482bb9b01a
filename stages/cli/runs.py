"""Commands that make many runs, and those that list and remove them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stages.cli.completion import complete_train_setting, complete_variant
from stages.cli.options import (
    CommandGroup,
    check_variants,
    dataset_options,
    jobs_option,
    request_options,
    seeds_option,
    variant_option,
)
from stages.console.messages import say

if TYPE_CHECKING:
    from stages.checkout.params import Request

_COMPARED_SEEDS = (0, 1, 2)


@click.command()
@request_options
@click.option(
    "--variant",
    "variants",
    metavar="NAME",
    multiple=True,
    shell_complete=complete_variant,
    help="Variant to compare. Repeatable.  [default: `variants` in params.yaml]",
)
@seeds_option(", ".join(map(str, _COMPARED_SEEDS)))
@jobs_option
def compare(
    request: Request, variants: tuple[str, ...], seeds: tuple[int, ...], jobs: int | None
) -> None:
    """Train the missing variants and seeds, and print tables.

    The tables give the mean and spread over the seeds, and the difference in mAP between each
    variant and `full` with its 95 % interval over the test images. While runs are made, the
    progress shows the epoch and the loss of each.
    """
    chosen = variants or tuple(request.params.variants)
    check_variants(request, chosen)
    from stages.commands import compare as command

    click.echo(command.compare(request, chosen, seeds or _COMPARED_SEEDS, jobs=jobs))


@click.command()
@click.argument("setting", metavar="KEY=VALUE,VALUE,...", shell_complete=complete_train_setting)
@request_options
@variant_option
@seeds_option("`seeds` in params.yaml")
@jobs_option
def sweep(
    request: Request, setting: str, variant: str, seeds: tuple[int, ...], jobs: int | None
) -> None:
    """Train with several values of one setting.

    KEY is a setting of train.<dataset>, e.g. regions=2,4,6,8,10 or network.modules=1,2,3,4 (as in
    Figure 4 of the paper). Prints a table, and writes it with a plot of mAP to
    runs/<dataset>/sweeps/KEY/. Existing runs are reused. While runs are made, the progress shows
    the epoch and the loss of each.
    """
    check_variants(request, [variant])
    from stages.commands import sweep as command

    table, files = command.sweep(
        setting, request, variant, seeds or request.params.seeds, jobs=jobs
    )
    click.echo(table)
    say(f"\n{files}")


@click.group(cls=CommandGroup)
def runs() -> None:
    """List or remove the runs of a data set."""


@runs.command("list")
@dataset_options
def list_runs(request: Request) -> None:
    """List the runs, and say which of them params.yaml names.

    Runs with other settings than those of params.yaml (made with --set or sweep) are listed with
    these settings.
    """
    from stages.commands import runs as command

    click.echo(command.list_runs(request, request.params.variants, request.params.seeds))


@runs.command()
@dataset_options
@click.option("--dry-run", is_flag=True, help="Only list what would be removed.")
def prune(request: Request, dry_run: bool) -> None:
    """Remove the runs that params.yaml does not name.

    These are the runs of other variants and seeds, the runs with other settings (made with --set
    or sweep), and the tables and plots of sweeps. A run that is being made is kept, and so is every
    file that gmpipe did not write.
    """
    from stages.commands import runs as command

    removed = command.prune(
        request.dataset, request.params.variants, request.params.seeds, dry_run=dry_run
    )
    (click.echo if dry_run else say)(removed)
