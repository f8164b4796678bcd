"""The program inside a sandbox: `python -I -S -P <guest>/child.py [fds=S,C] [own-uid]`.

`fds` says where the socket and the control pipe are when not at 3 and 4, to where they are moved; every other descriptor is closed.
`own-uid` says that no other process on this machine has this one's uid, so that a limit on processes binds the sandbox alone.
"""

import fcntl
import os
import resource
import sys

NOFILE_MAX = 4096
NPROC_MAX = 1024


def limit_myself(own_uid: bool) -> None:
    """Limits that hold before the first instruction of user code."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = NOFILE_MAX if hard == resource.RLIM_INFINITY else min(hard, NOFILE_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if own_uid:
        resource.setrlimit(resource.RLIMIT_NPROC, (NPROC_MAX, NPROC_MAX))
    os.umask(0o077)


def take_descriptors(numbers: tuple[int, int]) -> None:
    """Keep the standard ones, the socket at 3 and the control pipe at 4, and no other."""
    if numbers != (3, 4):
        # By way of high numbers, since one of the two may be where the other has to go.
        protocol, control = (fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in numbers)
        os.dup2(protocol, 3)
        os.dup2(control, 4)
    os.closerange(5, 65536)
    for fd in (3, 4):
        os.set_inheritable(fd, False)


def main(words: list[str]) -> None:
    numbers = (3, 4)
    for word in words:
        if word.startswith("fds="):
            protocol, control = word[4:].split(",")
            numbers = (int(protocol), int(control))
    take_descriptors(numbers)
    limit_myself("own-uid" in words)
    sys.argv = ["mn"]
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from mn_runner.inside.serve import serve

    serve()


if __name__ == "__main__":
    main(sys.argv[1:])
