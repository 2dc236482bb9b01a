"""The names of settings: which exist, which is nearest to a misspelt one, and what is wrong."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.errors import InputError
from pipeline.formats.text import first_few
from pipeline.settings import (
    SECTIONS,
    TREATMENTS,
    HeadSettings,
    Loss,
    Params,
    TrainSettings,
    head_of_variant,
    settings_class,
    variant_names,
)
from pipeline.settings.heads import DEFAULT_HEAD, HEADS

KINDS = {"network": "head", "loss": "name"}
"""Block of train settings of which there are several kinds -> the setting that tells which."""

_RENAMED = {
    "beta": "Write `{}loss.beta` instead.",
    "network.architecture": "Write `{}network.head` instead, and `gm-mlic` for `matching`.",
}
"""Train setting of an older release -> what to write now; the braces stand for what is before."""

_CUTOFF = 0.5  # of difflib: how alike a suggestion must be at least
_CHANGE = "Change the value."
_ADD = "Add it."
_SEE_ALL = "Remove it. `gmpipe settings` lists all settings."


def settings_error(
    error: ValidationError, where: str, given: Mapping[str, Any], root: type[BaseModel] = Params
) -> InputError:
    """Turn pydantic's first finding into an error that names the setting.

    Args:
        error: of the validation of ``given``.
        where: begins the message, e.g. `params.yaml`.
        given: the settings that were validated.
        root: the class of the block that was validated; keys are relative to it.
    """
    # A misspelt key that is required gives two findings: one is missing, another is unknown.
    findings = error.errors()
    order = ("name", "extra_forbidden")
    finding = min(findings, key=lambda one: order.index(one["type"]) if one["type"] in order else 2)
    kind, value = finding["type"], finding["input"]
    location = _location(finding, root)
    key = ".".join(location)

    if kind == "extra_forbidden":
        return _unknown_key(where, root, location, given)
    if kind == "missing":
        return InputError(f"{where}: the setting `{key}` is missing.", _ADD)
    if kind == "union_tag_not_found":
        misspelt = difflib.get_close_matches("source", list(value), n=1)
        if misspelt:
            wrong = f"{where}: unknown setting `{key}.{misspelt[0]}`."
            return InputError(wrong, "Did you mean `source`?")
        return InputError(f"{where}: the setting `{key}.source` is missing.", _ADD)
    if kind in ("union_tag_invalid", "head"):
        return _unknown_kind(where, key, finding)
    if kind == "own_loss":
        return _wrong_loss(where, ".".join([*location, "loss.name"]), finding["ctx"])
    if kind == "decisions":
        key = ".".join([*location, "decisions"])
        return InputError(f"{where}: `{key}`: {finding['msg']}.", finding["ctx"]["remedy"])
    if kind == "name":
        return name_error(value, f"{where}: {location[0]}", finding["ctx"])
    hint = ""
    if kind == "literal_error" and isinstance(value, str):
        hint = nearest(value, re.findall("'([^']+)'", finding["ctx"]["expected"]))
    if kind in ("list_type", "tuple_type") and isinstance(value, str | int | float):
        hint = f"Write a list: `[{value}]`."
    if kind in _BLOCK_EXPECTED and isinstance(value, str) and location[-1] in KINDS:
        hint = f"Write a block: `{{{KINDS[location[-1]]}: {value}}}`."
    if kind in _BLOCK_EXPECTED and location[-1:] == ["difficult"]:
        one = value if value in TREATMENTS else TREATMENTS[0]
        hint = f"Write a value for each split, e.g. `{{train: {one}, test: {one}}}`."
    shown = f"`{key}`" if key else "the whole file"
    if isinstance(value, Mapping):
        return InputError(f"{where}: {shown}: {_expected(finding)}.", "Correct the block.")
    problem = f"{where}: {shown} is {shortened(value)}: {_expected(finding)}."
    return InputError(problem, hint or _CHANGE)


_BLOCK_EXPECTED = ("dict_type", "model_type", "model_attributes_type")


def _location(finding: ErrorDetails, root: type[BaseModel]) -> list[str]:
    """The keys and indices down to a setting, as params.yaml has them."""
    # pydantic calls a tuple's index or a dict's key itself `[key]`: not part of a path.
    location = [str(part) for part in finding["loc"] if part != "[key]"]
    # pydantic adds the kind of a block after the block's own name.
    if root is Params and location[:1] == ["prepare"]:
        del location[2:3]
    block = location[2:] if root is Params and location[:1] == ["train"] else location
    if block[:1] == ["loss"] and root in (Params, TrainSettings):
        kind = len(location) - len(block) + 1
        del location[kind : kind + 1]
    return location


def _unknown_kind(where: str, key: str, finding: ErrorDetails) -> InputError:
    """The error for a block of a kind that does not exist, such as an unknown head."""
    context = finding["ctx"]
    if finding["type"] == "head":
        tag, kind, known = "head", context["head"], context["heads"].split(", ")
    else:
        tag, kind = context["discriminator"].strip("'"), context["tag"]
        known = re.findall(r"'([^']+)'", context["expected_tags"])
    expected = ", ".join(map(repr, known))
    wrong = f"{where}: `{key}.{tag}` is {shortened(kind)}. Expected one of {expected}."
    return InputError(wrong, nearest(str(kind), known) or _CHANGE)


def _wrong_loss(where: str, key: str, context: Mapping[str, Any]) -> InputError:
    """The error for a loss that does not belong to the head."""
    head, loss = context["head"], context["loss"]
    if loss == "own":
        others = [name for name in _losses() if name != "own"]
        return InputError(
            f"{where}: `{key}` is 'own', but the head `{head}` has no loss of its own.",
            f"Choose one of {', '.join(others)}.",
        )
    return InputError(
        f"{where}: `{key}` is {loss!r}, but the head `{head}` computes its own loss.",
        f"Set `{key}` to `own`.",
    )


def _losses() -> dict[str, type[BaseModel]]:
    """Name of a loss -> the class of its settings."""
    return {get_args(loss.model_fields["name"].annotation)[0]: loss for loss in get_args(Loss)}


def name_error(name: object, where: str, context: Mapping[str, Any]) -> InputError:
    """Make the error for a name that no data set or variant can have.

    Args:
        name: as it was given.
        where: begins the message.
        context: of `check_name`'s error.
    """
    return InputError(
        f"{where}: {shortened(name)} can't be a name: expected {context['rule']}.",
        f"Use another name, for example `{context['nearest']}`.",
    )


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


def shortened(value: object) -> str:
    """`repr` of a value, cut: YAML's aliases can make a value of a few lines endless."""
    return _SHORT.repr(value)


