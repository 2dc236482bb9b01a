"""`stages.checkout.params`: what params.yaml and `--set` may say, and what a run is made from.

Each mistake is one change to the shipped params.yaml. Its message names the file, the key, and for
a misspelt key or value the nearest one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from shipped import MISSING, SHIPPED, changed_params

from pipeline.errors import InputError, MissingError
from pipeline.settings import SECTIONS, Params, TrainSettings
from stages.checkout.params import load_params, read_request
from stages.checkout.plans import plan_run


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds only the shipped params.yaml, as the working directory."""
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- mistakes in the file ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"datastes": ["demo"]}, "datastes", "datasets"),
        ({"datasets": MISSING, "datastes": ["demo"]}, "datastes", "datasets"),
        ({"trian": {}}, "trian", "train"),
        ({"prepare.demo.tset": 5}, "prepare.demo.tset", "test"),
        (
            {"prepare.demo.source": MISSING, "prepare.demo.sorce": "scenes"},
            "prepare.demo.sorce",
            "source",
        ),
        ({"prepare.voc2007.dificult": {}}, "prepare.voc2007.dificult", "difficult"),
        ({"prepare.voc2007.difficult": {"tset": "ignored"}}, "voc2007.difficult.tset", "test"),
        ({"prepare.coco.difficult": {"test": "ignored"}}, "prepare.coco.difficult", None),
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
            "train.demo.variants.max-pool: unknown setting `learning_rte",
            "learning_rate",
        ),
        (
            {"train.demo.variants.full.network.latent_sise": 8},
            "train.demo.variants.full: the head `gm-mlic` has no setting `network.latent_sise",
            "latent_size",
        ),
    ],
)
def test_an_unknown_key_suggests_the_nearest(
    tmp_path: Path, changes: dict[str, Any], key: str, nearest: str | None
) -> None:
    file = changed_params(tmp_path, changes)
    with pytest.raises(InputError) as caught:
        load_params(file=file)
    assert caught.value.problem.startswith(f"{file}: ")
    assert caught.value.problem.endswith(f"{key}`.")
    suggested = re.findall("`([a-z_]+)`", caught.value.remedy)
    assert suggested == ([nearest] if nearest else [])


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # Names of data sets and variants
        ({"datasets": "demo"}, ["`datasets` is 'demo'", "`[demo]`"]),
        ({"seeds": 3}, ["`seeds` is 3", "`[3]`"]),
        ({"datasets": ["dmeo"]}, ["datasets", "'dmeo'", "coco, coco2017, demo,", "`demo`"]),
        ({"variants": ["full", "max_pool"]}, ["variants", "'max_pool'", "`max-pool`"]),
        ({"train.demo.variants.ful": {}}, ["train.demo.variants.ful", "`full`"]),
        # Sections and blocks
        *(({section: MISSING}, [f"`{section}`"]) for section in SECTIONS),
        *(({f"{section}.demo": MISSING}, [f"{section}.demo"]) for section in SECTIONS),
        ({"train.voc": {}}, ["train.voc", "prepare.voc"]),
        ({"train": None}, ["`train`", "None"]),
        ({"train.demo": None}, ["`train.demo`", "None"]),
        ({"train.demo.variants.full": None}, ["`train.demo.variants.full`", "None"]),
        ({"prepare.demo.source": MISSING}, ["`prepare.demo.source`"]),
        ({"prepare.demo.source": "scnes"}, ["`prepare.demo.source`", "'scnes'", "`scenes`"]),
        ({"detector.demo.source": "torchvision"}, ["`detector.demo`", "`fit`"]),
        ({"detector.demo.fit": MISSING}, ["`detector.demo`", "`fit`"]),
        (
            {"detector.demo.source": "file", "detector.demo.fit": MISSING},
            ["`detector.demo`", "`file`", "`weights`"],
        ),
        (
            {"detector.demo": {"source": "torchvision", "architecture": {"fpn_channels": 8}}},
            ["`detector.demo`", "`torchvision`", "`weights`", "`architecture`"],
        ),
        (
            {"prepare.voc2007.difficult": {"train": "postive"}},
            ["`prepare.voc2007.difficult.train`", "'postive'", "'negative'", "`positive`"],
        ),
        (
            {"prepare.imported.difficult": "negative"},
            ["`prepare.imported.difficult`", "'negative'", "`{train: negative, test: negative}`"],
        ),
        (
            {"prepare.imported.difficult": None},
            ["`prepare.imported.difficult`", "None", "`{train: ignored, test: ignored}`"],
        ),
        # Kinds of value
        ({"datasets": "demo"}, ["`datasets`", "'demo'", "list"]),
        ({"datasets": []}, ["`datasets`", "[]", "1"]),
        ({"variants": []}, ["`variants`", "[]", "1"]),
        ({"seeds": ["one"]}, ["`seeds.0`", "'one'", "integer"]),
        ({"seeds": [0, -1]}, ["`seeds.1`", "-1", "0"]),
        ({"train.demo.epochs": 3.5}, ["`train.demo.epochs`", "3.5", "integer"]),
        ({"train.demo.epochs": None}, ["`train.demo.epochs`", "None", "integer"]),
        ({"train.demo.epochs": [3]}, ["`train.demo.epochs`", "[3]", "integer"]),
        ({"extract.demo.flip": "maybe"}, ["`extract.demo.flip`", "'maybe'", "boolean"]),
        ({"train.demo.label_vectors": 5}, ["`train.demo.label_vectors`", "5", "string"]),
        ({"detector.demo.architecture.anchor_sizes": [8, 16]}, ["architecture.anchor_sizes.2`"]),
        ({"train.demo.optimizer": "adam"}, ["`train.demo.optimizer`", "'adam'", "`adamw`"]),
        ({"train.demo.optimizer": "full"}, ["`train.demo.optimizer`", "'full'", "'sgd'"]),
        # Bounds
        ({"prepare.demo.train": 9}, ["`prepare.demo.train`", "9", "10"]),
        ({"prepare.demo.size": 63}, ["`prepare.demo.size`", "63", "64"]),
        ({"detector.demo.fit.holdout": 1}, ["`detector.demo.fit.holdout`", "less than 1"]),
        ({"detector.demo.fit.holdout": 0}, ["`detector.demo.fit.holdout`", "greater than 0"]),
        ({"detector.demo.fit.size": 100}, ["`detector.demo.fit.size`", "100", "32"]),
        ({"extract.demo.nms_threshold": 1.1}, ["`extract.demo.nms_threshold`", "1.1", "1"]),
        ({"extract.demo.regions": 0}, ["`extract.demo.regions`", "0", "1"]),
        ({"train.demo.network.latent_size": 7}, ["`train.demo.network.latent_size`", "7", "2"]),
        ({"train.demo.learning_rate": 0}, ["`train.demo.learning_rate`", "greater than 0"]),
        ({"train.demo.clip_norm": float("inf")}, ["`train.demo.clip_norm`", "inf", "finite"]),
        ({"train.demo.loss.beta": float("nan")}, ["`train.demo.loss.beta`", "nan"]),
        # Heads and losses
        ({"train.demo.network.head": "maxpool"}, ["`train.demo.network.head`", "`max-pool`"]),
        ({"train.demo.network.head": [3]}, ["`train.demo.network.head`", "[3]", "'gm-mlic'"]),
        ({"train.demo.network": "max-pool"}, ["`train.demo.network`", "`{head: max-pool}`"]),
        ({"train.demo.loss.name": "focl"}, ["`train.demo.loss.name`", "'focl'", "`focal`"]),
        ({"train.demo.loss": "focal"}, ["`train.demo.loss`", "`{name: focal}`"]),
        ({"train.demo.loss": None}, ["`train.demo.loss`", "None", "block"]),
        (
            {"train.demo.loss": {"name": "own"}},
            ["`train.demo.loss.name` is 'own'", "`gm-mlic`", "weighted, asymmetric, focal"],
        ),
        (
            {"train.demo.variants.mine.network": {"head": "maxpool"}},
            ["variants.mine: `network.head` is 'maxpool'", "`max-pool`"],
        ),
        (
            {"train.demo.variants.mine.loss": {"name": "own"}},
            ["variants.mine: `loss.name` is 'own'", "`gm-mlic`"],
        ),
        # Settings of another head or loss, and of an older release
        (
            {"train.demo.network.hidden_size": 8},
            [
                "the head `gm-mlic` has no setting `train.demo.network.hidden_size`",
                "`max-pool`",
                ".network.hidden_size`.",
            ],
        ),
        (
            {"train.demo.variants.max-pool.network.neighbors": 8},
            ["the head `max-pool` has no setting `network.neighbors`", "`gm-mlic`"],
        ),
        (
            {"train.demo.loss": {"name": "focal", "beta": 0.4}},
            ["the loss `focal` has no setting `train.demo.loss.beta`", "`weighted`"],
        ),
        (
            {"train.demo.loss": {"gama": 2}},
            ["the loss `weighted` has no setting `train.demo.loss.gama`"],
        ),
        ({"train.demo.beta": 0.4}, ["`train.demo.beta`", "`train.demo.loss.beta`"]),
        ({"train.demo.variants.full.beta": 0.4}, ["variants.full", "`beta`", "`loss.beta`"]),
        (
            {"train.demo.network.architecture": "max-pool"},
            ["`train.demo.network.architecture`", "`train.demo.network.head`"],
        ),
        # Variants are checked when the file is read, not when they are trained.
        (
            {"train.demo.variants.max-pool.epochs": 0},
            ["train.demo.variants.max-pool: `epochs`", "0", "1"],
        ),
        (
            {"train.demo.variants.max-pool.network": None},
            ["train.demo.variants.max-pool: `network`", "None"],
        ),
        (
            {"train.demo.variants.max-pool.variants": {}},
            ["train.demo.variants.max-pool: ", "`variants`"],
        ),
    ],
)
def test_a_mistake_names_its_key(tmp_path: Path, changes: dict[str, Any], parts: list[str]) -> None:
    file = changed_params(tmp_path, changes)
    with pytest.raises(InputError) as caught:
        load_params(file=file)
    assert str(caught.value).startswith(str(file))
    assert [part for part in parts if part not in str(caught.value)] == []
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"datasets: [demo", ["YAML", "line 1, column 16"]),
        (b"a:\n\tb: 1", ["YAML", "line 2, column 1"]),
        (b"a: !!python/object:os.system x", ["YAML", "line 1", "python/object:os.system"]),
        (b"a: 1\nb: 1\na: 2", ["lines 1 and 3", "`a`"]),
        (b"train:\n  demo:\n    epochs: 1\n    epochs: 2", ["lines 3 and 4", "`epochs`"]),
        (b"\xff\xfe\xfa", ["UTF-8", "0xff"]),
        (b"", ["git checkout"]),
        (b"- demo", ["git checkout"]),
        (b"1: 2", ["`datasets`"]),
    ],
)
def test_a_file_without_settings_is_refused(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_params(file=file)
    message = str(caught.value)
    assert message.startswith(str(file))
    assert [part for part in parts if part not in message] == []
    assert "\n" not in message
    assert "ruamel" not in message
    assert caught.value.remedy


def test_outside_the_checkout_the_message_says_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match=rf"params\.yaml.*{re.escape(str(tmp_path))}.*checkout"):
        load_params()


