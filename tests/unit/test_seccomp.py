"""The system-call filter, run by an interpreter of BPF: what each call gives, on both processors."""

from __future__ import annotations

import struct

import pytest

from mn_runner import seccomp
from mn_runner.seccomp import AARCH64, ALLOW, ENOSYS, EPERM, ERRNO, KILL_PROCESS, X86_64, Architecture

REFUSED, UNKNOWN = ERRNO | EPERM, ERRNO | ENOSYS
BOTH = pytest.mark.parametrize("machine", [X86_64, AARCH64], ids=["x86_64", "aarch64"])


def decide(machine: Architecture, number: int, *arguments: int, audit: int | None = None) -> int:
    """What the filter returns, by the rules of `struct seccomp_data` and classic BPF."""
    padded = (*arguments, *[0] * (6 - len(arguments)))
    data = struct.pack("<IIQ6Q", number, machine.audit if audit is None else audit, 0, *padded)
    code = seccomp.program(machine)
    accumulator = position = 0
    while True:
        operation, if_true, if_false, constant = code[position]
        position += 1
        if operation == seccomp.RETURN:
            return constant
        if operation == seccomp.LD_WORD:
            accumulator = struct.unpack_from("<I", data, constant)[0]
            continue
        holds = {
            seccomp.JEQ: accumulator == constant,
            seccomp.JGE: accumulator >= constant,
            seccomp.JSET: bool(accumulator & constant),
        }[operation]
        position += if_true if holds else if_false


@BOTH
def test_every_jump_lands_inside_the_program(machine: Architecture) -> None:
    code = seccomp.program(machine)
    assert len(code) < 4096
    for place, (operation, if_true, if_false, _) in enumerate(code):
        if operation not in (seccomp.RETURN, seccomp.LD_WORD):
            assert max(if_true, if_false) < 256
            assert place + 1 + max(if_true, if_false) < len(code)
    assert code[-1][0] == seccomp.RETURN


@BOTH
def test_what_python_needs_is_allowed(machine: Architecture) -> None:
    ordinary = {X86_64: (0, 1, 9, 39, 59, 202, 231, 257, 318), AARCH64: (63, 64, 222, 172, 221, 98, 94, 56, 278)}[
        machine
    ]
    for number in (*ordinary, 424, 434, 436, 439, 441):
        assert decide(machine, number) == ALLOW, number


@BOTH
def test_what_changes_the_machine_is_refused(machine: Architecture) -> None:
    for number in (*machine.denied, 425, 426, 427, 429, 438, 442):
        assert decide(machine, number) == REFUSED, number


@BOTH
def test_numbers_from_the_future_do_not_exist(machine: Architecture) -> None:
    for number in (machine.highest_old + 1, 423, 453, 470, 1 << 20):
        assert decide(machine, number) == UNKNOWN, number


@BOTH
def test_clone_makes_threads_and_processes_and_no_namespaces(machine: Architecture) -> None:
    threads, user_namespace, mounts = 0x3D0F00, 0x10000000, 0x00020000
    assert decide(machine, machine.clone, threads) == ALLOW
    assert decide(machine, machine.clone, user_namespace) == REFUSED
    assert decide(machine, machine.clone, threads | mounts) == REFUSED
    assert decide(machine, seccomp.CLONE3) == UNKNOWN


@BOTH
def test_socket_families(machine: Architecture) -> None:
    for family in (1, 2, 10, 16):
        assert decide(machine, machine.socket, family) == ALLOW
    for family in seccomp.SOCKET_FAMILIES_DENIED:
        assert decide(machine, machine.socket, family) == REFUSED


@BOTH
def test_personalities_and_terminal_requests(machine: Architecture) -> None:
    assert decide(machine, machine.personality, 0xFFFFFFFF) == ALLOW
    assert decide(machine, machine.personality, 0x0400000) == REFUSED
    assert decide(machine, machine.ioctl, 1, 0x5401) == ALLOW
    assert decide(machine, machine.ioctl, 0, 0x5412) == REFUSED


def test_other_architectures_and_x32_are_killed() -> None:
    assert decide(X86_64, 1, audit=AARCH64.audit) == KILL_PROCESS
    assert decide(X86_64, 1, audit=0x40000003) == KILL_PROCESS
    assert decide(X86_64, 0x40000000 | 1) == KILL_PROCESS


def test_the_assembled_program_is_what_the_kernel_reads() -> None:
    data = seccomp.assembled("x86_64")
    assert len(data) == 8 * len(seccomp.program(X86_64))
    assert struct.unpack_from("<HBBI", data, 8) == (0x15, 1, 0, 0xC000003E)
    with pytest.raises(KeyError):
        seccomp.assembled("vax")
