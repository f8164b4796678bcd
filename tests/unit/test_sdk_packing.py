"""What travels with a function: its file, the user's modules that it imports, and pickles of what has no file."""

from __future__ import annotations

import importlib
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import mn
from mn import app
from mn.formats.manifest import parse_manifest
from mn.packing import imports_of, pack_module
from mn.scripts import importable_parts
from tests.support.stub_gateway import running

Write = Callable[[str, str], Path]


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Write]:
    """Write a file of a project; what was imported from it is forgotten afterwards."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / "project" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
        return file

    before, path = set(sys.modules), list(sys.path)
    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = path


def manifest_of(target: app.Target) -> dict[str, dict[str, Any]]:
    packed = app.pack_target(target)
    parse_manifest(packed.manifest)
    return {each["name"]: each for each in json.loads(packed.manifest)["functions"]}


def test_a_file_travels_with_the_local_modules_that_it_imports(project: Write) -> None:
    project("helpers.py", "import deeper\nfrom json import loads\n")
    project("deeper.py", "import yaml_not_here\n")
    project("lazy.py", "x = 1\n")
    project("unused.py", "x = 1\n")
    file = project(
        "jobs.py",
        """
        import mn, helpers, httpx
        try:
            import optional_not_here
        except ImportError:
            optional_not_here = None

        @mn.function
        def work(x):
            import lazy, maybe_not_here
            return lazy.x
        """,
    )
    project("deeper.py", "import httpx\n")
    packed = app.pack_target(app.load_target(str(file)))
    assert sorted(packed.files) == [f"payloads/{name}.py" for name in ("deeper", "helpers", "jobs", "lazy")]
    (spec,) = json.loads(packed.manifest)["functions"]
    assert spec["entry"] == "jobs:work"
    assert spec["environment"] == {
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "requires_modules": ["httpx"],
    }


def test_a_module_of_a_package_takes_the_package_along(project: Write) -> None:
    project("pkg/__init__.py", "")
    project("pkg/sub/__init__.py", "from .. import other\n")
    project("pkg/other.py", "import sibling\n")
    project("pkg/data/words.txt", "a b c")
    project("pkg/__pycache__/other.cpython-311.pyc", "x")
    project("pkg/.hidden", "x")
    project("sibling.py", "")
    file = project("pkg/sub/mod.py", "import mn\n@mn.function\ndef f(): ...\n")
    packed = app.pack_target(app.load_target(f"{file}::f"))
    names = ["pkg/__init__.py", "pkg/data/words.txt", "pkg/other.py", "pkg/sub/__init__.py", "pkg/sub/mod.py"]
    assert sorted(packed.files) == [f"payloads/{name}" for name in [*names, "sibling.py"]]
    assert json.loads(packed.manifest)["functions"][0]["entry"] == "pkg.sub.mod:f"


def test_the_decorators_settings_become_the_manifests(project: Write) -> None:
    file = project(
        "settings.py",
        '''
        import mn
        @mn.function(cpu=0.5, memory="1.5GiB", gpu=1, timeout="5m", retries=2, concurrency=8, min_replicas=1,
                     max_replicas=3, idle_timeout=60, env={"A": "b"}, name="other-name")
        def f(x: int, *, y="d"):
            """Says what."""
        @mn.function
        def raw(body: bytes): ...
        @mn.function
        async def gen():
            yield 1
        class Holder:
            @mn.function
            def inside(x): ...
        inside = Holder.inside
        ''',
    )
    specs = manifest_of(app.load_target(str(file)))
    first = specs["other-name"]
    assert first["resources"] == {"cpu": 0.5, "memory_mb": 1536, "gpu": 1}
    assert first["scaling"] == {"min_replicas": 1, "max_replicas": 3, "concurrency": 8, "idle_s": 60}
    assert (first["timeout_s"], first["retries"], first["env"]) == (300, 2, {"A": "b"})
    assert [each["name"] for each in first["parameters"]] == ["x", "y"] and first["doc"] == "Says what."
    assert first["source"] == "project/settings.py::f"
    assert specs["raw"]["raw"] and specs["gen"]["generator"]
    assert specs["inside"]["entry"] == "settings:Holder.inside"


def test_a_wrong_setting_names_the_function_and_itself(project: Write) -> None:
    file = project("wrong.py", "import mn\n@mn.function(memory='lots')\ndef f(): ...\n")
    with pytest.raises(mn.errors.InvalidRequest, match=r"f: memory='lots': not a size"):
        manifest_of(app.load_target(str(file)))
    for settings, told in (
        ("memory=512", 'memory=512: that is 512 bytes; write memory="512MiB"'),
        ("retries=101", "retries=101: must be 0 to 100"),
        ("timeout=0", "timeout=0: must be above 0"),
        ("min_replicas=2, max_replicas=1", "min_replicas=2: must not be above max_replicas"),
        ("name='a b'", "name: 'a b' is no function name"),
    ):
        file = project(f"wrong_{settings[:4]}.py", f"import mn\n@mn.function({settings})\ndef f(): ...\n")
        with pytest.raises(mn.errors.InvalidRequest) as caught:
            manifest_of(app.load_target(str(file)))
        assert caught.value.detail.startswith("@mn.function of ") and told in caught.value.detail
    with pytest.raises(TypeError, match="memroy"):
        mn.function(memroy="1GiB")  # type: ignore[call-overload]


def test_closures_and_lambdas_travel_as_pickles_that_run() -> None:
    base = 10
    helper = mn.function(name="helper")(lambda x: x + base)

    @mn.function
    def closure(x: int) -> Any:
        return helper(x) * 2

    packed = pack_module(sys.modules[__name__], [closure], only=True)
    (spec,) = json.loads(packed.manifest)["functions"]
    assert spec["entry"] == "pickle:functions/closure.pickle"
    shipped = packed.files["payloads/functions/closure.pickle"]
    assert isinstance(shipped, bytes) and shipped[:4] == b"MNP1"
    assert pickle.loads(shipped[8:])(1) == 22


def test_what_cannot_be_pickled_is_told_with_what_to_do() -> None:
    lock = threading.Lock()
    with pytest.raises(
        mn.errors.InvalidRequest, match=r"stuck is not there when its file is imported.*top of a module"
    ):
        pack_module(sys.modules[__name__], [mn.function(name="stuck")(lambda: lock)], only=True)


def test_two_functions_of_one_name_are_refused(project: Write) -> None:
    project("other_home.py", "import mn\n@mn.function\ndef same(): ...\n")
    file = project("one_home.py", "import mn, other_home\n@mn.function\ndef same(): ...\n")
    with pytest.raises(mn.errors.InvalidRequest, match=r"two functions are called 'same'.*name="):
        pack_module(app.load_target(str(file)).module)
    file = project("dup.py", "import mn\n@mn.function\ndef same(): ...\n@mn.function(name='same')\ndef other(): ...\n")
    with pytest.raises(mn.errors.InvalidRequest, match=r"'same', at dup\.py:2 and dup\.py:4: give one"):
        app.pack_target(app.load_target(str(file)))
    file = project("twice.py", "import mn\n@mn.function\ndef f(): ...\n\n@mn.function(cpu=1)\ndef f(): ...\n")
    with pytest.raises(mn.errors.InvalidRequest, match=r"'f', at lines 2 and 5 of twice\.py: the second replaces"):
        app.pack_target(app.load_target(str(file)))


def test_handles_travel_by_reference(project: Write) -> None:
    file = project("handles.py", "import mn\n@mn.function\ndef f(x): return x\n")
    found = next(iter(app.load_target(str(file))))
    data = pickle.dumps(found)
    assert len(data) < 120
    assert pickle.loads(data) is found
    assert pickle.loads(pickle.dumps(found.options(timeout=3))).timeout == 3
    del sys.modules["handles"]
    sys.path.remove(str(file.parent))
    importlib.invalidate_caches()
    away = pickle.loads(data)
    assert away.name == "f" and away.raw_function is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py", "no file"),
        ("nowhere_at_all", "no module 'nowhere_at_all'"),
        ("{file}::squar", "no function 'squar'; it has square"),
        ("{empty}", "put @mn.function above one"),
    ],
)
def test_a_target_that_is_not_there_says_what_is(project: Write, target: str, message: str) -> None:
    file = project("targets.py", "import mn\n@mn.function\ndef square(x): return x * x\n")
    empty = project("empty.py", "")
    with pytest.raises((mn.errors.NotFound, mn.errors.InvalidRequest), match=message):
        app.load_target(target.format(file=file, empty=empty))


def test_a_target_is_read_again_after_it_was_saved(project: Write) -> None:
    file = project("saved.py", "import mn\n@mn.function\ndef first(): ...\n")
    assert [each.name for each in app.load_target(str(file))] == ["first"]
    project("saved.py", "import mn\n@mn.function\ndef second_version(): ...\n")
    assert [each.name for each in app.load_target(str(file))] == ["second_version"]


def test_files_whose_names_are_no_module_names_can_be_deployed(project: Write) -> None:
    source = "import mn\n@mn.function\ndef f(): ...\n"
    for name, entry in (("01-load.py", "_01_load:f"), ("random.py", "random_:f")):
        packed = app.pack_target(app.load_target(str(project(name, source))))
        assert json.loads(packed.manifest)["functions"][0]["entry"] == entry
        assert f"payloads/{entry.partition(':')[0]}.py" in packed.files


def test_imports_are_read_from_source_without_running_it() -> None:
    source = b"import a.b\nfrom . import c\nfrom ..d import e\nif x:\n    import f\ndef g():\n    import h\n"
    found = {"a.b": True, "p.q": True, "p.d": True, "f": False, "h": False}
    assert dict(imports_of(source, "p.q")) == found
    assert imports_of(b"not python at all", "p") == []


SCRIPT = """
import mn
import helper_module

