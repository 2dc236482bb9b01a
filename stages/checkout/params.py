"""Read params.yaml and `--set` options into typed settings.

Every mistake is an `InputError` that names the setting.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from pipeline.errors import InputError, MissingError
from pipeline.files import read_bytes
from pipeline.names import check_name
from pipeline.settings import (
    SECTIONS,
    DetectorSettings,
    ExtractSettings,
    Params,
    PrepareSettings,
    TrainSettings,
    head_of_variant,
    variant_changes,
    variant_names,
)
from pipeline.settings.heads import DEFAULT_HEAD, HEADS, head_changes
from stages.checkout.keys import KINDS, flat, name_error, nearest, settings_error
from stages.checkout.yaml_text import load_yaml

_log = logging.getLogger(__name__)

PARAMS_FILE = Path("params.yaml")


@dataclass(frozen=True)
class Request:
    """The settings of one data set, as a command was asked to use them.

    A command reads params.yaml once, with `read_request`, and passes the request on.

    Attributes:
        dataset: name of the data set.
        params: all of params.yaml, with the overrides.
        overrides: the `--set` options as they were given, `key=value`.
        params_in_file: all of params.yaml, without the overrides.
        raw: params.yaml as it was read, unchecked and without the overrides.
    """

    dataset: str
    params: Params
    overrides: tuple[str, ...]
    params_in_file: Params
    raw: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def prepare(self) -> PrepareSettings:
        """The data set's block in the section `prepare`."""
        return self.params.prepare[self.dataset]

    @property
    def detector(self) -> DetectorSettings:
        """The data set's block in the section `detector`."""
        return self.params.detector[self.dataset]

    @property
    def extract(self) -> ExtractSettings:
        """The data set's block in the section `extract`."""
        return self.params.extract[self.dataset]

    @property
    def train(self) -> TrainSettings:
        """The data set's block in the section `train`."""
        return self.params.train[self.dataset]

    @property
    def extract_in_file(self) -> ExtractSettings:
        """`extract` without the overrides, where params.yaml describes the data set."""
        return self.params_in_file.extract.get(self.dataset, self.extract)

    @property
    def set_options(self) -> list[str]:
        """The overrides as words of a command line: `--set`, `key=value`, ..."""
        return [word for override in self.overrides for word in ("--set", override)]

    def overriding(self, *overrides: str) -> Request:
        """Return the request with further `--set` options, without reading params.yaml again.

        Raises:
            InputError: as `load_params`.
        """
        return _request(self.raw, self.dataset, (*self.overrides, *overrides))

    def for_dataset(self, dataset: str) -> Request:
        """Return the request for another data set of params.yaml."""
        return _request(self.raw, dataset, self.overrides)

    def variant(self, name: str, where: str = "train") -> TrainSettings:
        """Return the train settings of a variant, as `variant_settings` does."""
        return variant_settings(self.train, name, where)

    def is_overridden(self, variant: str) -> bool:
        """Whether a run of ``variant`` differs from the one that params.yaml describes."""
        train = self.params_in_file.train.get(self.dataset)
        if train is None or not has_variant(train, variant):
            return True
        return (
            self.variant(variant) != variant_settings(train, variant)
            or self.extract.views != self.extract_in_file.views
        )


def read_request(dataset: str | None, overrides: Sequence[str] = ()) -> Request:
    """Read params.yaml and apply `--set` options.

    Args:
        dataset: name of the data set; None for the first of ``datasets``.
        overrides: as in `load_params`.

    Raises:
        InputError: as `load_params`, or params.yaml does not describe the data set.
        MissingError: there is no params.yaml in the current folder.
    """
    return _request(read_params(), dataset, tuple(overrides))


def _request(raw: Mapping[str, Any], dataset: str | None, overrides: tuple[str, ...]) -> Request:
    params = _check(raw, overrides, PARAMS_FILE)
    name = params.datasets[0] if dataset is None else dataset
    _check_dataset(params, name, "--dataset")
    in_file = _check(raw, (), PARAMS_FILE) if overrides else params
    return Request(name, params, overrides, in_file, raw)


def load_params(overrides: Sequence[str] = (), file: Path = PARAMS_FILE) -> Params:
    """Read and check all of params.yaml.

    Args:
        overrides: ``key=value`` with a dotted key and a YAML value, e.g. ``train.demo.epochs=5``.
        file: path of params.yaml.

    Raises:
        InputError: the file or an override has an unknown key, data set or variant, or a value of
            the wrong kind. The message names the key and, if it is misspelt, the nearest one.
        MissingError: there is no such file.
    """
    return _check(read_params(file), overrides, file)


