"""What a shell offers after Tab: names from params.yaml and runs/, and keys of settings.

The shell waits for it at every Tab, so nothing slow is imported. Errors can't be shown there: if
params.yaml can't be read, nothing is offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import click
from click.shell_completion import BashComplete, CompletionItem, get_completion_class

SHELLS = ("bash", "zsh", "fish")

_INSTALL = {
    "bash": 'eval "$(gmpipe completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(gmpipe completion zsh)" in ~/.zshrc, after compinit',
    "fish": "gmpipe completion fish > ~/.config/fish/completions/gmpipe.fish",
}

_Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


class _Bash(BashComplete):
    """Bash, without a space after a key, since its value follows directly."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)",
        "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace",
    )


def script(shell: str, command: click.Command) -> str:
    """Return the completion script of a shell; its last line says how to install it.

    Args:
        shell: one of `SHELLS`.
        command: the top group.
    """
    kind = _Bash if shell == "bash" else get_completion_class(shell)
    assert kind is not None
    source: str = kind(command, {}, "gmpipe", "_GMPIPE_COMPLETE").source()
    return f"{source.rstrip()}\n\n# To install it: {_INSTALL[shell]}"


def _offering(values: Callable[[click.Context, str], Iterable[str]]) -> _Complete:
    """Make a completion that offers the values that begin with what was typed."""

    @wraps(values)
    def complete(context: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
        try:
            offered = values(context, typed)
            return [CompletionItem(one) for one in offered if one.startswith(typed)]
        except Exception:  # of any kind: a traceback in the middle of a prompt helps nobody
            return []

    return complete


@_offering
def complete_dataset(*_: object) -> Iterable[str]:
    """Offer the data sets of params.yaml."""
    return list(_params()["prepare"])


@_offering
def complete_variant(context: click.Context, *_: object) -> Iterable[str]:
    """Offer the variants that every data set has, and those that this one adds."""
    from pipeline.settings import variant_names

    own = _params()["train"][_dataset(context)].get("variants", {})
    return dict.fromkeys([*variant_names(), *own])


@_offering
def complete_heads(context: click.Context, typed: str) -> Iterable[str]:
    """Offer a head or a variant of one's own, after those that were typed already."""
    from pipeline.settings import head_variants
    from pipeline.settings.heads import HEADS

    own = _params()["train"][_dataset(context)].get("variants", {})
    before, comma, _last = typed.rpartition(",")
    known = dict.fromkeys(["all", *HEADS, *head_variants(), *own])
    return [f"{before}{comma}{name}" for name in known]


@_offering
def complete_run(context: click.Context, *_: object) -> Iterable[str]:
    """Offer the folders of runs: of the data set that is named, or else of all."""
    from stages.checkout.layout import CHECKPOINT_FILE, runs_folder

    named = context.params.get("dataset")
    datasets = [named] if named else _params()["prepare"]
    return sorted(
        str(path.parent)
        for dataset in datasets
        for path in runs_folder(dataset).glob(f"*/{CHECKPOINT_FILE}")
    )


@_offering
def complete_setting(_: click.Context, typed: str) -> Iterable[str]:
    """Offer `KEY=` for every setting that `--set` takes."""
    from stages.checkout.keys import setting_keys

    return [f"{key}=" for key in setting_keys(_params(), typed)]


@_offering
def complete_train_setting(context: click.Context, typed: str) -> Iterable[str]:
    """Offer `KEY=` for every setting of train.<dataset>."""
    from stages.checkout.keys import setting_keys

    top = f"train.{_dataset(context)}."
    keys = setting_keys(_params(), f"{top}{typed}")
    return [f"{key.removeprefix(top)}=" for key in keys if key.startswith(top)]


@_offering
def complete_section(*_: object) -> Iterable[str]:
    """Offer the sections of params.yaml."""
    from pipeline.settings import SECTIONS

    return SECTIONS


def _params() -> dict[str, Any]:
    """Read params.yaml without checking it: a mistake there is for the command to report."""
    from stages.checkout.params import read_params

    return read_params()


def _dataset(context: click.Context) -> str:
    return str(context.params.get("dataset") or _params()["datasets"][0])
