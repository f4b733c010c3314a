"""A reward model: whether it can score the prompts and completions of a run, before its weights are
read, and then how it is loaded."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from data import UsageError, one_line
from run import models

BATCH_SIZE = 16  # chats scored at once


def check(path: str, trust_remote_code: bool = False) -> "Checked":
    """UsageError if a folder or hub id is no sequence classifier with one output and a template."""
    models.check_files("--reward_model", path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        missing = missing_head(path, config, trust_remote_code)
    except Exception as error:  # of any kind, where a value is of another type than it should be
        models.refuse_code("--reward_model", path, error)
        problem = f"cannot be read: {models.reason(error)}"
        raise UsageError(f"--reward_model {path}: {problem}") from error
    if config.num_labels != 1:
        problem = f"has {config.num_labels} outputs; a model with one is needed"
        raise UsageError(f"--reward_model {path}: {problem}")
    if missing:
        raise UsageError(f"--reward_model {path}: its weights lack {', '.join(missing)}")
    if not tokenizer.chat_template:
        raise UsageError(f"--reward_model {path}: its tokenizer has no chat template")
    return Checked(path, tokenizer, models.context_of(config))


@dataclass
class Checked:
    """A reward model whose weights nobody has read yet."""

    path: str
    tokenizer: object
    context: float  # tokens that it reads

    def check_prompts(self, prompts: list, longest_completion: int) -> None:
        """UsageError if its template refuses a chat of these, or if one may be too long for it."""
        reply = {"role": "assistant", "content": ""}
        longest = 0
        for prompt in prompts:
            try:
                ids = self.tokenizer.apply_chat_template([*prompt, reply], return_dict=False)
            except Exception as error:  # what a template may raise: "System role not supported"
                problem = f"its chat template refuses a prompt: {one_line(error)}"
                raise UsageError(f"--reward_model {self.path}: {problem}") from error
            longest = max(longest, len(ids))
        if longest + longest_completion > self.context:
            raise UsageError(
                f"--reward_model {self.path}: reads {self.context} tokens; a prompt of {longest} "
                f"and --max_completion_length {longest_completion} are more; shorter ones work"
            )


def missing_head(path: str, config, trust_remote_code: bool = False) -> list[str]:
    """The weights of a classifier's head, if a local folder's files lack them all.

    They are read from the files' headers alone.
    """
    there = set()
    for file in Path(path).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            there.update(weights.keys())
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(
            config, trust_remote_code=trust_remote_code
        )
    body = f"{model.base_model_prefix}."
    head = [name for name, _ in model.named_parameters() if not name.startswith(body)]
    return head if there and there.isdisjoint(head) else []


def load(path: str, torch_dtype, trust_remote_code: bool = False) -> tuple:
    """As `rewards.load_scorer`: a model, its tokenizer, and how many chats to score at once.

    UsageError if the weights lack some, which transformers would make up at random.
    """
    from_pretrained = AutoModelForSequenceClassification.from_pretrained
    model = models.load(from_pretrained, "--reward_model", path, torch_dtype, trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(
        path, padding_side="right", trust_remote_code=trust_remote_code
    )
    # The score is read at a row's last token that is no padding: of what it was trained with.
    config = model.config.get_text_config()
    if config.pad_token_id in range(len(tokenizer)):  # some say -1
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
    needs_none = tokenizer.pad_token is None  # one at a time
    return model, tokenizer, 1 if needs_none else BATCH_SIZE
