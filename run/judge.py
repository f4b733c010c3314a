"""The judge: compares answers in a process of its own, which no answer can hang.

    trainer                    judge (python -m run.judge)         workers (forks of it)
    Judge(pairs) ── a line ──> compare ─┬─ fork_worker ─────────── verdict, verdict, …
     <─ ⏎ each second, a line ──       └─ fork_worker ─────────── verdict, ← timer: TIMEOUT

math_verify may never return on what a model writes, and only ending a process bounds that. So
certain answers are settled here (run/answers.py), and the rest by workers, each of which may die
over one answer. The judge imports neither torch nor transformers: a fork of it costs a few
milliseconds and little memory.

An answer's limit is processor time. What else runs on the machine then changes no verdict, only how
long it takes. What sleeps uses none, so a second limit, of PATIENCE times as long, is real time.
A judge that says nothing for SILENCE seconds, because it is stopped or swapped out, is replaced.

`Judge(timeout)` is a callable from (answer, reference) pairs to verdicts, like rewards.verify. To
compare otherwise, write such a callable and hand it to `Rewards(judge=…)`.
"""

import json
import logging
import math
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data import UsageError
from rewards import CRASH, TIMEOUT, RewardError
from run import jail, stop
from run.alphabet import cleaned
from run.answers import quick_verdict, verdict

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 20
MOST_WORKERS = 16  # on a machine: its ranks have a judge each, and share them out
MEMORY = 4 << 30  # bytes for all of them together, on all ranks of a machine
SILENCE = 60.0  # seconds; a judge that lives says something each second, on a busy machine later
RESTARTS = "rewards/accuracy/judge_restarts"  # the metric: processes that had to be replaced
TIMERS = {signal.SIGPROF, signal.SIGALRM}  # of processor time, and of real time
# Read by math_verify as a judge starts, so that forks find loaded and cached what it needs.
WARM_ANSWERS = ("7", r"\frac{1}{2}", "x^2+2x+1", "(1, e]", r"\boxed{\pi}", "so $x = 5$ it is.")
WARM_REFERENCES = ("0.5", "(x+1)^2", r"2\sqrt{3}")


# The trainer's side ----------------------------------------------------------------------------


class Judge:
    """Verdicts on (answer, reference) pairs; timeout: processor seconds that one of them may take.

    RewardError if its process ends, or falls silent, twice on one batch.
    """

    def __init__(self, timeout: float):
        if not timeout > 0:
            raise UsageError(f"--accuracy_timeout {timeout}: must be more than 0 seconds")
        self.timeout, self.process = timeout, None
        self.restarts = 0  # until `take_restarts` takes them

    def __call__(self, pairs: list[tuple[str, str]]) -> list[str]:
        pairs = [(cleaned(a), cleaned(b)) for a, b in pairs]
        verdicts = {pair: quick_verdict(*pair) for pair in pairs}  # equal pairs are compared once
        hard = [pair for pair, said in verdicts.items() if said is None]
        if hard:
            verdicts.update(zip(hard, self.ask(hard)))
        return [verdicts[pair] for pair in pairs]

    def start(self) -> None:
        """Start the process, unless it runs. It gets ready in the background."""
        if self.process is None:
            # In a session of its own, signals meant for the run miss it, and one kill ends it
            # with its workers. -m puts the folder that it starts in on its path.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "run.judge", str(self.timeout)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )

    def ask(self, pairs):
        """The process's verdicts."""
        for _ in range(2):
            self.start()
            try:
                line = self.say_and_hear(json.dumps(pairs).encode() + b"\n")
                if line:
                    return json.loads(line)
            except (BrokenPipeError, ValueError):  # it has ended, or was ended amid a line
                pass
            except BaseException:
                self.close()  # or the next batch would read this one's verdicts
                raise
            # Something ended it, perhaps the kernel for lack of memory, or silence: once more.
            self.close()
            self.restarts += 1
        raise RewardError(
            "the process that checks answers ended, or fell silent, twice on one batch"
        )

    def say_and_hear(self, question: bytes) -> bytes:
        """Its answer, a line; empty if it has ended, which SILENCE seconds without a word do."""
        line = b"\n"
        with self.watched():
            self.process.stdin.write(question)
            self.process.stdin.flush()
        while line == b"\n":  # a sign of life
            with self.watched():
                line = self.process.stdout.readline()
        return line

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What waits for the process in here ends SILENCE seconds later, since the process does."""
        watchdog = threading.Timer(SILENCE, os.killpg, [self.process.pid, signal.SIGKILL])
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()

    def take_restarts(self) -> int:
        """How many processes had to be replaced since the last call."""
        taken, self.restarts = self.restarts, 0
        return taken

    def close(self) -> None:
        """End the process and its workers."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with suppress(BrokenPipeError):
            process.stdin.close()


# The judge's side ------------------------------------------------------------------------------


