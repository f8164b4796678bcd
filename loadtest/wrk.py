"""HTTP load by wrk: one script for floor and system alike, figures as JSON from wrk's own counters."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.scratch import Failed

MARK = "wrk-figures "
TIMEOUT_S = 30
"""After this an answer counts as missing."""
ENDING_S = 60.0
SCRIPT = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer %(key)s"
wrk.body = %(body)s
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format(
    '%(mark)s{"requests": %%d, "duration_us": %%d, "p50_us": %%d, "p90_us": %%d, "p99_us": %%d, "max_us": %%d, ' ..
    '"connect": %%d, "read": %%d, "write": %%d, "status": %%d, "timeout": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max,
    e.connect, e.read, e.write, e.status, e.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """One run of wrk."""

    requests: int
    """Answers that came."""
    seconds: float
    p50_us: int
    p90_us: int
    p99_us: int
    max_us: int
    errors: int
    """Answers with status 400 and above, and connections that failed, broke or timed out."""

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


def find() -> str:
    """The program. Raises Failed with the line that installs it."""
    found = shutil.which("wrk")
    if found is None:
        raise Failed("wrk is not on PATH. Install it:  sudo apt-get install -y wrk")
    return found


def script(key: str, body: bytes) -> str:
    """The lua script: every request is the same."""
    return SCRIPT % {"key": key, "body": _lua(body), "mark": MARK}


def _lua(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03d}" for byte in data) + '"'


def parse(output: str) -> Load:
    """Figures from what wrk printed. Raises Failed when they are not there."""
    for line in output.splitlines():
        if line.startswith(MARK):
            told: dict[str, Any] = json.loads(line.removeprefix(MARK))
            errors = sum(told[kind] for kind in ("connect", "read", "write", "status", "timeout"))
            latencies = {name: told[name] for name in ("p50_us", "p90_us", "p99_us", "max_us")}
            return Load(told["requests"], told["duration_us"] / 1e6, errors=errors, **latencies)
    raise Failed(f"wrk printed no figures: {output.strip()[-500:]}")


class Wrk:
    """wrk with one script. Leaving the context removes the script."""

    def __init__(self, key: str, body: bytes) -> None:
        self._program = find()
        self._folder = tempfile.TemporaryDirectory(prefix="mn-loadtest-wrk-")
        self._script = Path(self._folder.name) / "post.lua"
        self._script.write_text(script(key, body))

    def __enter__(self) -> Wrk:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def run(self, url: str, connections: int, seconds: float) -> Load:
        """Load `url` for whole `seconds`, rounded up, from one thread."""
        whole = max(1, -int(-seconds // 1))
        done = subprocess.run(
            [self._program, "-t1", f"-c{connections}", f"-d{whole}s", f"--timeout={TIMEOUT_S}s", "--latency", "-s", str(self._script), url],
            capture_output=True, text=True, check=False, start_new_session=True, timeout=whole + TIMEOUT_S + ENDING_S,
        )  # fmt: skip
        if done.returncode:
            raise Failed(f"wrk ended with {done.returncode}: {(done.stderr or done.stdout).strip()}")
        return parse(done.stdout)
