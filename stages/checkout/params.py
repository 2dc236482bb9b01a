"""params.yaml and `--set` options -> typed settings, or an error that names the key."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import InputError, MissingError
from pipeline.settings import (
    SECTIONS,
    VARIANTS,
    DetectorSettings,
    ExtractSettings,
    Params,
    PrepareSettings,
    TrainSettings,
)
from stages.checkout.keys import describe, nearest

_log = logging.getLogger(__name__)

PARAMS_FILE = Path("params.yaml")


@dataclass(frozen=True)
class Request:
    """What a command was asked to do: one data set's settings, with `--set` options applied.

    A command reads params.yaml once, with `read_request`, and passes the request on.

    Attributes:
        dataset: name of the data set.
        params: all of params.yaml, overrides applied.
        overrides: the `--set` options as they were given, `key=value`.
        params_in_file: params.yaml without the overrides.
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

    def overriding(self, *overrides: str) -> Request:
        """The same request with further `--set` options; params.yaml is not read again.

        Raises:
            InputError: as `load_params`.
        """
        return _request(self.raw, self.dataset, (*self.overrides, *overrides))

    def for_dataset(self, dataset: str) -> Request:
        """The same request for another data set of params.yaml."""
        return _request(self.raw, dataset, self.overrides)

    def variant(self, name: str, where: str = "train") -> TrainSettings:
        """The train settings of a variant, as `variant_settings`."""
        return variant_settings(self.train, name, where)

    def is_overridden(self, variant: str) -> bool:
        """Whether a run of ``variant`` would differ from the one that params.yaml describes."""
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
        overrides: as `load_params` takes them.

    Raises:
        InputError: as `load_params`, or params.yaml does not describe the data set.
        MissingError: there is no params.yaml.
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
        overrides: ``key=value``, keys as in the file, e.g. ``train.demo.epochs=5``; values YAML.
        file: where params.yaml lies.

    Raises:
        InputError: there is no such file, or it holds an unknown key, data set or variant, or a
            value of the wrong kind; names the key and, for a misspelt one, the nearest.
    """
    return _check(read_params(file), overrides, file)


def _check(given: Mapping[str, Any], overrides: Sequence[str], file: Path) -> Params:
    raw = dict(given)  # `_override` copies each block that it changes
    for override in overrides:
        _override(raw, override)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise InputError(describe(error, file, "set" if overrides else "file")) from error
    _check_datasets(params, file)
    for dataset, settings in params.train.items():
        for variant in settings.variants:
            where = f"{file}: train.{dataset}.variants.{variant}"
            meant = difflib.get_close_matches(variant, VARIANTS, n=1, cutoff=0.85)
            if meant and variant not in VARIANTS:
                raise InputError(
                    f"{where} is no variant, and too near to one for a name of your own. Did you "
                    f"mean `{meant[0]}`?"
                )
            variant_settings(settings, variant, where)
        if dataset in params.datasets:
            for variant in params.variants:
                variant_settings(settings, variant, f"{file}: variants, for {dataset}")
    return params


def read_params(file: Path = PARAMS_FILE) -> dict[str, Any]:
    """What params.yaml holds, of which nothing is checked but that it is YAML.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        raw = YAML(typ="safe").load(file.read_text())
    except FileNotFoundError:
        raise MissingError(
            f"There is no {file} in {Path.cwd()}.",
            "gmpipe runs from its checkout: change to that folder first.",
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {error}. Mend it.") from error
    if not isinstance(raw, dict):
        raise InputError(f"{file} holds no settings. Restore it with `git checkout {file}`.")
    _log.info("read %s", file)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.split(".")
    if not equals or (len(path) < 2 and key not in ("datasets", "variants", "seeds")):
        raise InputError(
            f"--set {override}: expected KEY=VALUE with a key of params.yaml, e.g. "
            "`--set train.demo.epochs=5`."
        )
    block: Any = raw
    for depth, part in enumerate(path[:-1]):
        # Blocks with defaults, such as `network`, may be absent from the file.
        known = isinstance(block, dict) and (part in block or depth >= 2)
        if not known or not isinstance(block.setdefault(part, {}), dict):
            choices = block if isinstance(block, dict) and part not in block else ()
            raise InputError(
                f"--set {override}: params.yaml has no block "
                f"`{'.'.join(path[: depth + 1])}`.{nearest(part, choices)}"
            )
        block[part] = dict(block[part])  # a YAML alias may stand in several places
        block = block[part]
    try:
        block[path[-1]] = YAML(typ="safe").load(value)
    except YAMLError as error:
        raise InputError(f"--set {override}: the value is not YAML. Quote it.") from error


def _check_datasets(params: Params, file: Path) -> None:
    known = set.intersection(*(set(getattr(params, section)) for section in SECTIONS))
    for section in SECTIONS:
        for dataset in getattr(params, section):
            if dataset not in known:
                lacking = [name for name in SECTIONS if dataset not in getattr(params, name)]
                raise InputError(
                    f"{file}: {section}.{dataset} stands without {lacking[0]}.{dataset}; a data "
                    f"set needs a block in each of {', '.join(SECTIONS)}."
                    f"{nearest(dataset, known)}"
                )
    for dataset in params.datasets:
        _check_dataset(params, dataset, f"{file}: datasets")


def _check_dataset(params: Params, dataset: str, where: str) -> None:
    if dataset not in params.prepare:
        raise InputError(
            f"{where}: unknown data set {dataset!r}; params.yaml describes "
            f"{', '.join(params.prepare)}.{nearest(dataset, params.prepare)}"
        )


def unreached(request: Request, variant: str) -> list[str]:
    """Keys of a variant's settings that overrides name, but that the variant sets itself."""
    found: list[str] = []
    for override in request.overrides:
        section, _, key = override.partition("=")[0].partition(f".{request.dataset}.")
        own: Any = request.train.variants.get(variant, {})
        for part in key.split("."):
            own = own.get(part, found) if isinstance(own, Mapping) else found
        if section == "train" and own is not found:
            found.append(key)
    return found


def unread_by_runs(request: Request) -> list[str]:
    """Keys of overrides that a run of this data set does not read."""
    keys = [override.partition("=")[0] for override in request.overrides]
    views = f"extract.{request.dataset}.views"
    return [
        key
        for key in keys
        if "." in key and not key.startswith(f"train.{request.dataset}.") and key != views
    ]


def has_variant(settings: TrainSettings, variant: str) -> bool:
    """Whether it is one that every data set has, or one of the data set's own."""
    return variant in VARIANTS or variant in settings.variants


def variant_settings(settings: TrainSettings, variant: str, where: str = "train") -> TrainSettings:
    """The train settings of a variant: the data set's, with what the variant changes of them.

    Raises:
        InputError: there is no such variant, or it changes what is no setting.
    """
    if not has_variant(settings, variant):
        known = [*VARIANTS, *(name for name in settings.variants if name not in VARIANTS)]
        raise InputError(
            f"{where}: unknown variant {variant!r}; there are {', '.join(known)}."
            f"{nearest(variant, known)}"
        )
    changes = settings.variants.get(variant, {})
    if "variants" in changes:
        raise InputError(f"{where}: `variants` can't stand within a variant. Take it out.")
    merged = settings.model_dump(exclude={"variants"})
    _merge(merged, VARIANTS.get(variant, {}))
    _merge(merged, changes)
    try:
        return TrainSettings.model_validate(merged)
    except ValidationError as error:
        raise InputError(describe(error, Path(where), "file", root=TrainSettings)) from error


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)
