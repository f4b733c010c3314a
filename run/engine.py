"""vLLM in a process of its own, so that it can be watched and ended whatever it does.

    rank 0                              engine (python -m run.engine)
    Engine(…)       ── arguments ──>    vllm.LLM(…)
    complete(…)     ── requests ───>    complete      "alive" each second, then the completions
    announce, send  ── weights ────>    load_weights  then their fingerprint

Commands and replies are pickled tuples over a pipe; weights have a process group of their own
(weights.WeightGroup). An engine that ends, or says nothing for --vllm_timeout seconds, is killed,
and what waits for it fails with a SamplerError that names its log. It ends when the trainer does.

To sample with another engine, write a class with the two methods of `OnRank0` that
sampler.VLLMSampler calls, `load` and `complete`.
"""

import atexit
import functools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor

from run import display, stop, watch
from run.fingerprint import Fingerprint
from run.weights import WeightGroup, receive_weights, send_weights
from sampler import Completion, SamplerError

ROOT = Path(__file__).resolve().parent.parent
JOINING = "joining"  # in the store of trainer and engine
START_TIMEOUT = 600.0  # seconds in which an engine starts: a large model is read, graphs captured


# The trainer's side -----------------------------------------------------------------------------


class OnRank0:
    """An engine beside rank 0 that all ranks call at the same time, with the same outcome.

    start: makes an `Engine`, here and on rank 0 alone. What ends it is a SamplerError on all ranks.
    """

    def __init__(self, world, start: Callable[[], "Engine"]):
        self.world = world
        self.engine: Engine | None = None  # on rank 0 only
        self._together(lambda: setattr(self, "engine", start()))

    def complete(self, requests: list[tuple], sampling: dict) -> list[Completion]:
        """(prompt, number of completions, seed) … → the completions of all, in that order."""
        return self._together(lambda: self.engine.complete(requests, sampling))

    def load(self, announced: list[tuple], weights: Iterable, collective: bool) -> None:
        """Send weights, announced as (name, shape, dtype). collective: to make one takes all ranks."""
        self._together(
            lambda: send_weights(self.engine, announced, weights), weights if collective else ()
        )

    def _together(self, function: Callable, weights: Iterable = ()):
        """What rank 0's call returns, or the SamplerError that it raises, on every rank.

        weights: what the call goes through, and the other ranks with it.
        """
        outcome = None
        if self.world.is_main:
            try:
                outcome = function()
            except SamplerError as error:
                outcome = error
            except OSError as error:  # no room for its log, no process to be had
                outcome = SamplerError(f"--use_vllm true: {error}")
        for _ in weights:  # on rank 0 those that it came to no more, after an error
            pass
        outcome = self.world.from_main(outcome)
        if isinstance(outcome, SamplerError):
            raise outcome
        return outcome

    def close(self) -> None:
        if self.engine:
            self.engine.close()


