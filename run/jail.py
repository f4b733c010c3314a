"""A process that may only compute: no network, no new process, no file changed, no signal sent.

The workers that compare answers (run/judge.py) hand text that a model wrote to a large library of
formulas. Should some text lead that library astray, it finds itself in here. A second wall, not a
promise: files can still be read.

It is a filter on system calls, which the kernel keeps for good (man 2 seccomp): those named below
fail with EPERM. It is there on Linux, x86-64 and aarch64; elsewhere `shut` changes nothing.
"""

import ctypes
import errno
import os
import platform
import struct

# Call → its numbers on x86-64 and aarch64; None where there is none.
REFUSED = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "accept": (43, 202),
    "accept4": (288, 242), "bind": (49, 200), "listen": (50, 201), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # processes and threads
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424),
    "process_vm_writev": (311, 271),
    # files
    "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46), "rename": (82, None),
    "renameat": (264, 38), "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34),
    "rmdir": (84, None), "link": (86, None), "linkat": (265, 37), "symlink": (88, None),
    "symlinkat": (266, 36), "unlink": (87, None), "unlinkat": (263, 35), "mknod": (133, None),
    "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53),
    "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55), "lchown": (94, None),
    "fchownat": (260, 54), "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7),
    "openat2": (437, 437),  # its flags lie where a filter cannot look
    # what could do all of these in their stead
    "io_uring_setup": (425, 425), "bpf": (321, 280),
}  # fmt: skip
# Calls that open a file: their number, and which argument holds the flags.
OPENING = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The kernel's name of each architecture (<linux/audit.h>), and its place in the pairs above.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
X32 = 0x40000000  # from here on, x86-64's numbers are those of another set of the same calls

# <linux/bpf_common.h>, <linux/seccomp.h>, <linux/prctl.h>
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16  # where they lie in struct seccomp_data
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


def shut() -> bool:
    """Refuse this process all of the above from now on; whether the kernel does."""
    known = ARCHITECTURES.get(platform.machine())
    if platform.system() != "Linux" or known is None:
        return False
    program = filter_for(*known)
    code = ctypes.create_string_buffer(b"".join(program))
    # struct sock_fprog: how many instructions, and where
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return prctl(SECCOMP, FILTER, ctypes.addressof(header), 0, 0) == 0


def filter_for(architecture: int, place: int) -> list[bytes]:
    """The filter's instructions. Each `if` skips so many where it holds, and where it does not."""
    program = [
        instruction(LOAD, ARCHITECTURE),
        instruction(EQUAL, architecture, 1, 0),
        instruction(RETURN, REFUSE),
        instruction(LOAD, NUMBER),
        instruction(AT_LEAST, X32, 0, 1),
        instruction(RETURN, REFUSE),
    ]
    for numbers in REFUSED.values():
        if numbers[place] is not None:
            program.append(instruction(EQUAL, numbers[place], 0, 1))
            program.append(instruction(RETURN, REFUSE))
    for numbers, argument in OPENING.values():
        if numbers[place] is not None:
            program.append(instruction(EQUAL, numbers[place], 0, 4))
            program.append(instruction(LOAD, ARGUMENTS + 8 * argument))
            program.append(instruction(ANY_BIT, WRITING, 0, 1))
            program.append(instruction(RETURN, REFUSE))
            program.append(instruction(RETURN, ALLOW))
    return [*program, instruction(RETURN, ALLOW)]


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter"""
    return struct.pack("HBBI", code, if_true, if_false, value)