def _expected(finding: ErrorDetails) -> str:
    """Say what pydantic expected, without its own names of things."""
    if finding["type"] in _BLOCK_EXPECTED:
        return "expected a block of settings"
    if finding["type"] == "too_short":
        return f"expected at least {finding['ctx']['min_length']} entry"
    message = finding["msg"].removeprefix("Value error, ")
    message = re.sub("^Input should be (greater|less)", r"expected a value \1", message)
    return re.sub("^(Input|String) should ", "expected to ", message).replace("to be ", "", 1)


def _unknown_key(
    where: str, root: type[BaseModel], location: Sequence[str], given: Mapping[str, Any]
) -> InputError:
    """The error for a setting that its block does not have.

    Args:
        where, root, given: as in `settings_error`.
        location: keys and indices down to the unknown setting.
    """
    *block, word = location
    in_train = root is Params and location[0] == "train"
    before = "".join(f"{part}." for part in (location[:2] if in_train else ()))
    key = ".".join(location)
    wrong, hint = f"{where}: unknown setting `{key}`.", ""
    if in_train or root is TrainSettings:
        hint = _RENAMED.get(key.removeprefix(before), "").format(before)
    model, _ = _block_at(root, block, given)
    losses = _losses()
    if model and issubclass(model, HeadSettings):
        head = model.model_fields["head"].default
        wrong = f"{where}: the head `{head}` has no setting `{key}`."
        if head == "max-pool" and word == "latent_size":  # of an older release
            hint = f"Write `{'.'.join(block)}.hidden_size` instead."
        heads = [name for name in HEADS if word in settings_class(name).model_fields]
        if heads and not hint:
            own = f"{before}variants.{HEADS[heads[0]].variants[0]}.network.{word}"
            set_it = f"In a variant of one, it is `{own}`" if in_train else "Name one in `head`"
            hint = f"Heads that have it: {_listed(heads)}. {set_it}."
    elif model is not None and model in losses.values():
        [loss] = get_args(model.model_fields["name"].annotation)
        wrong = f"{where}: the loss `{loss}` has no setting `{key}`."
        if others := [name for name, other in losses.items() if word in other.model_fields]:
            hint = f"Losses that have it: {_listed(others)}. `{before}loss.name` chooses one."
    return InputError(wrong, hint or _nearest_key(root, location, given) or _SEE_ALL)


def _listed(names: Sequence[str]) -> str:
    return first_few([f"`{name}`" for name in names])


def _nearest_key(root: type[BaseModel], location: Sequence[str], given: Mapping[str, Any]) -> str:
    """Suggest the setting that an unknown one may stand for; an empty string if none is like it.

    A setting of the block or of a block in it is suggested as it is written there, and one of the
    same name in the data set's block as it is written in params.yaml.

    Args:
        root, given: as in `settings_error`.
        location: keys and indices down to the unknown setting.
    """
    *block, word = location
    here = _block_at(root, block, given)
    own = list(here[0].model_fields) if here[0] else []
    inner = [key for key in _dotted(*here) if "." in key] if block or root is not Params else []
    named: dict[str, list[str]] = {name: [name] for name in own}
    for key in inner:
        name = key.rpartition(".")[2]
        if name not in own:
            named.setdefault(name, []).append(key)
    top = block[: 2 if root is Params else 0]
    if word not in named and block != top:
        in_top = _dotted(*_block_at(root, top, given))
        above = [key for key in in_top if key.split(".")[-1] == word]
        if above:
            return f"Did you mean `{'.'.join([*top, above[0]])}`?"
    matches = difflib.get_close_matches(word, named, n=1, cutoff=_CUTOFF)
    return f"Did you mean `{'` or `'.join(named[matches[0]])}`?" if matches else ""


