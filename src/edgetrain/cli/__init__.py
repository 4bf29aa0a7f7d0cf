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

# name -> (module, the extra it needs, help)
_COMMANDS = {
    "export": ("export", "export", "Turn a torch model into a bundle that devices can train."),
    "verify": ("verify", "client", "Check a bundle's losses and gradients on this machine."),
    "inspect": ("inspect", "client", "Show what a bundle holds."),
    "client": ("client", "client", "Take part in a federation, on a device."),
    "coordinator": ("coordinator", "coordinator", "Run a federation."),
    "build-runtime": ("build_runtime", "client", "Compile what a runtime needs on this machine."),
    "demo": ("demo", "demo", "The whole thing on this machine, on real digits."),
}


class LazyGroup(click.Group):
    """Imports a subcommand when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which one meets them."""
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command; if its dependencies are missing, one that says which extra to install."""
        if name not in _COMMANDS:
            return None
        module, extra, _help = _COMMANDS[name]
        try:
            command = importlib.import_module(f"edgetrain.cli.{module}").command
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("edgetrain"):
                raise
            raise click.ClickException(
                f"`edgetrain {name}` needs {error.name}, which is not installed: pip install 'edgetrain[{extra}]'"
            ) from error
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in `edgetrain --help`, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_module, _extra, text) in _COMMANDS.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
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
    except click.exceptions.Abort:
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except EdgetrainError as error:
        click.secho("error: ", fg="red", nl=False, err=True)
        click.echo(str(error), err=True)
        status = 1
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        status = INTERRUPTED
    except BrokenPipeError:
        # The reader has gone, e.g. `edgetrain inspect … | head`; say nothing more, not at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status if isinstance(status, int) else 0)
