"""Calls in the child: arguments, results, errors, kinds of functions. In plain processes, since isolation plays no part."""

from __future__ import annotations

import base64
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mn.formats.codecs import PICKLE_HEADER, Codec
from mn_runner.protocol import REASON_CANCELLED, REASON_TIMEOUT, Status
from tests.support.sandboxes import Lab
from tests.support.session import Outcome


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab("host_local", tmp_path)
    yield lab
    lab.close()


def unpickled(outcome: Outcome) -> Any:
    assert outcome.status == Status.OK, outcome.payload
    assert outcome.payload[:8] == PICKLE_HEADER
    return pickle.loads(outcome.payload[8:])


def refusal(outcome: Outcome) -> tuple[str, str]:
    assert outcome.status == Status.PLATFORM_ERROR, outcome
    told = outcome.json()
    return told["slug"], told["detail"]


def test_an_object_is_keywords_anything_else_the_argument_and_nothing_none(lab: Lab) -> None:
    session = lab.load("def f(*args, **kwargs):\n    return [args, kwargs]\n", "app:f").session
    assert session.call({"a": 1}).value() == [[], {"a": 1}]
    assert session.call([1, 2]).value() == [[[1, 2]], {}]
    assert session.call(raw=b"null").value() == [[None], {}]
    assert session.call().value() == [[], {}]


def test_a_wrong_argument_is_the_callers_fault_and_shows_the_signature(lab: Lab) -> None:
    session = lab.load(
        "def area(width: int, height: int = 1) -> int:\n    return width * height\n", "app:area", name="area"
    ).session
    slug, detail = refusal(session.call({"widht": 2}))
    assert slug == "invalid-request"
    assert detail.startswith("area(width: int, height: int = 1) -> int: ")
    assert "widht" in detail


def test_a_type_error_within_the_function_is_the_functions(lab: Lab) -> None:
    outcome = lab.load("def f():\n    return len(3)\n", "app:f").session.call()
    assert (outcome.status, outcome.json()["type"]) == (Status.FUNCTION_ERROR, "TypeError")


def test_what_is_not_json_is_told_with_the_place(lab: Lab) -> None:
    session = lab.load("def f(x):\n    return x\n", "app:f").session
    slug, detail = refusal(session.call(raw=b'{"url":'))
    assert slug == "invalid-json"
    assert "char 7" in detail
    assert refusal(session.call(raw=b"[" * 100_000))[0] == "invalid-json"


def test_bytes_come_back_as_bytes_and_other_types_tell_their_name(lab: Lab) -> None:
    source = "def f(what):\n    return {'bytes': b'\\0x', 'set': {1}, 'nan': float('nan')}[what]\n"
    session = lab.load(source, "app:f").session
    outcome = session.call("bytes")
    assert (outcome.codec, outcome.payload) == (Codec.RAW, b"\0x")
    for what, named in (("set", "a set"), ("nan", "a float")):
        outcome = session.call(what)
        assert outcome.status == Status.FUNCTION_ERROR
        assert named in outcome.json()["message"]


def test_python_callers_get_any_value_that_pickles(lab: Lab) -> None:
    session = lab.load(
        "def f(a, b):\n    return {a: (b, {1, 2})}\ndef g(n):\n    return lambda x: x + n\n", "app:f"
    ).session
    assert unpickled(session.call_pickle("k", b=1j)) == {"k": (1j, {1, 2})}


def test_functions_come_back_by_value_and_sockets_not_at_all(lab: Lab) -> None:
    source = "import socket\ndef f(n):\n    return (lambda x: x + n) if n else socket.socket()\n"
    session = lab.load(source, "app:f").session
    assert unpickled(session.call_pickle(2))(3) == 5
    outcome = session.call_pickle(0)
    assert outcome.status == Status.FUNCTION_ERROR
    assert "socket" in outcome.json()["message"]


