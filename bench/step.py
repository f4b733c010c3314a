"""A whole GRPO step, its training pass and generation, beside TRL, transformers' generate and vLLM.

    python bench/step.py [ROW …]       prints a table and writes bench/step.json (of rows and precisions that did
                                       not run, the last figures stay); needs requirements-test.txt, and vLLM for its rows

Every row is the same work for all: the embedded model in bfloat16 (in float32 on a CPU that has no instructions for
bfloat16), the built-in task's prompts, G = 8, completions of exactly TOKENS tokens (nobody may stop earlier), micro-batches
of at most MICRO completions, as many threads as there are cores. Every contestant lives in a process of its own and works
when it is told to, one at a time and in turns, so that what else the machine does hits all alike. Seconds are medians of
REPEATS turns after a first one that does not count; memory is the process's peak.

Two limits of the machine are measured beside them: the speed of one large matrix product, and of a copy in memory. A
row's share of the first counts the products that its work needs (see `operations`), each prompt once, whatever a
contestant computes beyond that; generation's share of the second, reading all weights once a token.
"""

import importlib.util
import json
import os
import platform
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
TOKENS, G, MICRO, BETA, RANK, ALPHA, LEARNING_RATE = 128, 8, 16, 0.04, 16, 32, 1e-6
REPEATS = 3

# row → what is measured, completions, full training or LoRA, contestants
ROWS = {
    "step, 16 completions, full": ("step", 16, "full", ["ours", "trl"]),
    "step, 64 completions, LoRA": ("step", 64, "lora", ["ours", "trl"]),
    "training pass, 16 completions, full": ("pass", 16, "full", ["ours", "trl"]),
    "generation, 16 completions": ("generate", 16, "full", ["ours", "transformers", "vllm"]),
    "generation, 64 completions": ("generate", 64, "full", ["ours", "transformers", "vllm"]),
}


def precision() -> str:
    import torch

    import dist

    return "bfloat16" if dist.has_bfloat16(torch.device("cpu")) else "float32"


def load_model():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, precision()))


