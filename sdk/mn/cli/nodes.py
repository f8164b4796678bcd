"""`mn node`: the machines of the pool."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from mn.cli.output import Json, ago, columns, print_json
from mn.cli.remote import client
from mn.formats.errors import NotFound
from mn.formats.resources import format_size

app = typer.Typer(help="The machines of the pool.", no_args_is_help=True)

WATCH_EVERY_S = 2.0
MIB = 1 << 20
NODE_HEAD = ("NODE", "STATUS", "ELIGIBLE", "ROLE", "CPU", "MEMORY", "GPU", "SLOTS", "ADDRESS")
POOL_HEAD = ("POOL", "NODES", "SLOTS", "CPU", "MEMORY", "GPU")


@app.command("list")
def list_nodes(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show the nodes and their executor pools."""
    with client() as api:
        while True:
            found = api.nodes()
            if as_json:
                print_json(found)
            else:
                print(("\x1b[H\x1b[2J" if watch else "") + tables(found), flush=True)
            if not watch:
                return
            time.sleep(WATCH_EVERY_S)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Its name, or the part after the @.")], as_json: Json = False
) -> None:
    """Show one node with its sandboxes."""
    with client() as api:
        nodes = api.nodes()["nodes"]
    found = [node for node in nodes if name in (node["name"], node["name"].partition("@")[2])]
    if not found:
        raise NotFound(f"there is no node {name}; there are: {', '.join(node['name'] for node in nodes) or 'none'}")
    node = found[0]
    if as_json:
        print_json(node)
        return
    print(describe_node(node))
    print(f"{node['status']}, {'eligible' if node['eligible'] else 'not eligible'}, started {ago(node['started_ms'])}")
    print(f"driver {node['driver']}: {', '.join(node['layers']) or 'isolates nothing'}")
    print(f"python {', '.join(node['python'])}   spares {node['spares']}\n")
    head = ("SANDBOX", "FUNCTION", "STATE", "SLOTS", "PID")
    rows = [
        (s["sandbox"], s["version"], s["state"], f"{s['busy']} / {s['slots']}", s["pid"]) for s in node["sandboxes"]
    ]
    print(columns(head, rows))


def tables(found: dict[str, Any]) -> str:
    """The `nodes` and the `executor_pools` table."""
    nodes = columns(NODE_HEAD, [_node_row(node) for node in found["nodes"]])
    pools = columns(POOL_HEAD, [_pool_row(pool) for pool in found["executor_pools"]])
    return f"{nodes}\nexecutor_pools\n{pools}"


def _node_row(node: dict[str, Any]) -> tuple[str, ...]:
    eligible = "yes" if node["eligible"] else "no"
    return (node["name"], node["status"], eligible, node["role"], *_amounts(node), _slots(node), node["address"] or "–")


def _pool_row(pool: dict[str, Any]) -> tuple[str, ...]:
    cpu, memory, gpu = _amounts(pool)
    return (pool["pool"], str(pool["nodes"]), _slots(pool), cpu, memory, gpu)


def _amounts(it: dict[str, Any]) -> tuple[str, str, str]:
    cpu = f"{it['cpu_used']:.1f} / {it['cpu']:g}"
    memory = f"{it['memory_used_mb'] / 1024:.1f} / {format_size(it['memory_mb'] * MIB)}"
    return cpu, memory, f"{it['gpus_used']} / {it['gpus']}" if it["gpus"] else "–"


def _slots(it: dict[str, Any]) -> str:
    return f"{it['slots_busy']} / {it['slots']}"


def describe_node(node: dict[str, Any]) -> str:
    """`mirror_neuron@mn-7f3a91c2, leader, 8 CPU, 31 GiB`."""
    parts = [node["name"], node["role"], f"{node['cpu']:g} CPU", format_size(node["memory_mb"] * MIB)]
    if node["gpus"]:
        parts.append(f"{node['gpus']} × GPU")
    return ", ".join(part for part in parts if part)
