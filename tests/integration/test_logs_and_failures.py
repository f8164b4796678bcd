"""What remains of a call: its output, its failure with the input that caused it, and the counts that tell whose fault it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.api import Api, python
from tests.support.runtime import MN, Runtime, until

CODE = """
import os, sys

def chatty(lines):
    for number in range(lines):
        print(f"line {number:05}")
    sys.stderr.write("last words")
    raise RuntimeError("after many lines")

def speak(text):
    print(text)
    return text

def fail(text):
    print("about to fail over", text)
    return int(text)

def die(how):
    print("dying of", how)
    sys.stdout.flush()
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), 9)
"""


def test_a_failed_calls_problem_has_the_end_of_its_output(api: Api) -> None:
    api.deploy(CODE, "chatty")
    problem = api.invoke("chatty", {"lines": 2000}).json()
    assert problem["status"] == 500
    assert problem["output"].endswith("line 01999\nlast words")
    assert len(problem["output"]) == 4096
    assert problem["exception"]["message"] == "after many lines"


@pytest.mark.parametrize(("how", "cause"), [("exit", "3"), ("signal", "9|SIGKILL|killed")])
def test_a_sandbox_that_died_is_told_with_its_cause(api: Api, how: str, cause: str) -> None:
    api.deploy(CODE, "die")
    answer = api.invoke("die", {"how": how})
    problem = answer.json()
    assert (answer.status_code, problem["type"]) == (502, "/problems/sandbox-lost")
    assert problem["may_have_run"] is True
    assert re.search(cause, problem["detail"])
    assert api.invoke("die", {"how": how}).status_code == 502


def test_logs_of_a_function_and_of_one_call_and_as_they_come(runtime: Runtime, api: Api) -> None:
    api.deploy(CODE, "speak")
    one = api.invoke("speak", {"text": "alpha"}).headers["mn-invocation-id"]
    api.result("speak", {"text": "beta"})
    api.printed("beta", "speak")
    assert "alpha" in runtime.mn("logs", "speak").stdout
    assert "beta" in runtime.mn("logs", "speak").stdout
    until(lambda: "alpha" in runtime.mn("logs", one).stdout, "the call's own lines")
    assert "beta" not in runtime.mn("logs", one).stdout
    argv = [*MN, "logs", "speak", "-f"]
    with subprocess.Popen(argv, env=runtime.environ, stdout=subprocess.PIPE, text=True) as following:
        assert following.stdout is not None
        lines = iter(following.stdout.readline, "")
        assert any("beta" in line for line in lines)
        api.result("speak", {"text": "gamma"})
        assert any("gamma" in line for line in lines)
        following.terminate()


def test_debug_replays_the_failure_without_a_frame_of_ours(runtime: Runtime, api: Api) -> None:
    api.deploy(CODE, "fail")
    invocation = api.invoke("fail", {"text": "twelve"}).json()["instance"]
    replay = runtime.mn("debug", invocation, "--no-pdb", check=False)
    assert replay.returncode == 1
    assert replay.stdout == "about to fail over twelve\n"
    assert replay.stderr.endswith("ValueError: invalid literal for int() with base 10: 'twelve'\n")
    assert "return int(text)" in replay.stderr
    assert "/cli/" not in replay.stderr
    assert re.search(r"fail v\d+ of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", replay.stderr)


def test_debug_stops_in_the_debugger_where_it_was_raised(runtime: Runtime, api: Api) -> None:
    api.deploy(CODE, "fail")
    invocation = api.invoke("fail", {"text": "twelve"}).json()["instance"]
    stepped = runtime.mn("debug", invocation, check=False, input="p 'the text is ' + text\nq\n")
    assert "the text is twelve" in stepped.stdout


def test_a_call_of_a_process_that_has_ended_can_be_debugged(runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "pipeline.py").write_text("""
import mn
from dataclasses import dataclass

@dataclass
class Document:
    head: str

@mn.function
def parse(document):
    raise ValueError(f"not a PDF: {document.head}")

if __name__ == "__main__":
    parse.remote(Document("GIF"))
""")
    ended = python(runtime, "pipeline.py", cwd=tmp_path)
    found = re.search(r"mn debug (inv_\w+)", ended.stderr)
    assert found is not None, ended.stderr
    until(lambda: runtime.json("function", "list")["functions"] == [], "the end of the ephemeral function")
    (tmp_path / "pipeline.py").unlink()
    replay = runtime.mn("debug", found[1], "--no-pdb", check=False)
    assert replay.stderr.endswith("ValueError: not a PDF: GIF\n")
    assert "~" not in replay.stderr


def test_a_failed_item_of_a_map_can_be_debugged(runtime: Runtime, api: Api) -> None:
    api.deploy(CODE, "fail")
    answer = api.http.post("/v1/functions/fail/map", content=b'"1"\n"x"\n')
    invocation = f"{answer.headers['mn-invocation-id']}.1"
    replay = runtime.mn("debug", invocation, "--no-pdb", check=False)
    assert "invalid literal for int() with base 10: 'x'" in replay.stderr


def test_an_unknown_failure_is_told(runtime: Runtime) -> None:
    done = runtime.mn("debug", "inv_00000000000000000000000000", check=False)
    assert done.returncode == 4
    assert "no failure of inv_0000" in done.stderr


def test_calls_that_run_when_the_node_is_killed_are_answered_and_nothing_of_them_stays(tmp_path: Path) -> None:
    with Runtime(tmp_path / "home") as runtime:
        runtime.start()
        with Api(runtime) as api:
            api.deploy("import time\ndef work(seconds):\n    time.sleep(seconds)\n    return 'done'\n", "work")
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(api.invoke, "work", {"seconds": 600})
                until(lambda: any(it["busy"] for it in api.sandboxes("work")), "a call that runs")
                [sandbox] = api.sandboxes("work")
                os.kill(runtime.children()["node"]["pid"], signal.SIGKILL)
                answer = running.result()
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.status_code in (502, 503)
            until(lambda: runtime.mn("runtime", "health", check=False).returncode == 0, "a healthy runtime")
            assert api.result("work", {"seconds": 0}) == "done"
            until(lambda: not psutil.pid_exists(sandbox["pid"]), "the end of the old sandbox")
            assert not (runtime.home / "run" / "sandboxes" / sandbox["sandbox"]).exists()


def test_the_users_exceptions_count_apart_from_the_platforms_failures(api: Api) -> None:
    api.deploy(CODE.replace("def fail", "def counted").replace("def die", "def lost"), "counted", "lost")
    for _ in range(2):
        assert api.invoke("counted", {"text": "x"}).status_code == 500
    assert api.result("counted", {"text": "5"}) == 5
    assert api.invoke("lost", {"how": "exit"}).status_code == 502
    assert api.metric("mn_function_errors_total", function="counted") == 2
    assert api.metric("mn_platform_errors_total", function="counted") == 0
    assert api.metric("mn_function_errors_total", function="lost") == 0
    assert api.metric("mn_platform_errors_total", function="lost", problem="sandbox-lost") == 1
    assert api.metric("mn_invocations_total", function="counted", outcome="ok") == 1
