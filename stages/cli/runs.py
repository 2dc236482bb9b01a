"""Commands that make many runs, and those that list and remove them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stages.cli.completion import (
    complete_dataset,
    complete_heads,
    complete_run,
    complete_train_setting,
    complete_variant,
)
from stages.cli.options import (
    CommandGroup,
    check_base,
    check_variants,
    chosen_variants,
    dataset_of_run_option,
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
@click.option(
    "--heads",
    metavar="NAME,NAME,...",
    shell_complete=complete_heads,
    help="Heads to compare, beside any --variant: `all`, or names of heads or of variants. A head "
    "brings all variants that stand for it.",
)
@click.option(
    "--published",
    is_flag=True,
    help="Also compare each variant with its method's published settings, where ours are others.",
)
@click.option(
    "--base",
    metavar="NAME",
    shell_complete=complete_variant,
    help="Variant that the others are compared with.  [default: `full`, or else the first]",
)
@seeds_option(", ".join(map(str, _COMPARED_SEEDS)))
@jobs_option
def compare(
    request: Request,
    variants: tuple[str, ...],
    heads: str | None,
    published: bool,
    base: str | None,
    seeds: tuple[int, ...],
    jobs: int | None,
) -> None:
    """Train the missing variants and seeds, and print tables.

    The tables give the mean and spread over the seeds, what each network costs, and the difference
    in mAP between each variant and --base with its 95 % interval over the test images. While runs
    are made, the progress shows the epoch and the loss of each.
    """
    chosen = chosen_variants(request, variants, heads, published=published)
    check_variants(request, chosen)
    check_base(request, base, chosen)
    from stages.commands import compare as command

    click.echo(command.compare(request, chosen, seeds or _COMPARED_SEEDS, base=base, jobs=jobs))


@click.command()
@click.argument(
    "settings",
    metavar="KEY=VALUES...",
    nargs=-1,
    required=True,
    shell_complete=complete_train_setting,
)
@request_options
@variant_option
@seeds_option("`seeds` in params.yaml")
@click.option(
    "--trials",
    metavar="N",
    type=click.IntRange(min=1),
    help="Draw N combinations at random. The first of them are the same for every N.  "
    "[default: all combinations]",
)
@click.option(
    "--minutes",
    metavar="N",
    type=click.FloatRange(min=0, min_open=True),
    help="Begin no run after N minutes. The same command continues.  [default: no limit]",
)
@click.option(
    "--halving",
    is_flag=True,
    help="Train only the better half of the trials with each further seed.",
)
@jobs_option
def sweep(
    request: Request,
    settings: tuple[str, ...],
    variant: str,
    seeds: tuple[int, ...],
    trials: int | None,
    minutes: float | None,
    halving: bool,
    jobs: int | None,
) -> None:
    """Train with values of one or more settings.

    KEY is a setting of train.<dataset>. VALUES are VALUE,VALUE,... such as regions=2,4,6,8,10 or
    network.modules=1,2,3,4 (as in Figure 4 of the paper), or a range of numbers: 1..4, from which
    numbers are drawn evenly, or log:0.0001..0.1, from which their logarithms are.

    With one setting, prints a table, and writes it with a plot of mAP to
    runs/<dataset>/sweeps/KEY/, or to runs/<dataset>/sweeps/VARIANT-KEY/ for another variant than
    `full`. Existing runs are reused. While runs are made, the progress shows the epoch and the loss
    of each.

    If the runs have a validation part (train.<dataset>.validation), or the data set has a split
    `val`, the table marks the value with the best mAP on it, or each of several that tie. The test
    split never decides.

    Several settings, or one with --trials, --minutes or --halving, are a search. It needs a
    validation part or a split `val`. Only the best trial is evaluated on the test split. The folder
    is named by all keys and `search`, joined by `+`.
    """
    check_variants(request, [variant])
    from stages.commands import sweep as one_setting
    from stages.commands.searching import search as searching

    seeds = seeds or tuple(request.params.seeds)
    if len(settings) == 1 and trials is None and minutes is None and not halving:
        table, files = one_setting.sweep(settings[0], request, variant, seeds, jobs=jobs)
    else:
        table, files = searching.search(
            settings,
            request,
            variant,
            seeds,
            trials=trials,
            minutes=minutes,
            halving=halving,
            jobs=jobs,
        )
    click.echo(table)
    say(f"\n{files}")


@click.group(cls=CommandGroup)
def runs() -> None:
    """List, show or remove the runs of a data set."""


@runs.command("list")
@dataset_options
@click.option("--times", is_flag=True, help="Also list how long each run and stage one took.")
def list_runs(request: Request, times: bool) -> None:
    """List the runs, and say which of them params.yaml names.

    Runs with other settings than those of params.yaml (made with --set or sweep) are listed with
    these settings.
    """
    from stages.commands.runs import listing

    click.echo(listing.list_runs(request, times=times))


@runs.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@dataset_of_run_option
def show(run: str, dataset: str | None) -> None:
    """Show what a run was made with and what it reached.

    RUN is the folder of a run, such as runs/demo/full-s0, or the name of a run of --dataset, such
    as full-s0. Every setting is listed, and those that differ from params.yaml are marked. What is
    out of date comes last. Of an entry, which `evaluate --scores` or `--average` made, the metrics
    are shown, and what it is made of.
    """
    from stages.checkout.params import load_params

    load_params()
    from stages.commands.runs import show as command
    from stages.commands.runs.listing import find_run

    click.echo(command.show(find_run(run, dataset)))


_yes_option = click.option("--yes", is_flag=True, help="Remove it. By default, it is only listed.")


@runs.command()
@dataset_options
@click.option(
    "--unlisted",
    is_flag=True,
    help="Also remove the runs of variants and seeds that the lists `variants` and `seeds` of "
    "params.yaml leave out, and the entries beside the runs.",
)
@_yes_option
def prune(request: Request, unlisted: bool, yes: bool) -> None:
    """List the runs that params.yaml does not describe, or remove them.

    These are runs with other settings (made with --set or sweep), runs of variants that do not
    exist any more, and the tables and plots of sweeps. Runs of any seed stay, because compare makes
    them. So do the entries beside the runs, a run that is being made, and a folder with a file that
    gmpipe did not write.
    """
    from stages.commands.runs import removal

    removed = removal.prune(request, unlisted=unlisted, remove=yes)
    (say if yes else click.echo)(removed)


@click.command()
@click.argument("dataset", metavar="DATASET", shell_complete=complete_dataset)
@_yes_option
def clean(dataset: str, yes: bool) -> None:
    """List all that gmpipe made for a data set, or remove it.

    That is the manifest and resolved settings, the detector, the cache, the runs, the page, and
    what killed trainings resume from. Photographs, tables, params.yaml and all other files that
    gmpipe did not write stay.
    """
    from stages.checkout.params import load_params

    load_params()
    from stages.commands.runs import removal

    removed = removal.clean(dataset, remove=yes)
    (say if yes else click.echo)(removed)