def reward(completions, **_) -> list[float]:
    """Numbers that differ within a group, so that every completion is trained on."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [random.Random(text).random() for text in texts]


def prompts() -> list[dict]:
    import data

    return data.load_rows(["arithmetic"], seed=0)


def prompt_ids(count: int) -> list[list[int]]:
    from transformers import AutoTokenizer

    import data

    rows, _ = data.encode(prompts()[: count // G], AutoTokenizer.from_pretrained(MODEL), None, 1)
    return [row["prompt_ids"] for row in rows for _ in range(G)]


# Contestants. Each is a generator: what comes before a `yield` is one turn's work. --------------------------------


def our_step(count: int, kind: str):
    """train.py itself, which stops for a turn whenever it has logged a step."""
    import threading

    import dist
    import rewards
    import train

    rewards.orms["bench"] = reward
    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    make, log = train.make_sampler, train.Log.step

    def without_ends(*args):
        sampler = make(*args)
        sampler.eos = sampler.eos[:0]
        return sampler

    def wait(*args):
        log(*args)
        done.release()
        turn.acquire()

    train.make_sampler, train.Log.step = without_ends, wait
    flags = [
        "--dataset", "arithmetic", "--reward_funcs", "bench", "--output_dir", tempfile.mkdtemp(), "--train_type", kind,
        "--lora_rank", RANK, "--lora_alpha", ALPHA, "--learning_rate", LEARNING_RATE, "--beta", BETA,
        "--num_generations", G, "--per_device_train_batch_size", MICRO, "--gradient_accumulation_steps", count // MICRO,
        "--max_completion_length", TOKENS, "--temperature", "1.0", "--max_steps", 1000, "--torch_dtype", precision(),
    ]  # fmt: skip
    args = train.parse_args([str(flag) for flag in flags])
    threading.Thread(target=train.train, args=(args, dist.find_world()), daemon=True).start()
    while True:
        done.acquire()
        yield
        turn.release()


def trl_trainer(count: int, kind: str, callbacks=()):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        loss_type="grpo",
        beta=BETA,
        learning_rate=LEARNING_RATE,
        temperature=1.0,
        num_generations=G,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=count // MICRO,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        max_steps=1000,
        model_init_kwargs={"dtype": precision()},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
    )
    rows = [{"prompt": row["prompt"]} for row in prompts()[:1000]]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return GRPOTrainer(
        model=str(MODEL),
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        peft_config=lora if kind == "lora" else None,
        callbacks=list(callbacks),
    )


def trl_step(count: int, kind: str):
    """TRL's trainer, which stops for a turn at every step's end."""
    import threading

    from transformers import TrainerCallback

    turn, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            done.release()
            turn.acquire()

    trainer = trl_trainer(count, kind, [Turns()])
    threading.Thread(target=trainer.train, daemon=True).start()
    while True:
        done.acquire()
        yield
        turn.release()


def a_batch(count: int):
    """Prompts, completions, advantages, and log-probabilities of a reference that is not quite the policy."""
    import torch

    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    completions = [[rng.randrange(100, 40_000) for _ in range(TOKENS)] for _ in range(count)]
    return (
        prompt_ids(count),
        completions,
        torch.randn(count, generator=noise),
        torch.randn(count, TOKENS, generator=noise),
    )


def our_pass(count: int, kind: str):
    import dist
    import grpo

    dist.start(dist.find_world())
    model = load_model().train()
    grpo.prepare(model)
    ids, completions, advantages, ref = a_batch(count)
    settings = {"epsilon": 0.2, "beta": BETA, "num_completions": count}
    while True:
        model.zero_grad()
        logps, _, mask = grpo.completion_logps(model, ids, completions, 1.0)
        loss, _ = grpo.grpo_loss(logps, logps.detach(), logps.detach() + 0.1 * ref, advantages, mask, **settings)
        loss.backward()
        yield


def trl_pass(count: int, kind: str):
    import torch

    trainer = trl_trainer(count, kind)
    trainer.current_gradient_accumulation_steps = 1
    ids, completions, advantages, ref = a_batch(count)
    width = max(map(len, ids))
    inputs = {
        "prompt_ids": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
        "prompt_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.ones(count, TOKENS, dtype=torch.long),
        "advantages": advantages,
        "ref_per_token_logps": 0.1 * ref - 10,
    }
    model = trainer.model.train()
    while True:
        model.zero_grad()
        trainer._compute_loss(model, dict(inputs)).backward()
        yield


def our_generate(count: int, kind: str):
    import dist
    import grpo
    from sampler import ModelSampler

    dist.start(dist.find_world())
    model = load_model()
    grpo.prepare(model)
    sampler, ids = ModelSampler(model, eos_token_ids=[], max_new_tokens=TOKENS), prompt_ids(count)
    while True:
        assert all(len(c.ids) == TOKENS for c in sampler.generate(ids, range(count)))
        yield


def transformers_generate(count: int, kind: str):
    import torch

    model, ids = load_model(), prompt_ids(count)
    width = max(map(len, ids))
    rows = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    while True:
        with torch.inference_mode():
            out = model.generate(
                rows, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0,
            )  # fmt: skip
        assert out.shape[1] == width + TOKENS
        yield


def vllm_generate(count: int, kind: str):
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(MODEL), dtype=precision(), max_model_len=512, enforce_eager=True, kv_cache_memory_bytes=2 << 30,
        generation_config="vllm", enable_chunked_prefill=False,
    )  # fmt: skip
    ids = prompt_ids(count)[::G]
    settings = [
        SamplingParams(n=G, temperature=1.0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, seed=i)
        for i in range(len(ids))
    ]
    while True:
        outs = llm.generate([{"prompt_token_ids": row} for row in ids], settings, use_tqdm=False)
        assert sum(len(c.token_ids) for out in outs for c in out.outputs) == count * TOKENS
        yield


CONTESTANTS = {
    ("step", "ours"): our_step,
    ("step", "trl"): trl_step,
    ("pass", "ours"): our_pass,
    ("pass", "trl"): trl_pass,
    ("generate", "ours"): our_generate,
    ("generate", "transformers"): transformers_generate,
    ("generate", "vllm"): vllm_generate,
}


# Turns -----------------------------------------------------------------------------------------------------------


def contestant(what: str, who: str, count: str, kind: str) -> None:
    """The process of one contestant: a line on stdin is a turn, a line on the real stdout its seconds and peak MB."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    turns = CONTESTANTS[what, who](int(count), kind)
    for _ in sys.stdin:
        started = time.perf_counter()
        next(turns)
        seconds = time.perf_counter() - started
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=answers, flush=True)