# --- overrides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.demo.epochs=7", lambda p: p.train["demo"].epochs, 7),
        ("train.demo.learning_rate=3e-3", lambda p: p.train["demo"].learning_rate, 0.003),
        ("train.demo.network.modules=3", lambda p: p.train["demo"].network.modules, 3),
        (
            "train.demo.network.label_neighbors=null",
            lambda p: p.train["demo"].network.label_neighbors,
            None,
        ),
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
    assert read(load_params([override], raw)) == value


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
    ("override", "parts"),
    [
        ("train.demo.epochs", ["--set train.demo.epochs: ", "KEY=VALUE"]),
        ("epochs=5", ["--set epochs=5: ", "KEY=VALUE", "`--set train.demo.epochs=5`"]),
        ("train=5", ["--set train=5: ", "KEY=VALUE"]),
        ("=5", ["--set =5: ", "KEY=VALUE"]),
        ("", ["--set : ", "KEY=VALUE"]),
        ("trian.demo.epochs=5", ["params.yaml", "`trian`", "`train`"]),
        ("train.dmeo.epochs=5", ["params.yaml", "`train.dmeo`", "`demo`"]),
        ("else.demo.epochs=5", ["params.yaml", "`else`"]),
        ("train..epochs=5", ["params.yaml", "`train.`"]),
        ("train.demo.epochs.x=5", ["params.yaml", "`train.demo.epochs`"]),
        ("seeds.0=5", ["params.yaml", "`seeds`"]),
        ("train.demo.epohcs=5", ["--set", "`train.demo.epohcs`", "`epochs`"]),
        ("train.demo.netwrok.modules=5", ["--set", "`train.demo.netwrok`", "`network`"]),
        ("train.demo.network.module=5", ["--set", "`train.demo.network.module`", "`modules`"]),
        ("train.demo.=5", ["--set", "`train.demo.`", "gmpipe settings"]),
        ("train.demo.variants.full.epohcs=5", ["variants.full", "`epohcs`", "`epochs`"]),
        ("train.demo.epochs=", ["--set", "`train.demo.epochs`", "None"]),
        ("train.demo.epochs=0", ["--set", "`train.demo.epochs`", "0", "1"]),
        ("train.demo.epochs=many", ["--set", "`train.demo.epochs`", "'many'", "integer"]),
        ("train.demo.epochs=[", ["--set train.demo.epochs=[", "YAML"]),
        ("train.demo={epochs: 1, epochs: 2}", ["--set train.demo=", "`epochs`"]),
        ("train.new={}", ["train.new", "prepare.new"]),
        ("datasets=[new]", ["datasets", "'new'"]),
    ],
)
def test_a_bad_override_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        load_params([override], SHIPPED)
    assert [part for part in parts if part not in str(caught.value)] == []
    assert caught.value.remedy


