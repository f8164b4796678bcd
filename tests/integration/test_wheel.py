"""The wheel: built, installed as a client alone and with what a node needs, used, and uninstalled without a trace."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.api import Api
from tests.support.runtime import Runtime
from tests.support.venvs import Venv

HERE = Path(__file__).resolve().parents[2]
OURS = {"mn", "mn_runner", "mn_nodepool", "mn_gateway"}
SQUARE = """
import mn

@mn.function
def square(x):
    return x * x

if __name__ == "__main__":
    print(square.remote(12))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what the repository tracks, so that what lies about in the work tree is not in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (HERE / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / name, source / name)
    argv = [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Iterator[Venv]:
    """The client alone is installed in it."""
    venv = Venv(tmp_path_factory.mktemp("venv"))
    venv.pip("install", str(wheel))
    yield venv
    shutil.rmtree(venv.folder)


def test_the_wheel_has_our_packages_their_data_and_no_other_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == OURS
    assert "mn_nodepool/store/scripts/commit.lua" in names
    assert [name for name in names if "test" in name or name.endswith(".pyc")] == []


@pytest.mark.timeout(600)
def test_a_client_alone_calls_a_running_runtime_and_says_what_a_node_needs(
    venv: Venv, api: Api, tmp_path: Path
) -> None:
    assert "uvicorn" not in venv.names()
    assert "Run functions on your own machines" in venv.mn("--help").stdout
    assert venv.mn("--version").stdout.startswith("mn ")
    home = str(tmp_path / "home")
    for command in ("start", "enable"):
        refused = venv.mn("runtime", command, check=False, MN_HOME=home)
        assert refused.returncode == 9
        assert "pip install 'mirrorneuron[node]'" in refused.stderr
        assert "Traceback" not in refused.stderr
    (tmp_path / "hello.py").write_text(SQUARE)
    environ = {"MN_URL": api.url, "MN_KEY": api.key, "MN_HOME": home}
    assert venv.run([venv.python, "hello.py"], cwd=tmp_path, **environ).stdout == "144\n"
    api.deploy("def greet(name):\n    return 'hello ' + name\n", "greet")
    assert venv.mn("call", "greet", '"you"', **environ).stdout == '"hello you"\n'


@pytest.mark.timeout(900)
def test_a_node_is_installed_runs_a_call_and_is_uninstalled_without_a_trace(
    venv: Venv, wheel: Path, tmp_path: Path
) -> None:
    venv.pip("install", f"{wheel}[node]")
    home = tmp_path / "home"
    environ = {"MN_HOME": str(home)}
    try:
        started = json.loads(venv.mn("runtime", "start", "--ports", "auto", "--json", **environ).stdout)
        assert started["api"].startswith("http://127.0.0.1:")
        (tmp_path / "hello.py").write_text(SQUARE)
        assert venv.run([venv.python, "hello.py"], cwd=tmp_path, **environ).stdout == "144\n"
    finally:
        venv.mn("runtime", "stop", **environ)
    assert Runtime(home).processes() == []
    venv.pip("uninstall", "--yes", "mirrorneuron")
    left = {path for path in venv.site_packages.rglob("*") if path.relative_to(venv.site_packages).parts[0] in OURS}
    assert left == set()
    assert not {name for name in venv.names() if "mirrorneuron" in name}
    assert not (venv.folder / "bin" / "mn").exists()
