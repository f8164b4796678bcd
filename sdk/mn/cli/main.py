"""Entry of the `mn` command: gathers the nouns and turns every error into one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import typer

from mn.cli import bundles, calls, debugging, deploying, doctoring, functions, keys, login, nodes, runtime
from mn.formats.errors import MnError, outcome_of

EXIT_CRASH = 70
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="mn",
    help="Run functions on your own machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for noun in (deploying, calls, debugging, login, doctoring):
    noun.add_to(app)
for name, group in (
    ("function", functions.app),
    ("bundle", bundles.app),
    ("key", keys.app),
    ("node", nodes.app),
    ("runtime", runtime.app),
):
    app.add_typer(group, name=name)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mn {version('mirrorneuron')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Run functions on your own machines."""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; its exit code (the table is `mn.formats.errors.OUTCOMES`)."""
    try:
        code = app(list(arguments), standalone_mode=False, prog_name="mn")
    except MnError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        return _say((error.detail or error.slug) + notes, outcome_of(error).exit_code)
    except typer.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        hint = f"\nTry: {context.command_path} --help" if context is not None else ""
        return _say(usage() + hint, getattr(error, "exit_code", 2))
    return code if isinstance(code, int) else 0


def _say(text: str, code: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return code
