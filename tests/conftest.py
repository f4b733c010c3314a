"""Small models with random weights and the real tokenizer, and train.py as a user starts it."""

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # else the hub is asked, and asked again
ROOT = Path(__file__).parent.parent
EMBEDDED_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
sys.path.insert(0, str(ROOT))
import rewards  # noqa: E402

# architecture → (config class, model class, what is special about it)
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama-mha": ("LlamaConfig", "LlamaForCausalLM", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"sliding_window": 5}),  # caps its logits, too
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 5}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 4}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.3}),
    "smollm3": (
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2},
    ),  # some layers know no positions
    "hunyuan": (
        "HunYuanDenseV1Config",
        "HunYuanDenseV1ForCausalLM",
        {},
    ),  # norms of transposed tensors
    "deepseek3": (  # keys wider than values
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        | {"v_head_dim": 8, "first_k_dense_replace": 3},
    ),
}


FIRST_TOKENS = 1024  # of the tiny model; special tokens and bytes are among them
# Begun first, so that at the end no process is left with much to do alone.
LONGEST = [
    "test_vllm",
    "test_rollouts",
    "test_zero3_runs",
    "test_commands",
    "test_layout",
    "test_resume",
]
LONGEST += ["test_train", "test_judge", "test_nodes", "test_family", "test_zero2", "test_zero3"]


def pytest_collection_modifyitems(items):
    places = {f"{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def tiny_model(architecture: str = "llama", vocab_size: int = 97, dtype=torch.float32, **changes):
    """A model of two to four layers whose weights are large enough that its distributions are far from uniform."""
    import transformers

    config_class, model_class, special = ARCHITECTURES[architecture]
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**(sizes | special | changes))
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


@pytest.fixture(autouse=True)
def own_rewards():
    """What a run in a test's process registers is forgotten at the test's end."""
    yield
    rewards.orms.clear()
    rewards.orms.update(rewards.BUILT_IN)


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    if not EMBEDDED_MODEL.exists():
        pytest.skip("no embedded model; make model puts it there")
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def embedded_model(tokenizer) -> Path:
    """The embedded model itself; skips where it is not on disk."""
    return EMBEDDED_MODEL


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory) -> Path:
    """A tiny Llama with tied embeddings, and the first tokens of the embedded model's tokenizer: with
    all 49,152 most of a short run's time would be theirs."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    model = whole["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < FIRST_TOKENS}
    known = model["vocab"]  # a merge has an id above those of its parts
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in known]
    file.write_text(json.dumps(whole))
    tiny_model(vocab_size=FIRST_TOKENS, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(model_folder):
    """The tiny model's own."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    """A reward that tells random completions apart, so that there is something to learn from."""
    file = tmp_path_factory.mktemp("plugin") / "vowels.py"
    file.write_text(
        "from rewards import orms\n\n\n"
        "def vowels(completions, **columns):\n"
        '    return [sum(c in "aeiou" for c in text) / (1 + len(text)) for text in completions]\n\n\n'
        'orms["vowels"] = vowels\n'
    )
    return file


def flags_for(model_folder, plugin, output_dir, **changes) -> list[str]:
    """A short float32 run on the built-in task with a reward that tells random completions apart."""
    flags = {
        "model": model_folder,
        "torch_dtype": "float32",
        "gradient_checkpointing": "false",  # quicker
        "dataset": "arithmetic#64",  # few, since every run tokenizes them all
        "external_plugins": plugin,
        "reward_funcs": ["vowels", "format"],
        "num_generations": 4,
        "per_device_train_batch_size": 16,
        "max_completion_length": 8,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "beta": 0.04,
        "output_dir": output_dir,
    } | changes
    words = []
    for name, value in flags.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def train_here(*flags) -> str:
    """train.py in this process, which saves the seconds of a start → what it printed."""
    import train

    with contextlib.redirect_stdout(io.StringIO()) as out:
        train.main([str(flag) for flag in flags])
    return out.getvalue()


def start_train(
    *flags, processes=1, root: Path = ROOT, launcher="torch.distributed.run", **env
) -> subprocess.Popen:
    """train.py in processes of its own, as a user starts it, one thread each."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", launcher, "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen(
        [*command, str(root / "train.py"), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def run_train(*flags, processes: int = 1, check: bool = True, **env) -> subprocess.CompletedProcess:
    """The same, until it has ended."""
    with start_train(*flags, processes=processes, **env) as run:
        try:
            out, err = run.communicate(timeout=600)
        except BaseException:
            run.kill()
            raise
    if check and run.returncode:
        raise AssertionError(f"exit {run.returncode}: {' '.join(run.args)}\n{out}\n{err}")
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def read_metrics(folder: Path, evaluations: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if any(name.startswith("eval/") for name in line) == evaluations]


def checkpoint_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint folder, of the model or of the adapters."""
    from safetensors.torch import load_file

    is_lora = (checkpoint / "adapter_config.json").exists()
    return load_file(checkpoint / ("adapter_model.safetensors" if is_lora else "model.safetensors"))


def timeless(lines: list[dict]) -> list[dict]:
    """Metrics without those that are times, or the process's memory."""
    own = ("time/", "memory/")
    return [{k: v for k, v in line.items() if not any(part in k for part in own)} for line in lines]


def make_batch(groups=3, num_generations=4, longest=9, seed=0):
    """Prompts of different lengths that begin alike, ragged completions, rewards; some completions
    end with end-of-sequence, some are cut."""
    rng = random.Random(seed)
    beginning = [5, 6, 7, 8]
    prompts, completions = [], []
    for _ in range(groups):
        prompt = beginning + [rng.randrange(3, 97) for _ in range(rng.randrange(1, 7))]
        for _ in range(num_generations):
            prompts.append(prompt)
            length = rng.randrange(1, longest + 1)
            completions.append([rng.randrange(3, 97) for _ in range(length)])
            if rng.random() < 0.5:
                completions[-1][-1] = 2
    rewards = torch.tensor([rng.choice([0.0, 0.5, 1.0, 2.0]) for _ in prompts], dtype=torch.float64)
    return prompts, completions, rewards
