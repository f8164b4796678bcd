"""What `import mn` brings along: next to nothing, since every sandbox pays for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mn

SDK = Path(mn.__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """Modules that a bare interpreter with nothing but the SDK's folder has loaded after some code."""
    program = (
        f"import sys; sys.path.insert(0, {str(SDK)!r})\n{code}\nprint(str(list(sys.modules)).replace(chr(39), chr(34)))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_mn_and_decorating_loads_nothing_heavy() -> None:
    bare = modules_after("")
    decorated = modules_after("import mn\n@mn.function(cpu=1)\ndef f(x): return x\nassert f(2) == f.local(2) == 2")
    assert decorated - bare == {"__future__", "mn", "mn.functions"}


def test_calls_inside_a_sandbox_need_the_standard_library_alone() -> None:
    code = """
import mn, pickle
from mn.call import set_transport
from mn.formats.codecs import PICKLE_HEADER
class Inside:
    def call(self, name, codec, payload, timeout_s): return 0, 2, payload
    def stream(self, name, codec, payload, timeout_s): yield 0, 2, payload
    def map(self, name, codec, payloads, timeout_s, window): yield from ((n, 0, 2, p) for n, p in enumerate(payloads))
set_transport(Inside())
@mn.function
def f(x): return x
@mn.function
def g(x): yield x
assert f.remote(1) == ((1,), {})
assert list(f.map([1])) == [((1,), {})]
assert list(g.remote_gen(1)) == [((1,), {})]
"""
    assert not modules_after(code) & {"httpx", "msgspec", "h11", "rich", "ssl", "cloudpickle"}


def test_everything_public_is_there_and_errors_are_the_platforms() -> None:
    assert {name: getattr(mn, name) for name in mn.__all__}
    assert issubclass(mn.errors.CallTimeout, mn.errors.MnError)
    assert mn.function is not None and callable(mn.function)
