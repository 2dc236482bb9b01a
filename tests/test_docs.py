"""The documentation is true: its commands run, and its links, paths, options and messages exist.

The commands of a page run in a folder of their own, which has tiny data sets under the names that
the pages use. Its params.yaml is the project's, plus what the page adds, made tiny. `pages.py`
explains how a page marks its blocks.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest
from builders import TINY
from clusters import worker_in_this_process
from flows import BIN, PARAMS, ROOT, STAGES, VARIANTS, Flow, unrendered
from pages import LANGUAGES, PAGES, Block, commands, gmpipe_arguments, read_page
from PIL import ExifTags, Image
from ruamel.yaml import YAML
from small import make_small
from trees import VocObject, coco_files, draw_image, make_coco, make_nuswide, make_voc

from stages.checkout.params import load_params
from stages.cli.main import cli

PETS = ["balcony", "garden", "kitchen", "park", "rain", "sofa", "walk", "window"]
"""The photographs of docs/own-data.md."""

READ = {name: read_page(name) for name in PAGES}
BLOCKS = [block for page in READ.values() for block in page.blocks]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def is_run(block: Block) -> bool:
    return block.language in ("sh", "python") and block.reason is None and block.file is None


OTHER_OPTIONS = {
    # torchrun, Dask, pip and DVC
    "--nproc-per-node",
    "--no-python",
    "--nthreads",
    "--memory-limit",
    "--resources",
    "--queue",
    # Slurm
    "--cpus-per-task",
}
"""Options of other programs that prose names."""

_PLACEHOLDER = re.compile(r"[A-Z]{2,}|[<>*{}]|\.\.\.")
"""Marks a path in prose that stands for several, such as `pipeline/datasets/NAME.py`."""


# Running a page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, _in_this_process: None) -> Flow:
    """A checkout with data sets as their publishers lay them out, and a trained demo."""
    flow = Flow(tmp_path_factory.mktemp("world"))
    for name in ("Makefile", "params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, flow.folder)
    make_voc(flow / "data/voc2007")
    make_coco(flow / "data/coco")
    make_coco(flow / "data/coco2017", coco_files(2017))
    make_nuswide(flow / "data/nuswide")
    small = make_small(flow / "small")
    shutil.copy(small / "regions.npz", flow.folder)
    shutil.copy(small / "vectors.npz", flow / "voc2007.npz")
    shutil.rmtree(small.folder)
    home = flow / "home/Pictures"
    for number, name in enumerate(PETS):
        draw_image(home / f"pets/{name}.jpg", number)
    draw_image(home / "new/hall.jpg", len(PETS))
    classes = ["bee", "flower", "wasp"]
    objects = [VocObject(name, (1, 1, 10, 5)) for name in classes]
    gardens = {f"bee_{number:02d}": objects[number % 3 :] for number in range(6)}
    make_voc(home, gardens, {"wasp_01": objects}, vocabulary=classes)
    make_tiny(flow / "params.yaml")
    for command in STAGES:
        flow.ok(command)
    for variant in VARIANTS:
        flow.ok("train", "--variant", variant)
        flow.ok("evaluate", "--variant", variant)
    return flow


def make_tiny(file: Path) -> None:
    """Rewrite params.yaml so that every data set takes seconds.

    A data set that needs downloaded weights gets those of the tiny demo.
    """
    raw = YAML(typ="safe").load(file)
    raw["variants"] = [name for name in raw["variants"] if name in VARIANTS]
    for block in raw["prepare"].values():
        if block["source"] == "scenes":
            block.update(train=24, test=12, size=64)
    for name, block in raw["detector"].items():
        if block["source"] == "fit":
            raw["detector"][name] = PARAMS["detector"]["tiny"]
        elif block["source"] != "imported":
            raw["detector"][name] = {
                "source": "file",
                "weights": "data/demo/detector/weights.pt",
                "architecture": TINY.model_dump(mode="json"),
            }
    for name, block in raw["extract"].items():
        if raw["prepare"][name]["source"] != "imported":
            block["size"] = 64
        block.update(regions=min(block.get("regions", 10), 4), views=1)
    for block in raw["train"].values():
        block.setdefault("network", {}).update(latent_size=8, modules=1)
        for settings in (block, *block.get("variants", {}).values()):
            settings.pop("regions", None)
            settings["epochs"] = 1
        if str(block.get("label_vectors", "")).startswith("data/glove"):
            block["label_vectors"] = "wordllama"
    with file.open("w") as stream:
        YAML().dump(raw, stream)


@pytest.fixture(scope="module")
def _in_this_process() -> Iterator[None]:
    """Extract and train without further processes, which take longer to start than to work."""
    with (
        unrendered(),
        worker_in_this_process(),
        mock.patch("stages.commands.compare.cores", return_value=1),
    ):
        yield


def run_block(block: Block, flow: Flow) -> None:
    for line in block.lines:
        words = next(commands(line))
        if words[0] == "gmpipe":
            home = str(flow / "home")
            outcome = flow.gmpipe(*(re.sub("^~", home, word) for word in words[1:]))
            assert outcome.code == 0, f"{block.where}: `{line}`\n{outcome.err}"
            continue
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=flow.folder,
            env={
                **os.environ,
                "PATH": f"{BIN}:{os.environ['PATH']}",
                "HOME": str(flow / "home"),
                "BIG": str(flow.folder.with_name("big")),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block.where}: `{line}`\n{done.stderr}"


def merge(base: dict[str, Any], more: Mapping[str, Any]) -> None:
    for key, value in more.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            merge(base[key], value)
        else:
            base[key] = value


def add_settings(block: Block, flow: Flow) -> None:
    """Merge a block into the checkout's params.yaml, check the result, and make it tiny."""
    yaml, more = YAML(typ="safe"), YAML(typ="safe").load(block.text)
    for file, tiny in ((flow / "whole.yaml", False), (flow / "params.yaml", True)):
        source = ROOT / "params.yaml" if not file.exists() else file
        raw = yaml.load(source)
        merge(raw, more)
        with file.open("w") as stream:
            YAML().dump(raw, stream)
        if tiny:
            make_tiny(file)
        load_params(file=file)


