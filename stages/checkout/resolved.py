"""Resolved train settings in files that DVC compares and people read.

`data/<dataset>/settings/<variant>.yaml`
    holds the settings of a variant as params.yaml describes it, with all defaults, and the number
    of views. Training depends on this file, so that a change of one variant's settings retrains
    that variant alone. (DVC can't merge a variant with the settings that it changes, nor depend on
    keys that may be missing.) It also holds a digest of the code of the variant's head, so that
    only those variants are trained again whose head was edited.
`runs/<dataset>/<run>/settings.yaml`
    holds what a run was made with, including data set, variant and seed, and the sha256 of the
    checkpoint that was.

The same settings give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import DamagedError, MissingError, briefly
from pipeline.files import exists, matching, read_bytes, replacing, sha256_file, sha256_json
from pipeline.settings import TrainSettings
from pipeline.settings.heads import HEADS
from stages.checkout.layout import CHECKPOINT_FILE, SETTINGS_FILE, settings_folder
from stages.checkout.params import Request, has_variant, variant_settings

if TYPE_CHECKING:
    from stages.checkout.plans import RunPlan  # imports torch, which `prepare` does without

_SUFFIX = ".yaml"
_CHECKOUT = Path(__file__).resolve().parents[2]


def write_variant_settings(request: Request) -> None:
    """Write the settings of every variant that params.yaml lists, and remove all others.

    Files that are up to date stay untouched. `--set` options are not applied: the files describe
    params.yaml, as DVC's stages do.
    """
    files = _variant_files(request)
    for path in outdated_variant_settings(request):
        if path in files:
            _write(path, files[path])
        else:
            path.unlink(missing_ok=True)


def outdated_variant_settings(request: Request) -> list[Path]:
    """The files that `write_variant_settings` would write or remove."""
    files = _variant_files(request)
    differing = [
        path
        for path, text in files.items()
        if not exists(path) or read_bytes(path) != text.encode()
    ]
    unknown = set(matching(settings_folder(request.dataset), f"*{_SUFFIX}")) - files.keys()
    return [*differing, *sorted(unknown)]


def _variant_files(request: Request) -> dict[Path, str]:
    """The settings of every variant as YAML, by file."""
    params, dataset = request.params_in_file, request.dataset
    train, views = params.train[dataset], params.extract[dataset].views
    # A data set that `datasets` does not list may lack some of the variants.
    return {
        settings_folder(dataset) / f"{name}{_SUFFIX}": _as_yaml(
            _with_code(variant_settings(train, name), views)
        )
        for name in params.variants
        if has_variant(train, name)
    }


def write_run_settings(run: RunPlan, chosen_precision: str) -> None:
    """Write what a run was made with beside its checkpoint, with a digest of the rest of the file.

    The file names the checkpoint, so that nobody takes it for what another one was made with.

    Args:
        run: the plan.
        chosen_precision: `Checkpoint.chosen_precision`; written if there is one.
    """
    identity = {"dataset": run.dataset, "variant": run.variant, "seed": run.seed}
    checkpoint = {"checkpoint_sha256": sha256_file(run.folder / CHECKPOINT_FILE)}
    content = {**identity, **_resolved(run.settings, run.views), **checkpoint}
    if chosen_precision:
        content["chosen_precision"] = chosen_precision
    _write(run.folder / SETTINGS_FILE, _as_yaml({**content, "sha256": sha256_json(content)}))


def read_run_settings(folder: Path) -> Mapping[str, Any]:
    """Read what `write_run_settings` wrote: `dataset`, `variant`, `seed`, `settings`, `views`
    and `checkpoint_sha256`.

    Raises:
        MissingError: the folder has no such file.
        DamagedError: it was changed, or holds something else.
    """
    path = folder / SETTINGS_FILE
    remedy = "Train this run again."
    try:
        content = YAML(typ="safe").load(read_bytes(path))
        digest = content.pop("sha256")
        matches = digest == sha256_json(content)
    except FileNotFoundError as error:
        raise MissingError(f"There are no settings at {path}.", remedy) from error
    # ruamel raises IndexError, among others, for values that are none of their tag.
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, YAMLError) as error:
        raise DamagedError(f"{path} can't be read ({briefly(error)}).", remedy) from error
    if not matches:
        raise DamagedError(f"{path} is damaged: its content does not match its sha256.", remedy)
    return dict(content)


def _with_code(settings: TrainSettings, views: int) -> dict[str, Any]:
    """Resolved settings with a digest of the head's code: its file, and what its room shares."""
    own = HEADS[settings.network.head].file
    of_others = {entry.file for entry in HEADS.values()} - {own}
    room = {path.name: path for path in matching(_CHECKOUT / own.parent, "*.py")}
    files = {
        name: sha256_file(path)
        for name, path in sorted(room.items())
        if own.with_name(name) not in of_others
    }
    return {**_resolved(settings, views), "head_sha256": sha256_json(files)}


def _resolved(settings: TrainSettings, views: int) -> dict[str, Any]:
    own = {
        name: value
        for name, value in settings.model_dump(mode="json").items()
        if name != "variants"
    }
    return {"settings": own, "views": views}


def _as_yaml(content: Mapping[str, Any]) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(content, stream)
    return stream.getvalue()


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