def judge_main(timeout: float) -> None:
    """A line of pairs in (JSON, stdin), a line of verdicts out (stdout), until the trainer ends."""
    # To be woken, if it is stopped, and see that. (To be killed would be too much: the kernel takes
    # the end of the thread that has started this process for the end of the trainer.)
    stop.end_with_parent(stop.PARENT, signal.SIGCONT)
    end_with(os.getppid())
    logging.disable(logging.CRITICAL)  # math_verify warns that its own time limits are off
    for answer in WARM_ANSWERS:
        print(flush=True)  # a sign of life
        for reference in WARM_REFERENCES:
            verdict(answer, reference)
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        cores = len(os.sched_getaffinity(0))
    workers = workers_of(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for line in sys.stdin.buffer:
        print(json.dumps(compare(json.loads(line), timeout, cores, workers)), flush=True)
    os.killpg(0, signal.SIGKILL)


def workers_of(ranks: int) -> int:
    """How many one of so many judges may have. It has at least one, so that beyond MOST_WORKERS
    ranks on a machine they take more than MEMORY."""
    return max(1, MOST_WORKERS // ranks)


def end_with(trainer: int) -> None:
    """End this session when the trainer has ended, even if its child holds our stdin open."""

    def end_if_orphan(*_):
        if os.getppid() != trainer:
            os.killpg(0, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end_if_orphan)
    signal.setitimer(signal.ITIMER_REAL, 1.0, 1.0)


@dataclass
class Worker:
    """A process that compares some of a batch's pairs, one after the other."""

    pid: int
    todo: deque[int]  # the indices of the pairs left to it
    since: float  # its processor time when it last said something
    heard: float  # when that was
    overdue: bool = False  # ended for its silence


def compare(pairs, timeout, cores, most_workers=MOST_WORKERS, slow=0.1) -> list[str]:
    """Verdicts on the pairs. An answer may hold up those behind it for `slow` processor seconds."""
    verdicts = [CRASH] * len(pairs)
    # Neighbours stay together, for the completions of a group share their reference.
    share = math.ceil(len(pairs) / min(cores, 4))
    waiting, spoken = deque(), time.monotonic()
    for i in range(0, len(pairs), share):
        waiting.append(deque(range(i, min(i + share, len(pairs)))))
    running = {}  # pipe → worker
    while waiting or running:
        while waiting and len(running) < most_workers:
            todo = waiting.popleft()
            pid, pipe = fork_worker([pairs[i] for i in todo], timeout)
            running[pipe] = Worker(pid, todo, processor_time(pid), time.monotonic())
        for pipe in select.select(list(running), [], [], slow / 2)[0]:
            worker = running[pipe]
            worker.since, worker.heard = processor_time(worker.pid), time.monotonic()
            marks = os.read(pipe, 4096).decode()
            for mark in marks[: len(worker.todo)]:
                verdicts[worker.todo.popleft()] = mark
            if not marks or not worker.todo:
                del running[pipe]
                timed_out = end_worker(worker, pipe) or worker.overdue
                if worker.todo:  # it died over the first of these
                    verdicts[worker.todo.popleft()] = TIMEOUT if timed_out else CRASH
                if worker.todo:
                    waiting.append(worker.todo)
        now = time.monotonic()
        for worker in running.values():
            # Its timers end a worker earlier, but not one that is stopped.
            if now > worker.heard + 1.5 * PATIENCE * timeout and not worker.overdue:
                worker.overdue = True
                os.kill(worker.pid, signal.SIGKILL)
        if now > spoken + 1.0:
            spoken = now
            print(flush=True)  # a sign of life
        for worker in running.values():
            if len(worker.todo) > 1 and processor_time(worker.pid) - worker.since > slow:
                waiting.append(take_over(worker))
    return verdicts


def processor_time(pid: int) -> float:
    """Seconds that a process has computed; where there is no /proc, the time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return time.monotonic()
    # Its name, in brackets, may hold spaces. Behind it, the 12th and 13th fields count ticks.
    user, system = stat.rpartition(b")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def take_over(worker: Worker) -> deque[int]:
    """Leave a slow worker to the pair that it is at. Returns those behind."""
    slow = worker.todo.popleft()
    behind, worker.todo = worker.todo, deque([slow])
    return behind


def end_worker(worker: Worker, pipe: int) -> bool:
    """End a worker and close its pipe. Returns whether a timer had ended it."""
    os.kill(worker.pid, signal.SIGKILL)  # it may be at pairs that another has taken over
    _, status = os.waitpid(worker.pid, 0)
    os.close(pipe)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in TIMERS


def fork_worker(pairs, timeout, memory=MEMORY // MOST_WORKERS) -> tuple[int, int]:
    """Fork a process that writes a verdict a pair into a pipe, and ends. Returns pid and pipe.

    It sets two timers before each answer and leaves them to the kernel, which ends even a process
    deep in arithmetic on big integers. It may compute, and nothing else (run/jail.py). memory:
    bytes that it may take beyond what it shares with the judge.
    """
    pipe, write = os.pipe()
    judge, pid = os.getpid(), os.fork()
    if pid:
        os.close(write)
        return pid, pipe
    try:
        stop.end_with_parent(judge)
        for timer in TIMERS:
            signal.signal(timer, signal.SIG_DFL)  # it ends the process
        for stream in (0, 1, 2):  # what sympy prints must not reach the trainer
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        os.closerange(3, write)  # other workers' pipes, which bring their verdicts
        os.closerange(write + 1, 256)
        with suppress(ValueError, OSError):  # where there is no /proc, there is no limit
            most = memory + address_space()
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        jail.shut()
        for answer, reference in pairs:
            signal.setitimer(signal.ITIMER_PROF, timeout)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE * timeout)
            mark = verdict(answer, reference)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.write(write, mark.encode())
    finally:
        os._exit(0)


def address_space() -> int:
    """Bytes that this process has mapped."""
    pages = Path("/proc/self/statm").read_text().split()[0]
    return int(pages) * resource.getpagesize()


if __name__ == "__main__":
    with suppress(BrokenPipeError):  # the trainer has ended
        judge_main(float(sys.argv[1]))
    os.killpg(0, signal.SIGKILL)  # and the workers with it