def test_another_minors_pickle_is_refused_unopened(lab: Lab) -> None:
    session = lab.load("def f(x):\n    return x\n", "app:f").session
    slug, detail = refusal(session.call(raw=b"MNP1\x03\x08\0\0garbage", codec=Codec.PICKLE))
    assert slug == "invalid-request"
    assert "Python 3.8" in detail
    assert "python='3.8'" in detail


def test_a_pickle_of_a_missing_module_names_it(lab: Lab) -> None:
    session = lab.load("def f(x):\n    return x\n", "app:f").session
    payload = pickle.dumps(((_Elsewhere(),), {}), 5).replace(__name__.encode(), b"n" * len(__name__))
    slug, detail = refusal(session.call(raw=PICKLE_HEADER + payload, codec=Codec.PICKLE))
    assert slug == "invalid-request"
    assert "n" * len(__name__) in detail


class _Elsewhere:
    pass


def test_exceptions_travel_as_themselves_to_python_callers(lab: Lab) -> None:
    source = """
class Picky(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.b = b
class Forgetful(Exception):
    def __init__(self, a, b=None):
        super().__init__(f"{a}-{b}")
class Stuck(Exception):
    def __init__(self, what):
        self.what = what
def f(kind):
    if kind == "picky":
        raise Picky(1, 2)
    if kind == "forgetful":
        raise Forgetful(1, 2)
    if kind == "stuck":
        raise Stuck(__import__("socket").socket())
    raise LookupError("here", 7)
"""
    session = lab.load(source, "app:f").session
    told = session.call_pickle("plain").json()
    error = pickle.loads(base64.b64decode(told["pickle"])[8:])
    assert type(error) is LookupError
    assert error.args == ("here", 7)
    assert "pickle" not in session.call("plain").json()
    told = session.call_pickle("stuck").json()
    assert told["type"] == "Stuck"
    assert "pickle" not in told
    assert "socket" in told["pickle_error"]
    for kind in ("picky", "forgetful"):
        assert "pickle" in session.call_pickle(kind).json()


def test_a_module_that_is_not_there_is_told_with_what_to_do(lab: Lab) -> None:
    told = lab.load("def f():\n    import numpy_not_here.core\n", "app:f").session.call_pickle().json()
    assert told["type"] == "ModuleNotFoundError"
    assert "it needs numpy_not_here, which sandboxes of this release do not have: bring" in told["traceback"]
    error = pickle.loads(base64.b64decode(told["pickle"])[8:])
    assert "numpy_not_here" in error.__notes__[0]


def test_sys_exit_is_an_error_of_the_call_and_not_the_end(lab: Lab) -> None:
    session = lab.load("import sys\ndef f(x):\n    return x if x else sys.exit('enough')\n", "app:f").session
    outcome = session.call(0)
    assert (outcome.status, outcome.json()["type"], outcome.json()["message"]) == (
        Status.FUNCTION_ERROR,
        "SystemExit",
        "enough",
    )
    assert session.call(1).value() == 1


def test_a_script_is_loaded_without_its_main_part_and_its_classes_resolve(lab: Lab) -> None:
    source = """
import dataclasses
@dataclasses.dataclass
class Point:
    x: int
def f(x):
    import __main__
    assert __main__.Point is Point
    return Point(x)
def g(x):
    return Point.__module__
if __name__ == "__main__":
    raise SystemExit("ran as a script")
"""
    session = lab.load(source, "app:f", main=True).session
    outcome = session.call_pickle(3)
    assert outcome.status == Status.OK
    assert b"__main__" in outcome.payload
    assert b"__mn_main__" not in outcome.payload
    assert lab.load(source, "app:g", main=True).session.call(0).value() == "__main__"


def test_an_mn_handle_is_unwrapped_and_packages_import_each_other(lab: Lab) -> None:
    files = {
        "pkg/__init__.py": "",
        "pkg/a.py": "from pkg.b import Handle, two\n@Handle\ndef f(x):\n    return x * two\n",
        "pkg/b.py": "two = 2\nclass Handle:\n    def __init__(self, f):\n        self.raw_function = f\n",
    }
    assert lab.load(files, "pkg.a:f").session.call(4).value() == 8