class Engine:
    """vLLM in a process of its own; when this returns, it runs.

    engine_args: vllm.LLM's; device: the engine's; trainer: that of the weights it will be sent;
    timeout: seconds without a sign of life after which it is killed. Calls end with a SamplerError
    when it has ended.
    """

    def __init__(
        self,
        engine_args: dict,
        device: torch.device,
        *,
        trainer: torch.device,
        timeout: float = 300.0,
        log: str | Path = "vllm.log",
    ):
        two_gpus = device.type == "cuda" and device != trainer  # NCCL needs two
        self.backend = "nccl" if two_gpus else "gloo"
        self.trainer, self.timeout, self.log = trainer, timeout, log
        self.silent = 0.0  # after how many seconds of silence it was killed
        self.ended = False  # killed and waited for
        self.group: WeightGroup | None = None  # from the first weights on
        self.store = watch.serve_store("127.0.0.1", 0, 2)
        self.pipe, theirs = multiprocessing.Pipe()
        with open(log, "ab") as file:
            # -P keeps the folder that it starts in off its path.
            command = [sys.executable, "-P", "-m", "run.engine"]
            self.process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=engine_environment(device),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,  # signals meant for the run miss it
            )
        theirs.close()
        atexit.register(self.close)
        self.ask(engine_args, self.backend, self.store.port)
        self.reply(max(timeout, START_TIMEOUT))

    def complete(self, requests: list[tuple], sampling: dict) -> list[Completion]:
        """(prompt, number of completions, seed) … → the completions of all, in that order."""
        self.ask("complete", requests, sampling)
        return self.reply()

    def announce(self, tensors: list[tuple]) -> None:
        """Say which weights come next: (name, shape, dtype) …, in the order of `send`."""
        self.sent = Fingerprint()
        self.ask("load_weights", tensors)
        with self.watched():
            if self.group is None:
                self._await_joining()
                self.group = WeightGroup(self.store, 0, self.backend, self.trainer)

    def _await_joining(self) -> None:
        """Until the engine is about to join the group: neither gloo nor NCCL would notice its end.
        An engine that falls silent is killed by `watched`."""
        while not self.store.check([JOINING]):
            if self.process.poll() is not None:
                raise ConnectionError("the engine is gone")
            time.sleep(0.01)

    def send(self, name: str, tensor: Tensor) -> None:
        """One of the weights."""
        tensor = tensor.to(self.group.device).contiguous()
        with self.watched():
            self.group.send(tensor, lambda: self.process.poll() is None, self.timeout)
        self.sent.add(name, tensor)

    def check_arrived(self) -> None:
        """SamplerError if the engine has got other weights than were sent."""
        if self.reply() != self.sent.digest():
            raise self.failure("received other weights than were sent")

    def ask(self, *command) -> None:
        with self.watched():
            self.pipe.send(command)

    def reply(self, timeout: float | None = None):
        """What the command returns; each of the engine's signs of life starts the limit anew."""
        while True:
            with self.watched(timeout):
                kind, value = self.pipe.recv()
            if kind == "error":
                raise self.failure(value)
            if kind == "done":
                return value
            display.report_groups(*value)  # a sign of life

    @contextmanager
    def watched(self, timeout: float | None = None) -> Iterator[None]:
        """What blocks in here fails as soon as the engine is gone, and the engine is gone after
        `timeout` seconds."""
        timeout = timeout or self.timeout
        watchdog = threading.Timer(timeout, self._silence, [timeout])
        watchdog.daemon = True
        watchdog.start()
        try:
            yield
        except (EOFError, OSError, RuntimeError) as error:
            watchdog.cancel()  # how long the engine takes to end is not silence
            raise self.failure() from error
        finally:
            watchdog.cancel()

    def _silence(self, timeout: float) -> None:
        self.silent = timeout
        self.kill()

    def failure(self, what: str = "") -> SamplerError:
        """End the engine; the error tells what is known of why."""
        with suppress(subprocess.TimeoutExpired):
            # Its pipe closes before it has ended, on a busy machine by seconds.
            self.process.wait(0 if what else 10)
        status = self.process.poll()
        what = what or self._last_words()
        self.kill()
        if self.silent:
            flag = " (--vllm_timeout)" if self.silent == self.timeout else ""
            what = f"gave no sign of life for {self.silent:g} s{flag} and was killed"
        elif not what and status is None:
            what = "could not be reached"
        elif not what and status < 0:
            what = f"was killed by signal {-status}"
        elif not what:
            what = f"ended with status {status}"
        return SamplerError(f"--use_vllm true: the engine {what}; its log is {self.log}")

    def _last_words(self) -> str:
        """The error that the engine told when the trainer was not listening."""
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "error":
                    return value
        return ""

    def close(self) -> None:
        """Let the engine end, for at most 5 seconds."""
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()

    def kill(self) -> None:
        if not self.ended:
            self.ended = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with whatever vLLM may have started
        self.process.wait()


