"""What a shell offers after Tab: names from params.yaml and runs/, keys of settings.

A shell waits for it at every Tab, so nothing slow is imported. It can't show an error either: where
params.yaml can't be read, there is nothing to offer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    """Bash, without a blank after a key that its value must follow."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)",
        "COMPREPLY+=($value)\n            [[ $value == *= ]] && compopt -o nospace",
    )


def script(shell: str, command: click.Command) -> str:
    """What a shell has to read, with a comment on how to make it do so."""
    kind = _Bash if shell == "bash" else get_completion_class(shell)
    assert kind is not None
    source: str = kind(command, {}, "gmpipe", "_GMPIPE_COMPLETE").source()
    return f"{source.rstrip()}\n\n# To install it: {_INSTALL[shell]}"


def _offering(values: Callable[[click.Context], Iterable[str]]) -> _Complete:
    """Those of some values that begin as what is typed."""

    @wraps(values)
    def complete(context: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
        try:
            return [CompletionItem(one) for one in values(context) if one.startswith(typed)]
        except Exception:  # whatever is wrong: a traceback in the middle of a prompt helps nobody
            return []

    return complete


@_offering
def complete_dataset(_: click.Context) -> Iterable[str]:
    """Data sets of params.yaml."""
    return list(_params()["prepare"])


@_offering
def complete_variant(context: click.Context) -> Iterable[str]:
    """The variants that all data sets have, and those of this one's own."""
    from pipeline.settings import VARIANTS

    own = _params()["train"][_dataset(context)].get("variants", {})
    return dict.fromkeys([*VARIANTS, *own])


@_offering
def complete_run(context: click.Context) -> Iterable[str]:
    """Folders of the runs of all data sets, or of the one that is named."""
    from stages.checkout.layout import CHECKPOINT_FILE, runs_folder

    named = context.params.get("dataset")
    datasets = [named] if named else _params()["prepare"]
    return sorted(
        str(path.parent)
        for dataset in datasets
        for path in runs_folder(dataset).glob(f"*/{CHECKPOINT_FILE}")
    )


@_offering
def complete_setting(_: click.Context) -> Iterable[str]:
    """`KEY=` of every setting that `--set` takes."""
    from stages.checkout.keys import setting_keys

    return [f"{key}=" for key in setting_keys(_params())]


@_offering
def complete_train_setting(context: click.Context) -> Iterable[str]:
    """`KEY=` of every setting of train.<dataset>."""
    from stages.checkout.keys import setting_keys

    top = f"train.{_dataset(context)}."
    keys: Iterator[str] = (key for key in setting_keys(_params()) if key.startswith(top))
    return [f"{key.removeprefix(top)}=" for key in keys]


def _params() -> dict[str, Any]:
    """params.yaml as it stands; whether it makes sense is for the command to say."""
    from stages.checkout.params import read_params

    return read_params()


def _dataset(context: click.Context) -> str:
    return str(context.params.get("dataset") or _params()["datasets"][0])
