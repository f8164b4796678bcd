"""README.md, followed word for word on a fresh Debian: its files written, its commands run in one shell, its outputs compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.fresh_root import Shell, prepared_root, require_debootstrap, session, shell_in
from tests.support.runtime import Runtime

HERE = Path(__file__).resolve().parents[2]
README = HERE / "README.md"
FREE_PORTS = {f"MN_{name}_PORT": "0" for name in ("API", "STORE", "DIST", "MAPPER", "GRPC", "SENTINEL")}
"""Other runtimes of this machine may hold the usual ones."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXACT = re.compile(r'-?\d+|".*"|error: .*')
DATA = re.compile(r'-?\d+|".*"')
INVOCATION = re.compile(r"inv_[0-9A-Z]{26}")
PLACEHOLDER = "inv_…"


@dataclass
class Step:
    """A file to write, or a command to run and what it shows."""

    command: str = ""
    shows: list[str] = field(default_factory=list)
    file: str = ""
    content: str = ""


def steps_of(text: str) -> Iterator[Step]:
    for language, body in BLOCK.findall(text):
        if language == "python" and (name := re.match(r"# (\S+\.py)\n", body)):
            yield Step(file=name[1], content=body)
        elif language == "console":
            step: Step | None = None
            for line in body.splitlines():
                if line.startswith("$ "):
                    if step is not None:
                        yield step
                    step = Step(line[2:])
                elif step is not None:
                    step.shows.append(line)
            if step is not None:
                yield step


def apt_packages(text: str) -> list[str]:
    found = re.search(r"^sudo apt-get install -y ([^#\n]+)", text, re.MULTILINE)
    assert found is not None, "README.md has no apt line"
    return found[1].split()


def check(step: Step, output: str) -> None:
    """Numbers and JSON are compared as they are, other lines by their first two words: they show versions, times and ports."""
    said = [line.rstrip() for line in output.splitlines() if line.strip()]
    if step.shows and all(DATA.fullmatch(line) for line in step.shows):
        assert said == step.shows, f"$ {step.command}\n{output}"
        return
    rest = iter(said)
    for line in step.shows:
        begins = line.split()[:2]
        exact = bool(EXACT.fullmatch(line))
        assert any(it == line if exact else it.split()[:2] == begins for it in rest), (
            f"$ {step.command}\nthe README shows: {line}\nit said:\n{output}"
        )


@pytest.mark.timeout(1500)
def test_the_readme_works_word_for_word_on_a_fresh_debian(tmp_path: Path) -> None:
    require_debootstrap()
    text = README.read_text()
    root = tmp_path / "root"
    subprocess.run(["cp", "-a", "--reflink=auto", str(prepared_root(apt_packages(text))), str(root)], check=True)
    clone = root / "root" / "mirrorneuron"
    copy_tracked_files(clone)
    with shell_in(root, "/root/mirrorneuron", FREE_PORTS) as shell:
        follow(text, shell, clone)
        left, _ = shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")
        assert "mn_nodepool" not in left


@pytest.mark.parametrize("guide", ["functions", "http", "operating"])
def test_the_guides_work_as_shown(guide: str, tmp_path: Path) -> None:
    text = (HERE / "docs" / f"{guide}.md").read_text()
    with Runtime(tmp_path / "home") as runtime:
        runtime.start()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        os.mkfifo(tmp_path / "session")
        with session(["bash", "session"], tmp_path / "session", {**runtime.environ, "PATH": path}, tmp_path) as shell:
            follow(text, shell, tmp_path)


def follow(text: str, shell: Shell, folder: Path) -> None:
    """Write the text's files, run its commands, compare what they show. A call's id in a command is that of the last failure."""
    last_failure = ""
    for step in steps_of(text):
        if step.file:
            (folder / step.file).write_text(step.content)
            continue
        replays = f"debug {PLACEHOLDER}" in step.command
        output, code = shell(step.command.replace(PLACEHOLDER, last_failure))
        assert code == 0 or replays, f"$ {step.command}\nended with {code}:\n{output}"
        if replays:
            assert "Error: " in output, output
        else:
            check(step, output)
        last_failure = (INVOCATION.findall(output) or [last_failure])[-1]


def copy_tracked_files(clone: Path) -> None:
    """What a clone of this work tree has."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=HERE, capture_output=True, check=True).stdout
    clone.mkdir(parents=True)
    for name in names.decode().split("\0"):
        if name and (HERE / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((HERE / name).read_bytes())
            (clone / name).chmod((HERE / name).stat().st_mode & 0o777)