def engine_environment(device: torch.device) -> dict[str, str]:
    """The environment of the engine's process: its one GPU, all CPU cores, nothing of torchrun's,
    and this repository to import from."""
    torchrun = (
        r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE)_(RANK|NAME|WORLD_SIZE)|MASTER_(ADDR|PORT)"
        r"|TORCHELASTIC_.*|OMP_NUM_THREADS"
    )
    kept = {name: text for name, text in os.environ.items() if not re.fullmatch(torchrun, name)}
    if device.type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpu = visible.split(",")[device.index] if visible else str(device.index)
        kept["CUDA_VISIBLE_DEVICES"] = gpu
    else:
        kept["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # training uses the same cores in turn
    kept["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    kept["VLLM_NO_USAGE_STATS"] = "1"
    path = os.environ.get("PYTHONPATH")
    kept["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)
    return kept


# The engine's side, a process of its own --------------------------------------------------------


def engine_main(pipe: Connection, trainer: int) -> None:
    """Carry out the trainer's commands until it is gone. trainer: its process id."""
    stop.end_with_parent(trainer)  # who may be gone by now
    try:
        engine_args, backend, port = pipe.recv()
        from vllm import LLM

        llm, group = LLM(**engine_args), None
        # What vLLM compiles for its first completions belongs to the start.
        complete(llm, pipe, [([0], 2, 0)], {"max_tokens": 2})
        pipe.send(("done", None))
        while True:
            command, *args = pipe.recv()
            if command == "complete":
                pipe.send(("done", complete(llm, pipe, *args)))
                continue
            if group is None:
                store = torch_dist.TCPStore("127.0.0.1", port, 2, is_master=False)
                store.set(JOINING, "1")
                group = WeightGroup(store, 1, backend, torch.device("cuda", 0))
            received = Fingerprint()
            load = functools.partial(load_weights, llm, received)
            receive_weights(group, *args, load)
            pipe.send(("done", received.digest()))
    except (EOFError, BrokenPipeError):
        status = 0  # the trainer is gone
    except BaseException as error:
        traceback.print_exc()
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        with suppress(OSError):
            pipe.send(("error", f"failed ({first_line[:200]})"))
        status = 1
    sys.stdout.flush()
    os._exit(status)  # threads of vLLM's may not want to end


def complete(llm, pipe: Connection, requests: list[tuple], sampling: dict) -> list[Completion]:
    """What Engine.complete returns, with a sign of life each second."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = sampling | {"logprobs": 0, "detokenize": False}
    sampling["output_kind"] = RequestOutputKind.FINAL_ONLY
    engine = llm.llm_engine
    for i, (prompt, n, seed) in enumerate(requests):
        params = SamplingParams(n=n, seed=seed, **sampling)
        engine.add_request(str(i), {"prompt_token_ids": prompt}, params)

    outputs, told = {}, time.monotonic()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output.outputs
        if time.monotonic() > told + 1.0:
            told = time.monotonic()
            pipe.send(("alive", (len(outputs), len(requests))))
    return [completion_of(output) for i in range(len(requests)) for output in outputs[i]]


def completion_of(output) -> Completion:
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids)]
    return Completion(ids, logps, finished=output.finish_reason == "stop")


def load_weights(llm, received: Fingerprint, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Load weights as they arrive, over the old ones, and forget what was computed with those."""

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            received.add(name, tensor)
            yield name, tensor

    def load(worker) -> None:
        model, loaded = worker.model_runner.get_model(), set()
        own_load_weights = model.load_weights
        model.load_weights = lambda weights: loaded.update(own_load_weights(weights))
        try:
            worker.model_runner.reload_weights(weights_iterator=noted())
        finally:
            del model.load_weights
        missing = {name for name, _ in model.named_parameters()} - loaded
        if missing:  # reload_weights only logs them
            what = f"{len(missing)} of its weights were not sent, {min(missing)} among them"
            raise RuntimeError(what)
        # A head tied to the embedding is passed over, but on CPUs it has packed a copy.
        head = getattr(model, "lm_head", None)
        if hasattr(head, "quant_method"):
            head.quant_method.process_weights_after_loading(head)

    llm.collective_rpc(load)
    if not llm.llm_engine.reset_prefix_cache():
        raise RuntimeError("its prefix cache could not be reset")


if __name__ == "__main__":
    engine_main(Connection(int(sys.argv[1])), trainer=int(sys.argv[2]))
