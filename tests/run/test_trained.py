"""What a run has left is used: evaluated, talked to, merged, trained on, loaded by others."""

import contextlib
import importlib.util
import io
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    checkpoint_weights,
    flags_for,
    read_metrics,
    tiny_model,
    train_here,
)
from processes import forked
from safetensors.torch import save_file

import data
import rewards
from run import chat, evaluate, flags, merge, moved, passes, setup, trained
from run.chat import Screen, harmless

G = 4
# What vLLM's kernels take, for the engine below to load the checkpoints, too.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SIZES["intermediate_size"] = 128


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    """A tiny Llama that says a few words alone, and guesses small numbers now and then."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def guesses():
    """A tiny model is never right, so here a third of all texts are, the same ones each time."""

    def score(self, completions, solution):
        return [float(zlib.crc32(text.encode()) % 3 == 0) for text in completions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.Accuracy, "score", score)
        yield


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A reward that differs from step to step."""
    file = tmp_path_factory.mktemp("plugin") / "length.py"
    file.write_text(
        "from rewards import orms\n\n\n"
        "orms['length'] = lambda texts, step, **_: [len(text) + step for text in texts]\n"
    )
    return file


@pytest.fixture(scope="module")
def runs(model, plugin, tmp_path_factory):
    """Two short runs, one of LoRA and one of full training, that evaluate at each step."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"reward_funcs": ["accuracy", "length"], "reward_weights": [1, 0.1], "beta": 0}
    common |= {"val_dataset": "arithmetic-test#12", "per_device_eval_batch_size": 16}
    common |= {"eval_steps": 1, "max_steps": 2, "save_steps": 1, "temperature_eval": 0.7}
    common |= {"learning_rate": 5e-3, "top_k": 20, "system": "Count."}
    for kind in ("lora", "full"):
        words = flags_for(model, plugin, folder / kind, train_type=kind, **common)
        train_here(*words)
    return folder


def said_by(command, *words) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command.main([str(word) for word in words])
    return out.getvalue()


# Evaluate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_evaluation_of_a_checkpoint_is_the_evaluation_that_training_made_there(
    kind, runs, tmp_path
):
    checkpoint, out = runs / kind / "checkpoint-1", tmp_path / "out"
    said = said_by(evaluate, checkpoint, "--output_dir", out)
    found = json.loads((out / "evaluation.json").read_text())
    trained = read_metrics(runs / kind, evaluations=True)[0]
    assert trained["step"] == found["step"] == 1
    trained = {name.removeprefix("eval/"): v for name, v in trained.items() if "time/" not in name}
    del trained["step"]
    at_k = {name: value for name, value in trained.items() if "@" in name}
    assert set(at_k) == {"pass@2", "pass@4", "maj@4"} and 0 < at_k["pass@2"] < 1
    assert found["means"] == pytest.approx(trained, rel=1e-6)
    told = {name: each["value"] for name, each in found["metrics"].items()}
    assert {name: told[name] for name in at_k} == pytest.approx(at_k)
    assert told["accuracy"] == pytest.approx(trained["rewards/accuracy"])
    for name, each in found["metrics"].items():
        assert 0 <= each["low"] <= each["value"] <= each["high"] <= 1
        assert name in said


def test_every_completion_is_kept_and_is_what_the_numbers_are_of(runs):
    """Without --output_dir they lie in the run's folder, and an earlier evaluation moves aside."""
    said = said_by(evaluate, runs / "lora", "--metrics", "greedy", "pass@3")  # the newest
    folder = runs / "lora" / "evaluations" / "checkpoint-2"
    assert str(folder / "completions.jsonl") in said
    found = json.loads((folder / "evaluation.json").read_text())
    assert list(found["metrics"]) == ["greedy", "pass@3"]
    lines = (folder / "completions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    greedy = [record for record in records if record["drawn"] == "greedy"]
    sampled = [record for record in records if record["drawn"] == "sampled"]
    assert len(greedy) == 12 and len(sampled) == 12 * G
    right = sum(record["rewards"]["accuracy"] for record in greedy)
    assert found["metrics"]["greedy"]["value"] == pytest.approx(right / 12)
    by_row = [[r for r in sampled if r["row"] == row] for row in range(12)]
    chances = []
    for group in by_row:
        assert len({record["prompt"] for record in group}) == 1
        c = sum(record["rewards"]["accuracy"] for record in group)
        chances.append(passes.pass_at_k(passes.Question(int(c), [1] * (G - int(c))), 3))
    assert found["metrics"]["pass@3"]["value"] == pytest.approx(sum(chances) / 12)
    said_by(evaluate, runs / "lora", "--metrics", "accuracy")
    assert (folder / "earlier-1" / "completions.jsonl").exists()


def test_greedy_is_what_the_model_itself_finds_likeliest(runs, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    checkpoint, out = runs / "full" / "checkpoint-2", tmp_path / "out"
    said_by(evaluate, checkpoint, "--metrics", "greedy", "--output_dir", out)
    records = [json.loads(line) for line in (out / "completions.jsonl").read_text().splitlines()]
    first = next(record for record in records if record["drawn"] == "greedy")
    own = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer(first["prompt"], add_special_tokens=False, return_tensors="pt").input_ids
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 2}
    said = own.generate(ids, **settings)[0, ids.shape[1] :]
    assert tokenizer.decode(said).removesuffix("<|im_end|>") == first["completion"]


def test_flags_win_over_the_runs_own(runs, tmp_path):
    flags_typed = "--temperature 0.9 --num_generations_eval 2 --max_completion_length 5"
    words = [*flags_typed.split(), "--reward_funcs", "accuracy", "--output_dir", tmp_path / "out"]
    words += ["--val_dataset", "arithmetic-test#6", "--metrics", "pass@2"]
    said_by(evaluate, runs / "lora", *words)
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["questions"], found["completions"], found["temperature"]) == (6, 2, 0.9)
    assert set(found["metrics"]) == {"pass@2"}
    assert found["means"]["completion_length"] <= 5
    assert found["means"]["reward"] == pytest.approx(found["means"]["rewards/accuracy"])
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert args["system"] == "Count." and args["top_k"] == 20  # the run's


