"""Entry of the `mn` command: turns every error into one line on stderr and an exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from mn.formats.errors import InvalidRequest, MnError, outcome_of

EXIT_INTERRUPTED = 130
EXIT_USAGE = 2


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line; its exit code (the table is `mn.formats.errors.OUTCOMES`).

    With `--json` an error is one JSON document on stdout too: `{"error": {"slug", "detail", …}}`.
    """

    def work() -> object:
        from mn.cli.commands import app  # takes long enough for a Ctrl-C to come in between

        return app(list(arguments), standalone_mode=False, prog_name="mn")

    return carry_out(work, "--json" in arguments)


def carry_out(work: Callable[[], object], as_json: bool = False) -> int:
    """The exit code that some work gives, or that of the error it raises, which is told."""
    try:
        code = work()
    except MnError as error:
        return _fail(error, as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(InvalidRequest(f"{os.fsdecode(error.filename)}: {error.strerror}"), as_json)
    except Exception as error:
        return _end_of(error, as_json)
    return code if isinstance(code, int) else 0


def _end_of(error: Exception, as_json: bool) -> int:
    """What the command line's parser raised, told; anything else is a bug and passes through."""
    from typer import Abort

    if isinstance(error, Abort):
        return EXIT_INTERRUPTED
    usage = getattr(error, "format_message", None)
    if usage is None:
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":  # the help was printed when it was raised
        return 0
    context = getattr(error, "ctx", None)
    told = InvalidRequest(usage())
    if context is not None:
        told.add_note(f"Try: {context.command_path} --help")
    return _fail(told, as_json)


def _fail(error: MnError, as_json: bool) -> int:
    from mn.cli.output import describe, print_json

    if as_json:
        print_json({"error": {**error.extra, "slug": error.slug, "detail": error.detail}})
    print(f"error: {describe(error)}", file=sys.stderr)
    return outcome_of(error).exit_code
