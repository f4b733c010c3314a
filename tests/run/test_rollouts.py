"""The loop's own variants: draws that are made again, several steps a rollout, the KL in the reward,
a reference that follows, weights for what the sampler rounds; and the whole family, split and resumed."""

import argparse
import functools
import json
import os
import random
import shutil

import pytest
import torch
from conftest import (
    FIRST_TOKENS,
    flags_for,
    make_batch,
    read_metrics,
    timeless,
    tiny_model,
    train_here,
)
from processes import forked, free_port, places, run_forked

import data
import dist
import grpo
import train
from run import drift, flags, folder
from run.combinations import check_objective, check_reference
from sampler import Completion

# Half of the groups earn all the same: those whose question ends in an even number.
COIN = """
from rewards import orms

def coin(completions, prompts, **columns):
    values = []
    for completion, prompt in zip(completions, prompts):
        digits = [c for c in prompt[-1]["content"] if c.isdigit()]
        dull = int(digits[-1]) % 2 == 0
        values.append(0.0 if dull else sum(c in "aeiou" for c in completion) / (1 + len(completion)))
    return values

orms["coin"] = coin
orms["dull"] = lambda completions, **columns: [0.5] * len(completions)
"""


@pytest.fixture(scope="module")
def coin(tmp_path_factory):
    file = tmp_path_factory.mktemp("coin") / "coin.py"
    file.write_text(COIN)
    return file


def close(one: list[dict], two: list[dict], names=None):
    """Two runs' metrics, but for rounding."""
    for a, b in zip(timeless(one), timeless(two), strict=True):
        assert a.keys() == b.keys()
        for name in [name for name in names or a if name in a]:
            assert b[name] == pytest.approx(a[name], rel=2e-3, abs=2e-5), (a["step"], name)


# Dynamic sampling -------------------------------------------------------------------------------

DYNAMIC = {"reward_funcs": "coin", "dynamic_sample": "true", "max_resample_times": 9}
DYNAMIC |= {
    "dataset": "arithmetic#64",
    "beta": 0,
    "max_steps": 4,
    "log_completions": "true",
    "save_steps": 2,
}