@pytest.mark.parametrize("width", [90, 30, 1])
def test_a_table_of_results_fits_its_terminal(width, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    one = {"value": 0.871, "low": 0.82, "high": 0.91}
    found = {"checkpoint": "output/checkpoint-140", "questions": 256, "completions": 8}
    found |= {"temperature": 1.0, "metrics": {"greedy": one, "pass@2": one}}
    found |= {"means": {"reward": 2.1, "rewards/accuracy": 0.87, "completion_length": 23.1}}
    args = SimpleNamespace(val_dataset=["sums"], num_generations_eval=8, temperature_eval=1.0)
    evaluate.tell(found, args, tmp_path)
    table = capsys.readouterr().out.partition("every completion")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= width
    if width >= 30:
        for told in ("greedy", "pass@2", "87.1%", "82", "91", "completion_length", "23.100"):
            assert told in table, told
        assert "95 % over questions" in " ".join(table.split()) and "…" not in table.replace(
            " … ", ""
        )


def test_vllm_draws_where_it_is_asked_to(runs, tmp_path, monkeypatch):
    """The stand-in for vLLM, whose words never end by themselves."""
    stub, out = ROOT / "tests" / "fixtures" / "stub", tmp_path / "out"
    monkeypatch.syspath_prepend(stub)
    words = [str(runs / "lora"), "--use_vllm", "true", "--output_dir", str(out)]
    job = (evaluate.main, ([*words, "--metrics", "greedy", "pass@2"],), {"PYTHONPATH": stub})
    with forked(tmp_path / "said", job) as (process,):
        status, said = process.end(timeout=200)
    assert status == 0, said
    lines = (out / "completions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 12 * (G + 1) and (out / "vllm.log").exists()
    assert {(record["length"], record["finished"]) for record in records} == {(8, False)}


# Bad input --------------------------------------------------------------------------------------

WORKS = "config.json and model.safetensors, or adapter_config.json and adapter_model.safetensors"
BAD = {
    "no folder": (evaluate, ["{tmp}/no"], "{tmp}/no: no such folder; a checkpoint-N folder"),
    "no checkpoint": (
        chat,
        ["{tmp}"],
        f"{{tmp}}: no checkpoint; a folder works that holds {WORKS}",
    ),
    "k beyond G": (
        evaluate,
        ["{lora}", "--metrics", "pass@2", "maj@8"],
        "--metrics maj@8: a question has but 4 completions; maj@4 or less, or "
        "--num_generations_eval 8, works",
    ),
    "unknown metric": (
        evaluate,
        ["{lora}", "--metrics", "recall"],
        "--metrics recall: no such metric; greedy, accuracy, pass@K or maj@K works",
    ),
    "no accuracy": (
        evaluate,
        ["{lora}", "--metrics", "greedy", "--reward_funcs", "length"],
        "--metrics greedy: the reward accuracy tells right from wrong",
    ),
    "missing dataset": (
        evaluate,
        ["{lora}", "--val_dataset", "nowhere.jsonl"],
        "--val_dataset nowhere.jsonl: no such file",
    ),
    "no dataset": (evaluate, ["{model}"], "--val_dataset: names no rows to evaluate on;"),
    "unknown flag": (
        evaluate,
        ["{lora}", "--temprature", "1"],
        "--temprature: no such flag; did you mean --temperature?",
    ),
    "a flag of training": (chat, ["{lora}", "--beta", "1"], "--beta: no such flag"),
    "G that divides nothing": (
        evaluate,
        ["{lora}", "--num_generations_eval", "3"],
        "--num_generations_eval 3: does not divide the 16 completions",
    ),
    "merge of a model": (
        merge,
        ["{full}/checkpoint-1", "{tmp}/out"],
        "{full}/checkpoint-1: holds a whole model, which needs no merging",
    ),
    "merge into something": (
        merge,
        ["{lora}", "{full}"],
        "{full}: is not empty; a folder, empty or not there, works",
    ),
    "merge without a place": (merge, ["{lora}"], "the following arguments are required: OUT"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, runs, model, tmp_path, capsys, monkeypatch):

    monkeypatch.setattr(setup, "load_model", lambda *_: pytest.fail("a model was loaded"))
    command, words, message = BAD[case]
    places = {"tmp": tmp_path, "lora": runs / "lora", "full": runs / "full", "model": model}
    with pytest.raises(SystemExit) as stop:
        command.main([word.format(**places) for word in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith(f"train.py: {message.format(**places)}"), said
    assert said.count("\n") == 1


def test_a_runs_newest_whole_checkpoint_is_taken_and_why_not_a_newer_one(runs, tmp_path, capsys):
    """As it is when a run goes on. Without an optimizer's state a model can still be used."""
    for kind, name in (("lora", "adapter_model.safetensors"), ("full", "model.safetensors")):
        run = shutil.copytree(runs / kind, tmp_path / kind)
        file = run / "checkpoint-2" / name
        file.write_bytes(file.read_bytes()[:-10])
        assert trained.find(str(run)).folder == run / "checkpoint-1"
        said = capsys.readouterr().err
        line = f"takes {run / 'checkpoint-1'}; checkpoint-2 is not whole ({name} cannot be read"
        assert said.count("\n") == 1 and line in said, said
    run = shutil.copytree(runs / "full", tmp_path / "bare")
    for file in run.glob("checkpoint-*/optimizer.safetensors"):
        file.unlink()
    assert trained.find(str(run)).folder == run / "checkpoint-2"
    line = f"takes {run / 'checkpoint-2'}; checkpoint-2 is not whole (it has no optimizer"
    assert line in capsys.readouterr().err
    assert trained.find(str(runs / "full")).folder == runs / "full" / "checkpoint-2"
    assert not capsys.readouterr().err


def test_a_damaged_adapter_is_one_line(runs, tmp_path, capsys):
    shutil.copytree(runs / "lora", tmp_path / "run")
    folder = max((tmp_path / "run").glob("checkpoint-*"))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(SystemExit):
        chat.main([str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder}: {file.name} cannot be read (" in line
    assert line.endswith("a whole checkpoint works")


def test_weights_that_no_token_can_be_drawn_by_are_one_line(runs, tmp_path, capsys, monkeypatch):
    shutil.copytree(runs / "lora", tmp_path / "run")
    folder = max((tmp_path / "run").glob("checkpoint-*"))
    weights = checkpoint_weights(folder)
    huge = {name: tensor + 1e30 for name, tensor in weights.items()}
    save_file(huge, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit) as end:
        converse(monkeypatch, "What is 2 + 2?\n", folder)
    assert end.value.code == 1
    assert "the checkpoint gives log-probabilities" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(folder), "--output_dir", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 1 and "a policy whose log-probabilities are not finite" in line
    assert "learning_rate" not in line and line.endswith("the checkpoint stays as it is")


def test_a_wrong_command_line_is_answered_before_torch_is_imported(runs):
    for command in ("evaluate", "chat", "merge"):
        code = f"import sys, run.{command} as c\ntry: c.main(['nowhere', 'out'][:{1 + (command == 'merge')}])\n"
        code += "finally: assert 'torch' not in sys.modules"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2 and "nowhere: no such folder" in done.stderr, done.stderr


# Chat -------------------------------------------------------------------------------------------


def converse(monkeypatch, lines: str, *words) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    chat.main([str(word) for word in words])
    out.flush()
    return out.buffer.getvalue().decode()


def test_a_line_is_a_turn_and_the_conversation_is_kept(runs, monkeypatch):
    asked = []
    encode = chat.Model.answer

    def noted(self, turns):
        asked.append([turn["role"] for turn in turns])
        return encode(self, turns)

    monkeypatch.setattr(chat.Model, "answer", noted)
    said = converse(monkeypatch, "What is 2 + 2?\n\nAnd 3 + 3?\n", runs / "full")
    assert asked == [["user"], ["user", "assistant", "user"]]
    assert len(said) > 10 and "\x1b" not in said


def test_it_draws_what_the_sampler_draws(runs, tokenizer):
    import train

    checkpoint = trained.find(str(runs / "lora"))
    model = chat.Model(trained.flags_of(checkpoint, chat.NAMES, {}))
    prompt = tokenizer.encode("What is 12 + 7?")
    (whole,) = model.run.sampler.generate([prompt], [5])
    assert list(chat.draw(model.run.sampler, prompt, 5)) == whole.ids
    assert model.system == "Count."
    assert isinstance(model.run, train.Run)


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(runs):
    checkpoint = trained.find(str(runs / "lora"))
    model = chat.Model(trained.flags_of(checkpoint, chat.NAMES, {}))
    model.context = 80
    turns = [{"role": role, "content": "word " * 20} for role in ("user", "assistant", "user")]
    assert "".join(model.answer(turns)) and len(turns) == 1


def test_a_turn_that_is_too_long_is_told_and_the_next_is_answered(runs, monkeypatch, capsys):
    long = "word " * 1000
    said = converse(monkeypatch, f"{long}\nWhat is 2 + 2?\n", runs / "lora")
    assert said.strip() and "tokens are more than the" in capsys.readouterr().err


def test_the_built_in_task_is_asked_behind_its_worked_example(
    runs, tmp_path, tokenizer, monkeypatch
):
    """As it was trained: without it, a small model does not know the format."""
    folder = tmp_path / "run"
    shutil.copytree(runs / "full", folder)
    args = json.loads((folder / "args.json").read_text()) | {"dataset": ["arithmetic"]}
    (folder / "args.json").write_text(json.dumps(args | {"system": None}))
    model = chat.Model(trained.flags_of(trained.find(str(folder)), (*chat.NAMES, "dataset"), {}))
    (row,) = data.load_rows(["arithmetic-test#1"])
    asked = []
    monkeypatch.setattr(
        chat, "draw", lambda sampler, prompt_ids, seed: asked.append(prompt_ids) or []
    )
    list(model.answer([row["prompt"][-1]]))
    (trained_on,), _ = data.encode([row], model.run.tokenizer)
    assert asked == [trained_on["prompt_ids"]]


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "naïve 🙂 Привет 你好 🏳️‍🌈"
    pieces = chat.Pieces(tokenizer)
    parts = [pieces.add(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text and not any("\N{REPLACEMENT CHARACTER}" in p for p in parts)


def test_control_characters_are_shown_and_not_sent():
    hostile = "a\x1b[2Jb\x9b31mc\rd\x07e\x00f\x7fg\u202eh\ti\n"
    assert harmless(hostile) == "a␛[2Jb�31mc␍d␇e␀f␡g�h\ti\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def reconfigure(self, **_):
        pass


@pytest.mark.parametrize("size", [1, 3, 100])
def test_on_a_terminal_thoughts_stand_apart_however_they_are_cut(size, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    screen = Screen()
    text = "<think>12 < 19</think><answer>19</answer> <thi"
    for first in range(0, len(text), size):
        screen.show(text[first : first + size])
    screen.end()
    said = out.getvalue()
    thought, _, answer = said.partition("\n")
    plain = thought.replace("\x1b[2;3m", "").replace("\x1b[0m", "")
    assert plain == "12 < 19" and "\x1b[2;3m" in thought
    assert answer == "<answer>19</answer> <thi\n"


EDITS = """
import sys
from run import chat, console
console.settle()
for question in chat.Screen().questions():
    print("asked", question, flush=True)
    if question == "quit":
        break
"""


def test_on_a_terminal_a_line_is_edited_and_the_ones_before_come_back():
    """Typed: a line that the left arrow mends; the up arrow, which brings it again; the end."""
    pytest.importorskip("readline")
    ours, theirs = os.openpty()
    talk = subprocess.Popen(
        [sys.executable, "-c", EDITS],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(theirs)
    said = b""

    def wait_for(text):
        nonlocal said
        while text not in said:
            assert select.select([ours], [], [], 60)[0], said
            said += os.read(ours, 4096)
        said = said.partition(text)[2]

    wait_for(b"> ")
    os.write(ours, b"ac\x1b[Db\r")
    wait_for(b"asked abc")
    wait_for(b"> ")
    os.write(ours, b"\x1b[Ad\r")
    wait_for(b"asked abcd")
    wait_for(b"> ")
    os.write(ours, b"quit\r")
    assert talk.wait(30) == 0
    os.close(ours)


def test_ctrl_d_leaves_the_shell_a_line_of_its_own(monkeypatch):
    def ends(prompt=""):
        sys.stdout.write(prompt)
        raise EOFError

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", ends)
    assert list(Screen().questions()) == []
    assert sys.stdout.getvalue() == "\n> \n"


@pytest.mark.parametrize("length", [3, 40])
def test_an_answer_that_is_cut_says_so(length, runs, monkeypatch, capsys):
    """Drawn are four tokens, of which the last one ends an answer."""

    def draw(sampler, prompt_ids, seed):
        end = next(iter(sampler.ends))
        yield from [400, 401, 402, end][:length]

    monkeypatch.setattr(chat, "draw", draw)
    words = [runs / "lora", "--max_completion_length", length]
    said = converse(monkeypatch, "What is 2 + 2?\n", *words)
    told = capsys.readouterr().err
    assert "--max" not in said and ("cut at 3 tokens; --max_completion_length 6" in told) == (
        length == 3
    )


def test_no_length_is_named_that_the_context_has_no_room_for(monkeypatch, capsys):
    def answer(turns):
        yield "so"

    args = SimpleNamespace(max_completion_length=300)
    model = SimpleNamespace(answer=answer, was_cut=True, args=args)
    for model.context, told in ((601, "; --max_completion_length 600 has room\n"), (600, "\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2 + 2?\n"))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
        chat.chat(model)
        assert capsys.readouterr().err == f"run.chat: cut at 300 tokens{told}"


def test_on_a_terminal_a_note_is_dim(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    Screen().note("cut at 3 tokens [bold]")
    assert sys.stdout.getvalue() == "\x1b[2m(cut at 3 tokens [bold])\x1b[0m\n"


def test_a_chat_draws_as_the_runs_evaluations(runs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(runs / "full", folder)
    args = json.loads((folder / "args.json").read_text())
    args |= {"temperature": 1.3, "temperature_eval": 0.2}
    (folder / "args.json").write_text(json.dumps(args))
    asked = []
    monkeypatch.setattr(chat, "Model", lambda args: asked.append(args.temperature))
    monkeypatch.setattr(chat, "chat", lambda model: None)
    chat.main([str(folder)])
    chat.main([str(folder), "--temperature", "0.7"])
    assert asked == [0.2, 0.7]


def test_temperature_0_is_greedy(runs, tmp_path, monkeypatch, capsys):
    from run import trained

    checkpoint = trained.find(str(runs / "full"))
    model = chat.Model(trained.flags_of(checkpoint, chat.NAMES, {"temperature": 0.0}))
    turns = [{"role": "user", "content": "What is 2 + 2?"}]
    answers = {"".join(model.answer(turns)) for model.args.seed in range(4)}
    prompt = data.encode(
        [{"prompt": [{"role": "system", "content": "Count."}, *turns]}], model.run.tokenizer
    )[0][0]["prompt_ids"]
    (likeliest,) = model.run.sampler.generate([prompt], [0], temperature=0)
    assert answers == set(model.run.texts([likeliest]))
    common = ["--val_dataset", "arithmetic-test#6", "--output_dir"]
    said_by(evaluate, runs / "full", "--metrics", "greedy", *common, tmp_path / "a")
    said = said_by(evaluate, runs / "full", "--temperature", "0", *common, tmp_path / "b")
    found = [json.loads((tmp_path / out / "evaluation.json").read_text()) for out in "ab"]
    assert found[0]["metrics"] == found[1]["metrics"] and found[1]["completions"] == 1
    assert "pass@k takes" not in said
    with pytest.raises(SystemExit):
        evaluate.main([str(runs / "full"), "--temperature", "0", "--num_generations_eval", "4"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--num_generations_eval 4: at temperature 0 all completions of a question" in line
    with pytest.raises(SystemExit):
        evaluate.main([str(runs / "full"), "--temperature", "0", "--metrics", "pass@4"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pass@1 or less, or a --temperature above 0, works")
    for out, ways in (("a", {"sampled", "greedy"}), ("b", {"greedy"})):
        text = (tmp_path / out / "completions.jsonl").read_text()
        assert {json.loads(record)["drawn"] for record in text.splitlines()} == ways


def test_one_completion_a_question_tells_how_to_have_pass_at_k(runs, tmp_path):
    words = ["--val_dataset", "arithmetic-test#6", "--output_dir", tmp_path / "a"]
    said = said_by(evaluate, runs / "full", *words, "--num_generations_eval", "1")
    assert "pass@k takes several completions a question: --num_generations_eval 8" in said


def talk_for_ever(folder) -> None:
    sys.stdin = SimpleNamespace(readline=lambda: "What is 2 + 2?\n", isatty=lambda: False)
    chat.main([str(folder)])


def test_ctrl_c_ends_it_politely(runs, tmp_path):
    with forked(tmp_path, (talk_for_ever, (runs / "full",), {})) as (talk,):
        deadline = time.monotonic() + 60
        while not talk.said and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(talk.process.pid, signal.SIGINT)
        status, said = talk.end(timeout=30)
    assert status == 130 and said.endswith("\ngood-bye\n") and "Traceback" not in said, said


# Merge, and how others load what is left --------------------------------------------------------


@pytest.fixture(scope="module")
def merged(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "deep" / "model"
    said = said_by(merge, runs / "lora" / "checkpoint-2", out)
    assert said.startswith(f"{out}: ") and not list(out.parent.glob("*.unfinished"))
    return out


def peft_model(model, adapters):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, adapters)


def test_a_merged_model_is_what_peft_makes_of_the_same_adapters(model, runs, merged):
    from transformers import AutoModelForCausalLM

    theirs = peft_model(model, runs / "lora" / "checkpoint-2").merge_and_unload()
    ours = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    there, moved = theirs.state_dict(), 0.0
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, there[name], rtol=1e-6, atol=1e-6)
        moved = max(moved, (value - base[name]).abs().max())
    assert moved > 1e-3


def test_a_merged_model_is_asked_as_its_checkpoint(runs, merged, tmp_path):
    """Rows, system prompt, lengths and temperature are the run's: so are the numbers."""
    found = []
    for folder in (runs / "lora" / "checkpoint-2", merged):
        said_by(evaluate, folder, "--output_dir", tmp_path / folder.name)
        found.append(json.loads((tmp_path / folder.name / "evaluation.json").read_text()))
    assert found[1]["questions"] == found[0]["questions"]
    assert found[1]["metrics"] == found[0]["metrics"]


def test_a_merge_in_bfloat16_rounds_once(model, runs, merged, tmp_path):
    said_by(merge, runs / "lora" / "checkpoint-2", tmp_path / "out", "--torch_dtype", "bfloat16")
    exact = checkpoint_weights(merged)
    for name, value in checkpoint_weights(tmp_path / "out").items():
        assert value.dtype == torch.bfloat16
        # The base was rounded before, the sum after.
        torch.testing.assert_close(value.float(), exact[name], rtol=2**-7, atol=2**-9)


def test_transformers_and_peft_load_each_kind_of_checkpoint(model, runs, merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapted = peft_model(model, runs / "lora" / "checkpoint-2")
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    full = AutoModelForCausalLM.from_pretrained(runs / "full" / "checkpoint-2")
    for folder in (merged, runs / "full" / "checkpoint-2", runs / "lora" / "checkpoint-2"):
        assert AutoTokenizer.from_pretrained(folder).chat_template
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(plain(ids).logits, full(ids).logits, atol=1e-2)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

whole, adapters, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
llm = LLM(whole, dtype="float32", enforce_eager=True, max_model_len=256, enable_lora=True,
          kv_cache_memory_bytes=256 << 20, enable_chunked_prefill=False)
greedy = SamplingParams(temperature=0.0, max_tokens=12, detokenize=False, ignore_eos=True)
for request in (None, LoRARequest("adapters", 1, adapters)):
    (output,) = llm.generate({"prompt_token_ids": ids}, greedy, lora_request=request)
    print("IDS", json.dumps(list(output.outputs[0].token_ids)))
"""


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make vllm adds vLLM")
def test_vllm_loads_a_model_and_adapters_on_top(runs, merged, tokenizer):
    """One engine for both: the merged model, and the adapters once more on top of it."""
    ids = tokenizer.encode("What is 12 + 7?")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    words = [merged, runs / "lora" / "checkpoint-2", json.dumps(ids)]
    done = subprocess.run(
        [sys.executable, "-c", VLLM, *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("IDS ")]
    assert len(lines) == 2, done.stderr[-3000:]
    drawn = [json.loads(line.removeprefix("IDS ")) for line in lines]
    twice = peft_model(merged, runs / "lora" / "checkpoint-2")
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 2}
    expected = []
    for switch in (twice.disable_adapter, contextlib.nullcontext):
        with switch():
            whole = twice.generate(input_ids=torch.tensor([ids]), **settings)
        expected.append(whole[0, len(ids) :].tolist())
    assert drawn == expected and drawn[0] != drawn[1]


# A LoRA folder as --model -----------------------------------------------------------------------


def test_training_goes_on_from_a_lora_folder(runs, model, plugin, tmp_path):
    """A rate of 0 keeps what was loaded, and the tokens drawn are those of the adapted model."""
    start = runs / "lora" / "checkpoint-2"
    changes = {"reward_funcs": "length", "learning_rate": 0, "max_steps": 1, "beta": 0.04}
    words = flags_for(start, plugin, tmp_path / "out", **changes)
    train_here(*words)
    args = json.loads((tmp_path / "out" / "args.json").read_text())
    assert (args["model"], args["adapters"]) == (str(model), str(start))
    before = checkpoint_weights(start)
    after = checkpoint_weights(tmp_path / "out" / "checkpoint-1")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    (line,) = read_metrics(tmp_path / "out")
    assert line["kl"] > 1e-5  # its reference is the base, which it has left
    again = flags.parse_args(["--config", str(tmp_path / "out" / "args.json")])
    assert vars(again) == args | vars(again) and again.adapters == str(start)


# A base that has moved ---------------------------------------------------------------------------

GONE = "/gone/checkout/models/SmolLM2-135M-Instruct"


def flags_of(folder, **typed):
    from run import trained

    return trained.flags_of(trained.find(str(folder)), chat.NAMES, typed)


@pytest.fixture
def untold():
    """What is told once is told in each test."""
    moved.tell.cache_clear()


@pytest.mark.parametrize("recorded", [GONE, "models/SmolLM2-135M-Instruct"])
def test_the_embedded_model_of_another_checkout_is_this_ones(
    recorded, runs, tmp_path, capsys, monkeypatch, untold
):
    monkeypatch.chdir(tmp_path)
    start = runs / "lora" / "checkpoint-2"
    folder = copy_of(start, tmp_path / "a", base_model_name_or_path=recorded)
    words = ["--model", str(folder), "--dataset", "arithmetic"]
    for args in (flags_of(folder), flags.parse_args(words), flags.parse_args(words)):
        assert args.model == str(flags.EMBEDDED_MODEL) and args.adapters == str(folder)
    (line,) = capsys.readouterr().err.splitlines()  # once, however often they are read
    assert f"its base {recorded} is not there: {flags.EMBEDDED_MODEL} takes its place" in line


def test_a_model_of_that_name_elsewhere_is_not_taken_for_it(runs, tmp_path, capsys):
    for recorded in ("/gone/SmolLM2-135M-Instruct", "/gone/models/SmolLM2-135M-Instruct-x"):
        folder = copy_of(
            runs / "lora" / "checkpoint-2",
            tmp_path / recorded[-3:],
            base_model_name_or_path=recorded,
        )
        said = refused(["--model", folder, "--dataset", "arithmetic"], capsys)
        line = f"train.py: --model {folder}: its base model is in none of {recorded}; "
        assert said == f"{line}--adapters {folder} --model BASE names its place\n"
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = copy_of(runs / "lora" / "checkpoint-2", tmp_path / "h", base_model_name_or_path=hub)
    assert flags_of(folder).model == hub


def test_a_relative_base_is_looked_for_where_one_is_and_beside_the_checkpoint(
    runs, model, tmp_path, monkeypatch, capsys, untold
):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    (elsewhere / "base").mkdir(parents=True)
    start = runs / "lora" / "checkpoint-2"
    one = copy_of(start, run / "checkpoint-2", base_model_name_or_path="base")
    two = copy_of(start, run / "checkpoint-3", base_model_name_or_path="./../../base")
    for place, folder in ((run / "base", one), (tmp_path / "base", two)):
        shutil.copytree(model, place)
        monkeypatch.chdir(tmp_path if folder is one else elsewhere)
        if folder is one:
            (tmp_path / "base").mkdir()
            assert flags_of(folder).model == "base"  # of the working folder
            (tmp_path / "base").rmdir()
        assert os.path.samefile(flags_of(folder).model, place)
    monkeypatch.chdir(runs)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(data.UsageError) as told:
        flags_of(two)
    assert str(told.value).endswith("; --model BASE names its place")
    assert str(two / ".." / ".." / "base") in str(told.value)


def test_every_command_takes_the_base_from_a_flag(runs, model, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    gone = {"base_model_name_or_path": "/gone/model"}
    folder = copy_of(runs / "lora" / "checkpoint-2", run / "checkpoint-2", **gone)
    shutil.copy(runs / "lora" / "args.json", run)
    for command, words in ((chat, []), (evaluate, []), (merge, [tmp_path / "no"])):
        with pytest.raises(SystemExit):
            command.main([str(word) for word in (folder, *words)])
        (line,) = capsys.readouterr().err.splitlines()
        assert "in none of /gone/model; --model BASE names its place" in line
    out = tmp_path / "merged"
    said_by(merge, folder, out, "--model", model)
    expected = checkpoint_weights(model).keys()
    assert checkpoint_weights(out).keys() == expected
    assert converse(monkeypatch, "What is 2 + 2?\n", folder, "--model", model).strip()
    said = said_by(
        evaluate, folder, "--model", model, "--output_dir", tmp_path / "e", "--metrics", "greedy"
    )
    assert "greedy" in said
    with pytest.raises(SystemExit):
        chat.main([str(runs / "full"), "--model", str(model)])
    assert "is a whole model and has no base" in capsys.readouterr().err


def test_a_base_that_no_hub_has_is_told_with_the_flag_that_helps(runs, tmp_path, capsys):
    hub = "nobody/nothing-of-this-name"
    folder = copy_of(runs / "lora" / "checkpoint-2", tmp_path / "h", base_model_name_or_path=hub)
    with pytest.raises(SystemExit):
        chat.main([str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--model {hub}: not a model folder or hub id" in line
    assert line.endswith(f"{folder} has it as its base, and --model BASE names another place")


def test_a_file_of_flags_from_another_checkout_means_this_ones_model_and_plugin(
    tmp_path, capsys, untold
):
    plugin = "examples/train/grpo/plugin/close.py"
    kept = {"model": GONE, "external_plugins": [f"/gone/{plugin}", "mine.py"], "dataset": ["x"]}
    file = tmp_path / "args.json"
    file.write_text(json.dumps(kept))
    args = flags.parse_args(["--config", str(file)])
    assert args.model == str(flags.EMBEDDED_MODEL)
    assert args.external_plugins == [str(ROOT / plugin), "mine.py"]
    assert capsys.readouterr().err.count("takes its place\n") == 2
    typed = flags.parse_args(["--config", str(file), "--model", "/gone/other"])
    assert typed.model == "/gone/other"


def test_peft_finds_the_base_that_a_run_has_recorded(runs, model):
    peft = pytest.importorskip("peft")

    folder = runs / "lora" / "checkpoint-2"
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    told = peft_model(model, folder)
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, told(ids).logits)


REFUSED = {
    "base_model_name_or_path": (3, "base_model_name_or_path 3"),
    "use_dora": (True, "use_dora true"),
    "modules_to_save": (["lm_head"], "modules_to_save lm_head"),
    "rank_pattern": ({"q_proj": 4}, "rank_pattern {'q_proj': 4}"),
    "bias": ("all", "bias all"),
    "init_lora_weights": ("pissa", "init_lora_weights pissa"),
    "peft_type": ("LOHA", "peft_type LOHA"),
    "something_new": (1, "something_new 1"),
}


def copy_of(folder, out, **changes):
    out.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (out / name).write_bytes((folder / name).read_bytes())
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | changes))
    return out


def refused(words, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        flags.parse_args([str(word) for word in words])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("field", REFUSED)
def test_adapters_that_are_more_than_lora_are_refused(field, runs, tmp_path, capsys):
    value, told = REFUSED[field]
    folder = copy_of(runs / "lora" / "checkpoint-2", tmp_path / "a", **{field: value})
    said = refused(["--model", folder, "--dataset", "arithmetic"], capsys)
    line = f"train.py: --model {folder}: adapter_config.json says {told}; plain LoRA works\n"
    assert said == line


def test_flags_that_contradict_the_adapters_are_refused(runs, tmp_path, capsys):
    folder = runs / "lora" / "checkpoint-2"
    common = ["--model", folder, "--dataset", "arithmetic"]
    said = refused([*common, "--lora_rank", "4"], capsys)
    assert said == f"train.py: --lora_rank 4: --model {folder} has 8; that works\n"
    said = refused([*common, "--train_type", "full"], capsys)
    assert f"python -m run.merge {folder} OUT makes a model of them" in said
    said = refused(["--adapters", tmp_path, "--dataset", "arithmetic"], capsys)
    assert f"--adapters {tmp_path}: no adapter_config.json there" in said
    kept = flags.parse_args([*map(str, common), "--lora_rank", "8", "--lora_dropout", "0.1"])
    assert kept.lora_dropout == 0.1


def test_adapters_of_another_model_are_refused_before_it_is_loaded(
    runs, model_folder, plugin, tmp_path, capsys, monkeypatch
):
    import train

    monkeypatch.setattr(setup, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    words = flags_for(model_folder, plugin, tmp_path / "out", reward_funcs="length")
    with pytest.raises(SystemExit):
        train.main([*words, "--adapters", str(runs / "lora" / "checkpoint-2")])
    said = capsys.readouterr().err
    assert "down_proj.lora_A.weight is [8, 128] there and [8, 48] in --model" in said


def test_pefts_own_adapters_are_taken_as_peft_reads_them(model, tmp_path):
    """Of a few layers, chosen by a pattern, and scaled as rsLoRA scales."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from dist import find_world

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    target = r".*\.[12]\.(self_attn\.q_proj|mlp\.up_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=target)
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--dataset", "x", "--torch_dtype", "float32"]
    ours, _ = setup.load_model(flags.parse_args(words), find_world(), None)
    ids = torch.tensor([[5, 6, 7, 300]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert not torch.allclose(plain(ids).logits, theirs(ids).logits, atol=1e-2)


def test_a_runs_folder_as_the_model_is_told_its_newest_checkpoint(runs, capsys):
    for name in ("lora", "full"):
        (line,) = refused(["--model", runs / name, "--dataset", "arithmetic"], capsys).splitlines()
        assert line.endswith(
            f"--model {runs / name}: a run's folder, not a model's; its newest checkpoint, "
            f"{runs / name / 'checkpoint-2'}, works"
        )
