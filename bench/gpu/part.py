"""What every part of the kit uses: where it runs, what it has found, and train.py as a user starts it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
VOWELS = """from rewards import orms


def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]


orms["vowels"] = vowels
"""


class OutOfTime(BaseException):
    """A part's time is over; no `except Exception` on the way holds it up."""


class Part:
    """One part while it runs: where it computes and writes, and what it has found so far."""

    everyone: "list[Part]" = []

    def __init__(self, name: str, device: torch.device, tiny: bool, out: Path, folder: Path):
        self.name, self.device, self.tiny = name, device, tiny
        self.out, self.folder = out, folder  # what is kept, and what ends with the kit
        self.found, self.wrong = {}, []
        self.processes: list[subprocess.Popen] = []
        Part.everyone.append(self)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def tell(self, name: str, value) -> None:
        self.found[name] = value

    def check(self, name: str, value: float, most: float) -> None:
        """A number that has to be at most so large."""
        self.found[name] = float(f"{value:.3g}")
        if not value <= most:
            self.wrong.append(f"{name} is {value:.3g}, more than {most:g}")

    def wants(self, what: str, holds: bool) -> None:
        if not holds:
            self.wrong.append(f"not so: {what}")

    def start(self, command: list, log: str, **environment) -> subprocess.Popen:
        """A process in a session of its own, which ends with the part."""
        with (self.folder / log).open("w") as out:
            settings = {"cwd": ROOT, "stdout": out, "stderr": subprocess.STDOUT}
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
            words = [sys.executable, *map(str, command)]
            process = subprocess.Popen(words, start_new_session=True, env=environment, **settings)
        process.log = self.folder / log
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def finish(*processes: subprocess.Popen, status: int = 0) -> None:
    for process in processes:
        if process.wait() != status:
            end = process.log.read_text()[-800:]
            raise RuntimeError(f"exit {process.returncode}: {process.log.name}: {end}")


# train.py as a user starts it -------------------------------------------------------------------


def tokenizer_folder() -> Path:
    folders = (ROOT / "models" / "SmolLM2-135M-Instruct", ROOT / ".kit" / "tokenizer")
    for folder in folders:
        if (folder / "tokenizer.json").exists():
            return folder
    raise FileNotFoundError("tokenizer.json and tokenizer_config.json belong in .kit/tokenizer")


def save_with_tokenizer(model, folder: Path) -> Path:
    """A model on disk as train.py wants it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder())
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train_flags(part: Part, model: Path, output: str, **changes) -> list[str]:
    plugin = part.folder / "vowels.py"
    plugin.write_text(VOWELS)
    flags = {
        "model": model,
        "dataset": "arithmetic#256",
        "external_plugins": plugin,
        "reward_funcs": "vowels",
        "num_generations": 8,
        "output_dir": part.folder / output,
        "device": part.device.type,
    } | changes
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def read_metrics(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]
