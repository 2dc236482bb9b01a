"""Differences of settings: only what differs is named, by its dotted key."""

from __future__ import annotations

from pipeline.settings import TrainSettings
from stages.checkout.keys import differing, shown_differences


def settings(**changes: object) -> dict[str, object]:
    return TrainSettings.model_validate(changes).model_dump()


def test_only_what_differs_is_named_by_its_dotted_key() -> None:
    used = settings(network={"latent_size": 8}, epochs=3)
    wanted = settings(network={"latent_size": 16}, epochs=3, loss={"beta": 0.4})
    found = differing(used, wanted)
    assert found == {"network.latent_size": (8, 16), "loss.beta": (0.0, 0.4)}
    said = "`network.latent_size` was 8, expected 16; `loss.beta` was 0.0, expected 0.4"
    assert shown_differences(found) == said
    assert differing(used, used) == {}


def test_variants_of_a_data_set_are_no_settings_of_a_run() -> None:
    assert differing(settings(variants={"mine": {"epochs": 1}}), settings()) == {}


def test_a_setting_that_one_block_lacks_differs() -> None:
    assert differing({"a": {"b": 1}, "c": None}, {"a": {"d": 2}}) == {
        "a.d": (None, 2),
        "a.b": (1, None),
        "c": (None, None),
    }


def test_of_many_differences_the_first_are_shown() -> None:
    said = shown_differences({f"key{number}": (number, -number) for number in range(1, 10)})
    assert said.startswith("`key1` was 1, expected -1; `key2` was 2")
    assert said.endswith("`key4` was 4, expected -4; and 5 more")