def test_a_pickled_function_is_loaded(lab: Lab) -> None:
    import cloudpickle

    sandbox = lab.start()
    folder = lab.run_dir / "pickled"
    folder.mkdir()
    factor = 3
    (folder / "function.pkl").write_bytes(PICKLE_HEADER + cloudpickle.dumps(lambda x: x * factor))
    lab.run(lab.driver.provide(sandbox.handle, folder))
    assert sandbox.session.load("pickle:function.pkl", sandbox.handle.code_root) == {}
    assert sandbox.session.call(5).value() == 15


@pytest.mark.parametrize(
    ("members", "source", "said"),
    [
        ({"requires_modules": ["json", "numpy_of_nowhere"]}, "f = print", "numpy_of_nowhere"),
        ({"python": "3.8"}, "f = print", "Python 3.8"),
        ({"entry": "app:g"}, "f = print", "has no g"),
        ({"entry": "app:f"}, "f = 3", "not a function"),
        ({}, "raise RuntimeError('at import')", "RuntimeError: at import"),
        ({}, "import sys; sys.exit(4)", "SystemExit"),
        ({}, "def f(:", "SyntaxError"),
    ],
)
def test_what_hinders_loading_is_one_sentence(lab: Lab, members: dict[str, Any], source: str, said: str) -> None:
    sandbox = lab.start()
    sandbox.provide({"app.py": source}, lab.run_dir / "payload")
    error = sandbox.session.load(**{"entry": "app:f", "root": sandbox.handle.code_root, **members})["error"]
    assert said in error["detail"]
    assert sandbox.death().exit_code == 0


def test_a_queued_call_that_is_cancelled_is_answered_while_another_runs(lab: Lab) -> None:
    session = lab.load("import time\ndef f(s):\n    print('in')\n    time.sleep(s)\n    return s\n", "app:f").session
    first = session.start(30)
    session.until(lambda: session.outcomes[first].output != "")
    second = session.start(0)
    session.cancel(second, REASON_CANCELLED)
    assert refusal(session.finish(second))[0] == "cancelled"
    session.cancel(first, REASON_TIMEOUT)
    assert refusal(session.finish(first))[0] == "timeout"
    assert session.call(0).value() == 0


def test_a_cancellation_that_overtakes_its_call_is_answered_once(lab: Lab) -> None:
    session = lab.load("def f(x):\n    return x\n", "app:f").session
    assert session.call(1).value() == 1
    session.outcomes[2] = Outcome()
    session.cancel(2, REASON_CANCELLED)
    assert refusal(session.finish(2))[0] == "cancelled"
    number = session.start(2)
    assert number == 2
    assert session.call(3).value() == 3
    assert (
        session.outcomes[2].status == -1
    )  # what start() reset: the call that came late was dropped without a second answer


def test_a_busy_child_ends_with_its_node(lab: Lab) -> None:
    sandbox = lab.load("def f():\n    print('in')\n    while True:\n        pass\n", "app:f")
    number = sandbox.session.start()
    sandbox.session.until(lambda: sandbox.session.outcomes[number].output != "")
    sandbox.session.close()
    assert sandbox.death().exit_code == 0
    sandbox.session_closed()


def test_a_late_cancellation_hits_nothing(lab: Lab) -> None:
    session = lab.load("def f(x):\n    return x\n", "app:f").session
    number = session.start(1)
    session.finish(number)
    session.cancel(number, REASON_TIMEOUT)
    assert [session.call(x).value() for x in range(50)] == list(range(50))


def test_user_code_that_swallows_the_interruption_still_timed_out(lab: Lab) -> None:
    source = "import time\ndef f():\n    print('in')\n    try:\n        time.sleep(60)\n    except BaseException:\n        return 'swallowed'\n"
    session = lab.load(source, "app:f").session
    number = session.start()
    session.until(lambda: session.outcomes[number].output != "")
    session.cancel(number, REASON_TIMEOUT)
    assert refusal(session.finish(number))[0] == "timeout"


