"""The precision `auto`: what it means on which machine, where that is kept, and that it stays."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from flows import Flow
from ruamel.yaml import YAML
from test_checkpoint import checkpoint_of
from toys import Killed, Toy, copied, killed_after, make_checkout
from trainings import same, settings, train

from pipeline.errors import DamagedError
from pipeline.learning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.learning.training import train_network
from pipeline.tensors import has_bfloat16_units

AUTO = settings(precision="auto", epochs=1)


@contextmanager
def on_a_machine(*, units: bool) -> Iterator[None]:
    """Let the block run as on a machine that has units for bfloat16 or has none."""
    places = ("pipeline.learning.training", "stages.train")
    with (
        mock.patch(f"{places[0]}.has_bfloat16_units", return_value=units),
        mock.patch(f"{places[1]}.has_bfloat16_units", return_value=units),
    ):
        yield


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch is without oneDNN")
def test_a_processor_has_units_if_the_kernel_lists_them() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16_units(torch.device("cpu")) == ("avx512_bf16" in flags)


@pytest.mark.parametrize("units", [True, False])
def test_a_gpu_has_units_if_torch_need_not_emulate_them(units: bool) -> None:
    def is_supported(including_emulation: bool = True) -> bool:
        return units or including_emulation

    with mock.patch("torch.cuda.is_bf16_supported", is_supported):
        assert has_bfloat16_units(torch.device("cuda")) == units


def test_auto_trains_as_the_precision_that_it_means(toy: Toy, tmp_path: Path) -> None:
    trained = []
    for units, precision in ((True, "bfloat16"), (False, "float32")):
        with on_a_machine(units=units):
            trained.append(train(toy, tmp_path / f"{units}.pt", chosen=AUTO))
        named = AUTO.model_copy(update={"precision": precision})
        assert same(trained[-1], train(toy, tmp_path / f"{precision}.pt", chosen=named))
    assert not same(*trained)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    """A checkout with a run that was trained with `auto`, in bfloat16; to be read only."""
    network = {"latent_size": 8, "neighbors": 2}
    flow = make_checkout(tmp_path_factory.mktemp("checkout"), network=network, precision="auto")
    with on_a_machine(units=True):
        assert "train.toy.precision is auto, which means bfloat16" in flow.gmpipe("train").err
    return flow


def test_what_auto_meant_is_kept_with_the_run(checkout: Flow) -> None:
    run = checkout / "runs/toy/full-s0"
    checkout.ok("evaluate")  # whose checkpoint must have the settings of params.yaml
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    assert checkpoint.settings.precision == "auto"
    assert checkpoint.chosen_precision == "bfloat16"
    assert YAML(typ="safe").load(run / "settings.yaml")["chosen_precision"] == "bfloat16"
    shown = checkout.ok("runs", "show", "full-s0").splitlines()
    [line] = [one for one in shown if one.startswith("precision of training")]
    assert line.endswith("bfloat16")


def test_a_training_goes_on_in_its_precision_on_another_machine(
    checkout: Flow, tmp_path: Path
) -> None:
    flow = copied(checkout, tmp_path)
    eager = mock.patch("stages.train.train_network", partial(train_network, save_every=0))
    loss = mock.patch("pipeline.learning.steps.compute_loss", killed_after(3))
    with on_a_machine(units=True), eager, loss, pytest.raises(Killed):
        flow.gmpipe("train")
    with on_a_machine(units=False):
        resumed = flow.gmpipe("train")
    assert "step 3 of 12" in resumed.out
    assert "which means bfloat16" in resumed.err
    stored = [folder / "runs/toy/full-s0/checkpoint.pt" for folder in (checkout, flow)]
    assert stored[0].read_bytes() == stored[1].read_bytes()


@pytest.mark.parametrize("units", [True, False])
def test_bfloat16_without_units_is_noted(checkout: Flow, tmp_path: Path, units: bool) -> None:
    flow = copied(checkout, tmp_path)
    options = ("--set", "train.toy.precision=bfloat16", "--set", "train.toy.epochs=1")
    with on_a_machine(units=units):
        said = flow.gmpipe("train", *options).err
    assert ("`precision: auto`" in said) == (not units)


@pytest.mark.parametrize(
    ("precision", "chosen"), [("auto", ""), ("auto", "tf32"), ("tf32", "tf32")]
)
def test_a_checkpoint_of_a_precision_that_was_not_chosen_is_refused(
    toy: Toy, tmp_path: Path, precision: str, chosen: str
) -> None:
    trained = train(toy, tmp_path / "a.pt", chosen=settings(epochs=1))
    checkpoint = replace(
        checkpoint_of(trained),
        settings=settings(precision=precision),
        chosen_precision=chosen,
    )
    save_checkpoint(tmp_path / "checkpoint.pt", checkpoint)
    with pytest.raises(DamagedError, match="chosen_precision"):
        load_checkpoint(tmp_path / "checkpoint.pt")
