"""The command that looks for labels that are wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stages.cli.completion import complete_variant
from stages.cli.options import check_variants, request_options
from stages.console.messages import say

if TYPE_CHECKING:
    from stages.checkout.params import Request


@click.command()
@request_options
@click.option(
    "--variant",
    metavar="NAME",
    default="max-pool",
    shell_complete=complete_variant,
    help="Variant that is trained.",
)
@click.option(
    "--folds",
    type=click.IntRange(2, 100),
    default=5,
    metavar="K",
    help="Number of parts of the training split. For each, a network is trained on the others.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Seed of the folds and of the networks.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    metavar="N",
    help="Number of labels of each kind to print. The file has all that are doubtful.",
)
def doubts(request: Request, variant: str, folds: int, seed: int, top: int) -> None:
    """List the labels that are most likely to be wrong.

    Trains a network for each of --folds parts of the training split, on the images of the other
    parts, and compares its scores with the labels of that part. So no image is judged by a network
    that was trained on it. Images of the other splits are judged by the mean of these networks. If
    the same photograph is also in the training split, only the network that was not trained on it
    judges it.

    Prints the most doubtful labels that are given, and those that are not. Writes all of them to
    runs/<dataset>/doubts/doubts.csv, the most doubtful first. `gmpipe report` shows their
    photographs. No label is changed.
    """
    check_variants(request, [variant])
    from stages.commands.doubts import finding

    tables, written = finding.doubts(request, variant, seed, folds=folds, top=top)
    click.echo(tables)
    say(f"\n{written}")
