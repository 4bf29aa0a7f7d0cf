"""The `edgetrain` command.

Each subcommand lives in a module of its own that is imported only when it is used, so `edgetrain client`
never loads torch and `edgetrain export` needs no MQTT.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

from edgetrain import __version__
from edgetrain.protocol.errors import EdgetrainError

INTERRUPTED = 130

# name -> (module[:attribute], the extra it needs, help)
_COMMANDS = {
    "export": ("export", "export", "Turn a torch model into a bundle that devices can train."),
    "verify": ("verify", "client", "Check a bundle's losses and gradients on this machine."),
    "inspect": ("inspect", "client", "Show what a bundle holds."),
    "merge": ("merge", "export", "Write an ordinary inference model from trained parameters."),
    "client": ("client", "client", "Take part in a federation, on a device."),
    "coordinator": ("coordinator", "coordinator", "Run a federation."),
    "init": ("authority:init", "coordinator", "Make a federation directory: private CA, broker, keys."),
    "enroll": ("authority:enroll", "coordinator", "Enroll a client: writes its device file."),
    "revoke": ("authority:revoke", "coordinator", "Take a client's enrolment back."),
    "audit": ("audit", "coordinator", "Check and read the audit log of a run."),
    "testvectors": ("testvectors", "client", "Write test vectors for implementations in other languages."),
    "build-runtime": ("build_runtime", "client", "Compile what a runtime needs on this machine."),
    "runs": ("runs", "coordinator", "List, show, plot, pause, resume and stop runs."),
    "privacy": ("privacy", "client", "Plan a privacy budget."),
    "demo": ("demo", "demo", "The whole thing on this machine, on real digits."),
}


class LazyGroup(click.Group):
    """Imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which one meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, imported now."""
        if name not in _COMMANDS:
            return None
        try:
            module, _, attribute = _COMMANDS[name][0].partition(":")
            command = getattr(importlib.import_module(f"edgetrain.cli.{module}"), attribute or "command")
        except ModuleNotFoundError as error:
            raise _missing(name, error) from error
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Runs the subcommand; a dependency that is missing gives the extra that brings it."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            raise _missing(ctx.invoked_subcommand or "", error) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `edgetrain --help`, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, _extra, text) in _COMMANDS.items()])


def _missing(command: str, error: ModuleNotFoundError) -> Exception:
    """What to tell a user whose installation lacks a module."""
    if (error.name or "").startswith("edgetrain") or command not in _COMMANDS:
        return error
    return click.ClickException(
        f"`edgetrain {command}` needs {error.name}, which is not installed: "
        f"pip install 'edgetrain[{_COMMANDS[command][1]}]'"
    )


def _said(error: Exception) -> str:
    """An error in a line, the system's own without their number."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgetrain")
@click.option("-v", "--verbose", count=True, help="Say more; -vv for everything.")
@click.option("-q", "--quiet", is_flag=True, help="Only warnings and errors.")
def group(verbose: int, *, quiet: bool) -> None:
    """Train models on phones, Raspberry Pis and other small devices, and learn across them."""
    level = logging.WARNING if quiet else (logging.INFO, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    if verbose == 0:
        # Other people's libraries speak up when something is wrong only.
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("edgetrain").setLevel(level)


def main() -> None:
    """Runs a command; errors that we raise on purpose are one message, and the exit status is 1."""
    try:
        status = group.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BrokenPipeError:
        # The reader has gone, e.g. `edgetrain inspect … | head`; say nothing more, not at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (EdgetrainError, OSError) as error:
        # Of the system's own errors, those that nobody expected where they came: a full disk, most often.
        click.secho("error: ", fg="red", nl=False, err=True)
        click.echo(_said(error), err=True)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
