"""What every command has in common: how much it prints, exit codes, completion.

That each command checks params.yaml before it does anything is tested in test_mistakes.py.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from flows import ROOT, Flow, script, write_params
from small import write_params as write_small_params

from pipeline.settings import SECTIONS, variant_names
from pipeline.shards.index import write_index
from pipeline.shards.shard import map_shard, write_shard
from stages.cli.main import cli

HEAVY = ("torch", "torchvision", "pyarrow", "numpy", "h5py", "dask", "PIL")


def commands(group: click.Group = cli, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of every command, groups included."""
    for name, command in group.commands.items():
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


# --- how much is printed -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [" ".join(words) for words in commands()])
def test_every_command_takes_quiet_and_verbose(words: str) -> None:
    output = CliRunner().invoke(cli, [*words.split(), "--help"]).output
    assert "-q, --quiet" in output
    assert "-v, --verbose" in output


@pytest.mark.parametrize("group", ["", "runs", "cache"])
def test_a_list_of_commands_is_not_cut_off(group: str) -> None:
    """Checked in 76 columns; click uses 78 in a terminal of 80."""
    output = CliRunner().invoke(cli, [*group.split(), "--help"], terminal_width=76).output
    listed = output.partition("Options:")[2].partition("\n\n")[2].partition("\nVariants:")[0]
    helps = re.findall(r"^  (?:[a-z-]+) +(.*)$", listed, re.MULTILINE)
    parent = cli.commands[group] if group else cli
    assert isinstance(parent, click.Group)
    assert len(helps) == len(parent.commands)
    assert [text for text in helps if not text.endswith(".") or text.endswith("...")] == []


def test_names_of_variants_are_not_divided_at_their_hyphens() -> None:
    output = CliRunner().invoke(cli, ["--help"], terminal_width=76).output
    listed = output.partition("\nVariants:\n")[2]
    assert {line.strip() for line in listed.splitlines()} - {""}
    assert re.split(r",\s+", listed.strip()) == variant_names()
    assert max(map(len, listed.splitlines())) <= 76


