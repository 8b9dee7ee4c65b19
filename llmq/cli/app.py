"""The command line: one small file per verb, arguments in, results out, errors to exit codes.

Results go to stdout, everything else to stderr. An error is one line and exit code 1, or 2 where the command could
not be carried out as written; ``--debug`` shows the traceback instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from llmq import __version__
from llmq.cli.ablate import ablate_command
from llmq.cli.adapter import adapter_command
from llmq.cli.bench import bench_command
from llmq.cli.chat import chat_command
from llmq.cli.collect import collect_command
from llmq.cli.compare import compare_command
from llmq.cli.convert import convert_command
from llmq.cli.doctor import doctor_command
from llmq.cli.eval import eval_command
from llmq.cli.generate import generate_command
from llmq.cli.inspect import inspect_command
from llmq.cli.kernels import kernels_command
from llmq.cli.plan import plan_command
from llmq.cli.quantize import quantize_command
from llmq.cli.recipe import recipe_command
from llmq.cli.serve import serve_command
from llmq.cli.verify import verify_command
from llmq.errors import LlmqError
from llmq.joining import first_speaks, world_here

app = typer.Typer(
    name="llmq",
    help="Make large language models four times smaller, and as good as before.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmq {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Hold what is common to all verbs."""


def _ended(reason: object, exit_code: int) -> typer.Exit:
    """Print `reason` on one line and return what ends the program with `exit_code`; one of several processes prints."""
    if world_here()[0] == 0:
        typer.echo(f"error: {' '.join(str(reason).split())}", err=True)
    return typer.Exit(exit_code)


def _register(name: str, command: Callable[..., None]) -> None:
    """Add `command` to the app, with ``--debug`` and errors turned into one line and an exit code."""

    @wraps(command)
    def run(debug: bool = False, **arguments: Any) -> None:
        with first_speaks():
            try:
                command(**arguments)
            except LlmqError as error:
                if debug:
                    raise
                raise _ended(error, error.exit_code) from error
            except OSError as error:  # a file or folder that the system does not let llmq use
                if debug:
                    raise
                raise _ended(error, LlmqError.exit_code) from error
            except KeyboardInterrupt as interrupt:
                raise _ended("interrupted; to go on, run the same command again", LlmqError.exit_code) from interrupt

    option = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
    signature = inspect.signature(command, eval_str=True)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), debug])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*signature.parameters.values(), debug]}
    app.command(name, context_settings=_PASSED_ON if name == "serve" else None)(run)


_COMMANDS: dict[str, Callable[..., None]] = {
    "quantize": quantize_command,
    "plan": plan_command,
    "collect": collect_command,
    "recipe": recipe_command,
    "eval": eval_command,
    "ablate": ablate_command,
    "compare": compare_command,
    "convert": convert_command,
    "verify": verify_command,
    "doctor": doctor_command,
    "inspect": inspect_command,
    "kernels": kernels_command,
    "bench": bench_command,
    "generate": generate_command,
    "chat": chat_command,
    "serve": serve_command,
    "adapter": adapter_command,
}

_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # to a command of transformers

for _name, _command in _COMMANDS.items():
    _register(_name, _command)
