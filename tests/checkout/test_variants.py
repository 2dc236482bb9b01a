"""Variants: which settings they train with, and which `--set` options reach them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shipped import SHIPPED, changed_params

from pipeline.errors import InputError
from pipeline.settings import (
    FocalLoss,
    GmMlicSettings,
    TrainSettings,
    WeightedLoss,
    settings_class,
    variant_changes,
)
from stages.checkout.params import load_params, read_request, unreached, variant_settings


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds only the shipped params.yaml, as the working directory."""
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_unknown_variant_is_named_with_those_that_exist() -> None:
    own = TrainSettings(variants={"wide": {"network": {"latent_size": 8}}})
    assert variant_settings(own, "wide").network.latent_size == 8
    with pytest.raises(InputError, match=r"'max-pol'.* full, .*wide\..*`max-pool`"):
        variant_settings(own, "max-pol")


def test_a_variant_changes_what_it_names_and_keeps_the_rest() -> None:
    settings = TrainSettings(
        epochs=9,
        network=GmMlicSettings(latent_size=64, modules=3),
        variants={"wide": {"learning_rate": 0.5, "network": {"latent_size": 32}}},
    )
    assert variant_settings(settings, "wide") == TrainSettings(
        epochs=9, learning_rate=0.5, network=GmMlicSettings(latent_size=32, modules=3)
    )
    assert variant_settings(settings, "full") == settings.model_copy(update={"variants": {}})


def test_a_variant_of_another_head_starts_from_that_heads_settings() -> None:
    settings = TrainSettings.model_validate(
        {
            "epochs": 3,
            "batch_size": 7,
            "clip_norm": 2.0,
            "network": {"latent_size": 32, "least_deviation": 0.7},
            "loss": {"beta": 0.4},
            "variants": {
                "max-pool": {"epochs": 5},
                "mine": {"network": {"head": "max-pool", "hidden_size": 9}},
                "hard": {"loss": {"name": "focal"}},
            },
        }
    )
    heads_own = variant_changes("max-pool")
    for name, epochs in (("max-pool", 5), ("mine", heads_own["epochs"])):
        changed = variant_settings(settings, name)
        assert changed.epochs == epochs
        for key in ("batch_size", "learning_rate", "optimizer", "averaging"):
            assert getattr(changed, key) == heads_own[key] != getattr(settings, key)
        assert changed.clip_norm == 2.0  # which the head does not set
        assert changed.loss == WeightedLoss(**heads_own["loss"])
        # Nothing of the data set's network, not even a setting that both heads have.
        assert changed.network.least_deviation == heads_own["network"]["least_deviation"] != 0.7
    mine = settings_class("max-pool").model_validate({**heads_own["network"], "hidden_size": 9})
    assert variant_settings(settings, "mine").network == mine
    focal = variant_settings(settings, "hard")
    assert focal.loss == FocalLoss(name="focal")
    assert focal.network == settings.network


def test_a_loss_that_is_the_heads_own_stays_with_it() -> None:
    settings = TrainSettings.model_validate({"network": {"head": "pla"}, "loss": {"name": "own"}})
    for name in ("full", "without-label-graph", "max-pool"):
        assert variant_settings(settings, name).loss == WeightedLoss()
    for name in ("pla", "cnn-rnn"):
        assert variant_settings(settings, name).loss == settings.loss


def test_what_a_variant_sets_itself_is_not_reached(checkout: Path) -> None:
    wide = "{epochs: 3, network: {head: gm-mlic, label_neighbors: null}}"
    own = f"train.demo.variants={{wide: {wide}}}"

    def kept(override: str, variant: str = "wide") -> list[str]:
        return unreached(read_request("demo", [own, override]), variant)

    assert kept("train.demo.epochs=5") == ["epochs"]
    assert kept("train.demo.network.label_neighbors=5") == ["network.label_neighbors"]
    assert kept("train.demo.network={label_neighbors: 5, modules: 3}") == [
        "network.label_neighbors"
    ]
    assert kept("train.demo.epochs=5", "full") == []
    assert kept("train.demo.batch_size=5") == []
    assert kept("train.coco.epochs=5") == []
    assert kept("train.demo.variants.wide.epochs=5") == []
    # A variant of another head sets what its head needs, and takes nothing of the network's block.
    for override in ("epochs=1", "loss.beta=0.4", "network.latent_size=8", "network.modules=3"):
        assert kept(f"train.demo.{override}", "max-pool") == [override.partition("=")[0]]
    assert kept("train.demo.clip_norm=2.0", "max-pool") == []
    assert kept("train.demo.variants.max-pool.epochs=1", "max-pool") == []
    # An ablation sets its part of the network, and `full` its head.
    assert kept("train.demo.network.label_graph=true", "without-label-graph") == [
        "network.label_graph"
    ]
    assert kept("train.demo.network.head=max-pool", "full") == ["network.head"]
    assert kept("train.demo.network.head=max-pool", "max-pool") == []


