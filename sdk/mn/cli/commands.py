"""Every command, gathered from one file per noun."""

from __future__ import annotations

import typer

from mn.cli import bundles, calls, debugging, deploying, doctoring, functions, keys, login, nodes, runtime

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
