"""Which runtime the SDK and the CLI talk to, and how `config.toml` is kept."""

from __future__ import annotations

import json
import stat
import tomllib
from pathlib import Path

import pytest

from mn.client import Client
from mn.config import Context, contexts, current_context, save_context, use_context, write_table
from mn.formats.errors import InvalidRequest, NotFound, Unauthenticated, Unavailable
from tests.support.stub_gateway import running


def context_in(home: Path, **environ: str) -> Context:
    return current_context({"MN_HOME": str(home), **environ})


def test_the_environment_goes_before_the_configuration(tmp_path: Path) -> None:
    write_table(tmp_path, "client", {"url": "http://127.0.0.1:1/", "key": "mnk_file"})
    assert context_in(tmp_path) == Context("http://127.0.0.1:1", "mnk_file")
    assert context_in(tmp_path, MN_URL="http://h:2", MN_KEY="mnk_env") == Context("http://h:2", "mnk_env")


def test_a_runtime_that_this_home_started_is_found(tmp_path: Path) -> None:
    write_table(tmp_path, "client", {"key": "mnk_file"})
    (tmp_path / "run").mkdir()
    (tmp_path / "run/endpoints.json").write_text(json.dumps({"api": "http://127.0.0.1:54321"}))
    assert context_in(tmp_path) == Context("http://127.0.0.1:54321", "mnk_file")


def test_no_runtime_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"mn runtime start.*mn login"):
        context_in(tmp_path)
    with pytest.raises(InvalidRequest, match="write http"):
        context_in(tmp_path, MN_URL="127.0.0.1:54001")
    (tmp_path / "config.toml").write_text("= nonsense")
    with pytest.raises(InvalidRequest, match=r"config\.toml is not valid TOML"):
        context_in(tmp_path)


def test_named_contexts_are_kept_and_chosen(tmp_path: Path) -> None:
    write_table(tmp_path, "client", {"url": "http://here:1", "key": "mnk_here"})
    save_context(tmp_path, Context("https://lab:54001", "mnk_lab", "/ca.pem", "lab"))
    assert context_in(tmp_path) == Context("https://lab:54001", "mnk_lab", "/ca.pem", "lab")
    save_context(tmp_path, Context("https://home:54001", "mnk_home", None, "home"), use=False)
    assert context_in(tmp_path).name == "lab"
    assert context_in(tmp_path, MN_CONTEXT="home").key == "mnk_home"
    assert set(contexts({"MN_HOME": str(tmp_path)})) == {"lab", "home"}
    use_context(tmp_path, "")
    assert context_in(tmp_path).url == "http://here:1"
    with pytest.raises(NotFound, match=r"no context 'nope' \(known: home, lab\)"):
        context_in(tmp_path, MN_CONTEXT="nope")
    with pytest.raises(InvalidRequest, match="no context name"):
        save_context(tmp_path, Context("http://x", "", None, "a b"))


def test_writing_one_table_leaves_the_rest_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        '# mine\n[runtime]\ngateways = 2 # two\n\n[client]\nurl = "old"\n\n[contexts.a]\nurl = "http://a"\n'
    )
    write_table(tmp_path, "client", {"url": 'http://"quoted"\\é', "key": None})
    text = path.read_text()
    assert text.startswith("# mine\n[runtime]\ngateways = 2 # two\n")
    read = tomllib.loads(text)
    assert read["client"] == {"url": 'http://"quoted"\\é'}
    assert read["contexts"] == {"a": {"url": "http://a"}}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in tmp_path.iterdir()] == ["config.toml"]


def test_a_context_does_not_show_its_key() -> None:
    assert "mnk_secret" not in repr(Context("http://h", "mnk_secret"))


def test_the_client_tells_problems_as_errors() -> None:
    with running() as stub:
        stub.functions["square"] = abs
        with Client(stub.url, "mnk_test") as client:
            assert client.functions() == [{"name": "square"}]
            with pytest.raises(NotFound, match="no function squar") as missing:
                client.function("squar")
            assert missing.value.near == ["square"] and "did you mean square?" in missing.value.__notes__[0]
        with Client(stub.url, "mnk_wrong") as client, pytest.raises(Unauthenticated):
            client.functions()
