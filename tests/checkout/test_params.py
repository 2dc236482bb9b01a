"""`stages.checkout.params` and the command line: what params.yaml may say, and who is told.

Each mistake is one change to the shipped params.yaml; its message names the key.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner
from pydantic import BaseModel
from ruamel.yaml import YAML

from pipeline import settings as settings_module
from pipeline.errors import GmpipeError
from pipeline.settings import (
    SECTIONS,
    VARIANTS,
    NetworkSettings,
    Params,
    TrainSettings,
)
from stages.checkout.keys import _classes
from stages.checkout.params import (
    load_params,
    read_request,
    unreached,
    variant_settings,
)
from stages.checkout.plans import plan_run
from stages.cli.main import cli, main

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "params.yaml"
MISSING = object()
COMMANDS = ("prepare", "detector", "extract", "train", "evaluate", "compare", "report", "labels")
COMMANDS_WITH_VARIANT = ("train", "evaluate", "compare")
HEAVY = ("torch", "torchvision", "pyarrow", "numpy", "h5py", "dask", "PIL", "sklearn")


def changed_params(folder: Path, changes: dict[str, Any]) -> Path:
    """The shipped params.yaml with dotted keys set, or taken out where they are `MISSING`."""
    raw = YAML(typ="safe").load(SHIPPED)
    for key, value in changes.items():
        *path, last = key.split(".")
        block = raw
        for part in path:
            block = block.setdefault(part, {})
        if value is MISSING:
            del block[last]
        else:
            block[last] = copy.deepcopy(value)
    file = folder / "params.yaml"
    with file.open("w") as stream:
        YAML(typ="safe").dump(raw, stream)
    return file


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the shipped params.yaml and nothing else, as working directory."""
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- what is shipped -----------------------------------------------------------------------------


def test_the_shipped_file_is_sound() -> None:
    params = load_params(file=SHIPPED)
    assert params.datasets == ["demo"]
    assert set(params.variants) == set(VARIANTS)
    for settings in params.train.values():
        for variant in VARIANTS:
            assert variant_settings(settings, variant).variants == {}


def blocks() -> list[type[BaseModel]]:
    found = inspect.getmembers(settings_module, inspect.isclass)
    return [kind for name, kind in found if name.endswith("Settings") and not name.startswith("_")]


@pytest.mark.parametrize("block", [Params, *blocks()])
def test_every_setting_says_what_it_is(block: type[BaseModel]) -> None:
    assert block.__doc__
    for name, field in block.model_fields.items():
        is_block = any(issubclass(kind, BaseModel) for kind in _classes(field.annotation))
        # A block is described by its class, and so is its kind.
        described = is_block or (len(get_args(field.annotation)) == 1 and name == "source")
        assert described or len(field.description or "") > 5, name


@pytest.mark.parametrize("block", blocks())
def test_defaults_are_within_their_own_bounds(block: type[BaseModel]) -> None:
    source = block.model_fields.get("source")
    defaults = block.model_validate({"source": get_args(source.annotation)[0]} if source else {})
    spelt_out = json.loads(defaults.model_dump_json())
    assert block.model_validate(spelt_out) == defaults
    with pytest.raises(ValueError, match="frozen"):
        setattr(defaults, next(iter(block.model_fields)), 1)


def test_an_unknown_variant_is_named_with_those_there_are() -> None:
    own = TrainSettings(variants={"wide": {"network": {"latent_size": 8}}})
    assert variant_settings(own, "wide").network.latent_size == 8
    with pytest.raises(
        GmpipeError, match=r"unknown variant 'max-pol'; there are full, .*wide\..*`max-pool`"
    ):
        variant_settings(own, "max-pol")


