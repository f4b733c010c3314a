"""vLLM in a process of its own, so that it can be watched and ended whatever it does.

    rank 0                              engine (python -m run.engine)
    Engine(…)       ── arguments ──>    vllm.LLM(…)
    complete(…)     ── requests ───>    complete      "alive" each second, then the completions
    announce, send  ── weights ────>    load_weights  then their fingerprint

Commands and replies are pickled tuples over a pipe; weights have a process group of their own
(sampler.WeightGroup). An engine that ends, or says nothing for --vllm_timeout seconds, is killed,
and what waits for it fails with a SamplerError that names its log. It ends when the trainer does.

To sample with another engine, write a class with the methods that sampler.VLLMSampler calls:
`complete`, `announce`, `send`, `reply`, `failure`, `close`, and `group`.
"""

import argparse
import atexit
import ctypes
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor

from data import UsageError
from run.log import say
from sampler import Completion, SamplerError, WeightGroup, receive_weights

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 600.0  # seconds in which an engine starts: a large model is read, graphs captured


# What flags mean ---------------------------------------------------------------------------------


def engine_for(args: argparse.Namespace, world) -> Callable[[], "Engine"]:
    """What starts the engine that the flags describe."""
    device = device_of(args)
    shared = device.type == "cuda" and device == world.device
    memory = args.vllm_gpu_memory_utilization or (0.3 if shared else 0.9)
    if shared:
        what = f"vLLM shares {device}, the only GPU, with training"
        say(world, f"{what}; --vllm_gpu_memory_utilization is {memory}")
    settings = {
        "model": args.model,
        "dtype": args.torch_dtype,
        "seed": args.seed % 2**32,
        "max_model_len": args.vllm_max_model_len,
        "logprobs_mode": "processed_logprobs",  # of the distribution that was drawn from
        "generation_config": "vllm",
    }
    if device.type == "cuda":
        settings["gpu_memory_utilization"] = memory
        settings["async_scheduling"] = False  # nothing in flight when weights change
    else:
        settings["kv_cache_memory_bytes"] = 2 << 30
        settings["enforce_eager"] = True  # compiling takes minutes and brings a tenth
        # With seeds, 0.32.0 fails on half a prompt: "CPU Generator does not use offset".
        settings["enable_chunked_prefill"] = False
    log = Path(args.output_dir) / "vllm.log"
    return functools.partial(
        Engine, settings, device, trainer=world.device, timeout=args.vllm_timeout, log=log
    )


def device_of(args: argparse.Namespace) -> torch.device:
    """The engine's device, of rank 0's node; on other nodes there is none to find."""
    if int(os.environ.get("GROUP_RANK", 0)):
        return torch.device("cpu")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return vllm_device(args.vllm_device, gpus, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def vllm_device(wanted: str, gpus: int, trainers: int) -> torch.device:
    """The device that `--vllm_device` means, with GPUs numbered as this process sees them.

    `trainers` processes train here, on the first GPUs; a single GPU is shared. The CPU where there
    is no GPU. UsageError when the device is not there or not free.
    """
    if wanted == "auto" and not gpus:
        return torch.device("cpu")
    training = 0 if gpus == trainers == 1 else trainers
    free = [f"cuda:{i}" for i in range(training, gpus)]
    if wanted == "auto" and free:
        return torch.device(free[0])
    if wanted in free:
        return torch.device(wanted)
    if not gpus:
        raise UsageError(f"--vllm_device {wanted}: there is no GPU; auto, the CPU, works")

    if wanted == "auto":
        problem = f"{trainers} processes train on {gpus} GPUs"
    elif wanted in [f"cuda:{i}" for i in range(min(training, gpus))]:
        problem = "a process trains on it"
    else:
        problem = f"there is no such GPU among {gpus}"
    if free:
        hint = f"auto or {' or '.join(free)} works"
    elif gpus == 1:
        hint = "one process would share it"
    else:
        hint = f"{gpus - 1} processes would leave one free"
    raise UsageError(f"--vllm_device {wanted}: {problem}; {hint}")


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


# The trainer's side -----------------------------------------------------------------------------


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
        self.store = torch_dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
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
        self.ask("load_weights", tensors)
        with self.watched():
            if self.group is None:
                self.group = WeightGroup(self.store, 0, self.backend, self.trainer)

    def send(self, tensor: Tensor) -> None:
        """One of the weights, on the group's device."""
        with self.watched():
            self.group.send(tensor, lambda: self.process.poll() is None, self.timeout)

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


# The engine's side, a process of its own --------------------------------------------------------


def engine_main(pipe: Connection, trainer: int) -> None:
    """Carry out the trainer's commands until it is gone. trainer: its process id."""
    # PR_SET_PDEATHSIG: not a moment longer than the trainer, who may be gone by now.
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != trainer:
        os._exit(1)
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
                group = WeightGroup(store, 1, backend, torch.device("cuda", 0))
            load = functools.partial(load_weights, llm)
            pipe.send(("done", receive_weights(group, *args, load)))
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
            pipe.send(("alive", None))
    return [completion_of(output) for i in range(len(requests)) for output in outputs[i]]


def completion_of(output) -> Completion:
    ids = list(output.token_ids)
    logps = [step[token].logprob for step, token in zip(output.logprobs, ids)]
    return Completion(ids, logps, finished=output.finish_reason == "stop")


def load_weights(llm, weights: Iterator[tuple[str, Tensor]]) -> None:
    """Load weights as they arrive, over the old ones, and forget what was computed with those."""

    def load(worker) -> None:
        model, loaded = worker.model_runner.get_model(), set()
        own_load_weights = model.load_weights
        model.load_weights = lambda weights: loaded.update(own_load_weights(weights))
        try:
            worker.model_runner.reload_weights(weights_iterator=weights)
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
