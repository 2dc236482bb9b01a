"""The command line: the group of all commands, its exit codes, and how errors are shown.

A command parses its options, calls one function and prints what that returns: results that were
asked for with `click.echo`; what was done, and where it was written, with `say`, which prints
nothing under `--quiet`.

Slow imports (torch above all) happen inside the command that needs them.
"""

from __future__ import annotations

import os
import sys
import textwrap
import traceback

import click

from pipeline.errors import GmpipeError, Stopped
from pipeline.files import access_error
from pipeline.formats.text import printable_lines
from stages.cli import about, caches, doubts, runs, trained
from stages.cli.exit_codes import DONE, FAILED, STOPPED
from stages.cli.options import CommandGroup, level_options
from stages.cli.steps import STAGES
from stages.console.messages import is_verbose, speaking


def main() -> None:
    """Run the command line; show errors that the user can fix without a traceback."""
    # Before torch is imported. Threads that spin while they wait for each other slow down as soon
    # as another process wants a core: with one beside it on two cores, a training step took 2.4 to
    # 3 times as long. Without another process, sleeping costs at most a tenth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with speaking():
        sys.exit(_run())


def _run() -> int:
    """Run the command and return its exit code."""
    try:
        code: int | None = cli.main(prog_name="gmpipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # click's exception for Ctrl-C
        return _fail(
            "stopped. Finished work is kept; run the same command again to continue.", STOPPED
        )
    except Stopped as error:
        return _fail(str(error), STOPPED)
    except GmpipeError as error:
        return _fail(str(error))
    except BrokenPipeError:  # `gmpipe predict ... | head`
        return _fail("nobody reads this command's output any more.")
    except OSError as error:
        return _fail(str(access_error(error)))
    except RuntimeError as error:
        # torch's, whose import takes long: a class for a GPU, a text for the CPU.
        if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
            raise
        return _fail(
            f"not enough memory ({error}). Set a smaller `batch_size` or a smaller network, and "
            "run the same command again. Finished work is kept."
        )
    except MemoryError as error:
        return _fail(
            f"not enough memory{f' ({error})' if str(error) else ''}. Close other programs, or use "
            "smaller batches, and run the same command again. Finished work is kept."
        )
    return code or DONE


def _fail(message: str, code: int = FAILED) -> int:
    if is_verbose():
        traceback.print_exc()
    click.echo(f"Error: {printable_lines(message)}", err=True)
    return code


class _Cli(CommandGroup):
    """The top group: its help lists the stages in their order, and the variants."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        stages = [str(stage.name) for stage in STAGES]
        others = [name for name in self.list_commands(context) if name not in stages]
        limit = formatter.width - 6 - max(map(len, self.commands))
        for title, names in (("Stages, in order", stages), ("Other commands", others)):
            helps = [(name, self.commands[name].get_short_help_str(limit)) for name in names]
            with formatter.section(title):
                formatter.write_dl(helps, col_spacing=2)

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        from pipeline.settings import variant_names

        with formatter.section("Variants"):
            # click would break the lines at the hyphens of names, too.
            width = max(formatter.width - formatter.current_indent, 11)
            lines = textwrap.wrap(", ".join(variant_names()), width, break_on_hyphens=False)
            formatter.write("".join(f"{'':>{formatter.current_indent}}{line}\n" for line in lines))


@level_options
@click.group(
    cls=_Cli,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(package_name="gmpipe")
def cli() -> None:
    """Multi-label image classification by matching image regions to labels.

    `dvc repro` runs all stages, but skips those that are up to date. `compare` trains further
    seeds, and `sweep` varies one setting. The settings are in params.yaml.

    Exit codes: 0 success; 1 failure, which the message explains; 2 wrong usage; 130 stopped by
    Ctrl-C.

    Progress is written to stderr: as bars in a terminal, otherwise as lines at the start, every
    30 s and at the end. A part of the work that takes less than a second or two shows none. A
    command that continues after it was stopped says where it resumed. --quiet and --verbose may
    stand before or after the command.
    """


for _command in (
    *STAGES,
    runs.compare,
    runs.sweep,
    runs.runs,
    runs.clean,
    doubts.doubts,
    caches.cache,
    caches.import_regions,
    caches.verify_all,
    trained.predict,
    trained.explain,
    trained.export,
    trained.serve,
    about.settings,
    about.doctor,
    about.completion,
    about.labels,
):
    cli.add_command(_command)
