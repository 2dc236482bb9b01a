"""Commands about this installation and its settings, which make nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from stages.cli.completion import SHELLS, complete_section, script
from stages.cli.exit_codes import FAILED
from stages.cli.options import request_options

if TYPE_CHECKING:
    from stages.checkout.params import Request


def _check_section(_: click.Context, parameter: click.Parameter, section: str | None) -> str | None:
    from pipeline.settings import SECTIONS

    if section is not None and section not in SECTIONS:
        raise click.BadParameter(f"{section!r}: expected one of {', '.join(SECTIONS)}")
    return section


@click.command()
@click.argument(
    "section",
    metavar="[SECTION]",
    required=False,
    callback=_check_section,
    shell_complete=complete_section,
)
def settings(section: str | None) -> None:
    """Describe the settings of params.yaml.

    SECTION is a section of params.yaml, e.g. train. By default, all settings are described. The
    tables are Markdown. Together they are the page docs/settings.md.
    """
    from stages.commands.settings_page import settings_page

    click.echo(settings_page(section))


@click.command()
@click.pass_context
def doctor(context: click.Context) -> None:
    """Report what is missing, and how to fix it.

    Nothing is downloaded or written. Fails if a data set listed under `datasets` in params.yaml
    lacks something. What other data sets lack is only noted.
    """
    from stages.commands import doctor as command
    from stages.console.progress import progress_phase

    with progress_phase("look at the checkout"):
        table, sound = command.doctor()
    click.echo(table)
    if not sound:
        context.exit(FAILED)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    It completes commands, options, data sets, variants, runs and settings. To try it: `eval
    "$(gmpipe completion bash)"`. The last line of the script says how to install it for every new
    shell.
    """
    click.echo(script(shell, context.find_root().command))


@click.command()
@request_options
def labels(request: Request) -> None:
    """Show the words and the nearest labels of each label."""
    from stages.commands import labels as command

    click.echo(command.labels(request))
