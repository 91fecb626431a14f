"""`fewfire VERB ...`: finds the verb's module, calls it, turns errors into one line and an exit status.

Owns the table of verbs and the exit statuses: 0 done, 1 failed, 2 the user's mistake, 130 interrupted. A verb's
module is imported when it is called, so that `fewfire plan` never pays for torch.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from fewfire import __version__
from fewfire.errors import FewfireError


class Verb(NamedTuple):
    """Where a verb lives: `fewfire.cli.<module>`, its function, and the line that `fewfire --help` shows."""

    module: str
    function: str
    help: str


# In the order of `fewfire --help`. A verb is listed once it exists.
VERBS: dict[str, Verb] = {
    "demo": Verb("demo", "demo", "The whole way on a model trained here and now, offline, in minutes"),
    "train": Verb("train", "train", "Pretrain or fine-tune from a TOML file; goes on where it stopped"),
    "generate": Verb("generate", "generate", "Go on from a prompt, in the terminal or as JSON"),
    "eval": Verb("eval", "evaluate", "Perplexity, bits per byte and accuracy on your own text or questions"),
    "trace": Verb("trace", "trace", "Record what the routers do on your own text"),
    "pack": Verb("pack", "pack", "Quantize a checkpoint and lay it out for running"),
    "init": Verb("init", "init", "Random weights of a published shape, straight into a pack"),
    "verify": Verb("verify", "verify", "Compare every byte of a pack with its checksums"),
    "bench": Verb("bench", "bench", "Prefill and decode speed beside what this machine could do"),
    "export": Verb("export", "export", "Write a model in hub layout, as transformers loads it"),
    "plan": Verb("plan", "plan", "Total and active parameters, memory, fit, speed, cost of a model"),
    "doctor": Verb("doctor", "doctor", "What this machine can do, measured"),
    "models": Verb("models", "models", "The families, the published models known by name, and the hardware catalogue"),
}


def load_verb(name: str) -> Callable[..., Any]:
    """The function behind a verb."""
    verb = VERBS[name]
    function: Callable[..., Any] = getattr(import_module(f"fewfire.cli.{verb.module}"), verb.function)
    return function


class VerbGroup(TyperGroup):
    """A command group that imports a verb's module only when the verb is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(cmd_name, short_help=VERBS[cmd_name].help)(load_verb(cmd_name))
        return typer.main.get_command(app)


app = typer.Typer(cls=VerbGroup, add_completion=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewfire {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True),
) -> None:
    """fewfire plans, trains, explains, shrinks and serves Mixture-of-Experts models in the memory you have."""


# click's root of usage errors, wherever this typer keeps its click
_ClickException: type[Exception] = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException" and issubclass(kind, Exception)
)


def _fail(message: str, status: int) -> NoReturn:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(status)


def _usage_message(error: Any, arguments: Sequence[str]) -> str:
    message = str(error.format_message()).rstrip(".")
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        return f"no verb named {verb}; " + (f"did you mean {near[0]}?" if near else "`fewfire --help` lists them")
    return f"{message}; `fewfire {verb} --help` lists what it takes" if verb else f"{message}; try `fewfire --help`"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its status. Never shows a traceback for a mistake of the user's."""
    words = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    warnings.formatwarning = lambda message, *place, **line: f"warning: {message}\n"
    try:
        status = app(words, standalone_mode=False, prog_name="fewfire")
        sys.stdout.flush()
    except FewfireError as error:
        _fail(str(error), error.exit_status)
    except _ClickException as error:
        _fail(_usage_message(error, words), 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("\n")
        _fail("interrupted", 130)
    except BrokenPipeError:
        # whoever read our output has closed it (`| head`); nothing is left to say
        sys.stderr.close()
        raise SystemExit(0) from None
    except (OSError, MemoryError) as error:
        _fail(_system_message(error), 1)
    raise SystemExit(status if isinstance(status, int) else 0)


def _system_message(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "out of memory; give a smaller --context or --batch, or a --memory budget"
    name = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{name}"
