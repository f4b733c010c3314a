"""What rewards see is the model's answer, whatever the template opens and the tokenizer calls special."""

import json

import pytest
from conftest import EMBEDDED_MODEL, flags_for, read_metrics, train_here

import data
import sampler
import train
from data import UsageError
from run import templates

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPENED{% endif %}"
)
# R1's distills drop what an earlier turn has thought, and have a header of two words.
R1 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>{% else %}<|User|>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# Qwen3's: the last answer gets an empty thought in front of it, earlier ones do not.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking|default(true) %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture
def own_tokenizer():
    from transformers import AutoTokenizer

    if not EMBEDDED_MODEL.exists():
        pytest.skip("no embedded model; make model puts it there")
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


OPENINGS = [
    (CHATML.replace("OPENED", ""), {}, ""),
    (CHATML.replace("OPENED", "<think>\n"), {}, "<think>\n"),
    (CHATML.replace("OPENED", "<think>\n\n</think>\n\n"), {}, "<think>\n\n</think>\n\n"),
    (CHATML.replace("OPENED", "<reasoning>"), {}, "<reasoning>"),
    (R1, {}, "<think>\n"),
    (QWEN3, {}, ""),
    (QWEN3, {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
]


@pytest.mark.parametrize(("template", "more", "opened"), OPENINGS)
def test_what_a_template_opens_is_told_from_its_header(template, more, opened, own_tokenizer):
    own_tokenizer.chat_template = template
    user = {"role": "user", "content": "a"}
    assert templates.opening(own_tokenizer, [user], more) == opened


def test_a_template_that_takes_one_question_alone_opens_what_its_prompt_ends_in(own_tokenizer):
    """And one that insists on a system turn is asked with a prompt that has one."""
    one = "{% if messages|length > 2 %}{{ raise_exception('one question') }}{% endif %}"
    system = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    prompt = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    for strict in (one, system, one + system):
        own_tokenizer.chat_template = strict + CHATML.replace("OPENED", "<think>\n")
        assert templates.opening(own_tokenizer, prompt) == "<think>\n"


@pytest.mark.parametrize("special", [(), ("<think>", "</think>"), ("<answer>", "</answer>")])
def test_a_completion_is_read_with_its_tags_and_without_its_end(special, own_tokenizer):
    own_tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    end = own_tokenizer.eos_token_id
    run = train.Run(None, None, None, own_tokenizer, None, "<think>", {end})
    said = "2 and 3</think><answer>5</answer>"
    ids = own_tokenizer.encode(said, add_special_tokens=False)
    completions = [
        sampler.Completion([*ids, end], [0.0] * (len(ids) + 1), True),
        sampler.Completion(ids[:-1], [0.0] * (len(ids) - 1), False),
    ]
    whole, cut = run.texts(completions)
    assert whole == "<think>" + said
    assert whole.startswith(cut)


@pytest.fixture
def scripted(monkeypatch):
    """A sampler that says given texts in turn, in whatever run comes next."""

    def say(*texts):
        class Scripted:
            metrics = {}

            def __init__(self, tokenizer):
                self.tokenizer = tokenizer

            def generate(self, prompt_ids, seeds, temperature=None):
                ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
                said = [
                    [*ids[i % len(ids)], self.tokenizer.eos_token_id] for i in range(len(seeds))
                ]
                return [sampler.Completion(row, [-1.0] * len(row), True) for row in said]

            def take_weights(self, model):
                pass

        monkeypatch.setattr(
            "run.setup.make_sampler",
            lambda args, world, policy, tokenizer, fast: Scripted(tokenizer),
        )

    return say


def rows_file(folder, rows):
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


ROWS = [{"question": f"What is {i} + 2?", "answer": i + 2, "level": i / 4} for i in range(8)]


def test_a_run_scores_the_answer_from_what_its_prefix_has_opened(
    scripted, model_folder, plugin, tmp_path
):
    scripted("it is so</think> <answer>9</answer>", "it is so")
    changes = {"dataset": rows_file(tmp_path, ROWS), "reward_funcs": ["format"], "beta": 0}
    changes |= {"response_prefix": "<think>", "log_completions": "true", "max_steps": 1}
    train_here(*flags_for(model_folder, plugin, tmp_path / "out", **changes))
    (line,) = read_metrics(tmp_path / "out")
    assert line["rewards/format"] == 0.5
    first = json.loads((tmp_path / "out" / "completions.jsonl").read_text().splitlines()[0])
    assert first["completion"] == "<think>it is so</think> <answer>9</answer>"
    assert first["prompt"].endswith("assistant\n<think>")


def test_a_prefix_is_part_of_the_prompts_tokens(own_tokenizer):
    rows = data.load_rows(["arithmetic#3"])
    plain, _ = data.encode(rows, own_tokenizer)
    opened, _ = data.encode(rows, own_tokenizer, prefix="<think>")
    added = own_tokenizer.encode("<think>", add_special_tokens=False)
    assert [row["prompt_ids"] for row in opened] == [row["prompt_ids"] + added for row in plain]


def test_a_template_that_refuses_a_system_turn_trains_the_built_in_task_without_one(own_tokenizer):
    own_tokenizer.chat_template = NO_SYSTEM + CHATML.replace("OPENED", "")
    with pytest.raises(UsageError, match="refuses a prompt: .*no system; --system ''"):
        data.encode(data.load_rows(["arithmetic#3"]), own_tokenizer)
    rows, _ = data.encode(data.load_rows(["arithmetic#3"], system=""), own_tokenizer)
    assert all(row["prompt"][0]["role"] == "user" for row in rows)


@pytest.mark.parametrize("text", ["[1]", "true", "{", '"a"'])
def test_template_arguments_that_are_no_object_are_one_line(
    text, model_folder, plugin, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stop:
        train.main([*flags_for(model_folder, plugin, tmp_path), "--chat_template_kwargs", text])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"train.py: --chat_template_kwargs {text}: an object")


SEES = """
from rewards import ORM, orms

seen = []


class Sees(ORM):
    def __call__(self, completions, messages, response_token_ids, trainer_state, is_truncated,
                 level, answer, **columns):
        state = (trainer_state.global_step, trainer_state.max_steps)
        seen.append((completions, messages, response_token_ids, state, is_truncated, level, answer))
        return [float(i) for i in range(len(completions))]


orms["sees"] = Sees
"""


def test_a_plugin_gets_what_the_guides_system_hands_over_and_columns_as_they_are(
    scripted, model_folder, tmp_path, tokenizer
):
    scripted("first", "second")
    file = tmp_path / "sees.py"
    file.write_text(SEES)
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    rows = [{"messages": turns, "answer": 4, "level": 0.5}, {"messages": turns, "answer": 7.25}]
    changes = {"dataset": rows_file(tmp_path, rows * 4), "reward_funcs": ["sees"], "max_steps": 2}
    train_here(*flags_for(model_folder, file, tmp_path / "out", **changes))
    import sys

    seen = sys.modules["plugin_sees"].seen
    for step, (completions, messages, ids, state, cut, level, answer) in enumerate(seen):
        assert state == (step, 2)
        assert set(completions) == {"first", "second"} and not any(cut)
        for text, chat, tokens in zip(completions, messages, ids, strict=True):
            # The dataset's own messages end in the reference, which would earn itself.
            assert chat[-1] == {"role": "assistant", "content": text}
            assert chat[-2] == turns[0] and tokens[-1] == tokenizer.eos_token_id
        assert {type(a) for a in answer} <= {int, float} and set(answer) <= {4, 7.25}
        assert set(level) <= {0.5, None}


# Columns ----------------------------------------------------------------------------------------


def test_a_number_stays_a_number_and_nan_is_absent(tmp_path):
    text = '{"question": "a", "solution": 3, "x": 1e-05}\n{"question": "b", "solution": NaN, "x": NaN}\n'
    (tmp_path / "a.jsonl").write_text(text)
    first, second = data.load_rows([str(tmp_path / "a.jsonl")])
    assert first["solution"] == 3 and type(first["solution"]) is int and first["x"] == 1e-05
    assert second["solution"] is None and second["x"] is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e-05, "0.00001"),
        (1e16, "10000000000000000"),
        (2.5e-7, "0.00000025"),
        (-1e-9, "-0.000000001"),
    ]
    + [(4.0, "4.0"), (7, "7"), (True, "True"), ("1e3", "1e3"), (float("inf"), "inf")],
)
def test_a_number_is_written_as_a_person_would(number, text):
    assert data.text_of(number) == text


def test_arguments_of_the_template_reach_it(own_tokenizer):
    own_tokenizer.chat_template = QWEN3
    rows = [{"prompt": [{"role": "user", "content": "a"}]}]
    (row,), _ = data.encode(rows, own_tokenizer, template={"enable_thinking": False})
    assert own_tokenizer.decode(row["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
