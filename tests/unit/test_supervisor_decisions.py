"""What the supervisor decides without touching anything: restart delays, ports, messages, the lock's owner."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from mn.formats.errors import Conflict
from mn.formats.settings import Settings, read_config
from mn_nodepool.supervisor import home, ports
from mn_nodepool.supervisor.restart import DELAY_FIRST_S, DELAY_MAX_S, STEADY_S, next_delay_s


def test_a_child_that_keeps_crashing_is_restarted_ever_more_slowly_up_to_a_bound() -> None:
    delays = [next_delay_s(0, 0)]
    for _ in range(10):
        delays.append(next_delay_s(delays[-1], 0.05))
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == DELAY_MAX_S


def test_a_child_that_ran_well_is_restarted_quickly() -> None:
    assert next_delay_s(DELAY_MAX_S, STEADY_S) == DELAY_FIRST_S


def _resolve(wanted: dict[str, int], explicit: set[str], kept: dict[str, int], busy: set[int]) -> dict[str, int]:
    picks = iter(range(9000, 9100))
    return ports.resolve(wanted, frozenset(explicit), kept, lambda port: port not in busy, lambda: next(picks))


def test_automatic_ports_are_picked_once_and_kept() -> None:
    first = _resolve({"api_port": 0, "store_port": 0}, {"api_port", "store_port"}, {}, set())
    assert first == {"api_port": 9000, "store_port": 9001}
    assert _resolve({"api_port": 0, "store_port": 0}, {"api_port", "store_port"}, first, set()) == first


def test_a_kept_port_that_somebody_took_is_replaced() -> None:
    assert _resolve({"api_port": 0}, {"api_port"}, {"api_port": 7000}, {7000}) == {"api_port": 9000}


def test_a_start_without_flags_stays_on_the_kept_ports_and_a_flag_moves_it() -> None:
    assert _resolve({"api_port": 54001}, set(), {"api_port": 7000}, set()) == {"api_port": 7000}
    assert _resolve({"api_port": 54001}, {"api_port"}, {"api_port": 7000}, set()) == {"api_port": 54001}


def test_a_taken_port_is_told_with_its_holder_and_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        settings = Settings(home=tmp_path, store_port=port, api_port=ports.free_port())
        with pytest.raises(Conflict) as caught:
            ports.check_free(settings)
    assert f"port {port} is taken by" in str(caught.value)
    assert f"(pid {os.getpid()})" in str(caught.value)
    assert f"--store-port {port + 1}" in str(caught.value)


def test_a_redis_that_holds_the_port_is_offered_for_use() -> None:
    text = ports.taken_message("store_port", 6379, ("redis-server", 812))
    assert text.startswith("port 6379 is taken by redis-server (pid 812).")
    assert "MN_REDIS_URL=redis://127.0.0.1:6379/0 mn runtime start" in text
    assert "mn runtime start --store-port 6380" in text


def test_a_second_runtime_on_the_same_home_is_refused_with_the_setting_to_use(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    home.prepare(settings)
    (settings.run_dir / "children.json").write_text("{}")
    with (
        home.locked(settings, "host-a", False),
        pytest.raises(home.AlreadyRunning, match="--home DIR --ports auto"),
        home.locked(settings, "host-a", False),
    ):
        pass
    with home.locked(settings, "host-a", False):
        pass


def test_a_network_home_of_another_host_is_refused_even_when_the_kernel_lock_is_free(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    home.prepare(settings)
    settings.lock_file.write_text(json.dumps({"host": "host-b", "hostname": "attic", "pid": 7}))
    with pytest.raises(Conflict, match=r"used by the host attic.*MN_HOME="), home.locked(settings, "host-a", True):
        pass
    with home.locked(settings, "host-a", False):
        pass


def test_an_alias_is_made_once_and_a_given_one_is_kept(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    made = home.with_alias(settings, b"\x7f\x3a\x91\xc2rest").node_alias
    assert made == "mn-7f3a91c2"
    assert home.with_alias(settings, b"other bytes").node_alias == made
    assert home.with_alias(settings.with_(node_alias="attic"), b"other bytes").node_alias == "attic"
    assert home.with_alias(settings, b"other bytes").node_alias == "attic"


def test_the_first_key_is_written_once_for_its_owner_alone(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, api_port=5555)
    home.prepare(settings)
    settings.config_file.write_text("[runtime]\ngateways = 2\n")
    home.give_first_key(settings, bytes(range(32)))
    client = read_config(tmp_path)["client"]
    assert client["url"] == "http://127.0.0.1:5555"
    assert read_config(tmp_path)["runtime"] == {"gateways": 2}
    assert settings.config_file.stat().st_mode & 0o777 == 0o600
    waiting = json.loads((settings.run_dir / "bootstrap_key.json").read_text())
    assert waiting["name"] == "first"
    assert waiting["scopes"] == ["admin"]
    assert client["key"] not in json.dumps(waiting)

    settings.store_dir.mkdir()
    (settings.store_dir / "appendonly").write_text("")
    home.forget_first_key(settings)
    home.give_first_key(settings.with_(api_port=6666), bytes(32))
    moved = read_config(tmp_path)["client"]
    assert moved == {"url": "http://127.0.0.1:6666", "key": client["key"]}
    assert not (settings.run_dir / "bootstrap_key.json").exists()


def test_a_client_of_another_cluster_keeps_its_login(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    home.prepare(settings)
    settings.config_file.write_text('[client]\nurl = "https://elsewhere:54001"\nkey = "mnk_x"\n')
    home.give_first_key(settings, bytes(32))
    assert read_config(tmp_path)["client"] == {"url": "https://elsewhere:54001", "key": "mnk_x"}


def test_a_home_with_a_long_path_keeps_its_sockets_in_a_short_private_folder(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / ("deep" * 30))
    home.prepare(settings)
    try:
        assert len(str(settings.run_dir / "gateway-16.sock")) < 107
        assert settings.run_dir.stat().st_mode & 0o777 == 0o700
        assert settings.lock_file.is_relative_to(settings.home)
    finally:
        settings.run_dir.rmdir()
