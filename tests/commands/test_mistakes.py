"""A mistake in an option or in params.yaml: every command reports it before it does anything.

Also what a command imports: nothing heavy before its options and settings are known to be sound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from flows import ROOT, Flow
from shipped import SHIPPED, changed_params

from stages.cli.main import cli, main

COMMANDS = ("prepare", "detector", "extract", "train", "evaluate", "compare", "report", "labels")
COMMANDS_WITH_VARIANT = ("train", "evaluate", "compare")
HEAVY = ("torch", "torchvision", "pyarrow", "numpy", "h5py", "dask", "PIL", "sklearn")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds only the shipped params.yaml, as the working directory."""
    (tmp_path / "params.yaml").write_bytes(SHIPPED.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(folder: Path, script: str) -> Any:
    """Run a script in another interpreter, and return the JSON that it prints last."""
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
    commands = [["--version"], *([name, "--help"] for name in COMMANDS)]
    watched = [*HEAVY, "pydantic", "ruamel.yaml"]
    script = RUN_ALL.format(commands=commands, watched=watched)
    assert run_script(tmp_path, script) == [[0] * len(commands), []]
    # It lists the variants, which are defined beside the settings.
    script = RUN_ALL.format(commands=[["--help"]], watched=HEAVY)
    assert run_script(tmp_path, script) == [[0], []]


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


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[Any, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["gmpipe", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return end.value.code, printed.out, printed.err


MISTAKES = [(name, "--dataset", "dmeo", "'dmeo'", "`demo`") for name in COMMANDS]
MISTAKES += [(name, "--variant", "ful", "'ful'", "`full`") for name in COMMANDS_WITH_VARIANT]
MISTAKES += [
    (name, "--set", "train.demo.epohcs=5", "`train.demo.epohcs`", "`epochs`") for name in COMMANDS
]


@pytest.mark.parametrize(("name", "option", "value", "wrong", "nearest"), MISTAKES)
def test_a_mistake_is_reported_on_stderr_and_nothing_is_written(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    option: str,
    value: str,
    wrong: str,
    nearest: str,
) -> None:
    code, out, err = run_command(monkeypatch, capsys, name, option, value)
    assert (code, out) == (1, "")
    assert err.startswith("Error: ")
    assert wrong in err
    assert nearest in err
    assert "Traceback" not in err
    assert [path.name for path in checkout.rglob("*")] == ["params.yaml"]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_checks_all_of_the_file(
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
    for several in ("0,1", "[0, 1]", "0 1"):
        code, _, err = run_command(monkeypatch, capsys, name, "--seed", several)
        assert code == 2
        assert f"'{several}' is not one seed" in err
        assert (
            "gmpipe compare" in err if name in ("train", "evaluate") else "--seed 0 --seed 1" in err
        )


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


def test_a_base_that_nothing_can_be_compared_with_is_refused(small: Flow) -> None:
    """Nobody is told to add a variant that does not exist, nor gets tables without differences."""
    assert small.gmpipe("compare", "--base", "max-pol").refused("--base: .*`max-pool`")
    assert small.gmpipe("compare", "--base", "nothing-like-it").refused(
        "--base: unknown variant 'nothing-like-it'"
    )
    assert small.gmpipe("compare", "--variant", "pla", "--base", "pla").refused(
        "--base: 'pla' has no mAP.*`pla`"
    )


def test_a_sweep_of_what_only_the_variants_head_has_says_how(small: Flow) -> None:
    swept = small.gmpipe("sweep", "network.steps=3,4", "--variant", "pla")
    assert swept.refused(r"no setting `train\.voc2007\.network\.steps`.*`variants\.pla\.network")
    assert small.gmpipe("sweep", "network.stepz=3,4", "--variant", "pla").refused("stepz")


def test_all_variants_that_need_whole_views_are_named_before_any_run(small: Flow) -> None:
    """With what to compare instead, since regions of bottom-up attention have no such vectors."""
    heads = ("--heads", "max-pool,linear,csra,hcp-bce")
    refused = small.gmpipe("compare", *heads, "--seed", "0")
    assert refused.refused(
        r"`linear-whole`, `csra` .*`linear`, `csra`.*cache/voc2007 holds only regions.*array "
        r"`whole`.*`--heads max-pool,linear-mean,linear-max,hcp-bce`"
    )
    assert not (small / "runs").exists()
    # A sweep has runs of one variant, of which only some read them.
    swept = small.gmpipe("sweep", "network.whole_region=true,false")
    assert swept.refused(r"variant `full` \(head `gm-mlic`\) reads")
