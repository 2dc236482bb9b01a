"""Options that several commands share, and what a command is handed for them.

Naming: a decorator `..._option` adds one option, and the command takes its value under the option's
own name; a decorator `..._options` adds several, or turns what was typed into an object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.errors import InputError, naming
from stages.cli.completion import (
    complete_dataset,
    complete_run,
    complete_setting,
    complete_variant,
)
from stages.console.messages import QUIET, VERBOSE, note, set_level

if TYPE_CHECKING:
    from stages.checkout.params import Request

Command = Callable[..., Any]
_AnyCommand = TypeVar("_AnyCommand", bound=click.Command)


# --- how much a command says ---------------------------------------------------------------------


def level_options(command: _AnyCommand) -> _AnyCommand:
    """Add `--quiet` and `--verbose`, which set the level of the messages."""
    for name, help_text in (
        ("quiet", "Print only errors and the requested results."),
        ("verbose", "Also print which files are read and written, and the traceback of an error."),
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


def _choose_level(context: click.Context, parameter: click.Parameter, chosen: bool) -> None:
    if chosen:
        levels = context.meta.setdefault(f"{__name__}.levels", set())
        levels.add(QUIET if parameter.name == "quiet" else VERBOSE)
        if len(levels) > 1:
            raise click.UsageError("--quiet and --verbose exclude each other.", context)
        set_level(*levels)


class CommandGroup(click.Group):
    """A group that gives each of its commands `--quiet` and `--verbose`."""

    group_class = type

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Register a command under its name."""
        super().add_command(level_options(cmd), name)


# --- the data set and its settings ---------------------------------------------------------------

dataset_option = click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=complete_dataset,
    help="Data set to work on, by its name in params.yaml.  [default: the first of `datasets`]",
)

set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    shell_complete=complete_setting,
    help="Override a setting of params.yaml, e.g. train.demo.epochs=5. A run whose train settings "
    "differ from params.yaml gets its own folder. Repeatable.",
)


def dataset_options(command: Command) -> Command:
    """Add `--dataset`; the command takes a `Request` in its place."""
    return dataset_option(_with_request(command))


def request_options(command: Command) -> Command:
    """Add `--dataset` and `--set`; the command takes a `Request` in their place."""
    return dataset_option(set_option(_with_request(command)))


def _with_request(command: Command) -> Command:
    """Read params.yaml, then call ``command`` with the request before its other options."""

    @wraps(command)
    def read_then_call(
        dataset: str | None, overrides: tuple[str, ...] = (), **options: Any
    ) -> None:
        from stages.checkout.params import read_request

        request = read_request(dataset, overrides)
        with naming(request.dataset):
            command(request, **options)

    return read_then_call


# --- runs ----------------------------------------------------------------------------------------