@pytest.fixture(scope="module")
def dynamic(model_folder, coin, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamic") / "run"
    train_here(*flags_for(model_folder, coin, folder, **DYNAMIC))
    return folder


def test_groups_that_teach_nothing_are_drawn_anew(dynamic):
    lines = read_metrics(dynamic)
    assert all(line["zero_std_groups"] == 0 for line in lines)
    assert max(line["draws"] for line in lines) > 1
    assert all(line["completion_length"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_processes_and_a_resume_draw_the_same(dynamic, model_folder, coin, tmp_path):
    words = flags_for(model_folder, coin, tmp_path / "two", **DYNAMIC)
    run_forked([*words, "--per_device_train_batch_size", 8], 2, tmp_path / "ranks")
    resumed = flags_for(model_folder, coin, tmp_path / "resumed", **DYNAMIC)
    resumed += ["--resume_from_checkpoint", dynamic / "checkpoint-2"]
    train_here(*resumed)
    close(read_metrics(dynamic), read_metrics(tmp_path / "two"))
    close(read_metrics(dynamic)[2:], read_metrics(tmp_path / "resumed"))
    told = (dynamic / "completions.jsonl").read_text()
    assert (tmp_path / "two" / "completions.jsonl").read_text().count("\n") == told.count("\n")
    assert told.endswith((tmp_path / "resumed" / "completions.jsonl").read_text())


def test_where_nothing_differs_the_tries_end_and_the_run_says_so(model_folder, coin, tmp_path):
    changes = DYNAMIC | {"reward_funcs": "dull", "max_resample_times": 2, "max_steps": 5}
    said = train_here(*flags_for(model_folder, coin, tmp_path, **changes))
    lines = read_metrics(tmp_path)
    assert [line["draws"] for line in lines] == [3] * 5
    assert [line["drawn_completions"] for line in lines] == [3 * 16] * 5
    assert [line["zero_std_groups"] for line in lines] == [1] * 5
    assert "zero_std_groups is 100%" in said


def test_micro_batches_without_completions_add_nothing(model_folder, coin, tmp_path):
    """Half of the groups teach nothing, so that of eight micro-batches four or more are empty. In
    their place a token passes, 0, which is no padding here: padding has no gradient anyway."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    sizes = {"vocab_size": FIRST_TOKENS, "tie_word_embeddings": True, "pad_token_id": 3}
    tiny_model(**sizes).save_pretrained(model)
    changes = DYNAMIC | {"dynamic_sample": "false", "num_generations": 2, "max_steps": 3}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(*flags_for(model, coin, whole, **changes | {"per_device_train_batch_size": 8}))
    changes |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    train_here(*flags_for(model, coin, parts, **changes))
    assert max(line["zero_std_groups"] for line in read_metrics(whole)) >= 0.5
    close(read_metrics(whole), read_metrics(parts))


# Several steps a rollout --------------------------------------------------------------------------


def test_a_rollout_of_several_steps_is_walked_in_parts(model_folder, plugin, tmp_path):
    """The first part trains as a rollout of its own would; by the second the policy has moved."""
    common = {"max_steps": 4, "eval_steps": 3, "val_dataset": "arithmetic-test#4", "save_steps": 1}
    common["dataset"] = "arithmetic#64"
    one = flags_for(model_folder, plugin, tmp_path / "one", **common)
    two = flags_for(model_folder, plugin, tmp_path / "two", **common, steps_per_generation=2)
    same = flags_for(model_folder, plugin, tmp_path / "same", **common, generation_batch_size=32)
    for words in (one, two, same):
        train_here(*words)
    alone, lines = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert lines[0]["grad_norm"] == pytest.approx(alone[0]["grad_norm"], rel=1e-4)
    assert [line["ratio_deviation"] > 1e-6 for line in lines] == [False, True, False, True]
    assert [line["time/generate"] > 0 for line in lines] == [True, False, True, False]
    assert [line["num_tokens"] for line in lines[1::2]] == [
        line["num_tokens"] for line in lines[::2]
    ]
    close(lines, read_metrics(tmp_path / "same"))
    # Saved and evaluated where a rollout ends.
    assert [path.name for path in folder.checkpoints(tmp_path / "two")] == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert [line["step"] for line in read_metrics(tmp_path / "two", evaluations=True)] == [4]


def test_old_log_probabilities_of_a_later_part_are_those_of_the_policy_that_sampled(
    model_folder, plugin, tmp_path
):
    """At a learning rate of 0 the policy never leaves it."""
    changes = {"steps_per_generation": 3, "learning_rate": 0, "max_steps": 3, "lora_dropout": 0.0}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    for line in read_metrics(tmp_path):
        assert line["ratio/mean"] == pytest.approx(1, abs=1e-6)
        assert line["ratio/max"] == pytest.approx(1, abs=1e-5)


# The KL in the reward -----------------------------------------------------------------------------


class Alone:
    """What `take_off_kl` reads of a run."""

    def __init__(self, **changes):
        words = ["--dataset", "x", "--num_generations", "4", "--plain", "true"]
        self.args = argparse.Namespace(**vars(flags.parse_args(words)) | changes)
        self.world = dist.World(0, 1, torch.device("cpu"))
        self.rewards = argparse.Namespace(weights=[1.0])


def batch_of(prompts, completions, rewards):
    drawn = [Completion(ids, [0.0] * len(ids), True) for ids in completions]
    rewards = torch.tensor(rewards)
    rows = [{"prompt_ids": ids} for ids in prompts]
    return train.Batch(rows, drawn, [[r] for r in rewards.tolist()], rewards, rewards * 0, {})


def test_the_kl_in_the_reward_is_that_of_the_whole_completion():
    prompts, completions, rewards = make_batch()
    policy, reference = tiny_model(dtype=torch.float64), tiny_model(dtype=torch.float64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    run = Alone(beta=0.3, temperature=0.7)
    batch = batch_of(prompts, completions, torch.as_tensor(rewards).flatten().tolist())
    train.take_off_kl(run, policy, reference, batch)
    taken = []
    for prompt, ids, reward in zip(prompts, completions, batch.rewards.tolist()):
        kl = 0.0
        for model, sign in ((policy, 1), (reference, -1)):
            logits = model(torch.tensor([prompt + ids])).logits[0] / 0.7
            logps = logits.log_softmax(-1)
            kl += sign * sum(logps[len(prompt) - 1 + t, ids[t]].item() for t in range(len(ids)))
        taken.append(reward - 0.3 * kl)
    expected, _ = grpo.group_advantages(torch.tensor(taken, dtype=torch.float64), 4)
    torch.testing.assert_close(batch.advantages.double(), expected, atol=1e-4, rtol=0)


def test_equal_rewards_of_equal_policies_have_no_advantages_in_bfloat16():
    """Of a sampler's log-probabilities they would: its rounding is not the trainer's."""
    prompts, completions, _ = make_batch()
    policy = tiny_model(dtype=torch.bfloat16)
    for size in (2, 3, 12):
        run = Alone(beta=0.3, per_device_train_batch_size=size)
        batch = batch_of(prompts, completions, [0.0] * len(prompts))
        train.take_off_kl(run, policy, tiny_model(dtype=torch.bfloat16), batch)
        assert not batch.advantages.any()


# A reference that follows ------------------------------------------------------------------------


def test_the_reference_follows_the_policy(model_folder, plugin, tmp_path):
    changes = {"train_type": "full", "sync_ref_model": "true", "max_steps": 4, "beta": 0.04}
    changes["dataset"] = "arithmetic#64"
    taken = {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    train_here(*flags_for(model_folder, plugin, tmp_path / "taken", **changes, **taken))
    # It is the policy at each rollout's beginning.
    assert [line["kl"] for line in read_metrics(tmp_path / "taken")] == [0] * 4
    mixed = changes | {"ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5, "save_steps": 2}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_here(*flags_for(model_folder, plugin, straight, **mixed))
    words = flags_for(model_folder, plugin, resumed, **mixed)
    train_here(*words, "--resume_from_checkpoint", straight / "checkpoint-2")
    assert read_metrics(straight)[1]["kl"] > 0 and read_metrics(straight)[2]["kl"] > 0
    close(read_metrics(straight)[2:], read_metrics(resumed))


def test_following_is_a_mean_of_the_two():
    old, new = tiny_model(), tiny_model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = {
        n: 0.6 * p + 0.4 * q
        for (n, p), (_, q) in zip(new.named_parameters(), old.named_parameters())
    }
    train.follow(old, new, 0.6)
    for name, parameter in old.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].detach())


# What the sampler rounds --------------------------------------------------------------------------


def test_metrics_of_the_weights_equal_their_definitions():
    lengths, noise = [3, 1, 4], random.Random(0)
    ours = [[-noise.random() for _ in range(n)] for n in lengths]
    theirs = [[-noise.random() for _ in range(n)] for n in lengths]
    micros = []
    for rows in ([0, 2], [1], []):
        width = max((lengths[i] for i in rows), default=1)
        old = torch.zeros(len(rows), width)
        for place, i in enumerate(rows):
            old[place, : lengths[i]] = torch.tensor(ours[i])
        drawn = [Completion([5] * lengths[i], theirs[i], True) for i in rows]
        micros.append(argparse.Namespace(completions=drawn, old_logps=old))
    args = grpo_options(
        rollout_importance_sampling_mode="token_mask", rollout_importance_sampling_threshold=1.2
    )
    told = drift.metrics(args, dist.World(0, 1, torch.device("cpu")), micros)
    ratios = torch.tensor([a - b for x, y in zip(ours, theirs) for a, b in zip(x, y)]).exp()
    weights = torch.where(ratios > 1.2, 0.0, ratios)
    expected = {
        "sampler/logp_diff": ratios.log().abs().mean(),
        "sampler/logp_diff_max": ratios.log().abs().max(),
        "sampler/kl": -ratios.log().mean(),
        "sampler/k3": (ratios - ratios.log() - 1).mean(),
        "importance/mean": weights.mean(),
        "importance/max": weights.max(),
        "importance/bounded": (ratios > 1.2).float().mean(),
        "importance/ess": weights.sum() ** 2 / (weights**2).sum() / len(weights),
    }
    assert told == pytest.approx({n: v.item() for n, v in expected.items()}, rel=1e-5)
    assert 0 < told["importance/bounded"] < 1


def grpo_options(**changes):
    return argparse.Namespace(**vars(grpo.PAPER) | changes)


# The whole family, split and resumed --------------------------------------------------------------

CHOICES = {
    "advantage_estimator": ["grpo", "rloo", "reinforce_plus_plus"],
    "scale_rewards": ["group", "batch", "none", "mean", "gdpo"],
    "loss_type": ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo"],
    "importance_sampling_level": ["token", "sequence"],
    "epsilon_high": [0.28, 5],
    "beta": [0, 0.04],
    "kl_unbiased": ["false", "true"],
    "kl_in_reward": ["false", "true"],
    "entropy_coef": [0, 0.01],
    "top_entropy_quantile": [1, 0.4],
    "certain_tail": [1, 0.2],
    "off_policy_sequence_mask_delta": [None, 0.001],
    "overlong_filter": ["false", "true"],
    "dynamic_sample": ["false", "true"],
    "num_iterations": [1, 2],
    "rollout": [1, 2],
    "rollout_importance_sampling_mode": ["off", "token_truncate", "token_mask", "sequence_mask"],
    "train_type": ["lora", "full"],
    "sync_ref_model": ["false", "true"],
    "num_generations": [4, 16],  # groups that lie across micro-batches and ranks
}
COMMON = {
    "save_steps": 1,
    "dataset": "arithmetic#64",
    "ref_model_sync_steps": 1,
    "deepspeed": "zero2",
}
COMMON |= {
    "temperature": 0.2,  # else entropies hardly differ
    "rollout_importance_sampling_threshold": 2.0,
    "max_resample_times": 2,
    "learning_rate": 2e-4,
}
COMMON |= {"reward_funcs": ["coin", "format"], "bucket_size": 1000, "max_completion_length": 6}
DRAWN = 10
DEFAULTS = flags.parse_args(["--dataset", "x"])


@functools.cache
def drawn(count: int) -> list[dict]:
    """As many combinations, without those that are refused, in which each value comes up."""
    for seed in range(1000):
        rng, found = random.Random(seed), []
        while len(found) < count:
            changes = {name: rng.choice(values) for name, values in CHOICES.items()}
            if is_taken(changes):
                found.append(changes)
        if all({c[name] for c in found} == set(values) for name, values in CHOICES.items()):
            return found
    raise AssertionError("no draw has every value")


def is_taken(changes: dict) -> bool:
    typed = {name: {"true": True, "false": False}.get(v, v) for name, v in changes.items()}
    try:
        check_objective(argparse.Namespace(**vars(DEFAULTS) | typed))
        check_reference(argparse.Namespace(**vars(DEFAULTS) | typed))
    except data.UsageError:
        return False
    return True


def words_of(changes: dict, size: int, accumulation: int, model="m", plugin="p", folder="f"):
    changes = {name: value for name, value in (COMMON | changes).items() if value is not None}
    rollout = changes.pop("rollout")  # optimizer steps
    changes["steps_per_generation"] = accumulation * rollout
    changes["max_steps"] = 2 * rollout * changes["num_iterations"]
    changes |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    return list(map(str, flags_for(model, plugin, folder, **changes)))


def train_in_turns(runs: list[list[str]], ports: list[int]) -> None:
    for words, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train.main(words)


@pytest.fixture(scope="module")
def ending_model(model_folder, tmp_path_factory):
    """The tiny model, of which a sixth of all tokens end a completion: some end, some are cut."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(model_folder, folder)
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"eos_token_id": list(range(2, 49152, 6))}))
    return folder


