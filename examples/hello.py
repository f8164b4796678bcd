"""The first five minutes: `python examples/hello.py`, or `mn run examples/hello.py::square --x 12`."""

import mn


@mn.function(cpu=1, memory="512MiB", timeout=30, retries=2)
def square(x: int) -> int:
    """The square of a number."""
    return x * x


if __name__ == "__main__":  # plain Python still works
    print(square.local(3))
    print(square.remote(4))  # in a sandbox, on the pool
    print(sum(square.map(range(10_000))))  # progress bar on a terminal
