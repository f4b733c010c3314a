"""A process that may only compute: it changes no file, and starts, signals and starves no process.

The workers that compare answers (run/judge.py) hand text that a model wrote to a large library of
formulas. Should some text lead that library astray, it finds itself in here. A second wall, not a
promise: files can still be read.

It is a filter on system calls, which the kernel keeps for good (man 2 seccomp): those named below
fail with EPERM, and those of newer kernels than NEWEST as if this one did not have them. It is there
on Linux, x86-64 and aarch64; elsewhere `shut` changes nothing.
"""

import ctypes
import errno
import os
import platform
import struct

# <linux/fcntl.h>, <asm-generic/ioctls.h>
F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC = 0, 1, 2, 3, 1030
TCGETS, FIOCLEX, FIONCLEX = 0x5401, 0x5451, 0x5450
# Call → its numbers on x86-64 and aarch64; None where there is none.
REFUSED = {
    # network
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "accept": (43, 202),
    "accept4": (288, 242), "bind": (49, 200), "listen": (50, 201), "sendto": (44, 206),
    "sendmsg": (46, 211), "sendmmsg": (307, 269),
    # processes and threads: to start, follow, signal, leave or read them
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "process_mrelease": (448, 448), "kcmp": (312, 272), "setsid": (112, 157), "setpgid": (109, 154),
    "prctl": (157, 167),
    # files: what they hold, their names, modes, times and attributes
    "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "copy_file_range": (326, 285), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "unlink": (87, None), "unlinkat": (263, 35), "mknod": (133, None), "mknodat": (259, 33),
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None),
    "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5),
    "lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    # files: to lock them or watch them, of which there may be so many, to wait for the disk
    "flock": (73, 32), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "inotify_add_watch": (254, 27), "fanotify_init": (300, 262), "fanotify_mark": (301, 263),
    "sync": (162, 81), "syncfs": (306, 267), "fsync": (74, 82), "fdatasync": (75, 83),
    "sync_file_range": (277, 84),
    # file systems
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "swapon": (167, 224), "swapoff": (168, 225),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "acct": (163, 89),
    # others' share of the processors and of memory, and a larger one
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "setrlimit": (160, 164), "migrate_pages": (256, 238), "move_pages": (279, 239),
    "mlock": (149, 228), "mlock2": (325, 284), "mlockall": (151, 230),
    # memory beyond its limit, and what stays or is counted for a user
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "shmctl": (31, 195), "msgget": (68, 186), "msgsnd": (69, 189), "msgrcv": (70, 188),
    "msgctl": (71, 187), "semget": (64, 190), "semop": (65, 193), "semtimedop": (220, 192),
    "semctl": (66, 191), "mq_open": (240, 180), "mq_unlink": (241, 181), "mq_timedsend": (242, 182),
    "mq_timedreceive": (243, 183), "mq_notify": (244, 184), "mq_getsetattr": (245, 185),
    "pipe": (22, None), "pipe2": (293, 59), "epoll_create": (213, None), "epoll_create1": (291, 20),
    "eventfd": (284, None), "eventfd2": (290, 19), "signalfd": (282, None), "signalfd4": (289, 74),
    "timerfd_create": (283, 85), "timer_create": (222, 107), "io_setup": (206, 0),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # the machine
    "reboot": (169, 142), "kexec_load": (246, 104), "kexec_file_load": (320, 294),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "syslog": (103, 116), "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None),
    # what could do some of these in their stead, or looks where a filter cannot
    "openat2": (437, 437), "open_by_handle_at": (304, 265), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "bpf": (321, 280),
    "seccomp": (317, 277), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "personality": (135, 92), "modify_ldt": (154, None), "uselib": (134, None),
}  # fmt: skip
# Calls that open a file: their number, and which argument holds the flags.
OPENING = {"open": ((2, None), 1), "openat": ((257, 56), 2)}
# Calls that do many things: their number, which argument tells what, and what is allowed. Beyond it
# a file's lock, its attributes, and who gets a signal when a pipe has news.
ASKING = {
    "fcntl": ((72, 25), 1, [F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC]),
    "ioctl": ((16, 29), 1, [TCGETS, FIOCLEX, FIONCLEX]),
}
# A call that reads limits, and sets them where this argument is no null pointer.
LIMITS = ((302, 261), 2)
NEWEST = 450  # number of a call; those of later kernels are the same on both
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# The kernel's name of each architecture (<linux/audit.h>), and its place in the pairs above.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# <linux/bpf_common.h>, <linux/seccomp.h>, <linux/prctl.h>
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
REFUSE, UNKNOWN = FAIL | errno.EPERM, FAIL | errno.ENOSYS
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
    allow, refuse = instruction(RETURN, ALLOW), instruction(RETURN, REFUSE)
    program = [
        instruction(LOAD, ARCHITECTURE),
        instruction(EQUAL, architecture, 1, 0),
        refuse,
        instruction(LOAD, NUMBER),
        instruction(AT_LEAST, NEWEST + 1, 0, 1),  # x86-64's other set of the same calls, too
        instruction(RETURN, UNKNOWN),
    ]
    for numbers in REFUSED.values():
        program += for_call(numbers[place], [refuse])
    for numbers, argument in OPENING.values():
        flags = instruction(LOAD, ARGUMENTS + 8 * argument)
        rule = [flags, instruction(ANY_BIT, WRITING, 0, 1), refuse, allow]
        program += for_call(numbers[place], rule)
    for numbers, argument, allowed in ASKING.values():
        rule = [instruction(LOAD, ARGUMENTS + 8 * argument)]
        for value in allowed:
            rule += [instruction(EQUAL, value, 0, 1), allow]
        program += for_call(numbers[place], [*rule, refuse])
    numbers, argument = LIMITS
    rule = []
    for half in (0, 4):  # of a pointer
        rule += [instruction(LOAD, ARGUMENTS + 8 * argument + half)]
        rule += [instruction(EQUAL, 0, 1, 0), refuse]
    program += for_call(numbers[place], [*rule, allow])
    return [*program, allow]


def for_call(number: int | None, rule: list[bytes]) -> list[bytes]:
    """A rule, which ends with a return, for one call; none where there is no such call."""
    return [] if number is None else [instruction(EQUAL, number, 0, len(rule)), *rule]


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """struct sock_filter"""
    return struct.pack("HBBI", code, if_true, if_false, value)
