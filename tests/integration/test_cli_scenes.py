"""The command line's scenes on one machine: deploy, run, call, logs, debug, serve, versions, bundles, keys, nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runtime import MN, Runtime, until

HELLO = '''
import mn

@mn.function(cpu=1, memory="256MiB", timeout=30)
def square(x: int) -> int:
    """The square of a number."""
    print("squaring", x)
    return x * x

@mn.function()
def parse(head: str) -> str:
    raise ValueError(f"not a PDF: {head!r}")

@mn.function()
def countdown(start: int):
    yield from range(start, 0, -1)
'''


@pytest.fixture
def hello(tmp_path: Path) -> Path:
    file = tmp_path / "hello.py"
    file.write_text(HELLO)
    return file


@pytest.fixture
def deployed(runtime: Runtime, hello: Path) -> Iterator[Path]:
    runtime.mn("deploy", str(hello), "--replace")
    yield hello
    for name in ("square", "parse", "countdown"):
        runtime.mn("function", "delete", name, "--yes", check=False)


def test_run_takes_arguments_from_the_signature(runtime: Runtime, hello: Path) -> None:
    assert runtime.mn("run", f"{hello}::square", "--x", "12").stdout.strip() == "144"
    told = runtime.mn("run", f"{hello}::square", "--help").stdout
    assert "--x X" in told
    assert "The square of a number." in told
    wrong = runtime.mn("run", f"{hello}::square", "--x", "many", check=False)
    assert wrong.returncode == 2
    assert "invalid int value" in wrong.stderr
    assert runtime.json("function", "list")["functions"] == []


def test_run_streams_a_generator(runtime: Runtime, hello: Path) -> None:
    assert runtime.mn("run", f"{hello}::countdown", "--start", "3").stdout.split() == ["3", "2", "1"]


def test_run_shows_the_functions_own_exception(runtime: Runtime, hello: Path) -> None:
    done = runtime.mn("run", f"{hello}::parse", "--head", "GIF", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ValueError: not a PDF: 'GIF'")
    assert "mn debug inv_" in done.stderr


def test_a_file_that_cannot_be_imported_is_told_with_its_own_line(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import mn\n\nlimit = 1 / 0\n")
    done = runtime.mn("deploy", str(tmp_path / "broken.py"), check=False)
    assert done.returncode == 2
    assert "can't be imported: ZeroDivisionError" in done.stderr
    assert "limit = 1 / 0" in done.stderr
    assert "importlib" not in done.stderr


def test_deploy_then_call(runtime: Runtime, deployed: Path) -> None:
    assert runtime.mn("call", "square", '{"x": 12}').stdout.strip() == "144"
    again = runtime.mn("deploy", str(deployed)).stdout
    assert re.search(r"square +v1 .*unchanged", again)
    listed = {it["name"]: it["version"] for it in runtime.json("function", "list")["functions"]}
    assert listed["square"] == 1
    missing = runtime.mn("call", "sqare", "{}", check=False)
    assert missing.returncode == 4
    assert "square" in missing.stderr


def test_logs_of_a_function_and_of_one_call(runtime: Runtime, deployed: Path) -> None:
    runtime.mn("call", "square", '{"x": 31}')
    runtime.mn("call", "square", '{"x": 32}')
    lines = until(
        lambda: (
            [line for line in runtime.mn("logs", "square").stdout.splitlines() if "squaring 3" in line][1:]
            and runtime.mn("logs", "square", "--json").stdout.splitlines()
        ),
        "two lines in the log",
    )
    records = [json.loads(line) for line in lines]
    one = next(it for it in records if it["m"].strip() == "squaring 32")
    assert "squaring 31" not in runtime.mn("logs", one["i"]).stdout
    assert "squaring 32" in runtime.mn("logs", one["i"]).stdout


def test_debug_replays_a_failed_call_with_the_same_code_and_input(runtime: Runtime, deployed: Path) -> None:
    failed = runtime.mn("call", "parse", '{"head": "GIF"}', check=False)
    assert failed.returncode == 1
    found = re.search(r"inv_[0-9A-Z]+", failed.stderr)
    assert found is not None
    replay = runtime.mn("debug", found.group(), "--no-pdb", check=False)
    assert replay.returncode != 0
    assert "ValueError: not a PDF: 'GIF'" in replay.stderr
    stepped = runtime.mn("debug", found.group(), check=False, input="p head\nq\n")
    assert "'GIF'" in stepped.stdout
    assert list(Path(os.environ.get("TMPDIR", "/tmp")).glob("mn-debug-*")) == []


def test_versions_and_rollback(runtime: Runtime, deployed: Path) -> None:
    deployed.write_text(HELLO.replace("return x * x", "return -x * x"))
    runtime.mn("deploy", str(deployed))
    assert runtime.mn("call", "square", '{"x": 2}').stdout.strip() == "-4"
    assert runtime.mn("function", "rollback", "square").stdout.strip() == "square is v1 again"
    assert runtime.mn("call", "square", '{"x": 2}').stdout.strip() == "4"
    assert "live" in runtime.mn("function", "show", "square").stdout


def test_serve_redeploys_on_save_and_removes_itself(runtime: Runtime, hello: Path) -> None:
    argv = [*MN, "serve", f"{hello}::square"]
    with subprocess.Popen(argv, env=runtime.environ, stdout=subprocess.PIPE, text=True) as process:
        until(lambda: runtime.mn("call", "square", '{"x": 3}', check=False).stdout.strip() == "9", "the first version")
        hello.write_text(HELLO.replace("return x * x", "return x + 1000"))
        until(lambda: runtime.mn("call", "square", '{"x": 3}', check=False).stdout.strip() == "1003", "the saved one")
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert "squaring 3" in said
    assert "removed square" in said
    assert runtime.mn("call", "square", "{}", check=False).returncode == 4


def test_serve_tells_what_is_wrong_waits_for_a_save_and_cleans_up_when_terminated(
    runtime: Runtime, hello: Path, tmp_path: Path
) -> None:
    missing = runtime.mn("serve", str(tmp_path / "none.py"), check=False)
    assert missing.returncode == 4
    assert "there is no file" in missing.stderr
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n")
    with subprocess.Popen(
        [*MN, "serve", str(broken)], env=runtime.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = ""
        while "waiting for a save" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "SyntaxError" in said

        def saved() -> bool:
            broken.write_text(HELLO)  # again and again, since the watch may begin after the first
            return runtime.mn("call", "square", '{"x": 3}', check=False).returncode == 0

        until(saved, "the mended file")
        process.send_signal(signal.SIGTERM)
        assert "removed" in process.communicate(timeout=60)[0]
        assert process.returncode == 0
    assert runtime.mn("call", "square", "{}", check=False).returncode == 4


def test_debug_of_code_that_ends_its_process_leaves_no_folder(runtime: Runtime, tmp_path: Path) -> None:
    file = tmp_path / "abrupt.py"
    file.write_text("import os\nimport mn\n\n@mn.function()\ndef abrupt():\n    os._exit(3)\n")
    runtime.mn("deploy", str(file))
    failed = runtime.mn("call", "abrupt", check=False)
    found = re.search(r"inv_[0-9A-Z]+", failed.stderr)
    assert found is not None, failed.stderr
    assert runtime.mn("debug", found.group(), "--no-pdb", check=False).returncode == 3
    assert list(Path(os.environ.get("TMPDIR", "/tmp")).glob("mn-debug-*")) == []
    runtime.mn("function", "delete", "abrupt", "--yes")


def test_a_generator_that_fails_prints_what_came_and_ends_as_a_failure(runtime: Runtime, tmp_path: Path) -> None:
    file = tmp_path / "leaky.py"
    file.write_text("import mn\n\n@mn.function()\ndef leaky():\n    yield 1\n    raise ValueError('dry')\n")
    runtime.mn("deploy", str(file))
    done = runtime.mn("call", "leaky", check=False)
    assert (done.returncode, done.stdout) == (1, "1\n")
    assert done.stderr.startswith("error: ValueError: dry")
    told = runtime.mn("call", "leaky", "--json", check=False)
    assert told.returncode == 1
    assert json.loads(told.stdout)["error"]["slug"] == "function-error"
    once = runtime.mn("call", "leeky", check=False).stderr
    assert once.count("did you mean") == 1
    assert "inv_" not in once
    runtime.mn("function", "delete", "leaky", "--yes")


def test_a_key_that_only_invokes_can_log_in(runtime: Runtime, tmp_path: Path) -> None:
    made = runtime.json("key", "create", "--name", "caller", "--scope", "invoke")
    environ = {**runtime.environ, "MN_HOME": str(tmp_path / "caller")}
    argv = [*MN, "login", runtime.endpoints["api"], "--key", made["key"]]
    until(lambda: subprocess.run(argv, env=environ, capture_output=True, check=False).returncode == 0, "a login")
    runtime.mn("key", "revoke", made["id"])


def test_a_bundle_is_packed_validated_and_pushed(runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "thumbnail"
    (folder / "payloads").mkdir(parents=True)
    (folder / "manifest.json").write_text('{"manifest_version": "1", "name": "thumbnail", "entry": "thumb:make"}')
    refused = runtime.mn("bundle", "validate", str(folder), check=False)
    assert refused.returncode == 2
    assert "payloads/thumb.py" in refused.stderr
    (folder / "payloads" / "thumb.py").write_text("def make(url):\n    return 'small ' + url\n")
    assert runtime.json("bundle", "validate", str(folder))["functions"] == ["thumbnail"]
    archive = tmp_path / "thumb.tgz"
    packed = runtime.json("bundle", "pack", str(folder), "-o", str(archive))
    assert tarfile.is_tarfile(archive)
    pushed = runtime.json("bundle", "push", str(archive), "--deploy")
    assert pushed["digest"] == packed["digest"]
    assert runtime.mn("call", "thumbnail", '{"url": "x"}').stdout.strip() == '"small x"'
    assert packed["digest"] in {it["digest"] for it in runtime.json("bundle", "list")["bundles"]}
    runtime.mn("function", "delete", "thumbnail", "--yes")


def test_a_key_does_what_its_scope_says_until_it_is_revoked(runtime: Runtime, deployed: Path) -> None:
    made = runtime.json("key", "create", "--name", "ci", "--scope", "invoke", "--expires", "90d")
    as_ci = {**runtime.environ, "MN_KEY": made["key"]}

    def ci(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MN, *arguments], env=as_ci, capture_output=True, text=True, check=False)

    assert until(lambda: ci("call", "square", '{"x": 2}').stdout.strip() == "4", "a known key")
    refused = ci("deploy", str(deployed))
    assert refused.returncode == 3
    assert "deploy" in refused.stderr
    assert made["id"] in runtime.mn("key", "list").stdout
    assert made["key"] not in runtime.mn("key", "list", "--json").stdout
    runtime.mn("key", "revoke", made["id"])
    until(lambda: ci("call", "square", '{"x": 2}').returncode == 3, "a refused key")


def test_what_one_owner_deployed_is_not_anothers_to_replace_or_delete(runtime: Runtime, deployed: Path) -> None:
    made = runtime.json("key", "create", "--name", "guest", "--scope", "deploy", "--scope", "invoke")
    as_guest = {**runtime.environ, "MN_KEY": made["key"]}

    def guest(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MN, *arguments], env=as_guest, capture_output=True, text=True, check=False)

    until(lambda: guest("call", "square", '{"x": 2}').returncode == 0, "a known key")
    refused = guest("deploy", f"{deployed}::square")
    assert refused.returncode == 5
    assert "belongs to admin" in refused.stderr
    assert "--replace" in refused.stderr
    assert guest("function", "delete", "parse", "--yes").returncode == 3
    assert guest("deploy", f"{deployed}::square", "--replace").returncode == 0
    assert guest("call", "square", '{"x": 3}').stdout.strip() == "9"
    runtime.mn("key", "revoke", made["id"])


def test_node_list_has_nodes_and_executor_pools(runtime: Runtime) -> None:
    found = runtime.json("node", "list")
    assert [node["role"] for node in found["nodes"]] == ["leader"]
    assert [pool["pool"] for pool in found["executor_pools"]] == ["default"]
    told = runtime.mn("node", "list").stdout
    assert "NODE" in told
    assert "executor_pools" in told
    alias = found["nodes"][0]["name"].partition("@")[2]
    assert "driver" in runtime.mn("node", "show", alias).stdout
    assert runtime.mn("node", "show", "nobody", check=False).returncode == 4


def test_login_checks_the_key_and_keeps_a_context(runtime: Runtime, tmp_path: Path) -> None:
    made = runtime.json("key", "create", "--name", "laptop", "--scope", "read")
    laptop = {**runtime.environ, "MN_HOME": str(tmp_path / "laptop")}

    def mn(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MN, *arguments], env=laptop, capture_output=True, text=True, check=False)

    api = runtime.endpoints["api"]
    refused = mn("login", api, "--key", made["key"][:-1] + ("0" if made["key"][-1] != "0" else "1"))
    assert refused.returncode == 2
    assert mn("node", "list").returncode == 9
    until(lambda: mn("login", api, "--key", made["key"]).returncode == 0, "a login")
    assert mn("node", "list").returncode == 0
    assert (tmp_path / "laptop" / "config.toml").stat().st_mode & 0o777 == 0o600