# --- mistakes in the file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"datastes": ["demo"]}, "datastes", "datasets"),
        ({"datasets": MISSING, "datastes": ["demo"]}, "datastes", "datasets"),
        ({"trian": {}}, "trian", "train"),
        ({"prepare.demo.tset": 5}, "prepare.demo.tset", "test"),
        ({"prepare.demo.source": MISSING, "prepare.demo.sorce": "scenes"}, None, "source"),
        ({"detector.demo.wieghts": "x"}, "detector.demo.wieghts", "weights"),
        (
            {"detector.demo.architecture.anchor_size": [1]},
            "detector.demo.architecture.anchor_size",
            "anchor_sizes",
        ),
        ({"detector.demo.fit.learning_rte": 1}, "detector.demo.fit.learning_rte", "learning_rate"),
        ({"extract.demo.region": 5}, "extract.demo.region", "regions"),
        ({"train.demo.epohcs": 5}, "train.demo.epohcs", "epochs"),
        ({"train.demo.learning_rte": 1}, "train.demo.learning_rte", "learning_rate"),
        ({"train.demo.network.neighbours": 5}, "train.demo.network.neighbours", "neighbors"),
        ({"train.demo.network.learning_rte": 5}, "train.demo.network.learning_rte", None),
        (
            {"train.demo.variants.max-pool.learning_rte": 1},
            "train.demo.variants.max-pool: `learning_rte",
            "learning_rate",
        ),
        (
            {"train.demo.variants.full.network.latent_sise": 8},
            "train.demo.variants.full: `network.latent_sise",
            "latent_size",
        ),
    ],
)
def test_an_unknown_key_suggests_the_nearest(
    tmp_path: Path, changes: dict[str, Any], key: str | None, nearest: str | None
) -> None:
    file = changed_params(tmp_path, changes)
    with pytest.raises(GmpipeError, match="is no setting") as caught:
        load_params(file=file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ")
    assert f"{key or 'prepare.demo.sorce'}` is no setting." in message
    hint = f" Did you mean `{nearest}`?" if nearest else "is no setting."
    assert message.endswith(hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Names of data sets and variants
        ({"datasets": ["dmeo"]}, "datasets: unknown data set 'dmeo'; .* describes .*demo.*`demo`"),
        ({"variants": ["full", "max_pool"]}, "`variants.1` is 'max_pool': "),
        ({"train.demo.variants.ful": {}}, r"train.demo.variants.ful is no variant.*mean `full`"),
        # Sections and blocks
        *(({section: MISSING}, f"`{section}` is missing. Add it") for section in SECTIONS),
        *(
            ({f"{section}.demo": MISSING}, f"demo stands without {section}.demo; a data set needs")
            for section in SECTIONS
        ),
        ({"train.voc": {}}, r"train.voc stands without prepare.voc; a data set needs a block in e"),
        ({"train": None}, "`train` is None: Input should be a valid dictionary"),
        ({"train.demo": None}, "`train.demo` is None: Input should be a valid dictionary"),
        ({"train.demo.variants.full": None}, "`train.demo.variants.full` is None"),
        ({"prepare.demo.source": MISSING}, "`prepare.demo.source` is missing. Add it"),
        ({"detector.demo.source": "torchvision"}, "`detector.demo`: .*goes with source `fit`"),
        ({"detector.demo.fit": MISSING}, "`detector.demo`: the block `fit` goes with source"),
        (
            {"detector.demo.source": "file", "detector.demo.fit": MISSING},
            "`detector.demo`: source `file` needs `weights`",
        ),
        (
            {"detector.demo": {"source": "torchvision", "architecture": {"fpn_channels": 8}}},
            "`detector.demo`: source `torchvision` takes neither `weights` nor an architecture",
        ),
        # Kinds of value
        ({"datasets": "demo"}, "`datasets` is 'demo': Input should be a valid list"),
        ({"datasets": []}, "`datasets` is .*at least 1 item"),
        ({"variants": []}, "`variants` is .*at least 1 item"),
        ({"seeds": ["one"]}, "`seeds.0` is 'one': Input should be a valid integer"),
        ({"seeds": [0, -1]}, "`seeds.1` is -1: Input should be greater than or equal to 0"),
        ({"train.demo.epochs": 3.5}, "`train.demo.epochs` is 3.5: Input should be a valid int"),
        ({"train.demo.epochs": None}, "`train.demo.epochs` is None: .*valid integer"),
        ({"train.demo.epochs": [3]}, r"`train.demo.epochs` is \[3\]: .*valid integer"),
        ({"extract.demo.flip": "maybe"}, "`extract.demo.flip` is 'maybe': .*valid boolean"),
        ({"train.demo.label_vectors": 5}, "`train.demo.label_vectors` is 5: .*valid string"),
        ({"detector.demo.architecture.anchor_sizes": [8, 16]}, "`.*anchor_sizes.2` is missing"),
        ({"train.demo.optimizer": "adam"}, "`train.demo.optimizer` is 'adam': .*mean `adamw`"),
        ({"train.demo.optimizer": "full"}, "`train.demo.optimizer` is 'full': .* Change it.$"),
        # Bounds
        ({"prepare.demo.train": 9}, "`prepare.demo.train` is 9: .*greater than or equal to 10"),
        ({"prepare.demo.size": 63}, "`prepare.demo.size` is 63: .*greater than or equal to 64"),
        ({"detector.demo.fit.holdout": 1}, "`detector.demo.fit.holdout` is 1: .*less than 1"),
        ({"detector.demo.fit.holdout": 0}, "`detector.demo.fit.holdout` is 0: .*greater than 0"),
        ({"detector.demo.fit.size": 100}, "`detector.demo.fit.size` is 100: .*multiple of 32"),
        ({"extract.demo.nms_threshold": 1.1}, "`extract.demo.nms_threshold` is 1.1: .*equal to 1"),
        ({"extract.demo.regions": 0}, "`extract.demo.regions` is 0: .*greater than or equal to 1"),
        ({"train.demo.network.latent_size": 7}, "`train.demo.network.latent_size` is 7: .*of 2"),
        ({"train.demo.learning_rate": 0}, "`train.demo.learning_rate` is 0: .*greater than 0"),
        ({"train.demo.clip_norm": float("inf")}, "`train.demo.clip_norm` is inf: .*finite number"),
        ({"train.demo.beta": float("nan")}, "`train.demo.beta` is nan: "),
        # Variants are checked when the file is read, not when they are trained.
        (
            {"train.demo.variants.max-pool.epochs": 0},
            "train.demo.variants.max-pool: `epochs` is 0: .*greater than or equal to 1",
        ),
        (
            {"train.demo.variants.max-pool.network": None},
            "train.demo.variants.max-pool: `network` is None",
        ),
        (
            {"train.demo.variants.max-pool.variants": {}},
            "train.demo.variants.max-pool: `variants` can't stand within a variant",
        ),
    ],
)
def test_a_mistake_names_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = changed_params(tmp_path, changes)
    with pytest.raises(GmpipeError, match=message) as caught:
        load_params(file=file)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"datasets: [demo", "is not YAML: while parsing"),
        (b"a: 1\na: 2", 'is not YAML: .*found duplicate key "a"'),
        (b"a: !!python/object:os.system x", "is not YAML: could not determine a constructor"),
        (b"\xff\xfe\xfa", "is not YAML: 'utf-8' codec"),
        (b"", "holds no settings"),
        (b"- demo", "holds no settings"),
        (b"1: 2", "is missing"),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(GmpipeError, match=f"(?s){message}") as caught:
        load_params(file=file)
    assert str(caught.value).startswith(str(file))