@pytest.fixture(scope="module")
def family(ending_model, coin, tmp_path_factory):
    """Each combination as a whole, in micro-batches, resumed, and on two ranks."""
    home, model_folder = tmp_path_factory.mktemp("family"), ending_model
    runs = {"whole": [], "micro": [], "resumed": [], "ranks": []}
    for i, changes in enumerate(drawn(DRAWN)):
        for name, size, accumulation in (("whole", 16, 1), ("micro", 8, 2), ("ranks", 8, 1)):
            own = home / f"{name}-{i}"
            runs[name].append(words_of(changes, size, accumulation, model_folder, coin, own))
        whole, resumed = home / f"whole-{i}", home / f"resumed-{i}"
        words = words_of(changes, 16, 1, model_folder, coin, resumed)
        runs["resumed"].append((words, whole))
    jobs = []
    ports = [free_port() for _ in range(DRAWN)]
    for place in places(2, LOCAL_WORLD_SIZE=2):
        jobs.append((train_in_turns, (runs["ranks"], ports), place | {"LOCAL_RANK": place["RANK"]}))
    with forked(home / "ranks", *jobs) as ranks:
        for words in runs["whole"] + runs["micro"]:
            train_here(*words)
        for words, whole in runs["resumed"]:
            first = folder.checkpoints(whole)[0]
            train_here(*words, "--resume_from_checkpoint", first)
        ends = [rank.end(timeout=600) for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends
    return home


def comparable(lines: list[dict]) -> int:
    """Steps up to one whose gradient is little but rounding: AdamW makes a whole step of it."""
    small = [i for i, line in enumerate(lines) if 0 < line["grad_norm"] < 1e-3]
    return small[0] + 1 if small else len(lines)


@pytest.mark.parametrize("other", ["micro", "resumed", "ranks"])
@pytest.mark.parametrize("i", range(DRAWN))
def test_any_combination_is_the_same_in_parts_and_resumed(i, other, family):
    whole, parts = read_metrics(family / f"whole-{i}"), read_metrics(family / f"{other}-{i}")
    names = ["loss", "grad_norm", "reward", "clip_ratio", "left_out", "completion_length", "draws"]
    whole = whole[-len(parts) :]
    steps = comparable(whole)
    close(whole[:steps], parts[:steps], names)  # a step that trains on nothing lacks some of them


def test_nearly_all_of_them_train_and_are_compared(family):
    """A single prompt may earn nothing but zeros, and its reference be the policy itself."""
    runs = [read_metrics(family / f"whole-{i}") for i in range(DRAWN)]
    assert sum(comparable(lines) == len(lines) for lines in runs) >= DRAWN - 2
    last = [read_metrics(family / f"whole-{i}")[-1] for i in range(DRAWN)]
    assert sum(line["grad_norm"] > 0 for line in last) >= DRAWN - 2
    assert any(0 < line["clipped_completions"] < 1 for line in last)


# Bad input ----------------------------------------------------------------------------------------

REFUSED = {
    "--steps_per_generation 3 --gradient_accumulation_steps 2": "--steps_per_generation 3: ",
    "--steps_per_generation 2 --generation_batch_size 32": "--generation_batch_size 32: ",
    "--generation_batch_size 20": "--generation_batch_size 20: ",
    "--sync_ref_model true": "--train_type full works",
    "--sync_ref_model true --train_type full --beta 0": "--beta 0 has no reference",
    "--kl_in_reward true --scale_rewards gdpo": "--kl_in_reward true: ",
    "--kl_in_reward true --kl_unbiased true": "--kl_unbiased true: ",
    "--max_resample_times 0": "--max_resample_times: '0': ",
    "--ref_model_mixup_alpha 1.5": "--ref_model_mixup_alpha: '1.5': ",
    "--rollout_importance_sampling_threshold 0": "a number above 0 works",
    "--reward_funcs soft_overlong --soft_cache_length 900": "--soft_cache_length 900: ",
    "--vllm_importance_sampling_clip_max 3": "it is --rollout_importance_sampling_threshold now",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_has_no_meaning_together_is_refused_in_one_line(words, capsys):
    with pytest.raises(SystemExit):
        flags.answer_early(["--dataset", "x", *words.split()])
    said = capsys.readouterr().err
    assert REFUSED[words] in said and said.count("\n") == 1
