"""params.yaml -> typed settings, or an error that names the key."""

from __future__ import annotations

import copy
import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import GmpipeError
from pipeline.settings import (
    VARIANTS,
    DetectorSettings,
    ExtractSettings,
    PrepareSettings,
    TrainSettings,
    VariantName,
)

_log = logging.getLogger(__name__)

PARAMS_FILE = Path("params.yaml")
SECTIONS = ("prepare", "detector", "extract", "train")


class Params(BaseModel):
    """The whole of params.yaml. A section holds a block for each data set."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    datasets: list[str] = Field(min_length=1, description="what `dvc repro` runs")
    variants: list[VariantName] = Field(min_length=1, description="what `dvc repro` trains")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="with which seeds")
    prepare: dict[str, Annotated[PrepareSettings, Field(discriminator="source")]]
    detector: dict[str, DetectorSettings]
    extract: dict[str, ExtractSettings]
    train: dict[str, TrainSettings]

    @field_validator("datasets", "variants", "seeds")
    @classmethod
    def _check_unique(cls, names: list[Any]) -> list[Any]:
        # DVC expands stages over these lists; twice the same name is twice the same stage.
        if len(set(names)) != len(names):
            raise ValueError("expected each entry once")
        return names


@dataclass(frozen=True)
class DatasetSettings:
    """The settings of one data set, overrides applied.

    Attributes:
        dataset: its name.
        prepare, detector, extract, train: its blocks.
        in_file: the same as params.yaml alone has them; None where it lacks the data set.
    """

    dataset: str
    prepare: PrepareSettings
    detector: DetectorSettings
    extract: ExtractSettings
    train: TrainSettings
    in_file: DatasetSettings | None

    def overridden(self, variant: str) -> bool:
        """Whether a run of ``variant`` would differ from the one that params.yaml describes."""
        plain = self.in_file
        if plain is None or not has_variant(plain.train, variant):
            return True
        return (
            variant_settings(self.train, variant) != variant_settings(plain.train, variant)
            or self.extract.views != plain.extract.views
        )


def load_params(overrides: Sequence[str] = (), file: Path = PARAMS_FILE) -> Params:
    """Read and check all of params.yaml.

    Args:
        overrides: ``key=value``, keys as in the file, e.g. ``train.demo.epochs=5``; values YAML.
        file: where params.yaml lies.

    Raises:
        GmpipeError: there is no such file, or it holds an unknown key, data set or variant, or a
            value of the wrong kind; names the key and, for a misspelt one, the nearest.
    """
    raw = read_params(file)
    for override in overrides:
        _override(raw, override)
    try:
        params = Params.model_validate(raw)
    except ValidationError as error:
        raise GmpipeError(_describe(error, file, "set" if overrides else "file")) from error
    _check_datasets(params, file)
    for dataset, settings in params.train.items():
        for variant in settings.variants:
            where = f"{file}: train.{dataset}.variants.{variant}"
            meant = difflib.get_close_matches(variant, VARIANTS, n=1, cutoff=0.85)
            if meant and variant not in VARIANTS:
                raise GmpipeError(
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
        GmpipeError: there is no such file, or it is something else.
    """
    try:
        raw = YAML(typ="safe").load(file.read_text())
    except FileNotFoundError:
        raise GmpipeError(
            f"there is no {file} in {Path.cwd()}. gmpipe runs from its checkout: change to that "
            "folder first."
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise GmpipeError(f"{file} is not YAML: {error}. Mend it.") from error
    if not isinstance(raw, dict):
        raise GmpipeError(f"{file} holds no settings. Restore it with `git checkout {file}`.")
    _log.info("read %s", file)
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    path = key.split(".")
    if not equals or (len(path) < 2 and key not in ("datasets", "variants", "seeds")):
        raise GmpipeError(
            f"--set {override}: expected KEY=VALUE with a key of params.yaml, e.g. "
            "`--set train.demo.epochs=5`."
        )
    block: Any = raw
    for depth, part in enumerate(path[:-1]):
        # Blocks with defaults, such as `network`, may be absent from the file.
        known = isinstance(block, dict) and (part in block or depth >= 2)
        if not known or not isinstance(block.setdefault(part, {}), dict):
            choices = block if isinstance(block, dict) and part not in block else ()
            raise GmpipeError(
                f"--set {override}: params.yaml has no block "
                f"`{'.'.join(path[: depth + 1])}`.{_nearest(part, choices)}"
            )
        block[part] = dict(block[part])  # a YAML alias may stand in several places
        block = block[part]
    try:
        block[path[-1]] = YAML(typ="safe").load(value)
    except YAMLError as error:
        raise GmpipeError(f"--set {override}: the value is not YAML. Quote it.") from error


def _check_datasets(params: Params, file: Path) -> None:
    known = set.intersection(*(set(getattr(params, section)) for section in SECTIONS))
    for section in SECTIONS:
        for dataset in getattr(params, section):
            if dataset not in known:
                lacking = [name for name in SECTIONS if dataset not in getattr(params, name)]
                raise GmpipeError(
                    f"{file}: {section}.{dataset} stands without {lacking[0]}.{dataset}; a data "
                    f"set needs a block in each of {', '.join(SECTIONS)}."
                    f"{_nearest(dataset, known)}"
                )
    for dataset in params.datasets:
        _check_dataset(params, dataset, f"{file}: datasets")


def _check_dataset(params: Params, dataset: str, where: str) -> None:
    if dataset not in params.prepare:
        raise GmpipeError(
            f"{where}: unknown data set {dataset!r}; params.yaml describes "
            f"{', '.join(params.prepare)}.{_nearest(dataset, params.prepare)}"
        )


def dataset_settings(dataset: str | None, overrides: Sequence[str] = ()) -> DatasetSettings:
    """The settings of a data set; None means the first of ``datasets``.

    Raises:
        GmpipeError: as `load_params`, or params.yaml does not describe the data set.
    """
    params = load_params(overrides)
    name = params.datasets[0] if dataset is None else dataset
    _check_dataset(params, name, "--dataset")
    plain = load_params() if overrides else params
    in_file = _blocks(plain, name, None) if name in plain.train else None
    return _blocks(params, name, in_file)


def unreached(settings: DatasetSettings, overrides: Sequence[str], variant: str) -> list[str]:
    """Keys of a variant's settings that overrides name, but that the variant sets itself."""
    found: list[str] = []
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(f".{settings.dataset}.")
        own: Any = settings.train.variants.get(variant, {})
        for part in key.split("."):
            own = own.get(part, found) if isinstance(own, Mapping) else found
        if section == "train" and own is not found:
            found.append(key)
    return found


def unread_by_runs(settings: DatasetSettings, overrides: Sequence[str]) -> list[str]:
    """Keys in overrides that are of other stages or data sets than a run of this one reads."""
    keys = [override.partition("=")[0] for override in overrides]
    views = f"extract.{settings.dataset}.views"
    return [
        key
        for key in keys
        if "." in key and not key.startswith(f"train.{settings.dataset}.") and key != views
    ]


def _blocks(params: Params, name: str, in_file: DatasetSettings | None) -> DatasetSettings:
    blocks = {section: getattr(params, section)[name] for section in SECTIONS}
    return DatasetSettings(dataset=name, **blocks, in_file=in_file)


def has_variant(settings: TrainSettings, variant: str) -> bool:
    """Whether it is one that every data set has, or one of the data set's own."""
    return variant in VARIANTS or variant in settings.variants


def variant_settings(settings: TrainSettings, variant: str, where: str = "train") -> TrainSettings:
    """The train settings of a variant: the data set's, with what the variant changes of them.

    Raises:
        GmpipeError: there is no such variant, or it changes what is no setting.
    """
    if not has_variant(settings, variant):
        known = [*VARIANTS, *(name for name in settings.variants if name not in VARIANTS)]
        raise GmpipeError(
            f"{where}: unknown variant {variant!r}; there are {', '.join(known)}."
            f"{_nearest(variant, known)}"
        )
    changes = settings.variants.get(variant, {})
    if "variants" in changes:
        raise GmpipeError(f"{where}: `variants` can't stand within a variant. Take it out.")
    merged = settings.model_dump(exclude={"variants"})
    _merge(merged, VARIANTS.get(variant, {}))
    _merge(merged, changes)
    try:
        return TrainSettings.model_validate(merged)
    except ValidationError as error:
        raise GmpipeError(_describe(error, Path(where), "file", root=TrainSettings)) from error


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def _describe(
    error: ValidationError, file: Path, origin: str, root: type[BaseModel] = Params
) -> str:
    """The first of pydantic's findings, in the words of this project."""
    # A misspelt key that is required is found twice: first as missing, then as unknown.
    findings = error.errors()
    finding = next((one for one in findings if one["type"] == "extra_forbidden"), findings[0])
    # pydantic names a tuple's place or a dict's key itself `[key]`: not part of a path.
    location = [part for part in finding["loc"] if part != "[key]"]
    source = ""
    if location[:1] == ["prepare"] and len(location) > 2:
        source = str(location.pop(2))  # pydantic's name for the kind of block
    key = ".".join(str(part) for part in location) or "the whole"
    where = f"{file}{' or --set' if origin == 'set' else ''}: `{key}`"
    if finding["type"] == "extra_forbidden":
        known = _keys(root, location[:-1], source)
        return f"{where} is no setting.{_nearest(str(location[-1]), known)}"
    if finding["type"] == "missing":
        return f"{where} is missing. Add it."
    value = finding["input"]
    if finding["type"] == "union_tag_not_found":
        misspelt = difflib.get_close_matches("source", list(value), n=1)
        if misspelt:
            return f"{where[:-1]}.{misspelt[0]}` is no setting. Did you mean `source`?"
        return f"{where[:-1]}.source` is missing. Add it."
    if finding["type"] == "union_tag_invalid":
        value, expected = finding["ctx"]["tag"], finding["ctx"]["expected_tags"]
        hint = _nearest(value, re.findall(r"'([^']+)'", expected))
        return f"{where[:-1]}.source` is {value!r}: expected one of {expected}. Change it.{hint}"
    hint = ""
    if isinstance(value, str) and finding["type"] == "literal_error":
        hint = _nearest(value, re.findall("'([^']+)'", finding["ctx"]["expected"]))
    shown = "" if isinstance(value, Mapping) else f" is {value!r}"
    return f"{where}{shown}: {finding['msg'].removeprefix('Value error, ')}. Change it.{hint}"


def _keys(root: type[BaseModel], location: Sequence[int | str], source: str) -> Iterable[str]:
    """The settings that a block of params.yaml may hold; ``source`` tells blocks of one place."""
    model: Any = root
    for part in location:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return ()
        field = model.model_fields.get(str(part))
        if field is None:
            continue  # the data set's name, below a section
        model = _block(field.annotation, source)
    return model.model_fields if isinstance(model, type) and issubclass(model, BaseModel) else ()


def _block(annotation: Any, source: str) -> type[BaseModel] | None:
    """The kind of block that a setting holds; None where it holds a plain value."""
    blocks = [kind for kind in _classes(annotation) if issubclass(kind, BaseModel)]
    of_source = [
        kind
        for kind in blocks
        if "source" in kind.model_fields
        and source in get_args(kind.model_fields["source"].annotation)
    ]
    return next(iter(of_source or blocks), None)


def setting_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    """The dotted key of every setting that `--set` takes, for the data sets of ``raw``."""
    for name, field in Params.model_fields.items():
        if name not in SECTIONS:
            yield name
            continue
        for dataset, given in raw[name].items():
            block = _block(field.annotation, given.get("source", ""))
            yield from (f"{name}.{dataset}.{key}" for key in _dotted(block))


def _dotted(block: type[BaseModel] | None) -> Iterator[str]:
    for name, field in block.model_fields.items() if block else ():
        inner = _block(field.annotation, "")
        yield from (f"{name}.{key}" for key in _dotted(inner)) if inner else (name,)


def _classes(annotation: Any) -> list[type]:
    """The classes in an annotation, however deep they stand."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _classes(part)]


def _nearest(word: str, choices: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean `{found[0]}`?" if found else ""