class Point:
    pass

@mn.function
def shift(p):
    return p

if __name__ == "__main__":
    print(type(shift.remote(1)).__name__, list(shift.map([1, 2])))
"""


@pytest.mark.parametrize("how", ["script", "module", "prompt"])
def test_every_way_to_start_a_program_ships_what_it_needs(how: str, project: Write, tmp_path: Path) -> None:
    project("helper_module.py", "X = 1\n")
    file = project("my-script.py" if how == "script" else "my_module.py", SCRIPT)
    arguments = {"script": [str(file)], "module": ["-m", "my_module"], "prompt": ["-c", SCRIPT]}[how]
    with running() as stub:
        stub.functions["shift"] = lambda x: x
        environ = {"MN_URL": stub.url, "MN_KEY": "mnk_test", "MN_HOME": str(tmp_path), "PATH": ""}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=file.parent, env=environ, capture_output=True, text=True, timeout=60
        )
        assert (done.stdout, done.stderr) == ("int [1, 2]\n", "")
        assert stub.requests[-1][:2] == ("DELETE", f"/v1/scopes/{next(iter(stub.scopes))}")
    (spec,) = stub.bundles[0]["functions"]
    files = {name for name in stub.bundle_files[0] if name.endswith(".py")}
    if how == "prompt":
        assert spec["entry"] == "pickle:functions/shift.pickle"
    else:
        name = "my_script" if how == "script" else "my_module"
        assert (spec["entry"], spec["main"]) == (f"{name}:shift", True)
        assert files == {f"payloads/{name}.py", "payloads/helper_module.py"}


def test_an_import_of_a_script_leaves_out_its_main_part() -> None:
    source = b"""
try:
    def tried(): ...
except ImportError:
    class Other: ...
if flag and __name__ == "__main__":
    def guarded(): ...
else:
    def otherwise(): ...
def outer():
    global added
    def added(): ...
"""
    found = importable_parts(source)
    assert found.names == {"tried", "Other", "otherwise", "outer"}
    assert found.guarded == (range(7, 8),)
