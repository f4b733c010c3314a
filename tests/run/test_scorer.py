"""Reward models from the wild: found unfit before a policy is loaded, or scored right."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from fixtures.rewards.classifier import TEMPLATE, WORDS, save_classifier
from safetensors.torch import load_file

from data import UsageError
from rewards import RewardModel
from run import scorer

USER = {"role": "user", "content": "good ? 3"}
SYSTEM = {"role": "system", "content": "bad"}
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
)


def test_a_template_that_refuses_a_prompt_is_told(tmp_path):
    path = save_classifier(tmp_path / "picky", template=NO_SYSTEM + TEMPLATE)
    found = scorer.check(path)
    found.check_prompts([[USER], [USER]], 10)
    with pytest.raises(UsageError) as error:
        found.check_prompts([[USER], [SYSTEM, USER]], 10)
    said = f"--reward_model {path}: its chat template refuses a prompt: no system turn"
    assert str(error.value) == said


@pytest.mark.parametrize(("completion", "fits"), [(40, True), (60, False)])
def test_a_context_too_short_for_prompt_and_completion_is_told(completion, fits, tmp_path):
    """The chat of the prompt has some twelve words, the context 64."""
    folder = Path(save_classifier(tmp_path / "short"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    found = scorer.check(str(folder))
    if fits:
        found.check_prompts([[USER]], completion)
        return
    with pytest.raises(UsageError, match="reads 64 tokens; a prompt of 1. and --max_completion"):
        found.check_prompts([[USER]], completion)


def padding(folder: Path, kind: str) -> str:
    """A classifier whose files say something else of padding."""
    path = save_classifier(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    config = transformers.AutoConfig.from_pretrained(path)
    if kind == "none":
        tokenizer.pad_token = None
        config.pad_token_id = None
    elif kind == "end of sequence":
        tokenizer.pad_token, tokenizer.eos_token = None, "."
        config.pad_token_id = None
    elif kind == "none that exists":
        config.pad_token_id = -1
    elif kind == "the model's own":  # [UNK], which the tokenizer knows nothing of
        config.pad_token_id = 0
    tokenizer.save_pretrained(path)
    config.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind", ["none", "none that exists", "end of sequence", "the model's own", "stated"]
)
def test_a_score_does_not_depend_on_what_lies_beside_it(kind, tmp_path):
    model = RewardModel(padding(tmp_path / "model", kind), torch.float32, "cpu", scorer.load)
    prompts = [[{"role": "user", "content": "good " * n}] for n in (1, 17, 6)]
    said = ["3", "good bad 4 5 6 7 8 9", "bad ?"]
    together = model(said, prompts=prompts)
    alone = [model([text], prompts=[prompt])[0] for text, prompt in zip(said, prompts)]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together)) == 3


@pytest.mark.parametrize("kind", ["none", "stated"])
def test_a_score_is_that_of_the_last_token_of_the_chat(kind, tmp_path):
    path = padding(tmp_path / "model", kind)
    model = RewardModel(path, torch.float32, "cpu", scorer.load)
    (score,) = model(["good 7"], prompts=[[USER]])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    chat = "<user> good ? 3 . <assistant> good 7 . "
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        states = plain.model(ids).last_hidden_state
        assert score == pytest.approx(plain.score(states)[0, -1, 0].item(), abs=1e-5)


def test_a_model_of_text_and_images_is_checked_by_its_text_model(tmp_path):
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "max_position_embeddings": 48}
    config = transformers.Gemma3Config(text_config=text, num_labels=1)
    config.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(save_classifier(tmp_path / "words")).save_pretrained(
        tmp_path
    )
    with pytest.raises(UsageError, match="reads 48 tokens"):
        scorer.check(str(tmp_path)).check_prompts([[USER]], 40)


def test_a_reward_model_whose_files_lack_its_head_is_not_made_up(tmp_path):
    pickled = Path(save_classifier(tmp_path / "pickled", architecture="LlamaForCausalLM"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its weights lack score.weight"):
        scorer.load(str(pickled), torch.float32)
