"""Ranks meet over the network, and each of them ends when another one is lost.

    store, watch = meet(rank, size, place, timeout, on_loss)      all have come, or UsageError
    dist.start(world, store)                                       torch's group meets in that store
    …                                                              collectives may now wait for hours
    watch.close(watch.DONE)                                        a good-bye, else it is a loss

torch.distributed notices a lost rank late or never: gloo waits for hours, NCCL for ever. So the
ranks keep connections of their own, over which they say that they live.

To change what counts as lost, change `Watch._next_loss`; to change what happens then, `on_loss`.
"""

import errno
import fcntl
import ipaddress
import math
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch.distributed as torch_dist

from data import UsageError
from run.console import harmless

LOOPBACK = ("localhost", "127.0.0.1", "::1")  # what no other machine could mean
SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the address of a network interface


def meet(
    rank: int,
    size: int,
    place: str,
    timeout: float = 30.0,
    on_loss: Callable[[str], None] = print,
    meeting: float = 300.0,
) -> "tuple[torch_dist.Store, Watch] | tuple[None, None]":
    """Meet the other ranks at torchrun's MASTER_ADDR and MASTER_PORT, and watch them from then on.

    place: who this is, for messages: rank and host. timeout: see `Watch`. on_loss: called from
    another thread with one line that names who was lost; it has to end the process.
    meeting: seconds in which all must have come; UsageError when they have not.
    One process meets nobody: (None, None).
    """
    if size == 1:
        return None, None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = find_store(rank, size, host, port, meeting)
        watch = Watch(rank, size, place, host, store, timeout, on_loss, meeting)
    except (torch_dist.DistError, OSError) as error:
        if os.strerror(errno.EADDRINUSE).lower() in str(error).lower():
            raise UsageError(
                f"--master_port {port}: in use on this machine; a free one, on every node, works"
            ) from error
        raise UsageError(
            f"--master_addr {host} --master_port {port}: {place} did not meet rank 0 there within "
            f"{meeting:g} s; an address of rank 0's machine that all others reach works"
        ) from error
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        # By itself gloo takes what the host name stands for, which is often loopback.
        interface = interface_to(host)
        if interface:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    return store, watch


def find_store(rank: int, size: int, host: str, port: int, meeting: float) -> torch_dist.Store:
    """The table of names and values that all ranks share: torchrun's, or else rank 0 serves it."""
    has_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    patience = timedelta(seconds=meeting)
    if rank == 0 and not has_torchruns:
        store = serve_store(host, port, size, patience)
    else:
        store = torch_dist.TCPStore(host, port, is_master=False, timeout=patience)
    # torchrun's outlives a run that it starts again, which must not find the names of the first.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return torch_dist.PrefixStore(f"train/{attempt}", store)


def serve_store(
    host: str, port: int, size: int, patience: timedelta = timedelta(seconds=300)
) -> torch_dist.TCPStore:
    """A store served from here for so many processes; by itself torch would listen on all of this
    machine's addresses. port: 0 takes one that is free."""
    server = listen(host, size, port)
    port = server.getsockname()[1]
    settings = {"wait_for_workers": False, "timeout": patience, "multi_tenant": True}
    descriptor = server.detach()  # the store closes it
    return torch_dist.TCPStore(host, port, is_master=True, master_listen_fd=descriptor, **settings)


def interface_to(host: str) -> str | None:
    """The network interface by which this machine reaches a host over IPv4, if that can be told."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing, but picks the address to send from
        own_address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has no address
                request = struct.pack("256s", name.encode())
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == own_address:
                    return name
    return None


def listen(host: str, size: int, port: int = 0) -> socket.socket:
    """A server at this machine's address `host` for so many processes. port: 0 takes a free one.

    A name that stands for loopback here may be known by another address elsewhere, and an address
    that is not this machine's may be one that forwards to it. Then it is heard on all it has.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    is_name = host not in LOOPBACK
    is_loopback = ipaddress.ip_address(address[0]).is_loopback
    spans_machines = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < size
    if not (is_name and is_loopback and spans_machines):
        try:
            return socket.create_server(address[:2], family=family, backlog=size)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=size, dualstack_ipv6=dual)


