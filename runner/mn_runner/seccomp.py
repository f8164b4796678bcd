"""The system-call filter of a sandbox, as a classic BPF program made without libraries.

It allows what a container engine's default profile allows a process without capabilities: every call of the tables' age except those named in
`DENIED`, with arguments checked for `clone`, `socket`, `personality` and `ioctl`. Newer and unknown numbers give ENOSYS, so that libraries fall
back to what they used before; denied ones give EPERM. Programs of another architecture are killed.

Sources: the kernel's `include/uapi/linux/{bpf_common,filter,seccomp,audit}.h` and `arch/*/entry/syscalls`; seccomp(2).
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass

LD_WORD, JEQ, JGE, JSET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
OFFSET_NUMBER, OFFSET_ARCH, OFFSET_ARGUMENTS = 0, 4, 16
X32_BIT = 0x40000000
CLONE_NAMESPACES = 0x7E020080
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET and NEWTIME."""
SOCKET_FAMILIES_DENIED = (15, 17, 38, 40, 44)
"""AF_KEY, AF_PACKET, AF_ALG, AF_VSOCK, AF_XDP: kernel surface that no function needs."""
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)
IOCTLS_DENIED = (0x5412, 0x541C)
"""TIOCSTI and TIOCLINUX type into the terminal of whoever started the node."""

# Numbers from 424 (pidfd_send_signal) on are the same on every architecture.
_COMMON_DENIED = (
    *range(425, 428),  # io_uring_setup, io_uring_enter, io_uring_register
    *range(428, 434),  # open_tree, move_mount, fsopen, fsconfig, fsmount, fspick
    438,  # pidfd_getfd
    442,  # mount_setattr
    443,  # quotactl_fd
    450,  # set_mempolicy_home_node
)
CLONE3 = 435
HIGHEST_KNOWN = 452
"""fchmodat2; what came later gives ENOSYS."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What differs between processors: the audit number and call numbers."""

    audit: int
    clone: int
    socket: int
    personality: int
    ioctl: int
    denied: tuple[int, ...]
    highest_old: int
    """Last number of the architecture's own table; between it and 424 nothing is defined."""


X86_64 = Architecture(
    audit=0xC000003E, clone=56, socket=41, personality=135, ioctl=16, highest_old=334,
    denied=(
        101,  # ptrace
        103,  # syslog
        134, 136, 139,  # uselib, ustat, sysfs
        153, 155, 156, 161, 163, 164, 165, 166,  # vhangup, pivot_root, _sysctl, chroot, acct, settimeofday, mount, umount2
        167, 168, 169, 172, 173,  # swapon, swapoff, reboot, iopl, ioperm
        174, 175, 176, 177, 178, 179, 180,  # create_module … nfsservctl
        212, 227, 305,  # lookup_dcookie, clock_settime, clock_adjtime
        237, 238, 239, 256, 279,  # mbind, set_mempolicy, get_mempolicy, migrate_pages, move_pages
        246, 248, 249, 250,  # kexec_load, add_key, request_key, keyctl
        272, 298, 300, 303, 304, 308,  # unshare, perf_event_open, fanotify_init, name_to_handle_at, open_by_handle_at, setns
        310, 311, 312, 313, 320, 321, 323,  # process_vm_readv/writev, kcmp, finit_module, kexec_file_load, bpf, userfaultfd
    ),
)  # fmt: skip
AARCH64 = Architecture(
    audit=0xC00000B7, clone=220, socket=198, personality=92, ioctl=29, highest_old=294,
    denied=(
        117,  # ptrace
        116,  # syslog
        18, 39, 40, 41, 42, 51, 58, 60,  # lookup_dcookie, umount2, mount, pivot_root, nfsservctl, chroot, vhangup, quotactl
        89, 97, 104, 105, 106,  # acct, unshare, kexec_load, init_module, delete_module
        112, 142, 170, 224, 225,  # clock_settime, reboot, settimeofday, swapon, swapoff
        217, 218, 219,  # add_key, request_key, keyctl
        235, 236, 237, 238, 239,  # mbind, get_mempolicy, set_mempolicy, migrate_pages, move_pages
        241, 262, 264, 265, 266, 268,  # perf_event_open, fanotify_init, name_to_handle_at, open_by_handle_at, clock_adjtime, setns
        270, 271, 272, 273, 280, 282, 294,  # process_vm_readv/writev, kcmp, finit_module, bpf, userfaultfd, kexec_file_load
    ),
)  # fmt: skip
ARCHITECTURES = {"x86_64": X86_64, "amd64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, constant."""


def program(architecture: Architecture) -> list[Instruction]:
    """The filter's instructions."""
    code: list[Instruction] = [
        (LD_WORD, 0, 0, OFFSET_ARCH),
        (JEQ, 1, 0, architecture.audit),
        (RETURN, 0, 0, KILL_PROCESS),
        (LD_WORD, 0, 0, OFFSET_NUMBER),
        (JGE, 0, 1, X32_BIT),
        (RETURN, 0, 0, KILL_PROCESS),
    ]
    code += _unless(architecture.clone, _argument_has_bits(0, CLONE_NAMESPACES))
    code += _unless(architecture.socket, _argument_is_one_of(0, SOCKET_FAMILIES_DENIED))
    code += _unless(architecture.ioctl, _argument_is_one_of(1, IOCTLS_DENIED))
    code += _unless(architecture.personality, _argument_is_none_of(0, PERSONALITIES))
    code += [(JEQ, 0, 1, CLONE3), (RETURN, 0, 0, ERRNO | ENOSYS)]
    for number in sorted((*architecture.denied, *_COMMON_DENIED)):
        code += [(JEQ, 0, 1, number), (RETURN, 0, 0, ERRNO | EPERM)]
    code += [
        (JGE, 0, 1, HIGHEST_KNOWN + 1),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (JGE, 2, 0, 424),
        (JGE, 0, 1, architecture.highest_old + 1),
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (RETURN, 0, 0, ALLOW),
    ]
    return code


def _unless(number: int, check: list[Instruction]) -> list[Instruction]:
    """`check`, which returns in every case, for one call only."""
    return [(JEQ, 0, len(check), number), *check]


def _argument_has_bits(index: int, bits: int) -> list[Instruction]:
    return [_load_argument(index), (JSET, 0, 1, bits), (RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW)]


def _argument_is_one_of(index: int, values: Sequence[int]) -> list[Instruction]:
    # The kernel takes the low 32 bits of these arguments as well.
    return [*_compare(index, values), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ERRNO | EPERM)]


def _argument_is_none_of(index: int, values: Sequence[int]) -> list[Instruction]:
    return [*_compare(index, values), (RETURN, 0, 0, ERRNO | EPERM), (RETURN, 0, 0, ALLOW)]


def _compare(index: int, values: Sequence[int]) -> list[Instruction]:
    """Jump over the next instruction after these when the argument is one of `values`."""
    last = len(values) - 1
    return [_load_argument(index), *((JEQ, last - place + 1, 0, value) for place, value in enumerate(values))]


def _load_argument(index: int) -> Instruction:
    return (LD_WORD, 0, 0, OFFSET_ARGUMENTS + 8 * index)


def assembled(machine: str = "") -> bytes:
    """The program for this machine, or the one named, as `struct sock_filter[]`.

    Raises KeyError for a processor without a table.
    """
    architecture = ARCHITECTURES[machine or platform.machine().lower()]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program(architecture))
