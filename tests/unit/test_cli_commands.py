"""The command line as its users meet it: errors, exit codes, speed of import, what is printed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mn.cli import calls, units
from mn.cli.main import run
from mn.cli.nodes import tables
from mn.cli.output import describe
from mn.formats.errors import Conflict, FunctionFailed, InvalidRequest, Unavailable
from mn.formats.settings import Settings


@pytest.fixture(autouse=True)
def no_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("MN_URL", "MN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MN_HOME", str(tmp_path / "home"))


def test_help_loads_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from mn.cli.main import run; run(['--version']);"
        "print([m for m in ('httpx', 'msgspec', 'grpc', 'cloudpickle', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["nope"], 2, "error: No such command 'nope'"),
        (["key", "create", "--name", "x", "--scope", "all"], 2, "'all' is not one of invoke, deploy, read, admin"),
        (["runtime", "start", "--worker-node"], 2, "comes with clusters"),
        (["runtime", "start", "--ports", "some"], 2, "'some' is not `auto`"),
        (["runtime", "start", "--driver", "magic"], 2, "'magic' is not one of bubblewrap, host_local"),
        (["runtime", "start", "--gateways", "0"], 2, "not between 1 and 64"),
        (["runtime", "health"], 9, "mn runtime start"),
        (["call", "square", "{"], 2, "not JSON"),
        (["call", "square", "@/nonexistent.json"], 2, "/nonexistent.json: No such file"),
        (["deploy", "/"], 2, "/ is a folder: give one of its files"),
        (
            ["key", "create", "--name", "x", "--scope", "read", "--expires", "0d"],
            2,
            "--expires: 0d is no time from now",
        ),
        (["logs", "square", "-n", "-1"], 2, "'--limit' / '-n'"),
        (["login", "somewhere", "--key", "x"], 2, "no address of an API"),
        (["login", "http://127.0.0.1:1", "--key", "mnk_x"], 2, "cut or misspelt"),
        (["bundle", "validate", "/nonexistent"], 4, "there is no /nonexistent"),
        (["node", "list"], 9, "mn runtime start"),
    ],
)
def test_errors_are_told_on_stderr_with_an_exit_code_of_their_kind(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, told: str
) -> None:
    assert run(arguments) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert told in said.err
    assert said.out == ""


@pytest.mark.parametrize("command", [["runtime", "status"], ["runtime", "stop"], ["runtime", "start"], ["call", "f"]])
def test_a_home_that_is_a_file_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "home").write_text("")
    assert run(command) == 2
    assert f"{tmp_path}/home" in capsys.readouterr().err


def test_an_unknown_setting_in_the_configuration_is_refused_with_near_names(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "config.toml").write_text("[runtime]\ngatways = 2\n")
    assert run(["runtime", "status"]) == 2
    assert "'gatways'; did you mean gateways?" in capsys.readouterr().err


def test_mn_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    said = capsys.readouterr()
    assert "Run functions on your own machines." in said.out
    assert said.err == ""


def test_with_json_an_error_is_a_document_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["call", "square", "{", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["slug"] == "invalid-json"
    assert said.err.startswith("error: ")


def test_an_error_shows_its_field_once_and_what_to_do() -> None:
    assert describe(InvalidRequest("Expected float, got str", path="resources.cpu")).startswith("resources.cpu: Exp")
    assert describe(InvalidRequest("driver: no such", path="driver")) == "driver: no such"
    assert describe(Conflict("f belongs to ann", owner="ann")).endswith("--replace")


def test_a_generator_that_fails_shows_what_came_before_and_raises(capsys: pytest.CaptureFixture[str]) -> None:
    problem = {"type": "/problems/function-error", "exception": {"type": "ValueError", "message": "enough"}}
    lines = [{"index": 0, "value": 7}, {"index": 1, "error": problem}, {"end": 1}]
    with pytest.raises(FunctionFailed, match="ValueError: enough"):
        calls._print_values("f", "\n".join(map(json.dumps, lines)).encode(), as_json=False)
    assert capsys.readouterr().out == "7\n"


def test_a_generator_as_json_is_one_list_and_a_cut_one_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    calls._print_values("f", b'{"index":0,"value":1}\n{"index":1,"base64":"YQ=="}\n{"end":2}\n', as_json=True)
    assert json.loads(capsys.readouterr().out) == [1, "YQ=="]
    with pytest.raises(Unavailable, match="cut off"):
        calls._print_values("f", b'{"index":0,"value":1}\n', as_json=True)


def test_status_of_what_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runtime", "status"]) == 9
    assert "start it: mn runtime start" in capsys.readouterr().out
    assert run(["runtime", "status", "--json"]) == 9
    assert '"running": false' in capsys.readouterr().out


def test_stop_and_reset_of_nothing_are_fine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runtime", "stop"]) == 0
    assert run(["runtime", "reset"]) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_enable_without_systemd_says_what_to_run_instead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(units, "SYSTEMD", tmp_path / "absent")
    assert run(["runtime", "enable"]) == 9
    assert "mn runtime start --foreground" in capsys.readouterr().err


def test_a_unit_carries_the_settings_but_no_key() -> None:
    settings = Settings(home=Path("/srv/a home"))
    text = units.unit_text(settings, "/opt/py thon", True, {"MN_KEY": "mnk_secret", "MN_GATEWAYS": "2", "PATH": "/bin"})
    assert 'ExecStart="/opt/py thon" -P -m mn_nodepool.supervisor' in text
    assert 'Environment="MN_HOME=/srv/a home"' in text
    assert 'Environment="MN_GATEWAYS=2"' in text
    assert "secret" not in text
    assert "WantedBy=multi-user.target" in text


def test_units_of_two_homes_do_not_collide() -> None:
    usual = Path("/home/a/.mn")
    assert units.unit_name(usual, usual) == "mirrorneuron.service"
    assert units.unit_name(Path("/srv/x"), usual) != units.unit_name(Path("/srv/y"), usual)


def test_nodes_and_executor_pools_are_shown_as_two_tables() -> None:
    amounts = {"cpu": 8.0, "cpu_used": 2.0, "memory_mb": 31744, "memory_used_mb": 3174, "gpus": 1, "gpus_used": 0}
    node = {
        **amounts, "name": "mirror_neuron@mn-7f3a91c2", "status": "healthy", "eligible": True, "role": "leader",
        "address": "", "slots": 24, "slots_busy": 3,
    }  # fmt: skip
    pool = {**amounts, "pool": "default", "nodes": 1, "slots": 24, "slots_busy": 3}
    lines = tables({"nodes": [node], "executor_pools": [pool]}).splitlines()
    assert lines[0].split() == ["NODE", "STATUS", "ELIGIBLE", "ROLE", "CPU", "MEMORY", "GPU", "SLOTS", "ADDRESS"]
    assert lines[1].split()[:4] == ["mirror_neuron@mn-7f3a91c2", "healthy", "yes", "leader"]
    assert "2.0 / 8" in lines[1]
    assert "3.1 / 31 GiB" in lines[1]
    assert lines[2] == "executor_pools"
    assert lines[4].startswith("default")


def test_a_client_alone_is_told_how_to_become_a_node(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert run(["runtime", "start"]) == 9
    assert "pip install 'mirrorneuron[node]'" in capsys.readouterr().err
