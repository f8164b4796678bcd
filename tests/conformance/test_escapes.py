"""What code in a bubblewrap sandbox must not reach, tried from inside: as root's sandbox, and as an ordinary user's."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mn_runner.drivers.mounts import this_minor
from tests.support.sandboxes import Lab

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux only")

ATTEMPTS = """
import ctypes, errno, os, socket, sys

libc = ctypes.CDLL(None, use_errno=True)

def call(number, *arguments):
    result = libc.syscall(number, *arguments)
    return "done" if result >= 0 else errno.errorcode[ctypes.get_errno()]

def attempt(expression):
    try:
        return repr(eval(expression))
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
"""


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A function that evaluates a Python expression in a sandbox."""
    run_dir = tmp_path_factory.mktemp("run")
    lab = Lab("bubblewrap", run_dir)
    sandbox = lab.load(ATTEMPTS, "app:attempt")
    other = lab.load("SECRET = 'of another sandbox'\ndef f():\n    return SECRET\n", "app:f")
    assert other.session.call().value() == "of another sandbox"

    def evaluate(expression: str) -> Any:
        return sandbox.session.call({"expression": expression}).value()

    evaluate.sandbox = sandbox  # type: ignore[attr-defined]
    evaluate.lab = lab  # type: ignore[attr-defined]
    yield evaluate
    lab.close()


def x86_64(number: int, other: int) -> int:
    return number if os.uname().machine == "x86_64" else other


def test_only_its_own_processes_are_visible(inside: Any) -> None:
    visible = eval(inside("[open(f'/proc/{p}/comm').read() for p in os.listdir('/proc') if p.isdigit()]"))
    assert len(visible) == 2  # bubblewrap's init and Python
    assert inside("os.kill(-1, 0)") in ("None", "ESRCH", "EPERM")
    assert inside(f"os.kill({os.getpid()}, 0)") == "ESRCH"


def test_kill_of_everything_ends_nothing_of_the_host(inside: Any, tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "300"], user=None)
    try:
        victim = inside.lab.load(
            "import os, signal\ndef f():\n    os.kill(-1, signal.SIGKILL)\n    return 1\n", "app:f"
        )
        victim.session.start()
        inside("1")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_files_of_the_host_are_not_there(inside: Any) -> None:
    for path in (
        "/home",
        "/work",
        "/var",
        "/boot",
        "/srv",
        "/run",
        str(Path(__file__).resolve().parent),
        str(inside.lab.run_dir),
    ):
        assert inside(f"os.listdir({path!r})") == "ENOENT", path
    # A parent of the interpreter's folder is there, and holds nothing else.
    assert inside("os.listdir('/root')") in ("ENOENT", "EACCES", "['.pyenv']", "['.local']", "['.venv']")
    assert inside("open('/etc/shadow')") == "ENOENT"
    assert "sandbox" in inside("open('/etc/passwd').read()")
    assert inside("sorted(os.listdir('/mn/code'))") == "['__pycache__', 'app.py']".replace("'__pycache__', ", "")


def test_what_it_sees_it_can_not_change(inside: Any) -> None:
    for path in ("/usr/bin/x", "/etc/x", "/mn/guest/x", "/mn/code/x", "/x", "/mn/x", sys.base_prefix + "/x"):
        assert inside(f"open({path!r}, 'w')") in ("EROFS", "EACCES", "EPERM"), path
    for path in ("/tmp/x", "/mn/work/x", "/dev/shm/x"):
        assert inside(f"open({path!r}, 'w').write('mine')") == "4", path


