"""`python -m loadtest COMMAND`. Exit codes: 0 all bounds kept, 1 one missed, 2 not measured, 130 interrupted."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from loadtest import cold, footprint, machine, map, profiling, warm
from loadtest.report import print_report, say
from loadtest.scratch import Failed
from mn.formats.errors import MnError

COMMANDS = {"warm": warm, "map": map, "cold": cold, "footprint": footprint, "profile": profiling}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m loadtest", description=sys.modules["loadtest"].__doc__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        words = (module.__doc__ or "").strip()
        one = commands.add_parser(name, help=words.partition("\n")[0], description=words)
        one.add_argument(
            "--quick", action="store_true", help="few and short rounds: shows that it works, proves little"
        )
        module.arguments(one)
        one.set_defaults(run=module.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # What ends this process by a signal has to pass by all that cleans up.
    signal.signal(signal.SIGTERM, _terminated)
    facts = machine.facts()
    try:
        report = options.run(options)
    except (Failed, MnError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; everything that was started is stopped")
        return 130
    report.figures["quick"] = options.quick
    print_report(report, facts)
    return int(report.exit_code)


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
