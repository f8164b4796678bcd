"""What a person sees on a terminal while a map runs."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from tests.support.runtime import Runtime

SCRIPT = """
import time
import mn

@mn.function
def slow(x):
    time.sleep(0.02)
    return x

if __name__ == "__main__":
    print(sum(slow.map(range(60))))
"""


def test_a_map_shows_a_live_progress_bar_on_a_terminal_and_nowhere_else(runtime: Runtime, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SCRIPT)
    ours, theirs = pty.openpty()
    environ = {**runtime.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, str(script)], env=environ, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not part:
            break
        seen += part
    out, _ = process.communicate(timeout=60)
    os.close(ours)
    assert out.split() == [b"1770"]
    counts = {int(n) for n in re.findall(rb"(\d+)/60", seen)}
    assert len(counts) > 2, seen
    assert max(counts) == 60, seen

    piped = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, check=True)
    assert piped.stdout.split() == [b"1770"]
    assert b"/60" not in piped.stderr