@pytest.mark.parametrize(
    ("name", "expression"),
    [
        ("mount", f"call({x86_64(165, 40)}, b'none', b'/tmp', b'tmpfs', 0, None)"),
        ("umount2", f"call({x86_64(166, 39)}, b'/proc', 0)"),
        ("chroot", "os.chroot('/tmp')"),
        ("pivot_root", f"call({x86_64(155, 41)}, b'/tmp', b'/tmp')"),
        ("ptrace", f"call({x86_64(101, 117)}, 0, 0, 0, 0)"),
        ("unshare user", f"call({x86_64(272, 97)}, 0x10000000)"),
        ("unshare mount", f"call({x86_64(272, 97)}, 0x00020000)"),
        ("setns", f"call({x86_64(308, 268)}, 0, 0)"),
        ("clone new user", f"call({x86_64(56, 220)}, 0x10000000 | 17, 0, 0, 0, 0)"),
        ("io_uring_setup", "call(425, 8, ctypes.create_string_buffer(120))"),
        ("bpf", f"call({x86_64(321, 280)}, 0, ctypes.create_string_buffer(128), 128)"),
        ("keyctl", f"call({x86_64(250, 219)}, 0, -3, 1, 0, 0)"),
        ("add_key", f"call({x86_64(248, 217)}, b'user', b'x', b'y', 1, -3)"),
        ("perf_event_open", f"call({x86_64(298, 241)}, ctypes.create_string_buffer(128), 0, -1, -1, 0)"),
        ("userfaultfd", f"call({x86_64(323, 282)}, 0)"),
        ("open_tree", "call(428, -100, b'/', 1)"),
        ("fsopen", "call(430, b'tmpfs', 0)"),
        ("process_vm_readv", f"call({x86_64(310, 270)}, 1, 0, 0, 0, 0, 0)"),
        ("vsock", "socket.socket(40, socket.SOCK_STREAM)"),
        ("raw packets", "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
        ("device node", "os.mknod('/tmp/disk', 0o60600, os.makedev(8, 0))"),
    ],
)
def test_the_kernel_refuses(inside: Any, name: str, expression: str) -> None:
    assert inside(expression).strip("'") == "EPERM"


def test_root_is_out_of_reach(inside: Any) -> None:
    # A user namespace without that uid says EINVAL.
    assert inside("os.setuid(0)") in ("EPERM", "EINVAL")


def test_clone3_is_as_if_it_did_not_exist(inside: Any) -> None:
    assert inside("call(435, ctypes.create_string_buffer(88), 88)") == "'ENOSYS'"


def test_its_credentials_are_empty_and_its_own(inside: Any) -> None:
    status = dict(
        line.split(":\t", 1) for line in eval(inside("open('/proc/self/status').read()")).splitlines() if ":\t" in line
    )
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    uids = status["Uid"].split()
    assert len(set(uids)) == 1
    if os.geteuid() == 0:
        assert int(uids[0]) >= 200_000
        assert status["Groups"].strip() == ""
        assert Path(f"/proc/{inside.sandbox.handle.pid}").stat().st_uid == 0


def test_two_sandboxes_of_root_have_two_uids(inside: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's sandboxes differ by their user namespaces")
    second = inside.lab.load("import os\ndef f():\n    return os.getuid()\n", "app:f")
    assert second.session.call().value() != int(inside("os.getuid()"))


def test_it_holds_five_descriptors(inside: Any) -> None:
    # The sixth is the listing's own.
    assert inside("sorted(map(int, os.listdir('/proc/self/fd')))") == "[0, 1, 2, 3, 4, 5]"


def test_limits_hold(inside: Any) -> None:
    assert inside("__import__('resource').getrlimit(4)") == "(0, 0)"
    assert inside("__import__('resource').getrlimit(7)[1] <= 4096") == "True"
    assert inside("os.umask(0o077)") == "63"
    if os.geteuid() == 0:
        assert inside("__import__('resource').getrlimit(6)[1]") == "1024"


def test_no_network_but_its_own_loopback(inside: Any) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert inside(f"socket.create_connection(('127.0.0.1', {port}), 2)") == "ECONNREFUSED"
    for address in ("10.0.0.1", "169.254.169.254", "192.168.0.1", "1.1.1.1"):
        assert inside(f"socket.create_connection(({address!r}, 80), 2)") == "ENETUNREACH", address
    assert inside("socket.create_connection(('fd00::1', 80), 2)") in ("ENETUNREACH", "EADDRNOTAVAIL", "EAFNOSUPPORT")
    assert inside("socket.if_nameindex()") == "[(1, 'lo')]"


def test_abstract_sockets_of_the_host_are_out_of_reach(inside: Any) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0mn-escape-test")
        server.listen()
        assert inside("socket.socket(socket.AF_UNIX).connect('\\0mn-escape-test')") == "ECONNREFUSED"


def test_nothing_secret_shows_in_command_lines_or_environments(inside: Any) -> None:
    host = Path(f"/proc/{inside.sandbox.handle.pid}/cmdline").read_bytes()
    assert b"--setenv" not in host
    assert b"--seccomp" not in host
    lines = eval(inside("[open(f'/proc/{p}/cmdline').read() for p in os.listdir('/proc') if p.isdigit()]"))
    assert all(str(inside.lab.run_dir) not in line for line in lines)
    if os.geteuid() == 0:
        assert inside("open('/proc/1/environ').read()") == "EACCES"
    assert inside("os.uname().nodename") == "'sandbox'"


def test_an_ordinary_users_sandboxes_hold_as_well() -> None:
    """The same tests by the user nobody, with an interpreter that it can reach."""
    if os.geteuid() != 0:
        pytest.skip("this is already an ordinary user")
    python = Path("/usr/bin") / f"python{this_minor()}"
    setpriv = shutil.which("setpriv")
    if not python.exists() or setpriv is None:
        pytest.skip(f"needs {python} and setpriv: the interpreter of this test run is private to root")
    root = Path(__file__).resolve().parents[2]
    packages = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    folder = Path(f"/tmp/mn-nobody-{os.getpid()}-{time.monotonic_ns()}")
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    paths = ":".join(str(path) for path in (root, root / "sdk", root / "runner", packages))
    try:
        result = subprocess.run(
            [
                setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--", str(python), "-P", "-m", "pytest", "-q",
                "-p", "no:cacheprovider", f"--basetemp={folder}/t",
                "-c", "/dev/null", f"--rootdir={root}", "--noconftest", str(Path(__file__)), str(Path(__file__).with_name("test_driver.py")),
                "-k", "not host_local and not ordinary_users",
            ],
            env={"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HOME": str(folder)},
            cwd=folder, capture_output=True, text=True, timeout=150,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert " passed" in result.stdout
    finally:
        shutil.rmtree(folder, ignore_errors=True)