def test_interruptions_at_any_moment_tear_no_frame(lab: Lab) -> None:
    source = "def f(n):\n    for i in range(n):\n        print('x' * 50)\n    return 'y' * 5000\n"
    session = lab.load(source, "app:f").session
    slugs = set()
    for turn in range(200):
        number = session.start(20)
        if turn % 3:
            time.sleep(turn % 7 * 0.0001)
        session.cancel(number, REASON_TIMEOUT)
        outcome = session.finish(number)
        slugs.add(outcome.status)
        assert outcome.status == Status.OK or outcome.json()["slug"] == "timeout"
    assert session.call(1).value() == "y" * 5000


def test_output_is_bounded_per_call_with_a_note(lab: Lab) -> None:
    session = lab.load(
        "def f(n):\n    for i in range(n):\n        print('0123456789')\n", "app:f", output_bytes_max=1000
    ).session
    outcome = session.call(500)
    assert outcome.output.startswith("0123456789\n" * 80)
    assert "output truncated" in outcome.output
    assert len(outcome.output) < 1200
    assert session.call(2).output == "0123456789\n" * 2


def test_raw_descriptors_and_subprocesses_write_to_the_output_pipe(lab: Lab) -> None:
    source = """
import os, subprocess, sys
def f():
    subprocess.run(["echo", "from below"])
    os.write(2, b"raw\\n")
    return sys.stdin.read()
"""
    sandbox = lab.load(source, "app:f")
    assert sandbox.session.call().value() == ""
    assert sandbox.raw_output() == b"from below\nraw\n"


def test_threads_of_user_code_print_into_the_running_call(lab: Lab) -> None:
    source = "import threading\ndef f():\n    t = threading.Thread(target=print, args=('from a thread',))\n    t.start()\n    t.join()\n"
    assert lab.load(source, "app:f").session.call().output == "from a thread\n"


def test_a_forked_process_can_neither_answer_nor_call(lab: Lab) -> None:
    source = """
import os
import mn.call
def f():
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            mn.call.transport().call("g", 0, b"", None)
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        print("forked")
        return "from the fork"
    os.waitpid(pid, 0)
    return os.read(read, 100).decode()
"""
    sandbox = lab.load(source, "app:f")
    assert sandbox.session.call().value() == "RuntimeError"
    assert b"forked" in sandbox.raw_output()
    assert sandbox.session.call().value() == "RuntimeError"


def test_generators_say_so_and_stop_when_cancelled(lab: Lab) -> None:
    source = "import itertools, time\ndef f():\n    for i in itertools.count():\n        yield i\n        time.sleep(0.001)\n"
    session = lab.load(source, "app:f", generator=True).session
    number = session.start()
    session.until(lambda: len(session.outcomes[number].items) > 3)
    session.cancel(number, REASON_CANCELLED)
    outcome = session.finish(number)
    assert refusal(outcome)[0] == "cancelled"
    assert [json.loads(item) for item in outcome.items] == list(range(len(outcome.items)))
    told = refusal(lab.load(source, "app:f").session.call())[1]
    assert "`yield from`" in told and '"generator": true' in told


def test_an_error_midway_follows_the_values(lab: Lab) -> None:
    session = lab.load("def f():\n    yield 1\n    raise KeyError('gone')\n", "app:f", generator=True).session
    outcome = session.call()
    assert outcome.items == [b"1"]
    assert outcome.json()["type"] == "KeyError"


def test_large_values_of_a_generator_come_whole(lab: Lab) -> None:
    session = lab.load(
        "def f(n):\n    for i in range(3):\n        yield bytes([i]) * n\n", "app:f", generator=True
    ).session
    outcome = session.call(2 << 20)
    assert outcome.items == [bytes([i]) * (2 << 20) for i in range(3)]
