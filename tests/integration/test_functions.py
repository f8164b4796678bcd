"""The SDK from wherever its users write code: modules, scripts, packages, closures, `python -c`, notebooks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mn.formats.codecs import PICKLE_HEADER
from tests.support.api import Api, python
from tests.support.runtime import Runtime, until

SCRIPT = '''
from dataclasses import dataclass
import mn
from helper import double

@dataclass
class Point:
    x: int
    y: int

@mn.function
def mirrored(point: Point) -> Point:
    """Uses a module beside the script, and a class of the script's own."""
    return Point(double(point.y), point.x)

@mn.function
async def later(x):
    import asyncio
    await asyncio.sleep(0)
    return x + 1

@mn.function
def letters(word):
    for letter in word:
        yield letter

@mn.function
def inverse(x):
    return 1 / x

if __name__ == "__main__":
    print(mirrored.local(Point(1, 2)), mirrored.remote(Point(1, 2)))
    print(mirrored.remote(Point(1, 2)) == Point(4, 1), isinstance(mirrored.remote(Point(3, 4)), Point))
    print(later.remote(1))
    print(list(letters.remote_gen("abc")))
    print(list(inverse.map([1, 2, 4])), sorted(inverse.map([1, 2, 4], order_outputs=False)))
    print([type(it).__name__ for it in inverse.map([1, 0], return_exceptions=True)])
    print(list(inverse.starmap([(1,), (2,)])))
    try:
        inverse.remote(0)
    except ZeroDivisionError as error:
        print("caught", error)