def _check(given: Mapping[str, Any], overrides: Sequence[str], file: Path) -> Params:
    raw = dict(given)  # `_override` copies each block that it changes
    for override in _kinds_first(overrides):
        _override(raw, override)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        where = f"{file} or --set" if overrides else str(file)
        raise settings_error(error, where, raw) from error
    _check_datasets(params, file)
    for dataset, settings in params.train.items():
        for variant in settings.variants:
            where = f"{file}: train.{dataset}.variants.{variant}"
            meant = difflib.get_close_matches(variant, variant_names(), n=1, cutoff=0.85)
            if meant and variant not in variant_names():
                raise InputError(
                    f"{where}: unknown variant {variant!r}. Its name is too similar to an existing "
                    "one to define a variant of your own.",
                    f"Did you mean `{meant[0]}`?",
                )
            variant_settings(settings, variant, where)
        if dataset in params.datasets:
            for variant in params.variants:
                variant_settings(settings, variant, f"{file}: variants, for {dataset}")
    return params


def read_params(file: Path = PARAMS_FILE) -> dict[str, Any]:
    """Read params.yaml without checking its settings.

    Raises:
        InputError: the file is not YAML, or not a mapping.
        MissingError: there is no such file.
    """
    try:
        text = read_bytes(file).decode()
    except FileNotFoundError:
        raise MissingError(
            f"There is no {file} in {Path.cwd()}.",
            "gmpipe runs in its checkout: change to that folder first.",
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8: {error}.", "Save it as UTF-8.") from error
    raw = load_yaml(text, str(file), "Correct it there.")
    if not isinstance(raw, dict):
        raise InputError(
            f"{file} holds no settings. Expected `datasets: [...]` and further keys.",
            f"Restore it with `git checkout {file}`.",
        )
    _log.info("read %s", file)
    return raw


def _kinds_first(overrides: Sequence[str]) -> list[str]:
    """Move an override that chooses a head or a loss before those of settings in its block.

    It starts the block afresh, which must not undo what others set.
    """
    blocks = [override.partition("=")[0].rpartition(".")[0] for override in overrides]

    def place(index: int) -> tuple[int, bool]:
        first = _chooses_kind(overrides[index])
        return blocks.index(blocks[index]) if first else index, not first

    return [overrides[index] for index in sorted(range(len(overrides)), key=place)]


def _chooses_kind(override: str) -> bool:
    path = override.partition("=")[0].split(".")
    return path[0] == "train" and len(path) > 3 and KINDS.get(path[-2]) == path[-1]


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one ``key=value`` in ``raw``, with copies of the blocks that it changes."""
    key, equals, value = override.partition("=")
    path = key.split(".")
    lists = [name for name in Params.model_fields if name not in SECTIONS]
    if not equals or (len(path) < 2 and key not in lists):
        raise InputError(
            f"--set {override}: expected KEY=VALUE with a key of params.yaml.",
            "For example: `--set train.demo.epochs=5`.",
        )
    block: Any = raw
    for depth, part in enumerate(path[:-1]):
        # Blocks with defaults, such as `network`, may be absent from the file.
        known = isinstance(block, dict) and (part in block or depth >= 2)
        if not known or not isinstance(block.setdefault(part, {}), dict):
            choices = block if isinstance(block, dict) and part not in block else ()
            raise InputError(
                f"--set {override}: params.yaml has no block `{'.'.join(path[: depth + 1])}`.",
                nearest(part, choices) or "The key is SECTION.DATASET.SETTING.",
            )
        block[part] = dict(block[part])  # a YAML alias may put it in several places
        block = block[part]
    new = load_yaml(value, f"--set {override}", "Quote it, or correct it.")
    if _chooses_kind(override) and new != _kind(raw, path[:-1]):
        block.clear()
    block[path[-1]] = new


def _kind(raw: Mapping[str, Any], path: Sequence[str]) -> object:
    """Which head or loss a block of train settings is for; ``path`` leads to the block.

    Args:
        raw: params.yaml, unchecked.
        path: `train`, a data set, perhaps `variants` and a variant, and the block's own name.
    """
    name, own = path[-1], raw["train"][path[1]]
    places: list[Any] = [own]
    if len(path) > 3:
        variant = path[3]
        built_in = variant_changes(variant) if head_of_variant(variant) else {}
        places = [own["variants"][variant], built_in, own]
    for place in places:
        block = place.get(name)
        if isinstance(block, Mapping) and KINDS[name] in block:
            return block[KINDS[name]]
    return {"network": DEFAULT_HEAD, "loss": "weighted"}[name]


def _check_datasets(params: Params, file: Path) -> None:
    known = set.intersection(*(set(getattr(params, section)) for section in SECTIONS))
    for section in SECTIONS:
        for dataset in getattr(params, section):
            if dataset not in known:
                lacking = [name for name in SECTIONS if dataset not in getattr(params, name)]
                raise InputError(
                    f"{file} has a block {section}.{dataset}, but no block {lacking[0]}.{dataset}. "
                    f"A data set needs a block in each of {', '.join(SECTIONS)}.",
                    nearest(dataset, known) or f"Add {lacking[0]}.{dataset}.",
                )
    for dataset in params.datasets:
        _check_dataset(params, dataset, f"{file}: datasets")


def _check_dataset(params: Params, dataset: str, where: str) -> None:
    if dataset not in params.prepare:
        check_dataset_name(dataset, where)
        raise InputError(
            f"{where}: unknown data set {dataset!r}. params.yaml describes "
            f"{', '.join(params.prepare)}.",
            nearest(dataset, params.prepare) or "Correct the name, or add its blocks there.",
        )


def check_dataset_name(dataset: str, where: str) -> None:
    """Check the name of a data set that params.yaml does not describe, before it is told to.

    Raises:
        InputError: no data set can have the name.
    """
    try:
        check_name(dataset)
    except PydanticCustomError as error:
        raise name_error(dataset, where, error.context or {}) from error


def unreached(request: Request, variant: str) -> list[str]:
    """Return the overridden train settings that a variant does not take.

    It sets them itself, or has another head than the data set's block, whose settings it leaves.
    The keys are relative to ``train.<dataset>``.
    """
    asked = flat(request.train.model_dump())
    taken = flat(request.variant(variant).model_dump())
    keys: list[str] = []
    for override in request.overrides:
        name, _, value = override.partition("=")
        section, _, key = name.partition(f".{request.dataset}.")
        if section == "train":
            given = load_yaml(value, f"--set {override}", "Correct it.")
            keys += flat({key: given})
    unset = object()
    return [
        key for key in dict.fromkeys(keys) if key in asked and taken.get(key, unset) != asked[key]
    ]


def unread_by_runs(request: Request) -> list[str]:
    """Return the keys of overrides that a run of this data set does not read."""
    keys = [override.partition("=")[0] for override in request.overrides]
    views = f"extract.{request.dataset}.views"
    return [
        key
        for key in keys
        if "." in key and not key.startswith(f"train.{request.dataset}.") and key != views
    ]


def has_variant(settings: TrainSettings, variant: str) -> bool:
    """Whether every data set has the variant, or this one defines it."""
    return head_of_variant(variant) is not None or variant in settings.variants


def variant_settings(settings: TrainSettings, variant: str, where: str = "train") -> TrainSettings:
    """Return the train settings of a data set with the changes of one of its variants.

    A variant of another head than the data set's starts from that head's own train settings.

    Args:
        settings: of the data set.
        variant: a built-in one, or one that the data set defines.
        where: begins the message of an error.

    Raises:
        InputError: the variant is unknown, or what it changes is not a setting or not valid.
    """
    if not has_variant(settings, variant):
        known = list(dict.fromkeys([*variant_names(), *settings.variants]))
        raise InputError(
            f"{where}: unknown variant {variant!r}. The variants are {', '.join(known)}.",
            nearest(variant, known) or "Correct the name, or add it to the data set's `variants`.",
        )
    changes = changes_of_variant(settings, variant)
    if "variants" in changes:
        raise InputError(f"{where}: a variant can't define `variants` itself.", "Remove them.")
    merged = settings.model_dump(exclude={"variants"})
    network = changes.get("network")
    head = network.get("head") if isinstance(network, Mapping) else None
    if head in HEADS and head != merged["network"]["head"]:
        if merged["loss"]["name"] == "own":  # of the data set's head
            del merged["loss"]
        if head_of_variant(variant) != head:  # a built-in variant has all of its settings itself
            _merge(merged, head_changes(head))
    _merge(merged, changes)
    try:
        return TrainSettings.model_validate(merged)
    except ValidationError as error:
        raise settings_error(error, where, merged, TrainSettings) from error


def changes_of_variant(settings: TrainSettings, variant: str) -> dict[str, Any]:
    """What a variant changes of the data set's train settings: built in, then by params.yaml."""
    changes: dict[str, Any] = {}
    if head_of_variant(variant) is not None:
        _merge(changes, variant_changes(variant))
    _merge(changes, settings.variants.get(variant, {}))
    return changes


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Change a block in place; a block of another kind takes the place of the one there."""
    for key, value in changes.items():
        own, kind = base.get(key), KINDS.get(key, "")
        if (
            isinstance(value, Mapping)
            and isinstance(own, dict)
            and value.get(kind, own.get(kind)) == own.get(kind)
        ):
            _merge(own, value)
        else:
            base[key] = copy.deepcopy(value)