def end(processes: dict[str, subprocess.Popen]) -> None:
    for process in processes.values():
        os.killpg(process.pid, signal.SIGKILL)  # vLLM's engine is a process of its own
        process.wait()


def measure(row: str) -> dict:
    what, count, kind, names = ROWS[row]
    names = [n for n in names if n != "vllm" or importlib.util.find_spec("vllm")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    log = Path(tempfile.gettempdir()) / "bench-step.log"
    processes = {}
    for name in names:
        command = [sys.executable, __file__, what, name, str(count), kind]
        with log.open("a") as file:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file}
            processes[name] = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)
    results = {name: [] for name in names}
    for _ in range(1 + REPEATS):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                end(processes)
                sys.exit(f"bench/step.py: {name} ended; {log} tells why")
            results[name].append(tuple(map(float, answer.split())))
    end(processes)
    tokens, needed, machine = count * TOKENS, operations(what, count, kind), limits()
    table = {}
    for name, turns in results.items():
        seconds = statistics.median(seconds for seconds, _ in turns[1:])
        times = [theirs / ours for (theirs, _), (ours, _) in zip(turns[1:], results["ours"][1:])]
        table[name] = {
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
            "times_ours": statistics.median(times),
            "peak_MB": turns[-1][1],
            "of_matmul_peak": needed / seconds / machine["matmul_GFLOP_per_s"] / 1e9,
        }
        if what == "generate":
            bytes_read = TOKENS * sum(p.nbytes for p in load_model().parameters())
            table[name]["of_memory_bandwidth"] = bytes_read / seconds / machine["memory_GB_per_s"] / 1e9
    return {"row": row, "torch_dtype": precision(), "machine": machine, "contestants": table}


def operations(what: str, count: int, kind: str) -> float:
    """Additions and multiplications in the matrix products that a row's work needs, attention left out.

    2 a weight and token forward, as many backward to the inputs and, for full training, to the weights. What prompts
    share is computed once.
    """
    import grpo

    model = load_model()
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters() if p.ndim == 2) - head
    ids, completions, *_ = a_batch(count)
    rows, tokens = grpo.Pack(ids, completions, model.config, "cpu").ids.numel(), count * TOKENS
    forward, generated = 2 * (rows * body + tokens * head), 2 * tokens * (body + head)
    train = {"lora": 2, "full": 3}[kind] * forward
    return {"generate": generated, "pass": train, "step": generated + train + forward}[what]  # with a reference


def limits() -> dict[str, float]:
    """What the machine can do at best: matrix products in the precision of the rows, and copying memory."""
    import torch

    a, b = torch.randn(2, 2048, 2048).to(getattr(torch, precision()))
    source, target = torch.ones(2, 1 << 28, dtype=torch.uint8)

    def best(work) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    return {
        "matmul_GFLOP_per_s": 2 * 2048**3 / best(lambda: a @ b) / 1e9,
        "memory_GB_per_s": 2 * source.numel() / best(lambda: target.copy_(source)) / 1e9,
    }


def main(rows: list[str]) -> None:
    import torch

    results = [measure(row) for row in ROWS if not rows or row in rows]
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(
        f"{precision():38}{'':14}{'seconds':>9}{'tokens/s':>10}{'× ours':>8}{'peak MB':>9}{'of matmul':>11}{'of memory':>11}"
    )
    for result in results:
        for i, (name, r) in enumerate(result["contestants"].items()):
            label = result["row"] if i == 0 else ""
            print(
                f"{label:38}{name:14}{r['seconds']:9.2f}{r['tokens_per_s']:10.0f}{r['times_ours']:8.2f}{r['peak_MB']:9.0f}"
                f"{r['of_matmul_peak']:11.0%}"
                + (f"{r['of_memory_bandwidth']:11.0%}" if "of_memory_bandwidth" in r else "")
            )
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.exists() else []
    for result in results:
        result["machine"] |= machine
    measured = {(result["row"], result["torch_dtype"]): result for result in [*known, *results]}
    file.write_text(json.dumps(list(measured.values()), indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in ("step", "pass", "generate"):
        contestant(*sys.argv[1:])
    else:
        main(sys.argv[1:])