def read_line(connection: socket.socket, seconds: float, most: int) -> str:
    """A line that comes within so many seconds and bytes; ValueError or OSError for anything else."""
    deadline, said = time.monotonic() + seconds, b""
    while not said.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        part = connection.recv(most - len(said))
        if not part:  # it has ended, or says too much
            raise ValueError("no line")
        said += part
    return said.decode().strip()


class Watch:
    """Ends this process when another one of the run is lost.

    Every rank keeps a connection to rank 0, apart from all others, on which a thread says each
    second that it lives:

        its process ends without a good-bye     the connection closes: at once
        its machine is switched off or cut off  the kernel gets no acknowledgement
                                                (TCP_USER_TIMEOUT): `timeout` s
        it is stopped, or holds Python's lock   nothing is said: 4 · `timeout` s, since it may yet
                                                go on

    Rank 0 tells the others of whom it lost. `on_loss` gets one line that names rank and host, from
    the thread, and has to end the process: its main thread may be deep in a collective that never
    returns.
    """

    # What is said on a connection; any other bytes are the line of a loss.
    ALIVE, FAILED, DONE, ASKED = b"\1", b"\2", b"\3", b"\4"
    PATIENCE = 15.0  # seconds until rank 0 says for whom it waits
    HELLO = 2.0  # seconds in which one who connects has to say who it is
    GRACE = 3.0  # seconds to end with an error of one's own when another has said that it failed

    def __init__(
        self,
        rank: int,
        size: int,
        place: str,
        host: str,
        store: torch_dist.Store,
        timeout: float,
        on_loss: Callable[[str], None],
        meeting: float,
    ):
        self.timeout, self.on_loss = timeout, on_loss
        self.closed, self.deferred, self.told = False, threading.Event(), threading.Event()
        self.failing = False  # this process has an error of its own, and is about to tell it
        # Connections, and who is at their other ends: all others on rank 0, rank 0 on the others.
        self.peers: dict[socket.socket, str] = {}
        if rank == 0:
            self._await_all(size, place, host, store, time.monotonic() + meeting)
        else:
            self._join_main(rank, place, host, store, meeting)
        for connection in self.peers:
            connection.settimeout(None)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                milliseconds = round(timeout * 1000)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def close(self, word: bytes = FAILED) -> None:
        """Watch no more, and tell the others that this process ends: as it should (DONE), with a
        failure that it has told (FAILED), or since a signal asked it to (ASKED)."""
        if self.closed:
            return
        self.closed = True
        for connection in list(self.peers):
            with suppress(OSError):
                connection.sendall(word)
            connection.close()

    def defer(self) -> None:
        """The main thread has failed, perhaps because another process is lost; if so this ends the
        process."""
        self.deferred.set()
        self.thread.join(self.GRACE)

    def others_tell(self) -> bool:
        """This process has failed: whether rank 0 has, too, or knows of one that has, and told why.
        A failure that ranks share comes to all of them at about the same time."""
        self.failing = True
        return self.told.wait(self.GRACE)

    # Meeting

    def _join_main(
        self, rank: int, place: str, host: str, store: torch_dist.Store, meeting: float
    ) -> None:
        """Introduce this rank to rank 0, which says in the store where it listens, and the word by
        which it tells a rank from a stranger."""
        port, word, main = store.get("watch").decode().split(" ", 2)
        connection = socket.create_connection((host, int(port)), meeting)
        connection.sendall(f"{word} {rank} {place}\n".encode())
        if not connection.recv(1):  # rank 0's first sign of life: all have come
            raise ConnectionError(f"{main} has ended")
        self.peers[connection] = harmless(main, keep="")

    def _await_all(
        self, size: int, place: str, host: str, store: torch_dist.Store, deadline: float
    ) -> None:
        """Rank 0's: let all others introduce themselves."""
        missing = set(range(1, size))
        word = secrets.token_hex(16)
        with listen(host, size) as server:
            store.set("watch", f"{server.getsockname()[1]} {word} {place}")
            speak = time.monotonic() + self.PATIENCE
            while missing:
                names = ", ".join(map(str, sorted(missing)))
                if time.monotonic() >= deadline:  # strangers may come for as long as they like
                    raise UsageError(
                        f"--nnodes: rank {names} of {size} did not come within the time to "
                        "meet; the same command on every node, each with its --node_rank, works"
                    )
                if time.monotonic() >= speak:
                    print(f"waiting for rank {names} of {size}", flush=True)
                    speak = math.inf  # once is enough
                server.settimeout(max(0.001, min(speak, deadline) - time.monotonic()))
                with suppress(TimeoutError):
                    connection, _ = server.accept()
                    self._admit(connection, missing, word)
        for connection in self.peers:
            connection.sendall(self.ALIVE)

    def _admit(self, connection: socket.socket, missing: set[int], word: str) -> None:
        """Take a connection's other end off the missing ranks, if it is one of them."""
        try:
            said, rank, place = read_line(connection, self.HELLO, 1000).split(" ", 2)
            if not secrets.compare_digest(said.encode(), word.encode()):
                raise ValueError("not of this run")
            missing.remove(int(rank))
        except (ValueError, KeyError, OSError):  # a stranger, who looks for open ports
            connection.close()
        else:
            self.peers[connection] = harmless(place, keep="")

    # Watching, in a thread

    def _run(self) -> None:
        lost, grace = self._next_loss()
        if not lost or self.closed:
            return
        # Only rank 0 has anyone to tell but the one that is lost.
        for connection in self.peers:
            news = lost.encode()
            if grace:
                news = self.FAILED + news
            with suppress(OSError):
                connection.sendall(news)
        self.deferred.wait(self.GRACE if self.failing else grace)
        if not self.closed:
            self.on_loss(lost)

    def _next_loss(self) -> tuple[str, float]:
        """Wait until somebody is lost: who and how, and the seconds to wait for an error of one's
        own. No text if all others have ended as they should, or this process has."""
        heard = dict.fromkeys(self.peers, time.monotonic())
        spoken = 0.0
        selector = selectors.DefaultSelector()
        for connection in self.peers:
            selector.register(connection, selectors.EVENT_READ)
        place = ""  # whose connection is in use, for the two handlers below
        try:
            while self.peers and not self.closed:
                for key, _ in selector.select(1.0):
                    connection, place = key.fileobj, self.peers[key.fileobj]
                    said = connection.recv(4096)
                    heard[connection] = time.monotonic()
                    if self.FAILED in said:
                        self.told.set()
                    told = said.strip(self.ALIVE + self.FAILED + self.DONE + self.ASKED)
                    if told:  # rank 0 has lost another one
                        line = harmless(told.decode(errors="replace"), keep="")
                        return line, self.GRACE if self.FAILED in said else 0.0
                    if self.FAILED in said:
                        return f"lost {place}: it failed, and has told why", self.GRACE
                    if self.ASKED in said:
                        return f"lost {place}: a signal asked it to end", 0.0
                    if not said:
                        return f"lost {place}: its process has ended", 0.0
                    if self.DONE in said:
                        selector.unregister(connection)
                        del self.peers[connection]
                if time.monotonic() <= spoken + 1.0:
                    continue
                spoken = time.monotonic()
                for connection, place in self.peers.items():
                    if spoken > heard[connection] + 4 * self.timeout:
                        return f"lost {place}: no sign of life for {4 * self.timeout:g} s", 0.0
                    with suppress(ConnectionError):  # recv has its last words, if there are any
                        connection.sendall(self.ALIVE)
        except ConnectionError:
            return f"lost {place}: its process has ended", 0.0
        except OSError as error:
            reason = f"out of reach for {self.timeout:g} s ({error.strerror})"
            return f"lost {place}: {reason}", 0.0
        return "", 0.0
