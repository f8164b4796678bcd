"""What the benchmarks make of their readings: ratios, checks, wrk's figures, the store's counters, memory."""

from __future__ import annotations

import json

import pytest

from loadtest import cold, commands, footprint, machine, profiling, report, warm, wrk
from loadtest.commands import Window
from loadtest.scratch import Failed


def test_a_check_at_its_bound_is_kept_and_one_beyond_is_missed() -> None:
    kept = report.Report()
    kept.check("throughput", 0.45, ">=", 0.45)
    kept.check("p50", 4.5, "<=", 4.5)
    kept.check("errors", 0, "==", 0)
    assert kept.exit_code == 0
    for value, relation, bound in ((0.44999, ">=", 0.45), (4.50001, "<=", 4.5), (1, "==", 0)):
        missed = report.Report()
        missed.check("it", value, relation, bound)
        assert missed.exit_code == 1, "a value is compared before it is rounded for print"


def test_the_report_is_one_json_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    it = report.Report({"per_s": [1234.5678]})
    it.check("p50 / floor", 5.0, "<=", 4.5)
    report.print_report(it, {"cores": 2})
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "machine": {"cores": 2},
        "figures": {"per_s": [1235.0]},
        "checks": [{"name": "p50 / floor", "value": 5.0, "bound": "<= 4.5", "ok": False}],
    }
    assert "MISSED" in printed.err


def test_a_ratio_is_of_neighbours_so_that_a_slow_moment_of_the_machine_does_not_count() -> None:
    quiet, slowed = [100.0, 100.0, 100.0], [100.0, 10.0, 100.0]
    assert report.paired([50, 5, 50], slowed) == 0.5
    assert report.paired([50, 5, 50], quiet) == 0.5


def test_wrk_gets_any_body_and_its_figures_come_back() -> None:
    assert '"\\123\\034\\000\\255"' in wrk.script("mnk_x", b'{"\x00\xff'), "each byte is written by its number"
    printed = (
        "Running 1s test\n"
        + wrk.MARK
        + (
            '{"requests": 1000, "duration_us": 2000000, "p50_us": 90, "p90_us": 100, "p99_us": 200, "max_us": 900, '
            '"connect": 1, "read": 2, "write": 3, "status": 4, "timeout": 5}\n'
        )
    )
    load = wrk.parse(printed)
    assert (load.per_s, load.p50_us, load.errors) == (500.0, 90, 15)
    with pytest.raises(Failed, match="unable to connect"):
        wrk.parse("unable to connect to 127.0.0.1")


def test_a_missing_wrk_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Failed, match="apt-get install -y wrk"):
        wrk.find()
    with pytest.raises(Failed, match="pip install py-spy"):
        profiling.find()


def test_the_payload_has_its_size_and_is_json() -> None:
    assert len(warm.payload()) == warm.PAYLOAD_BYTES
    assert set(json.loads(warm.payload())) == {"text"}


def test_renewals_by_the_clock_are_nobodys_and_what_calls_send_is_found() -> None:
    idle = Window({"evalsha": 8, "get": 8}, 10.0)
    assert commands.caused(idle, Window({"evalsha": 81, "get": 82}, 100.0), 1.25) == {}
    assert commands.caused(idle, Window({"evalsha": 8, "get": 8, "xadd": 1}, 10.0), 1.25) == {"xadd": 1}
    assert commands.caused(idle, Window({"evalsha": 508, "get": 8}, 10.0), 1.25)["evalsha"] > 490


def test_a_reading_does_not_count_itself() -> None:
    assert commands.between({"info": 4, "get": 2}, {"info": 5, "get": 2}) == {}


def test_server_timing_is_read_by_name() -> None:
    header = "queue;dur=5.999, start;dur=0.000, run;dur=0.046, total;dur=6.499"
    assert cold.phases_of(header) == {"queue": 5.999, "start": 0.0, "run": 0.046, "total": 6.499}


def test_memory_is_the_proportional_part() -> None:
    rollup = "55d0-7fff ---p 00000000 00:00 0 [rollup]\nRss: 9000 kB\nPss: 4000 kB\nPrivate_Clean: 1000 kB\nPrivate_Dirty: 2000 kB\n"
    assert footprint.parse(rollup) == (4000 * 1024, 3000 * 1024)


def test_functions_are_ranked_by_their_own_samples() -> None:
    table = profiling.shares(["loop;read 60", "loop;call;work 30", "loop 10"])
    assert [(share.function, share.own) for share in table[:2]] == [("read", 0.6), ("work", 0.3)]
    assert {share.function: share.below for share in table}["loop"] == 1.0


def test_the_machine_is_described() -> None:
    facts = machine.facts()
    assert facts["cores"] >= 1
    assert facts["memory_mb"] > 0
    json.dumps(facts)