def test_outside_the_checkout_the_message_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = f"There is no params.yaml in {re.escape(str(tmp_path))}. gmpipe runs from its checkou"
    with pytest.raises(GmpipeError, match=message):
        load_params()


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.demo.epochs=7", lambda p: p.train["demo"].epochs, 7),
        ("train.demo.learning_rate=3e-3", lambda p: p.train["demo"].learning_rate, 0.003),
        ("train.demo.network.modules=3", lambda p: p.train["demo"].network.modules, 3),
        ("train.demo.network.label_neighbors=null", lambda p: p.train["demo"].network, None),
        ("train.demo.label_vectors=a=b.npz", lambda p: p.train["demo"].label_vectors, "a=b.npz"),
        (
            "train.demo.variants.max-pool.learning_rate=0.5",
            lambda p: p.train["demo"].variants["max-pool"]["learning_rate"],
            0.5,
        ),
        ("train.demo={epochs: 3}", lambda p: p.train["demo"], TrainSettings(epochs=3)),
        ("extract.demo.flip=false", lambda p: p.extract["demo"].flip, False),
        (
            "detector.demo.architecture.anchor_sizes=[1, 2, 3, 4, 5]",
            lambda p: p.detector["demo"].architecture.anchor_sizes,
            (1, 2, 3, 4, 5),
        ),
        ("seeds=[4, 5]", lambda p: p.seeds, [4, 5]),
        ("variants=[full]", lambda p: p.variants, ["full"]),
        ("datasets=[demo]", lambda p: p.datasets, ["demo"]),
    ],
)
def test_a_good_override_is_applied(
    tmp_path: Path, override: str, read: Callable[[Params], object], value: object
) -> None:
    raw = changed_params(tmp_path, {"train.demo.network": {"latent_size": 8, "modules": 1}})
    found = read(load_params([override], raw))
    if isinstance(found, NetworkSettings):
        assert found.label_neighbors is value
    else:
        assert found == value