# --- a data set's settings, a variant's, and the run they make -----------------------------------


def test_a_data_set_takes_its_own_blocks(checkout: Path) -> None:
    voc = {"source": "torchvision"}
    changes = {"prepare.voc": {"source": "scenes", "seed": 3}, "detector.voc": voc}
    changed_params(checkout, {**changes, "extract.voc": {}, "train.voc": {"epochs": 3}})
    request = read_request("voc")
    assert (request.dataset, request.prepare.seed, request.train.epochs) == ("voc", 3, 3)
    assert (request.detector.source, request.extract.size) == ("torchvision", 448)
    assert read_request(None).dataset == "demo"
    assert read_request(None, ["datasets=[voc, demo]"]).dataset == "voc"
    with pytest.raises(InputError, match=r"--dataset.*'vox'.* demo, .*voc.*`voc`"):
        read_request("vox")


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
    name, _, entries = key.partition("=")
    with pytest.raises(InputError, match=rf"`{name}`.*{re.escape(entries[1:4])}"):
        load_params([key])


def test_overrides_can_add_a_data_set(checkout: Path) -> None:
    changes = {
        "prepare": "{source: scenes}",
        "detector": "{source: torchvision}",
        "extract": "{}",
        "train": "{epochs: 2}",
    }
    request = read_request("new", [f"{key}.new={value}" for key, value in changes.items()])
    assert request.train.epochs == 2
    assert request.is_overridden("full")