def test_another_head_or_loss_starts_its_block_afresh(checkout: Path) -> None:
    def network(*overrides: str) -> dict[str, Any]:
        written = [f"train.demo.{override}" for override in overrides]
        return load_params(written).train["demo"].network.model_dump()

    assert load_params().train["demo"].network.model_dump()["latent_size"] == 96
    assert network("network.head=gm-mlic")["latent_size"] == 96  # the same head
    fresh = settings_class("max-pool").model_validate({"head": "max-pool"}).model_dump()
    assert network("network.head=max-pool") == fresh
    # In any order, so that no option undoes another one.
    both = ("network.hidden_size=7", "network.head=max-pool", "epochs=3")
    assert network(*both) == network(*reversed(both)) == {**fresh, "hidden_size": 7}
    assert network("network.head=max-pool", "network.head=gm-mlic")["head"] == "gm-mlic"

    file = changed_params(checkout, {"train.demo.loss": {"beta": 0.4}})
    train = load_params(["train.demo.loss.gamma=1.5", "train.demo.loss.name=focal"], file)
    assert train.train["demo"].loss == FocalLoss(name="focal", gamma=1.5)
    kept = load_params(["train.demo.loss.name=weighted"], file).train["demo"].loss
    assert kept == WeightedLoss(beta=0.4)


def test_the_former_name_of_a_setting_of_max_pool_leads_to_the_present_one(checkout: Path) -> None:
    former = {"max-pool": {"network": {"latent_size": 64}}}
    changed_params(checkout, {"train.demo.variants": former})
    with pytest.raises(InputError, match=r"`max-pool` .*latent_size`.*`network\.hidden_size`"):
        load_params()
    changed_params(checkout, {"train.demo.network": {"head": "max-pool", "latent_size": 64}})
    with pytest.raises(InputError, match=r"Write `train\.demo\.network\.hidden_size` instead"):
        load_params()


def test_a_heads_own_loss_does_not_stay_with_a_variant_of_another_head(checkout: Path) -> None:
    """Whoever gives the data set such a head keeps the variants that params.yaml lists."""
    overrides = ("train.demo.network.head=pla", "train.demo.loss.name=own")
    request = read_request("demo", overrides)
    assert request.train.loss.name == "own"
    assert request.variant("full").loss == WeightedLoss()
    assert request.variant("max-pool").loss == WeightedLoss()
    assert request.variant("cnn-rnn").loss.name == "own"
    beta = "train.demo.variants.full.loss.beta=0.3"
    assert read_request("demo", (*overrides, beta)).variant("full").loss == WeightedLoss(beta=0.3)


@pytest.mark.parametrize(
    ("override", "dropout"),
    [
        ("network.head=max-pool", 0.1),  # it has this head already, by its name
        ("network.head=gm-mlic", 0.0),
    ],
)
def test_another_head_starts_a_variants_block_afresh(
    checkout: Path, override: str, dropout: float
) -> None:
    changed_params(checkout, {"train.demo.variants": {"max-pool": {"network": {"dropout": 0.1}}}})
    request = read_request("demo", [f"train.demo.variants.max-pool.{override}"])
    assert request.variant("max-pool").network.model_dump()["dropout"] == dropout


def test_a_built_in_variant_does_not_start_from_another_one_of_its_head() -> None:
    settings = TrainSettings()
    for variant in ("hcp-bce", "ml-gcn-regions", "linear-max"):
        network = variant_changes(variant)["network"]
        alone = settings_class(network["head"]).model_validate(network)
        assert variant_settings(settings, variant).network == alone