def test_overrides_leave_the_rest_alone() -> None:
    before = load_params(file=SHIPPED)
    after = load_params(["train.demo.epochs=7", "train.demo.network.modules=3"], SHIPPED)
    assert after.train["demo"].network.latent_size == before.train["demo"].network.latent_size
    for section in ("prepare", "detector", "extract"):
        assert getattr(after, section) == getattr(before, section)


def test_the_last_override_of_a_key_counts() -> None:
    params = load_params(["train.demo.epochs=7", "train.demo.epochs=9"], SHIPPED)
    assert params.train["demo"].epochs == 9


def test_an_override_reaches_one_data_set_of_a_shared_block(tmp_path: Path) -> None:
    """YAML's aliases let two data sets share a block."""
    raw = YAML(typ="safe").load(SHIPPED)
    for section in SECTIONS:
        raw[section]["other"] = raw[section]["demo"]
    file = tmp_path / "params.yaml"
    with file.open("w") as stream:
        YAML(typ="safe").dump(raw, stream)
    assert "other: *" in file.read_text()
    before = load_params(file=file)
    assert before.train["other"] == before.train["demo"]
    after = load_params(["train.other.network.latent_size=6", "train.other.epochs=7"], file)
    assert after.train["other"].network.latent_size == 6
    assert after.train["demo"] == before.train["demo"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.demo.epochs", "--set train.demo.epochs: expected KEY=VALUE with a key of params"),
        (
            "epochs=5",
            "--set epochs=5: expected KEY=VALUE with a key of params.yaml, e.g. `--set tr",
        ),
        ("train=5", "--set train=5: expected KEY=VALUE"),
        ("=5", "--set =5: expected KEY=VALUE"),
        ("", "--set : expected KEY=VALUE"),
        ("trian.demo.epochs=5", "has no block `trian`. Did you mean `train`"),
        ("train.dmeo.epochs=5", "has no block `train.dmeo`. Did you mean `demo`"),
        ("else.demo.epochs=5", "has no block `else`.$"),
        ("train..epochs=5", "has no block `train.`"),
        ("train.demo.epochs.x=5", "has no block `train.demo.epochs`.$"),
        ("seeds.0=5", "has no block `seeds`.$"),
        ("train.demo.epohcs=5", "`train.demo.epohcs` is no setting. Did you mean `epochs`"),
        ("train.demo.netwrok.modules=5", "`train.demo.netwrok` is no setting. .*`network`"),
        ("train.demo.network.module=5", "`train.demo.network.module` is no setting. .*`modules`"),
        ("train.demo.=5", "`train.demo.` is no setting"),
        ("train.demo.variants.full.epohcs=5", "variants.full: `epohcs` is no setting. .*`epochs`"),
        ("train.demo.epochs=", "params.yaml or --set: `train.demo.epochs` is None"),
        ("train.demo.epochs=0", "params.yaml or --set: `train.demo.epochs` is 0: .* equal to 1"),
        ("train.demo.epochs=many", "or --set: `train.demo.epochs` is 'many': .*valid integer"),
        ("train.demo.epochs=[", "--set train.demo.epochs=\\[: the value is not YAML. Quote it"),
        ("train.new={}", "train.new stands without prepare.new"),
        ("datasets=[new]", "datasets: unknown data set 'new'"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str) -> None:
    with pytest.raises(GmpipeError, match=message):
        load_params([override], SHIPPED)


# --- a data set's settings, a variant's, and the run they make -----------------------------------


def test_a_data_set_takes_its_own_blocks(checkout: Path) -> None:
    voc = {"source": "torchvision"}
    changes = {"prepare.voc": {"source": "scenes", "seed": 3}, "detector.voc": voc}
    changed_params(checkout, {**changes, "extract.voc": {}, "train.voc": {"epochs": 3}})
    found = read_request("voc")
    assert (found.dataset, found.prepare.seed, found.train.epochs) == ("voc", 3, 3)
    assert (found.detector.source, found.extract.size) == ("torchvision", 448)
    assert read_request(None).dataset == "demo"
    assert read_request(None, ["datasets=[voc, demo]"]).dataset == "voc"
    with pytest.raises(
        GmpipeError, match=r"--dataset: unknown data set 'vox'; .* demo, .*voc.*`voc`"
    ):
        read_request("vox")


def test_a_variant_changes_what_it_names_and_keeps_the_rest() -> None:
    settings = TrainSettings(
        epochs=9,
        network=NetworkSettings(latent_size=64, modules=3),
        variants={"max-pool": {"learning_rate": 0.5, "network": {"latent_size": 32}}},
    )
    changed = variant_settings(settings, "max-pool")
    assert changed == TrainSettings(
        epochs=9,
        learning_rate=0.5,
        network=NetworkSettings(architecture="max-pool", latent_size=32, modules=3),
    )
    assert variant_settings(settings, "full") == settings.model_copy(update={"variants": {}})


def test_what_a_variant_sets_itself_is_not_reached(checkout: Path) -> None:
    own = "train.demo.variants={max-pool: {epochs: 3, network: {direct_size: null}}}"

    def found(override: str, variant: str = "max-pool") -> list[str]:
        return unreached(read_request("demo", [own, override]), variant)

    assert found("train.demo.epochs=5") == ["epochs"]
    assert found("train.demo.network.direct_size=5") == ["network.direct_size"]
    assert found("train.demo.epochs=5", "full") == []
    assert found("train.demo.batch_size=5") == []
    assert found("train.coco.epochs=5") == []
    assert found("train.demo.variants.max-pool.epochs=5") == []


def folder_of(variant: str, overrides: Sequence[str] = ()) -> str:
    run = plan_run(read_request("demo", overrides), variant, 4)
    assert run.folder.parent == Path("runs/demo")
    return run.folder.name


def test_overridden_runs_lie_apart(checkout: Path) -> None:
    epochs = load_params().train["demo"].epochs
    assert folder_of("max-pool") == "max-pool-s4"
    # Neither the file's own value nor another section's setting makes another run.
    assert folder_of("full", [f"train.demo.epochs={epochs}"]) == "full-s4"
    assert folder_of("full", ["extract.demo.batch_size=3", "seeds=[4]"]) == "full-s4"
    longer = folder_of("full", [f"train.demo.epochs={epochs + 1}"])
    wider = folder_of("full", ["train.demo.network.latent_size=6"])
    for name in (longer, wider):
        assert re.fullmatch(r"full-s4-[0-9a-f]{8}", name)
    assert longer != wider
    assert longer == folder_of("full", [f"train.demo.epochs={epochs + 1}"])
    # More views are other training data; another variant's settings are not this one's.
    assert folder_of("full", ["extract.demo.views=2"]) != "full-s4"
    other = "train.demo.variants={max-pool: {epochs: 3}}"
    assert folder_of("full", [other]) == "full-s4"
    assert folder_of("max-pool", [other]) != "max-pool-s4"


@pytest.mark.parametrize("key", ["datasets=[demo, demo]", "variants=[full, full]", "seeds=[1, 1]"])
def test_an_entry_twice(checkout: Path, key: str) -> None:
    with pytest.raises(GmpipeError, match="expected each entry once"):
        load_params([key])


def test_overrides_can_add_a_data_set(checkout: Path) -> None:
    changes = {
        "prepare": "{source: scenes}",
        "detector": "{source: torchvision}",
        "extract": "{}",
        "train": "{epochs: 2}",
    }
    found = read_request("new", [f"{key}.new={value}" for key, value in changes.items()])
    assert found.train.epochs == 2
    assert found.is_overridden("full")


# --- the command line ----------------------------------------------------------------------------


def run_script(folder: Path, script: str) -> Any:
    """The JSON that a script prints last, run by another interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


RUN_ALL = """
import json, sys
from stages.cli.main import main
codes = []
for arguments in {commands}:
    sys.argv = ["gmpipe", *arguments]
    try:
        main()
    except SystemExit as end:
        codes.append(end.code)
print()
print(json.dumps([codes, [name for name in {watched} if name in sys.modules]]))
"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    commands = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    watched = [*HEAVY, "pydantic", "ruamel.yaml"]
    script = RUN_ALL.format(commands=commands, watched=watched)
    assert run_script(tmp_path, script) == [[0] * len(commands), []]


def test_a_mistake_is_found_before_anything_heavy_is_imported(checkout: Path) -> None:
    commands = [[name, "--dataset", "dmeo"] for name in COMMANDS]
    commands += [[name, "--set", "train.demo.epohcs=5"] for name in COMMANDS]
    commands += [[name, "--variant", "ful"] for name in COMMANDS_WITH_VARIANT]
    script = RUN_ALL.format(commands=commands, watched=list(HEAVY))
    assert run_script(checkout, script) == [[1] * len(commands), []]


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_each_command_explains_itself(name: str) -> None:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0
    command = cli.commands[name]
    assert command.help
    assert command.help.split()[0] in result.output
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert parameter.opts[0] in result.output


def test_the_group_lists_its_commands() -> None:
    assert set(COMMANDS) <= set(cli.commands)
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in cli.commands:
        assert f"\n  {name} " in result.output


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    """Exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["gmpipe", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


MISTAKES = [(name, "--dataset", "dmeo", "data set 'dmeo'") for name in COMMANDS]
MISTAKES += [(name, "--variant", "ful", "variant 'ful'") for name in COMMANDS_WITH_VARIANT]
MISTAKES += [(name, "--set", "train.demo.epohcs=5", "`epochs`?") for name in COMMANDS]


@pytest.mark.parametrize(("name", "option", "value", "message"), MISTAKES)
def test_a_mistake_is_told_on_stderr_and_nothing_is_written(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    option: str,
    value: str,
    message: str,
) -> None:
    code, out, err = run_command(monkeypatch, capsys, name, option, value)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert message in err
    assert "Did you mean" in err
    assert "Traceback" not in err
    assert [path.name for path in checkout.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize("name", COMMANDS)
def test_all_of_the_file_is_checked_whatever_is_run(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    changed_params(checkout, {"train.demo.variants.max-pool.epochs": 0})
    code, _, err = run_command(monkeypatch, capsys, name)
    assert code == 1
    assert err.startswith("Error: params.yaml: train.demo.variants.max-pool: `epochs` is 0")
    assert [path.name for path in checkout.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize("name", COMMANDS_WITH_VARIANT)
def test_a_negative_seed_is_refused(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    code, _, err = run_command(monkeypatch, capsys, name, "--seed", "-1")
    assert code == 2
    assert "--seed" in err
    assert [path.name for path in checkout.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize(("before", "after"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setattr(sys, "argv", ["gmpipe", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert os.environ["OMP_WAIT_POLICY"] == after