class _Seed(click.IntRange):
    """A seed, as in params.yaml.

    Args:
        remedy: what to do about several seeds in one value.
    """

    def __init__(self, remedy: str) -> None:
        super().__init__(0, 2**63 - 1)
        self.remedy = remedy

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read a seed; say how to give several."""
        if isinstance(value, str) and re.fullmatch(r"\[?\d+([,;\s-]+\d+)+\]?", value.strip()):
            self.fail(f"{value!r} is not one seed. {self.remedy}", param, ctx)
        return super().convert(value, param, ctx)


variant_option = click.option(
    "--variant",
    metavar="NAME",
    default="full",
    shell_complete=complete_variant,
    help="Variant of the network.",
)


def run_options(command: Command) -> Command:
    """Add `--variant` and `--seed` of a single run."""
    command = click.option(
        "--seed",
        type=_Seed("A run has one; `gmpipe compare` makes the runs of several."),
        metavar="N",
        help="Seed of the run.  [default: the first of `seeds`]",
    )(command)
    return variant_option(command)


def seeds_option(default: str) -> Callable[[Command], Command]:
    """Add `--seed`, which may be repeated; ``default`` describes the seeds used without it."""
    return click.option(
        "--seed",
        "seeds",
        metavar="N",
        multiple=True,
        type=_Seed("Repeat the option for each seed: `--seed 0 --seed 1`."),
        help=f"Seed of a run. Repeatable.  [default: {default}]",
    )


jobs_option = click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of runs to make at the same time. Concurrent runs use one thread each; a single "
    "run uses all cores. The number of threads changes how sums are rounded, which can change a "
    "run's mAP by some tenths of a point.  [default: one per core, or 1 on a GPU]",
)


def chosen_variants(
    request: Request, variants: Sequence[str], heads: str | None, *, published: bool
) -> list[str]:
    """Return the variants to compare: those that are named, then those of the heads, once each.

    Args:
        variants: of `--variant`.
        heads: of `--heads`, names with commas between them; None without the option.
        published: whether each variant brings the one with published settings.

    Raises:
        InputError: a name of ``heads`` is unknown.
    """
    from pipeline.settings import variant_names

    named = variants if variants or heads is not None else request.params.variants
    chosen = [*named, *(_variants_of(heads, request.train.variants) if heads is not None else ())]
    if published:
        known = set(variant_names())
        both = ((name, f"{name}-published") for name in chosen)
        chosen = [one for pair in both for one in pair if one in chosen or one in known]
        if not any(name.endswith("-published") for name in chosen):
            note("none of these variants has other published settings: --published adds none.")
    return list(dict.fromkeys(chosen))


def _variants_of(heads: str, own: Collection[str]) -> list[str]:
    """The variants that `--heads` names; ``own`` are those that params.yaml defines."""
    from pipeline.settings import head_variants, variant_names
    from pipeline.settings.heads import HEADS
    from stages.checkout.keys import nearest

    variants: list[str] = []
    for name in map(str.strip, heads.split(",")):
        if name == "all":
            variants += head_variants()
        elif name in HEADS:
            variants += HEADS[name].variants
        elif name in variant_names() or name in own:
            variants.append(name)
        else:
            raise InputError(
                f"--heads: unknown head {name!r}. The heads are {', '.join(HEADS)}.",
                nearest(name, [*HEADS, *variant_names(), *own, "all"])
                or "Name heads with commas between them, or `all`.",
            )
    return variants


def check_base(request: Request, base: str | None, variants: Sequence[str]) -> None:
    """Check that the variant that others are to be compared with is one of them.

    Raises:
        InputError: it is not, there is no such variant, or it has no mAP.
    """
    if base is None:
        return
    settings = request.variant(base, "--base")
    if not settings.ranks:
        raise InputError(
            f"--base: {base!r} has no mAP that others could be compared with, since its head "
            f"`{settings.network.head}` predicts sets of labels and ranks none.",
            "Choose another variant.",
        )
    if base not in variants:
        from stages.checkout.keys import nearest

        raise InputError(
            f"--base: {base!r} is not among the compared variants: {', '.join(variants)}.",
            nearest(base, variants) or f"Add `--variant {base}`, or choose one of these.",
        )


def check_variants(request: Request, variants: Sequence[str]) -> None:
    """Check the variants that runs are to be made of, before anything heavy is imported.

    Also notes which `--set` options have no effect on these runs, and where the cache and the
    manifest differ from what params.yaml asks for.

    Raises:
        InputError: a variant is unknown.
    """
    for name in variants:
        request.variant(name, "--variant")
    from stages.checkout.plans import (
        note_other_regions,
        note_other_treatments,
        note_unused_overrides,
    )

    note_other_regions(request)
    note_other_treatments(request)
    note_unused_overrides(request, variants)


# --- trained networks and what is written of them ------------------------------------------------

dataset_of_run_option = click.option(
    "--dataset",
    metavar="NAME",
    shell_complete=complete_dataset,
    help="Data set of a run that is given by its name.  [default: the first of `datasets`]",
)


def trained_run_options(command: Command) -> Command:
    """Add `--run` and `--dataset`; the command takes the folder of a trained run in their place."""

    @wraps(command)
    def find_then_call(run: str, dataset: str | None, **options: Any) -> None:
        from stages.commands.runs.listing import check_run, find_run

        folder = find_run(run, dataset)
        check_run(folder)
        command(run_folder=folder, **options)

    run_option = click.option(
        "--run",
        metavar="RUN",
        required=True,
        shell_complete=complete_run,
        help="Folder of a trained run, e.g. runs/demo/full-s0, or the name of one, e.g. full-s0.",
    )
    return run_option(dataset_of_run_option(find_then_call))


detector_option = click.option(
    "--detector",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder of the detector whose regions the run was trained on.  [default: "
    "data/<dataset>/detector in the run's checkout]",
)


def _is_managed(path: Path) -> bool:
    """Whether a file lies in a folder of the checkout where data and results are."""
    kept = ("data", "cache", "runs", "reports", ".state")
    return any(Path(folder).resolve() in path.resolve().parents for folder in kept)


def _free_folder(context: Any, option: Any, path: Path | None) -> Path | None:
    if path is not None and _is_managed(path):
        raise click.BadParameter(f"{path} is in a folder that gmpipe keeps: choose another place")
    return path


bundle_option = click.option(
    "--bundle",
    metavar="FOLDER",
    type=click.Path(path_type=Path, file_okay=False),
    callback=_free_folder,
    help="Write this folder instead: all that `predict` and `serve` need, on any machine.",
)


def output_option(
    *suffixes: str, help_text: str, required: bool = False
) -> Callable[[Command], Command]:
    """Add `--output`, the name of a file that ends in one of ``suffixes``."""

    def check(context: Any, option: Any, path: Path | None) -> Path | None:
        if path is not None and path.suffix not in suffixes:
            raise click.BadParameter(
                f"{path}: expected a name that ends in {' or '.join(suffixes)}"
            )
        if path is not None and path.is_file() and _is_managed(path):
            raise click.BadParameter(f"{path} is a file that gmpipe keeps: choose another name")
        return path

    return click.option(
        "-o",
        "--output",
        metavar="FILE",
        required=required,
        type=click.Path(path_type=Path, dir_okay=False),
        callback=check,
        help=help_text,
    )
