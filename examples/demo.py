"""`make demo`: a runtime in a throw-away home, the census of the standard library on it, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MN = (sys.executable, "-P", "-c", "from mn.cli.main import main; main()")
NOTICE = """
************************************************************************************
  This machine refuses sandboxes: {why}
  The demo goes on with the driver host_local, which ISOLATES NOTHING: its functions
  run with your rights. It runs only the code in examples/.
  What fixes it:  {fix}
************************************************************************************
"""


def main() -> int:
    home = Path(tempfile.mkdtemp(prefix="mn-demo-"))
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MN_")}
    environ = {**plain, "MN_HOME": str(home)}
    try:
        subprocess.run([*MN, "runtime", "start", "--ports", "auto", *driver(environ)], env=environ, check=True)
        print(flush=True)
        return subprocess.run([sys.executable, str(HERE / "stdlib_census.py")], env=environ, check=False).returncode
    except subprocess.CalledProcessError as failed:
        return failed.returncode
    except KeyboardInterrupt:
        return 130
    finally:
        subprocess.run([*MN, "runtime", "reset", "--yes"], env=environ, stdout=subprocess.DEVNULL, check=False)
        shutil.rmtree(home)
        print("\nThe runtime is stopped; no process and no file is left.")


def driver(environ: dict[str, str]) -> list[str]:
    """Options for the start: none where sandboxes work, the loudly announced fallback where they are refused."""
    doctor = subprocess.run([*MN, "doctor", "--json"], env=environ, stdout=subprocess.PIPE, text=True, check=False)
    checks = json.loads(doctor.stdout)["checks"]
    isolation = next(check for check in checks if check["name"] == "isolation")
    if isolation["state"] == "ok":
        return []
    print(
        NOTICE.format(why=isolation["detail"], fix=isolation["fix"] or "mn doctor tells"), file=sys.stderr, flush=True
    )
    return ["--driver", "host_local"]


if __name__ == "__main__":
    sys.exit(main())
