"""The script that `map` measures, run as a user runs one: `python mapping.py ITEMS ROUNDS`.

Pool and system take turns over the same trivial work. It prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import mn

REPLICAS = 2
CHUNKS = (10, 100, 1000, 5000)
WAIT_S = 60.0


def plain(x: int) -> int:
    """What the pool runs."""
    return x + 1


@mn.function(min_replicas=REPLICAS, max_replicas=REPLICAS)
def remote(x: int) -> int:
    """What the system runs."""
    return x + 1


def timed(run: Callable[[], Iterable[int]], expected: list[int]) -> float:
    """Seconds until the last result is there."""
    began = time.perf_counter()
    results = list(run())
    seconds = time.perf_counter() - began
    if results != expected:
        raise SystemExit("the results are not those of the items in their order")
    return seconds


def await_replicas() -> dict[str, Any]:
    """The node, once the function has all of its sandboxes."""
    from mn.client import Client

    deadline = time.monotonic() + WAIT_S
    with Client() as client:
        while True:
            node = dict(client.nodes()["nodes"][0])
            if len([it for it in node["sandboxes"] if it["state"] == "ready"]) == REPLICAS:
                return node
            if time.monotonic() > deadline:
                raise SystemExit(f"the function does not have {REPLICAS} sandboxes: {node['sandboxes']}")
            time.sleep(0.05)


def main(items: int, rounds: int) -> dict[str, Any]:
    expected = [x + 1 for x in range(items)]
    seconds: dict[str, list[float]] = {"system": [], "pool": []}
    chunked: dict[str, list[float]] = {str(chunk): [] for chunk in CHUNKS}
    # The pool forks its workers before there is any thread in this process.
    with ProcessPoolExecutor(REPLICAS) as pool:
        timed(lambda: pool.map(plain, range(items), chunksize=100), expected)
        warm_ups = 1
        timed(lambda: remote.map(range(items)), expected)
        node = await_replicas()
        for number in range(1, rounds + 1):
            seconds["pool"].append(timed(lambda: pool.map(plain, range(items)), expected))
            seconds["system"].append(timed(lambda: remote.map(range(items)), expected))
            for chunk in CHUNKS:
                chunked[str(chunk)].append(
                    timed(lambda size=chunk: pool.map(plain, range(items), chunksize=size), expected)  # type: ignore[misc]
                )
            told = {name: f"{values[-1]:.3f} s" for name, values in seconds.items()}
            print(f"round {number}/{rounds}: {told}", file=sys.stderr, flush=True)
    return {
        "seconds": seconds,
        "pool_chunked_seconds": chunked,
        "items_mapped": items * (rounds + warm_ups),
        "driver": node["driver"],
        "sandboxes": len(node["sandboxes"]),
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