def _block_at(
    root: type[BaseModel], location: Sequence[str], given: Mapping[str, Any]
) -> tuple[type[BaseModel] | None, Any]:
    """Return the class of a block and what was given for it; no class if there is no such block.

    Args:
        root: the class that ``location`` begins in.
        location: keys and indices down to the block.
        given: the settings for ``root``.
    """
    model: type[BaseModel] | None = root
    block: Any = given
    for depth, part in enumerate(location):
        in_section = root is Params and depth == 1 and location[0] in SECTIONS
        field = model.model_fields.get(part) if model else None
        block = _within(block, part)
        if field is not None and not in_section:
            inside = root is Params and depth == 0 and len(location) > 1
            model = _block(field.annotation, _within(block, location[1]) if inside else block)
        elif not in_section:  # a data set's name, below a section, leads to no other class
            return None, block
    return model, block


def _within(block: Any, key: str) -> Any:
    return block.get(key) if isinstance(block, Mapping) else None


def _block(annotation: Any, given: Any) -> type[BaseModel] | None:
    """Return the class of the block that a setting holds; None if it holds a plain value.

    Args:
        annotation: of the setting.
        given: the block, which may be anything; it tells which of several kinds it is.
    """
    blocks = [kind for kind in _classes(annotation) if issubclass(kind, BaseModel)]
    if HeadSettings in blocks:
        head = _within(given, "head") or DEFAULT_HEAD
        return settings_class(head) if isinstance(head, str) and head in HEADS else HeadSettings
    of_kind = [kind for kind in blocks if _is_of_kind(kind, given)]
    return next(iter(of_kind or blocks), None)


def _is_of_kind(block: type[BaseModel], given: Any) -> bool:
    """Whether a given block says that it is of this class, in its `source` or `name`."""
    for tag in ("source", "name"):
        field = block.model_fields.get(tag)
        if field is not None:
            return (_within(given, tag) or field.default) in get_args(field.annotation)
    return False


def setting_keys(raw: Mapping[str, Any], typed: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting that `--set` takes, for the data sets of ``raw``.

    Args:
        raw: params.yaml as it was read.
        typed: how a key may begin. If it names a variant, that variant's keys follow.
    """
    for name, field in Params.model_fields.items():
        if name not in SECTIONS:
            yield name
            continue
        for dataset, given in raw[name].items():
            top = f"{name}.{dataset}."
            yield from (f"{top}{key}" for key in _dotted(_block(field.annotation, given), given))
            if name == "train" and typed.startswith(f"{top}variants."):
                variant = typed.removeprefix(f"{top}variants.").partition(".")[0]
                yield from (f"{top}{key}" for key in _keys_of_variant(given, variant))


def _keys_of_variant(given: Mapping[str, Any], variant: str) -> Iterator[str]:
    """Yield the keys of a variant's settings, relative to the data set's block ``given``."""
    own = (given.get("variants") or {}).get(variant)
    if own is None and variant not in variant_names():
        return
    changes = {**given, **(own or {})}
    head = _within(_within(own, "network"), "head") or head_of_variant(variant)
    if head is not None:
        changes["network"] = {"head": head}
    for key in _dotted(TrainSettings, changes):
        if key != "variants":
            yield f"variants.{variant}.{key}"


def _dotted(block: type[BaseModel] | None, given: Any) -> Iterator[str]:
    for name, field in block.model_fields.items() if block else ():
        inside = _within(given, name)
        inner = _block(field.annotation, inside)
        yield from (f"{name}.{key}" for key in _dotted(inner, inside)) if inner else (name,)


def flat(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a block by their dotted keys, without those of variants."""
    settings: dict[str, Any] = {}
    for name, value in block.items():
        if isinstance(value, Mapping) and name != "variants":
            settings |= flat(value, f"{prefix}{name}.")
        elif name != "variants":
            settings[f"{prefix}{name}"] = value
    return settings


def differing(
    used: Mapping[str, Any], described: Mapping[str, Any]
) -> dict[str, tuple[object, object]]:
    """Return the settings in which two blocks differ: dotted key -> both values.

    A setting that only one of the blocks has differs, and is None in the other one. The keys are in
    the order of ``described``.
    """
    one, other = flat(used), flat(described)
    return {
        key: (one.get(key), other.get(key))
        for key in {**other, **one}
        if (key in one) != (key in other) or one[key] != other[key]
    }


def shown_differences(differences: Mapping[str, tuple[object, object]]) -> str:
    """Say which settings differ, e.g. "`epochs` was 2, expected 3"; of many, the first ones."""
    words = [
        f"`{key}` was {shortened(used)}, expected {shortened(wanted)}"
        for key, (used, wanted) in differences.items()
    ]
    return first_few(words, "; ")


def _classes(annotation: Any) -> list[type]:
    """Return the classes in an annotation, at any depth."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _classes(part)]


def nearest(word: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is most like ``word``; an empty string if none is."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=_CUTOFF)
    return f"Did you mean `{matches[0]}`?" if matches else ""