LONG_PAGES = {f"docs/{name}.md" for name in ("datasets", "experiments", "own-data", "python")}
"""Those whose commands take four seconds and more."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LONG_PAGES else ())
        for name in PAGES
        if any(map(is_run, READ[name].blocks))
    ],
)
def test_the_commands_of_a_page_run(world: Flow, name: str, tmp_path: Path) -> None:
    flow = Flow(Path(shutil.copytree(world.folder, tmp_path / "checkout")))
    (tmp_path / "big").mkdir()
    for block in READ[name].blocks:
        if find_spec("onnxruntime") is None and re.search("onnxruntime|gmpipe export", block.text):
            continue
        if block.file is not None:
            (flow / block.file).parent.mkdir(parents=True, exist_ok=True)
            (flow / block.file).write_text(block.text)
        elif is_run(block) and block.language == "sh":
            run_block(block, flow)
        elif is_run(block):
            with contextlib.chdir(flow.folder), contextlib.redirect_stdout(None):
                exec(compile(block.text, block.where, "exec"), {})
        elif block.comment == "params.yaml":
            add_settings(block, flow)


def test_the_example_of_images_in_memory_is_right_for_a_turned_photograph(
    world: Flow, tmp_path: Path
) -> None:
    flow = Flow(Path(shutil.copytree(world.folder, tmp_path / "checkout")))
    [block] = [one for one in READ["docs/python.md"].blocks if "ImageOps" in one.text]
    path = flow / "data/demo/prepared/images/test-00000.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 8
    with Image.open(path) as image:
        image.resize((96, 64)).save(path, exif=exif)
    with contextlib.chdir(flow.folder), contextlib.redirect_stdout(None):
        exec(compile(block.text, block.where, "exec"), {})


# What is only parsed ------------------------------------------------------------------------------


def test_every_block_names_its_language_and_why_it_is_not_run() -> None:
    for block in BLOCKS:
        assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"
        if block.comment.startswith("not run"):
            assert block.language in ("sh", "python"), block.where
            assert block.reason, f"{block.where}: why is it not run?"
        assert block.language != "yaml" or block.comment == "params.yaml", block.where
    assert sum(block.reason is None for block in SHELL) > len(SHELL) / 3


@pytest.fixture(scope="module")
def uninvoked() -> Iterator[None]:
    """Let commands be parsed and do nothing."""
    with contextlib.ExitStack() as stack:
        for command in leaves(cli):
            stack.enter_context(mock.patch.object(command, "callback", return_value=None))
        yield


def leaves(command: click.Command) -> Iterator[click.Command]:
    if isinstance(command, click.Group):
        for child in command.commands.values():
            yield from leaves(child)
    else:
        yield command


def parse(arguments: list[str], where: str, *, whole: bool = True) -> None:
    """Fail unless gmpipe accepts a command; if it is not ``whole``, arguments may be missing."""
    try:
        with contextlib.redirect_stdout(None):
            cli.main(arguments, standalone_mode=False)
    except click.MissingParameter as error:
        if whole:
            pytest.fail(f"{where}: `gmpipe {' '.join(arguments)}`: {error.format_message()}")
    except click.ClickException as error:
        pytest.fail(f"{where}: `gmpipe {' '.join(arguments)}`: {error.format_message()}")


def is_make_target(name: str) -> bool:
    return re.search(rf"^{re.escape(name)}:", (ROOT / "Makefile").read_text(), re.M) is not None


@pytest.mark.usefixtures("uninvoked")
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_every_command_exists(block: Block) -> None:
    for line in block.lines:
        for words in commands(line):
            arguments = gmpipe_arguments(words)
            if arguments is not None:
                parse(arguments, block.where)
            elif words[0] == "make":
                assert is_make_target(words[1]), f"{block.where}: {line}"
            elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
                assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file(), line
            elif words[0] == "dvc":
                from dvc.cli import parse_args

                parse_args(words[1:])


@pytest.mark.parametrize(
    "block", [one for one in SHELL if "#!/bin/bash" in one.text], ids=lambda one: one.where
)
def test_scripts_are_valid(block: Block) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.usefixtures("uninvoked")
@pytest.mark.parametrize("name", PAGES)
def test_commands_and_options_in_prose_exist(name: str) -> None:
    options = {
        option for command in leaves(cli) for param in command.params for option in param.opts
    }
    page = READ[name]
    for line, span in page.spans + page.headings:
        where = f"{name}, line {line}"
        if span.startswith("gmpipe "):
            parse(gmpipe_arguments(next(commands(span))) or [], where, whole=False)
        elif span.startswith("make "):
            assert is_make_target(span.split()[1]), f"{where}: {span}"
        elif span.startswith("--"):
            option = re.split("[ =]", span)[0]
            assert option in options | OTHER_OPTIONS, f"{where}: {span}"


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for line, link in READ[name].links:
        if re.match("[a-z]+:", link):
            continue
        where = f"{name}, line {line}: {link}"
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), where
        if anchor:
            assert anchor in read_page(str(target.resolve().relative_to(ROOT))).anchors, where


@pytest.mark.parametrize("name", PAGES)
def test_paths_of_the_code_exist(name: str) -> None:
    for line, span in READ[name].spans:
        of_code = re.match(r"(pipeline|stages|tests|docs|benchmarks)/", span)
        if of_code and not _PLACEHOLDER.search(span):
            shown = any(block.file == span for block in READ[name].blocks)
            assert shown or (ROOT / span).exists(), f"{name}, line {line}: {span}"


def test_every_page_can_be_found_from_the_readme() -> None:
    linked = {link.partition("#")[0] for _, link in READ["README.md"].links}
    assert {name for name in PAGES if name != "README.md"} <= linked


# Messages -----------------------------------------------------------------------------------------


def texts_of_the_source() -> Iterator[str]:
    """Every text in the code, with `…` for what is filled in.

    The arguments of a call count as one text too, since a message is often given as a problem and
    a remedy.
    """
    for folder in ("pipeline", "stages"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    parts = [text_of(argument) for argument in node.args]
                    if len(parts) > 1 and all(parts):
                        yield " ".join(map(str, parts))
                elif (text := text_of(node)) is not None:
                    yield text


def text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w*\}", "…", node.value)
    return None


def test_messages_in_troubleshooting_are_those_of_the_source() -> None:
    """A heading quotes a message; `…` stands for anything that is filled in."""
    source = "\n".join(" ".join(text.split()) for text in texts_of_the_source())
    headings = READ["docs/troubleshooting.md"].headings
    assert len(headings) > 30
    for line, quoted in headings:
        pattern = ".*".join(re.escape(part.strip()) for part in quoted.split("…"))
        assert re.search(pattern, source), f"line {line}: {quoted}"


# Checks of the code -------------------------------------------------------------------------------


def test_a_commit_is_checked_as_make_check_does() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    hooks = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    assert hooks == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]


def test_make_clean_leaves_nothing_that_gmpipe_clean_removes() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(
        r"^clean: \$\(VENV\)/\.base\n\t-\$\(BIN\)/gmpipe clean demo --yes\n", makefile, re.M
    )


# The helpers --------------------------------------------------------------------------------------


def test_a_page_is_read() -> None:
    page = read_page(
        "x.md",
        "# A `b` & c\n\n## A\n\n## A\n\nSee `gmpipe x` and [y](z.md#q).\n\n"
        "<!-- not run: takes\nlong -->\n```sh\n# note\ngmpipe a \\\n  --b 'c d'  # e\n\n```\n"
        "- item\n\n  ```yaml\n  a: 1\n  ```\n",
    )
    assert page.anchors == ["a-b--c", "a", "a-1"]
    assert page.spans == [(7, "gmpipe x")]
    assert page.headings == [(1, "b")]
    assert page.links == [(7, "z.md#q")]
    shell, settings = page.blocks
    assert (shell.language, shell.reason, shell.line) == ("sh", "takes long", 11)
    assert [list(commands(line)) for line in shell.lines] == [[["gmpipe", "a", "--b", "c d"]]]
    assert (settings.language, settings.text, settings.comment) == ("yaml", "a: 1\n", "")
    assert list(commands("A=1 torchrun gmpipe train > x & wait")) == [
        ["A=1", "torchrun", "gmpipe", "train"],
        ["x"],
        ["wait"],
    ]
    assert gmpipe_arguments(["torchrun", "gmpipe", "train"]) == ["train"]
    assert gmpipe_arguments(["x"]) is None
    assert gmpipe_arguments(["cd", "gmpipe"]) is None


@pytest.mark.usefixtures("uninvoked")
@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--sede", "0"], ["train", "--seed", "x"], ["cache", "look"]]
)
def test_an_unknown_command_is_found(arguments: list[str]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"x\.md: `gmpipe"):
        parse(arguments, "x.md")