'''
SAID = """Point(x=4, y=1) Point(x=4, y=1)
True True
2
['a', 'b', 'c']
[1.0, 0.5, 0.25] [0.25, 0.5, 1.0]
['float', 'ZeroDivisionError']
[1.0, 0.5]
caught division by zero
"""


def leaves_nothing(runtime: Runtime) -> None:
    until(lambda: [it["name"] for it in runtime.json("function", "list")["functions"]] == [], "no function left")


def test_a_script_with_a_module_beside_it(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "my-script.py").write_text(SCRIPT)
    done = python(runtime, "my-script.py", cwd=tmp_path)
    assert done.stdout == SAID, done.stderr
    leaves_nothing(runtime)


def test_a_module_that_a_program_imports(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "geometry.py").write_text(SCRIPT)
    code = "import geometry\nprint(geometry.mirrored.remote(geometry.Point(5, 6)))\n"
    done = python(runtime, cwd=tmp_path, code=code)
    assert done.stdout == "Point(x=12, y=5)\n", done.stderr


def test_a_package_with_relative_imports_and_a_data_file(runtime: Runtime, tmp_path: Path) -> None:
    package = tmp_path / "tool" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "tool" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .work import scaled\n")
    (tmp_path / "tool" / "factor.txt").write_text("3")
    (package / "work.py").write_text(
        "from pathlib import Path\nimport mn\nfrom ..units import UNIT\n\n@mn.function\ndef scaled(x):\n"
        "    factor = int((Path(__file__).parents[1] / 'factor.txt').read_text())\n    return f'{x * factor} {UNIT}'\n"
    )
    (tmp_path / "tool" / "units.py").write_text("UNIT = 'mm'\n")
    (tmp_path / "tool" / "__main__.py").write_text("from .inner import scaled\nprint(scaled.remote(14))\n")
    done = python(runtime, "-m", "tool", cwd=tmp_path)
    assert done.stdout == "42 mm\n", done.stderr


def test_closures_and_lambdas(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "closure.py").write_text("""
import mn

def scaler(factor):
    @mn.function
    def scaled(x):
        return factor * x
    return scaled

if __name__ == "__main__":
    print(scaler(3).remote(4), scaler(5).remote(4))
    print(mn.function(name="tripled")(lambda x: 3 * x).remote(5))
""")
    done = python(runtime, "closure.py", cwd=tmp_path)
    assert done.stdout == "12 20\n15\n", done.stderr
    leaves_nothing(runtime)


def test_code_given_on_the_command_line(runtime: Runtime, tmp_path: Path) -> None:
    code = """
import mn
OFFSET = 100

@mn.function
def shifted(x):
    return inner.remote(x) + OFFSET

@mn.function
def inner(x):
    return -x

print(shifted.remote(1), list(shifted.map([1, 2])))
"""
    done = python(runtime, cwd=tmp_path, code=code)
    assert done.stdout == "99 [99, 98]\n", done.stderr


def test_cells_of_a_notebook_with_a_running_loop(runtime: Runtime, tmp_path: Path) -> None:
    """As IPython runs them: `__main__` without a file, one cell after another, inside a loop that runs."""
    program = """
import asyncio
import sys

CELLS = [
    "import mn\\nimport math",
    "@mn.function\\ndef area(r):\\n    return round(math.pi * r * r, 3)",
    "print(area.remote(2))",
    "@mn.function\\ndef area(r):\\n    return 'a new definition'",
    "print(area.remote(2))",
    "print(list(area.map([1, 2])))",
]

async def kernel():
    main = sys.modules["__main__"].__dict__
    main.pop("__file__", None)
    for number, cell in enumerate(CELLS):
        exec(compile(cell, f"<ipython-input-{number}>", "exec"), main)
    print(await main["area"].aio.remote(2))
    print([it async for it in main["area"].aio.map([1])])

asyncio.run(kernel())
"""
    (tmp_path / "kernel.py").write_text(program)
    done = python(runtime, "kernel.py", cwd=tmp_path)
    new = "a new definition"
    assert done.stdout == f"12.566\n{new}\n['{new}', '{new}']\n{new}\n['{new}']\n", done.stderr


def test_a_deployed_function_is_looked_up_by_name(runtime: Runtime, api: Api, tmp_path: Path) -> None:
    api.deploy("def greet(name):\n    return 'hello ' + name\n", "greet")
    code = "import mn\nprint(mn.lookup('greet').remote('you'))\nmn.lookup('great').remote('you')"
    done = python(runtime, cwd=tmp_path, code=code)
    assert done.stdout == "hello you\n"
    assert "NotFound" in done.stderr
    assert "greet" in done.stderr


def test_settings_reach_the_sandbox(runtime: Runtime, tmp_path: Path) -> None:
    code = """
import mn, os

@mn.function(env={"GREETING": "good day"}, memory="128MiB", concurrency=2, timeout="30s")
def greeting():
    return os.environ["GREETING"]

print(greeting.remote())
"""
    assert python(runtime, cwd=tmp_path, code=code).stdout == "good day\n"


def test_two_calls_share_a_replica_with_concurrency(api: Api) -> None:
    source = """
import threading
BARRIER = threading.Barrier(2, timeout=30)

def meet():
    BARRIER.wait()
    return "met"
"""
    api.deploy(source, "meet", scaling={"concurrency": 2, "max_replicas": 1})
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda _: api.result("meet"), range(2))) == ["met", "met"]


def test_a_remote_exception_shows_where_it_was_raised_and_how_to_debug_it(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("""
import mn

@mn.function
def parse(head):
    raise ValueError(f"not a PDF: {head!r}")

if __name__ == "__main__":
    parse.remote(b"GIF")
""")
    done = python(runtime, "pipeline.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "ValueError: not a PDF: b'GIF'" in done.stderr
    assert "raised in sandbox of parse" in done.stderr
    assert 'raise ValueError(f"not a PDF: {head!r}")' in done.stderr
    assert "debug it here: mn debug inv_" in done.stderr


def test_a_pickle_of_another_python_is_refused_in_one_sentence(api: Api) -> None:
    api.deploy("def square(x):\n    return x * x\n", "square")
    foreign = PICKLE_HEADER[:4] + bytes((3, 99, 0, 0)) + b"\x80\x05N."
    answer = api.http.post(
        "/v1/functions/square/invoke", content=foreign, headers={"Content-Type": "application/vnd.mn.cloudpickle"}
    )
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (422, "/problems/invalid-request")
    assert "Python 3.99" in problem["detail"]
    assert "\n" not in problem["detail"]


def test_a_bundle_for_another_python_is_refused_in_one_sentence(api: Api) -> None:
    answer = api.post("def square(x):\n    return x * x\n", "square", environment={"python": "3.99"})
    problem = answer.json()
    assert (answer.status_code, problem["path"]) == (422, "environment.python")
    assert "made with Python 3.99" in problem["detail"]
    assert "\n" not in problem["detail"]


def test_a_module_that_sandboxes_lack_is_told_before_the_function_loads(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "needs.py").write_text("""
import mn
import httpx

@mn.function
def version():
    return httpx.__version__

if __name__ == "__main__":
    version.remote()
""")
    done = python(runtime, "needs.py", cwd=tmp_path)
    last = [line for line in done.stderr.splitlines() if "InvalidRequest" in line]
    assert last, done.stderr
    assert "version needs httpx, which sandboxes of this release do not have: bring pure-Python code" in last[-1]


def test_what_cannot_travel_is_told_here(runtime: Runtime, tmp_path: Path) -> None:
    code = """
import mn, threading
lock = threading.Lock()

@mn.function
def held():
    with lock:
        return 1

held.remote()
"""
    done = python(runtime, cwd=tmp_path, code=code)
    assert "held has no file, and it can't be pickled" in done.stderr


def test_without_a_runtime_the_next_step_is_told(tmp_path: Path) -> None:
    nowhere = Runtime(tmp_path / "home", MN_URL="http://127.0.0.1:1", MN_KEY="mnk_none")
    code = "import mn\n@mn.function\ndef f():\n    return 1\nf.remote()\n"
    done = python(nowhere, cwd=tmp_path, code=code)
    assert "Unavailable" in done.stderr
    assert "mn runtime start" in done.stderr


@pytest.mark.parametrize("size", [1 << 16, 5_000_000])
def test_large_values_travel_both_ways(runtime: Runtime, tmp_path: Path, size: int) -> None:
    code = f"""
import mn

@mn.function
def reverse(data):
    return data[::-1]

data = bytes(range(256)) * ({size} // 256)
print(reverse.remote(data) == data[::-1])
"""
    done = python(runtime, cwd=tmp_path, code=code)
    assert done.stdout == "True\n", done.stderr


def test_a_function_of_the_main_part_travels_by_value(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "guarded.py").write_text("""
import functools
import mn

class Scale:
    factor = 3

def logged(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

@mn.function
@logged
def top(x):
    return -x

if __name__ == "__main__":
    @mn.function
    def scaled(x):
        return top(x) * Scale.factor, inner.remote(x), Scale()

    @mn.function
    def inner(x):
        return top.remote(x)

    value, nested, scale = scaled.remote(2)
    print(value, nested, isinstance(scale, Scale), top.remote(1))
""")
    done = python(runtime, "guarded.py", cwd=tmp_path)
    assert done.stdout == "-6 -2 True -1\n", done.stderr
    leaves_nothing(runtime)


def test_a_script_without_a_main_part_is_told_where_it_calls(runtime: Runtime, tmp_path: Path) -> None:
    source = "import mn\n\n@mn.function\ndef sq(x):\n    return x * x\n\nprint(sq.remote(3))\n"
    (tmp_path / "first.py").write_text(source)
    done = python(runtime, "first.py", cwd=tmp_path)
    advice = 'first.py calls sq.remote while it is imported (line 7): put that under `if __name__ == "__main__":`'
    assert f"InvalidRequest: {advice}" in done.stderr


def test_an_exception_with_arguments_of_its_own_is_caught_by_its_type(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text("""
import mn

class Mismatch(ValueError):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.a, self.b = a, b

@mn.function
def compare(a, b):
    raise Mismatch(a, b)

@mn.function
def outer(a, b):
    compare.remote(a, b)

@mn.function
def held():
    error = Mismatch(1, 2)
    error.lock = __import__("threading").Lock()
    raise error

if __name__ == "__main__":
    for function in (compare, outer):
        try:
            function.remote(1, 2)
        except Mismatch as error:
            print(error, error.a, error.b, error.args)
    try:
        held.remote()
    except mn.errors.FunctionFailed as error:
        print(*error.__notes__)
""")
    done = python(runtime, "picky.py", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["1-2 1 2 ('1-2',)"] * 2, done.stderr
    assert "its type could not be rebuilt: Refusal: a _ByState" not in done.stdout
    assert "its type could not be rebuilt: " in done.stdout and "lock" in done.stdout