def test_quiet_leaves_errors_and_requested_results(small: Flow) -> None:
    for words in (("-q", "train"), ("train", "--quiet"), ("evaluate", "-q")):
        done = small.gmpipe(*words)
        assert (done.code, done.out, done.err) == (0, "", "")
    idle = ("--set", "extract.voc2007.regions=2")
    for words in (("labels",), ("runs", "list"), ("cache", "info")):
        done = small.gmpipe(*words, "-q")
        assert done.code == 0
        assert done.err == ""
        assert done.out == small.ok(*words)
    done = small.gmpipe(
        "-q", "compare", "--variant", "full", "--seed", "0", "--seed", "1", "--jobs", "1", *idle
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("## Results")
    done = small.gmpipe("sweep", "epochs=1,2", "--jobs", "1", "-q")
    assert (done.code, done.err) == (0, "")
    assert "results.csv" not in done.out
    assert small.gmpipe("-q", "train", "--set", "train.voc2007.regions=9").refused(r"\b3\b")
    before = small.bytes("runs")
    assert small.ok("runs", "prune", "-q") != ""
    assert small.ok("-q", "runs", "prune", "--yes") == ""
    assert small.bytes("runs") != before


@pytest.mark.parametrize("words", [("-v", "evaluate"), ("evaluate", "--verbose")])
def test_verbose_names_what_is_read_and_written(small: Flow, words: tuple[str, ...]) -> None:
    small.ok("train")
    plain = small.gmpipe("evaluate")
    done = small.gmpipe(*words)
    assert done.out == plain.out
    assert plain.err == ""
    lines = [line for line in done.err.splitlines() if re.match(r"\d\d:\d\d:\d\d\.\d{3} ", line)]
    for expected in (
        ("params.yaml",),
        ("runs/voc2007/full-s0/checkpoint.pt",),
        ("data/voc2007/prepared/manifest.parquet", "48", "20"),
        ("cache/voc2007", "48"),
        ("vectors.npz", "20"),
        ("runs/voc2007/full-s0/metrics.json",),
        ("stages.checkout.times", "full-s0"),
    ):
        assert any(all(part in line for part in expected) for line in lines), expected


def test_verbose_shows_where_an_error_comes_from(small: Flow) -> None:
    done = small.gmpipe("-v", "evaluate")
    assert done.code == 1
    assert "Traceback" in done.err
    assert "in load_checkpoint" in done.err
    assert re.match(r"Error: .*runs/voc2007/full-s0/checkpoint\.pt", done.err.splitlines()[-1])
    assert small.gmpipe("evaluate").refused(r"runs/voc2007/full-s0/checkpoint\.pt")


def test_one_command_leaves_nothing_to_the_next(small: Flow) -> None:
    for words in (("-q", "train"), ("-v", "train")):
        small.ok(*words)
        for name in ("stages", "pipeline"):
            assert logging.getLogger(name).handlers == []
            assert logging.getLogger(name).level == logging.NOTSET
        assert "2 epochs, loss" in small.ok("train")


def test_a_set_option_without_effect_is_noted(small: Flow) -> None:
    for key, idle in (
        ("extract.voc2007.regions=2", True),
        ("extract.voc2007.views=1", False),
        ("train.voc2007.epochs=1", False),
        ("seeds=[3]", False),
    ):
        done = small.gmpipe("train", "--set", key)
        assert done.code == 0
        assert (f"`{key.split('=')[0]}`" in done.err) == idle
        assert len(re.findall("^Note: runs on voc2007", done.err, re.MULTILINE)) == idle


def test_a_set_option_that_a_variant_does_not_take_is_noted(small: Flow) -> None:
    def noted(*overrides: str) -> list[str]:
        sets = [word for key in overrides for word in ("--set", f"train.voc2007.{key}")]
        with mock.patch("stages.commands.compare.compare", return_value=""):
            done = small.gmpipe("compare", *sets)
        assert done.code == 0
        return re.findall("^Note: .*$", done.err, re.MULTILINE)

    [own] = noted("epochs=1")
    assert re.search(
        r"max-pool sets `epochs` itself.*`--set train\.voc2007\.variants\.max-pool\.epochs=", own
    )
    [other] = noted("network.latent_size=8")
    assert re.search(r"max-pool\b.*head `max-pool`.*no setting `network\.latent_size`", other)
    [head] = noted("network.head=max-pool")
    assert re.search(r"variant full has the head `gm-mlic`.*Choose a variant", head)
    assert noted("clip_norm=4.0", "variants.max-pool.epochs=1") == []


def test_a_cache_of_other_regions_than_params_yaml_asks_for_is_noted(small: Flow) -> None:
    """The cache is written again as if extracted: nothing is noted about imported regions."""
    recipe = {"regions": 3, "feature_dtype": "float16", "images": ""}
    shard = small / "cache/voc2007/regions-00000.h5"
    _, rows, _ = map_shard(shard)
    write_shard(shard, rows, dataset="voc2007", recipe=recipe)
    write_index(shard.parent, "voc2007", recipe, [shard])
    small.ok("train")
    for asked, differs in (({}, False), ({"regions": 2, "feature_dtype": "float32"}, True)):
        write_small_params(small.folder, extract={"voc2007": {"regions": 3, **asked}})
        for words in (("evaluate",), ("compare", "--seed", "0", "--variant", "full")):
            done = small.gmpipe(*words)
            assert done.code == 0
            assert done.err.count("Note: ") == differs
            for part in ("regions 3", "2", "float16", "float32", "extract --dataset voc2007"):
                assert (part in done.err) == differs
    shutil.rmtree(small / "cache")
    assert small.gmpipe("train").refused(r"^Error: cache/voc2007/index\.parquet")


# --- exit codes ----------------------------------------------------------------------------------


def test_exit_codes_distinguish_success_failure_wrong_usage_and_ctrl_c(small: Flow) -> None:
    assert small.gmpipe("runs", "list").code == 0
    assert small.gmpipe("--version").code == 0
    assert small.gmpipe("evaluate").code == 1
    assert small.gmpipe("prepare", "--check").code == 0
    for words in (
        ("trian",),
        ("train", "--sead", "1"),
        ("train", "--seed", "x"),
        ("sweep",),
        ("extract", "--resource", "GPU"),
        ("completion", "tcsh"),
        ("-q", "train", "-v"),
        ("train", "-q", "-v"),
    ):
        done = small.gmpipe(*words)
        assert done.code == 2, words
        assert "Usage: gmpipe " in done.err + done.out
        assert "Traceback" not in done.err
    for stop in (KeyboardInterrupt, click.Abort):
        with mock.patch("stages.train.open_inputs", side_effect=stop):
            done = small.gmpipe("train")
        assert done.code == 130
        assert re.search(r"^Error: .*stopped.*again", done.err, re.MULTILINE)
    assert re.search(r"Exit codes: 0 .*; 1 .*; 2 .*;\s+130 .*Ctrl-C", small.ok("--help"), re.DOTALL)


# --- completion ----------------------------------------------------------------------------------


def completions(words: str, typed: str) -> list[str]:
    shell = BashComplete(cli, {}, "gmpipe", "_GMPIPE_COMPLETE")
    return [item.value for item in shell.get_completions(words.split(), typed)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two data sets, one with a variant of its own and two runs; the current folder."""
    write_params(
        tmp_path,
        extract__other={},
        prepare__other={"source": "voc"},
        detector__other={"source": "torchvision"},
        train__tiny={"variants": {"wide": {"network": {"latent_size": 32}}}},
        train__other={"network": {"head": "max-pool"}, "loss": {"name": "focal"}},
    )
    for run in ("tiny/full-s0", "tiny/full-s1", "other/max-pool-s0"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "checkpoint.pt").touch()
    (tmp_path / "runs/tiny/sweeps").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("checkout")
def test_values_are_offered() -> None:
    assert completions("train --dataset", "") == ["tiny", "other"]
    assert completions("runs list --dataset", "o") == ["other"]
    assert completions("train --variant", "wi") == [
        "without-label-graph",
        "without-instance-graph",
        "without-matching-edges",
        "wide",
    ]
    assert completions("train --dataset other --variant", "wi") == completions(
        "compare --dataset other --variant", "wi"
    )
    assert "wide" not in completions("train --dataset other --variant", "wi")
    assert completions("", "pre") == ["predict", "prepare"]
    assert completions("train --set", "train.tiny.network.label_") == [
        "train.tiny.network.label_graph=",
        "train.tiny.network.label_neighbors=",
    ]
    # The keys of a network are those of the head that the block names, and so are a variant's.
    named = [key for key in completions("train --set", "train.other.network.") if "hidden" in key]
    assert named == ["train.other.network.hidden_size="]
    assert "train.other.network.latent_size=" not in completions("train --set", "train.other.")
    of_loss = ["train.other.loss.name=", "train.other.loss.gamma=", "train.other.loss.alpha="]
    assert completions("train --set", "train.other.loss.") == of_loss
    of_variant = completions("train --set", "train.tiny.variants.max-pool.network.h")
    top = "train.tiny.variants.max-pool.network."
    assert of_variant == [f"{top}head=", f"{top}hidden_size="]
    assert completions("train --set", "train.tiny.variants.wide.network.latent") == [
        "train.tiny.variants.wide.network.latent_size="
    ]
    assert completions("sweep", "variants.max-pool.network.hi") == [
        "variants.max-pool.network.hidden_size="
    ]
    assert completions("train --set", "train.tiny.variants.none.") == []
    assert "all" in completions("compare --heads", "")
    assert completions("compare --heads", "gm-mlic,max") == ["gm-mlic,max-pool"]
    assert completions("compare --heads", "csra,wi") == ["csra,wide"]  # which params.yaml defines
    assert completions("prepare --set", "prepare.tiny.t") == [
        "prepare.tiny.train=",
        "prepare.tiny.test=",
    ]
    assert "prepare.other.folder=" in completions("prepare --set", "prepare.other.")
    assert completions("prepare --set", "se") == ["seeds="]
    assert completions("sweep", "network.mod") == ["network.modules="]
    assert "regions=" in completions("sweep --dataset other", "r")
    assert completions("completion", "") == ["bash", "zsh", "fish"]
    assert completions("settings", "") == list(SECTIONS)


def test_runs_are_offered(checkout: Path) -> None:
    from stages.cli.completion import complete_run

    def runs(typed: str, **chosen: str) -> list[str]:
        context = click.Context(cli)
        context.params = {**chosen}
        return [item.value for item in complete_run(context, click.Option(["--run"]), typed)]

    both = ["runs/tiny/full-s0", "runs/tiny/full-s1"]
    assert runs("") == ["runs/other/max-pool-s0", *both]
    assert runs("runs/t") == runs("", dataset="tiny") == both


@pytest.mark.parametrize("content", [None, "datasets: [", "- 1", "datasets: [tiny]\ntrain: 3\n"])
def test_a_broken_params_yaml_offers_nothing(checkout: Path, content: str | None) -> None:
    (checkout / "params.yaml").unlink()
    if content is not None:
        (checkout / "params.yaml").write_text(content)
    for words in ("train --dataset", "train --variant", "train --set", "sweep"):
        assert completions(words, "t") == []
    assert completions("", "tr") == ["train"]


def test_every_setting_that_is_offered_exists(checkout: Path) -> None:
    from stages.checkout.keys import setting_keys
    from stages.checkout.params import load_params, read_params

    params = load_params()
    keys = list(setting_keys(read_params()))
    assert len(keys) == len(set(keys)) > 100
    for key in keys:
        section, *path = key.split(".")
        if section in SECTIONS:
            value = getattr(params, section)[path[0]]
            for part in path[1:]:
                assert value is None or hasattr(value, part), key
                value = getattr(value, part, None)  # `fit` is None for `other`, and has keys
        else:
            assert hasattr(params, section)
    assert "train.tiny.epochs" in keys


def test_a_real_bash_completes(checkout: Path) -> None:
    line = "gmpipe sweep --dataset tiny network.modu"
    code = (
        "import sys; sys.argv = ['gmpipe', 'completion', 'bash']; from stages.cli.main import main;"
        "main()"
    )
    with pytest.raises(subprocess.CalledProcessError):
        script(checkout, code.replace("bash", "tcsh"))
    (checkout / "gmpipe.bash").write_text(script(checkout, code).stdout)
    (checkout / "bin").mkdir()
    (checkout / "bin/gmpipe").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c \'import sys; sys.argv[0] = "gmpipe"; '
        'from stages.cli.main import main; main()\' "$@"\n'
    )
    (checkout / "bin/gmpipe").chmod(0o755)
    done = subprocess.run(
        [
            "bash",
            "-c",
            'compopt() { echo "compopt $@"; }; source gmpipe.bash\n'
            f"COMP_WORDS=({line}); COMP_CWORD=4; _gmpipe_completion gmpipe; complete -p gmpipe\n"
            'echo "${COMPREPLY[@]}"',
        ],
        cwd=checkout,
        env={**os.environ, "PATH": f"{checkout}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "compopt -o nospace",
        "complete -o nosort -F _gmpipe_completion gmpipe",
        "network.modules=",
    ]
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_says_how_to_install_it(shell: str, tmp_path: Path) -> None:
    *_, last = Flow(tmp_path).ok("completion", shell).splitlines()
    assert last.startswith("# To install it: ")
    assert f"gmpipe completion {shell}" in last


# --- frequent requests are quick -----------------------------------------------------------------


def test_nothing_heavy_is_imported_for_help_completion_and_settings(checkout: Path) -> None:
    code = f"""
import json, os, sys
from stages.cli.main import main
def run(*words):
    sys.argv = ["gmpipe", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
run("settings", "extract")
for words in (["--help"], ["--version"], ["doctor", "--help"], ["completion", "zsh"]):
    run(*words)
os.environ["_GMPIPE_COMPLETE"] = "bash_complete"
for line in ("gmpipe train --dataset ", "gmpipe train --variant ", "gmpipe train --set "):
    os.environ |= {{"COMP_WORDS": line, "COMP_CWORD": "3"}}
    run()
print()
print(json.dumps([name for name in {HEAVY} if name in sys.modules]))
"""
    output = script(checkout, code).stdout.splitlines()
    assert json.loads(output[-1]) == []
    assert "plain,wide" in output


def test_the_version_is_that_of_the_project(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Flow(tmp_path).ok("--version") == f"gmpipe, version {project['version']}\n"


# --- remedies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["detector", "extract", "labels", "train", "compare", "cache"])
def test_the_remedy_names_the_data_set(tmp_path: Path, name: str) -> None:
    write_params(tmp_path)
    words = (name, "estimate") if name == "cache" else (name,)
    done = Flow(tmp_path).gmpipe(*words, "--dataset", "tiny")
    assert done.refused(r"data/tiny/prepared/manifest\.parquet.*`gmpipe prepare --dataset tiny`")
