"""The page to look at, in a real browser; and what a step recorded of its tokens."""

import dataclasses
import json
import math
import random
import shutil
import threading
import time

import pytest
import torch
from conftest import flags_for, read_metrics, timeless, train_here
from processes import run_forked

from data import UsageError
from run import health
from run.report import __main__ as report
from run.report import folder, page, story, summary
from run.tokens import pieces

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 1">',
    "<!-- <script> @DATA@ @SCRIPT@ ${1} \u2028 \x00 \x1b[31m",
    '"><svg onload="window.hacked = 1">' + "long" * 99,
]
QUESTIONS = ["What is 2 + 2?", "What is 2 + 3?", "Why <b>not</b>?"]


# A run's folder, written by hand ------------------------------------------------------------------


def lines(file, objects):
    file.write_text("".join(json.dumps(one) + "\n" for one in objects))


def add_step(path, step):
    line = {"step": step, "epoch": step / 2, "loss": 0.0, "reward": step / 10, "time/step": 2.0}
    line |= {"rewards/accuracy": step / 10, "zero_std_groups": 0.5, "num_tokens": 100 * step}
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def completions_of(step, texts) -> list[dict]:
    """Groups of two: a right answer and a wrong one."""
    records = []
    for i, text in enumerate(texts):
        system = "Answer as briefly as you can. " * 20
        prompt = f"<|system|>{system}\n<|user|>\n{QUESTIONS[i // 2]}<|end|>\n<|assistant|>\n"
        record = {"step": step, "phase": "train", "prompt": prompt, "completion": text}
        record |= {"rewards": {"accuracy": 1.0 - i % 2}, "advantage": 0.7 - 1.4 * (i % 2)}
        records.append(record | {"solution": "4", "length": 3, "finished": i % 2 == 0})
    return records


def tokens_of(record, index) -> dict:
    """Three tokens, of which the step makes the first likelier and the second less likely."""
    text = record["completion"]
    told = {name: record[name] for name in ("rewards", "advantage", "length", "finished")}
    told |= {"index": index, "ids": [7, 8, 9], "tokens": [text[:2], text[2:5], text[5:]]}
    told |= {"sampled": [-0.5, -1.0, -0.125], "before": [-0.5, -1.0, -0.125]}
    told |= {"after": [-0.25, -2.0, -0.125], "entropy": [0.75, 0.5, 0.0]}
    return told | {"ratio": [1.0, 1.0, 1.0]}


def make_run(path, steps=4):
    path.mkdir()
    flags = {"model": "</title><script>window.hacked = 1</script>", "dataset": ["sums"]}
    flags |= {"max_steps": 6, "num_train_epochs": 1.0, "num_generations": 2, "reward_weights": None}
    flags |= {"num_generations_eval": 1, "top_p": 1.0, "top_k": 0}
    (path / "args.json").write_text(json.dumps(flags | {"train_type": "lora"}))
    records, tokens = [], []
    for step in range(1, steps + 1):
        add_step(path, step)
        texts = [f"I say {step}.", f"Or {step + 1}?", *HOSTILE]
        own = completions_of(step, texts)
        records += own
        group = [tokens_of(record, i) for i, record in enumerate(own[2:4], start=2)]
        line = {"step": step, "drawn": step, "prompt": own[2]["prompt"], "solution": "4"}
        tokens.append(line | {"completions": group})
    with (path / "metrics.jsonl").open("a") as file:
        for step, value in ((0, 0.25), (4, 0.75)):
            file.write(json.dumps({"step": step, "eval/rewards/accuracy": value}) + "\n")
    held_out = [record | {"phase": "eval", "advantage": None} for record in records[:2]]
    lines(path / "completions.jsonl", records + held_out)
    lines(path / "tokens.jsonl", tokens)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's folder with its page."""
    path = make_run(tmp_path_factory.mktemp("made") / "hostile <i>run")
    report.write_page(folder.read(path))
    return path


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("no browser; apt-get install chromium chromium-driver puts it there")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    settings = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking "
    settings += "disable-component-update disable-sync disable-dev-shm-usage"
    for setting in settings.split():
        options.add_argument(f"--{setting}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('browser')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    """With the window of a desk; at the end its console has said nothing."""
    set_window(chromium, 1200, 900)
    yield chromium
    said = chromium.get_log("browser")
    chromium.get("about:blank")
    assert said == []


def set_window(browser, width, height, scheme="light"):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})


def open_page(browser, path, state=""):
    browser.get("about:blank")  # so that another state behind # is another page
    browser.get(f"{(path / 'report.html').as_uri()}#{state}")


def find(browser, selector) -> list:
    return browser.find_elements("css selector", selector)


def texts(browser, selector) -> list[str]:
    return [node.get_property("textContent") for node in find(browser, selector)]


def choose(browser, name, value):
    find(browser, f"#{name} option[value={value}]")[0].click()


def test_more_groups_are_offered_where_there_are_more(browser, made):
    open_page(browser, made)
    assert find(browser, ".group") and not find(browser, "#all")[0].is_displayed()


def test_the_slider_and_a_click_on_a_curve_move_to_another_step(browser, made):
    open_page(browser, made)
    assert texts(browser, "#step") == ["step 4"]
    assert "I say 4." in texts(browser, ".text")
    slider = find(browser, "#slider")[0]
    slider.send_keys("\ue012")  # the left arrow
    assert texts(browser, "#step") == ["step 3"]
    assert "I say 3." in texts(browser, ".text") and "I say 4." not in texts(browser, ".text")
    find(browser, "#earlier")[0].click()
    assert texts(browser, "#step") == ["step 2"]
    from selenium.webdriver import ActionChains

    plot = find(browser, ".wide .plot")[0]
    right = plot.size["width"] // 2 - 15
    ActionChains(browser).move_to_element_with_offset(plot, right, 0).click().perform()
    assert texts(browser, "#step") == ["step 4"]
    browser.refresh()  # which the address survives
    assert texts(browser, "#step") == ["step 4"]


def hover(browser, node) -> None:
    """Point at it, in the middle of the window, until its numbers show: on a busy machine the page
    may still be laid out."""
    from selenium.webdriver import ActionChains

    (tip,) = find(browser, "#tip")
    deadline = time.monotonic() + 10
    while not tip.is_displayed() and time.monotonic() < deadline:
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
        ActionChains(browser).move_by_offset(1, 1).move_to_element(node).pause(0.1).perform()
    assert tip.is_displayed()


def test_tokens_are_coloured_by_what_the_step_did_and_tell_their_numbers(browser, made):
    open_page(browser, made, "step=2")
    tokens = find(browser, ".group:first-child .completion:first-child .t")  # those with tokens
    assert [token.get_attribute("class") for token in tokens] == ["t up", "t down", "t up"]
    shares = [t.get_attribute("style") for t in tokens]  # of the largest change, 1.0
    assert shares == ["--share: 0.250;", "--share: 1.000;", "--share: 0.000;"]
    hover(browser, tokens[1])
    rows = dict(row.split("\t") for row in tip_rows(browser))
    assert rows["token"] == "2 of 3, id 8" and rows["advantage"] == "0.7"
    assert rows["log π before the step"] == "-1" and rows["log π after it"] == "-2"
    assert rows["change"] == "-1" and rows["entropy"] == "0.5"
    assert rows["π after / before"] == f"× {math.exp(-1):.3g}"
    assert rows["importance weight"] == "1" and rows["ρ in the objective"] == "1"
    choose(browser, "measure", "entropy")
    tokens = find(browser, ".group:first-child .completion:first-child .t")
    assert [token.get_attribute("class") for token in tokens] == ["t heat"] * 3
    choose(browser, "measure", "advantage")
    colours = [t.get_attribute("class") for t in find(browser, ".group:first-child .t")]
    assert colours == ["t up"] * 3 + ["t down"] * 3


def tip_rows(browser) -> list[str]:
    script = "return [...document.querySelectorAll('#tip tr')]"
    script += ".map(row => [...row.cells].map(cell => cell.textContent).join('\\t'))"
    return browser.execute_script(script)


def test_search_finds_what_a_plain_search_of_the_file_finds(browser, made):
    records = [json.loads(line) for line in (made / "completions.jsonl").read_text().splitlines()]
    for query in ("hacked", "say 2", "NOT</B>", "nowhere"):
        open_page(browser, made, "step=2")
        find(browser, "#search")[0].send_keys(query)
        groups = [records[i : i + 2] for i in range(0, len(records) - 2, 2)]
        found = [group for group in groups if query.lower() in json.dumps(group).lower()]
        here = [group for group in found if group[0]["step"] == 2]
        assert len(find(browser, ".group")) == len(here)
        steps = {group[0]["step"] for group in found}
        assert f"“{query.lower()}” is in {len(steps)} of 4 steps" in texts(browser, "#told")[0]
    marked = set()
    open_page(browser, made, "step=2&query=say")
    marked |= set(texts(browser, "mark"))
    assert marked == {"say"}


def test_what_is_searched_for_is_marked_in_coloured_tokens_too(browser, made):
    """A hit may lie in several tokens, and stands after letters whose small ones are longer."""
    open_page(browser, made, "step=2&query=script")
    tokens = find(browser, ".group:first-child .completion:first-child .t")
    assert len(tokens) == 3
    marks = texts(browser, ".group:first-child .completion:first-child mark")
    assert marks[:3] == ["scr", "ipt", "script"] and "".join(marks) == "script" * 3
    assert "".join(node.get_property("textContent") for node in tokens) == HOSTILE[0]
    hover(browser, find(browser, ".group:first-child .t mark")[0])
    rows = dict(row.split("\t") for row in tip_rows(browser))
    assert rows["token"] == "2 of 3, id 8"
    hits = "return marked('\u0130\u0130 Say SAY', 'say').map(node => node.textContent ?? node)"
    assert browser.execute_script(hits) == ["\u0130\u0130 ", "Say", " ", "SAY", ""]


def test_held_out_completions_stand_apart(browser, made):
    open_page(browser, made)
    choose(browser, "phase", "eval")
    assert texts(browser, ".text") == ["I say 1.", "Or 2?"]
    assert find(browser, ".advantage") == []
    tiles = texts(browser, ".tile")
    assert "accuracy, held out0.75from 0.25" in tiles


def test_what_a_model_wrote_is_shown_as_text_and_never_run(browser, made):
    open_page(browser, made)
    shown = texts(browser, ".text")
    for text in HOSTILE:
        assert text.replace("\x00", "\ufffd") in shown or text in shown
    assert any("Why <b>not</b>?" in question for question in texts(browser, ".question"))
    assert texts(browser, "h1") == ["hostile <i>run"]
    run = (
        "return [window.hacked ?? null, document.querySelectorAll('img, i:not(.legend i)').length]"
    )
    assert browser.execute_script(run) == [None, 0]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_pages_policy_lets_no_other_script_run(chromium, made):
    open_page(chromium, made)
    add = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1';"
    chromium.execute_script(add + "document.body.append(s)")
    assert chromium.execute_script("return window.hacked ?? null") is None
    assert "Content Security Policy" in chromium.get_log("browser")[0]["message"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_in_dark(scheme, browser, made):
    set_window(browser, 360, 780, scheme)
    open_page(browser, made)
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    assert browser.execute_script(widths) == [360, 360]
    assert is_dark(browser) == (scheme == "dark")
    find(browser, "#theme")[0].click()
    assert is_dark(browser) == (scheme == "light")


def is_dark(browser) -> bool:
    script = "const c = document.createElement('canvas').getContext('2d');"
    script += "c.fillStyle = getComputedStyle(document.body).backgroundColor;"
    script += "c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]"
    return sum(browser.execute_script(script)[:3]) < 300


def test_a_run_without_completions_gets_its_curves_and_is_told_how_to_have_them(
    browser, tmp_path, capsys
):
    path = make_run(tmp_path / "bare")
    (path / "completions.jsonl").unlink()
    (path / "tokens.jsonl").unlink()
    report.main([str(path)])
    said = capsys.readouterr().out
    assert "\nno completions were recorded; --log_completions true records them, --log_tok" in said
    open_page(browser, path)
    assert len(find(browser, ".plot path.bold")) >= 3
    assert "--log_completions true" in texts(browser, "#told")[0]
    assert not find(browser, "#slider")[0].is_displayed()


AT_START = {"prompts_per_row": 2.0, "weights_out_of_reach": 0.9}


@pytest.mark.parametrize("patience", [2, 5])
def test_a_run_is_healthy_if_it_had_nothing_to_warn_of_at_its_start_either(
    patience, browser, tmp_path, monkeypatch
):
    monkeypatch.setattr(story, "PATIENCE", patience)
    path = make_run(tmp_path / "run")
    report.write_page(folder.read(path))
    open_page(browser, path)
    (told,) = texts(browser, ".health")
    assert ("Too short" in told) == (patience > 4) and ("Healthy" in told) == (patience <= 4)
    rewrite(path / "metrics.jsonl", lambda line: line | AT_START)
    report.write_page(folder.read(path))
    open_page(browser, path)
    told = texts(browser, ".health")
    assert [line.partition(":")[0] for line in told] == [
        "at the start--dataset",
        "at the start--learning_rate",
    ]
    expected = health.at_start(AT_START)
    assert [line.removeprefix("at the start") for line in told] == expected


def test_the_lines_of_a_curves_grid_have_numbers_of_their_own(browser, tmp_path):
    """An entropy of 6.861 or a mean length of 1,000.2 may move by a thousandth of itself."""
    path = make_run(tmp_path / "run")
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for i, record in enumerate(records):
        record |= {"entropy": 6.8585 + i / 1000, "completion_length": 2000.3 + i / 10}
    lines(path / "metrics.jsonl", records)
    report.write_page(folder.read(path))
    open_page(browser, path)
    plots = "return [...document.querySelectorAll('.plot')].map((plot) => "
    plots += "[...plot.querySelectorAll('text[text-anchor=end]')].map((t) => t.textContent))"
    marks = [told[:-1] for told in browser.execute_script(plots)]  # without the last step
    assert any("6.86" in one for one in marks) and any("2,000.5" in one for one in marks), marks
    assert all(len(set(told)) == len(told) for told in marks), marks


def test_the_page_of_lines_that_tell_the_least_opens(browser, tmp_path):
    path = make_run(tmp_path / "run")
    rewrite(
        path / "metrics.jsonl", lambda line: {k: line[k] for k in line if k in ("step", "loss")}
    )
    report.write_page(folder.read(path))
    open_page(browser, path)
    assert "tokens–" in texts(browser, ".tile") and "reward–" in texts(browser, ".tile")


def rewrite(file, change):
    lines(file, [change(json.loads(line)) for line in file.read_text().splitlines()])


def test_watch_keeps_an_open_page_fresh_until_the_run_is_over(browser, tmp_path):
    path = make_run(tmp_path / "going", steps=2)
    ended = []

    def follow():
        ended.append(report.watch(path, 0.2))

    watching = threading.Thread(target=follow, daemon=True)
    watching.start()
    wait_for(lambda: (path / "report.html").exists())
    open_page(browser, path)
    wait_for(lambda: texts(browser, "#step") == ["step 2"])
    with (path / "completions.jsonl").open("a") as file:
        for record in completions_of(3, ["a", "b"]):
            file.write(json.dumps(record) + "\n")
    add_step(path, 3)
    wait_for(lambda: texts(browser, "#step") == ["step 3"])
    assert watching.is_alive() and not ended
    for step in (4, 5, 6):
        add_step(path, step)
    (path / "checkpoint-6").mkdir()
    watching.join(timeout=20)
    assert ended[0].is_over
    report.write_page(ended[0])
    assert '"refresh":0' in (path / "report.html").read_text()


def wait_for(holds, seconds=20):
    from selenium.common.exceptions import WebDriverException

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if holds():
                return
        except WebDriverException:  # the page was read anew in between
            pass
        time.sleep(0.05)
    raise AssertionError("did not come")


# Without one --------------------------------------------------------------------------------------


def damage(path, file, text):
    (path / file).write_text(text)


def remains(path, *names):
    """Of a run's folder these files alone."""
    for file in path.iterdir():
        if file.name not in names:
            file.unlink()


def is_a_file(path):
    shutil.rmtree(path)
    path.write_text("")


NO_PLACE = {"step": 1, "drawn": 1, "prompt": "", "completions": [{"tokens": [], "rewards": {}}]}
BAD_FOLDERS = {
    "nowhere": (lambda path: shutil.rmtree(path), r"no such folder"),
    "a file": (is_a_file, "a file; a run's --output_dir works"),
    "nothing yet": (
        lambda path: remains(path, "args.json"),
        "neither metrics.jsonl nor completions.jsonl says anything yet; --watch waits",
    ),
    "an evaluation": (
        lambda path: damage(path, "evaluation.json", "{}"),
        "an evaluation's folder, with no steps to show; a run's --output_dir works",
    ),
    "an empty folder": (lambda path: remains(path), "no run's folder, for it has no args.json"),
    "tokens without a place": (
        lambda path: damage(path, "tokens.jsonl", json.dumps(NO_PLACE) + "\n"),
        "tokens.jsonl: line 1 is broken, for it has no index",
    ),
    "no run": (lambda path: (path / "args.json").unlink(), r"has no args.json"),
    "no flags": (lambda path: damage(path, "args.json", "[1]"), r"args.json: no run's flags"),
    "no metrics": (lambda path: (path / "metrics.jsonl").unlink(), r"no step in metrics.jsonl yet"),
    "broken line": (
        lambda path: damage(path, "metrics.jsonl", '{"step": 1, "loss": 0}\n{"st\n{"step": 2}\n'),
        r"metrics.jsonl: line 2 is broken",
    ),
    "no step in a line": (
        lambda path: damage(path, "metrics.jsonl", '{"loss": 0}\n'),
        r"metrics.jsonl: line 1 is broken, for it has no step",
    ),
    "other completions": (
        lambda path: damage(path, "completions.jsonl", '{"step": 1, "prompt": "a"}\n'),
        r"completions.jsonl: line 1 is broken, for it has no completion",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_folder_that_is_no_run_is_told_in_one_line(name, tmp_path, capsys):
    path = make_run(tmp_path / "run")
    change, line = BAD_FOLDERS[name]
    change(path)
    with pytest.raises(SystemExit) as end:
        report.main([str(path)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1
    assert line in said and str(path) in said


def test_watch_waits_for_no_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    (tmp_path / "args.json").write_text("{}")
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(UsageError, match="an evaluation's folder"):
        report.watch(tmp_path, 60)


def test_a_checkpoints_folder_names_its_runs(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    (path / "checkpoint-4").mkdir()
    with pytest.raises(SystemExit):
        report.main([str(path / "checkpoint-4")])
    assert f"no args.json; that of its run, {path}, works\n" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["metrics", "completions", "tokens"])
def test_whatever_a_line_lacks_there_is_a_page_or_one_line(file, tmp_path):
    """Every key that a line has, and every key of a completion in it, taken away or null."""
    path = make_run(tmp_path / "run")
    whole = (path / f"{file}.jsonl").read_text()
    made = [json.loads(line) for line in whole.splitlines()]
    names = dict.fromkeys(name for line in made for name in line)
    names |= {("in", name): None for name in tokens_of(completions_of(1, ["a"])[0], 0)}
    pages = 0
    for name in names:
        for change in (lambda of, key: of.pop(key, None), lambda of, key: of.update({key: None})):
            changed = json.loads(json.dumps(made))
            for line in changed:
                inner = line.get("completions", []) if isinstance(name, tuple) else [line]
                for one in inner:
                    change(one, name[1] if isinstance(name, tuple) else name)
            lines(path / f"{file}.jsonl", changed)
            try:
                run = folder.read(path)
            except UsageError as error:
                assert "\n" not in str(error) and str(path) in str(error)
                continue
            report.write_page(run)
            summary.completions(run), summary.results(run)
            summary.draw_curve(run, path / "curve.png")
            pages += 1
    assert pages > 8


@pytest.mark.parametrize("words", [[], ["--watch", "0"], ["--watch", "often"], ["--port", "8"]])
def test_a_wrong_flag_is_told_in_one_line(words, made, capsys):
    with pytest.raises(SystemExit) as end:
        report.main(words and [str(made), *words])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1


def test_a_line_that_is_being_written_is_left_for_later(tmp_path):
    path = make_run(tmp_path / "run")
    before = folder.read(path)
    for name in ("metrics", "completions", "tokens"):
        with (path / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
    assert folder.read(path) == before


def test_the_last_lines_tell_five_completions_the_accuracy_and_where_the_page_is(made, capsys):
    report.main([str(made)])
    out = capsys.readouterr().out
    assert out.count("advantage") == 5
    assert "accuracy on held-out questions: 25.0% before, 75.0% after step 4" in out
    assert "4 steps in 0.1 minutes, 400 tokens" in out
    assert "\n  What is 2 + 2?\n  I say 4.\n" in out
    assert str(made / "report.html") in out
    assert "\x1b" not in out and "\x00" not in out  # of a hostile completion
    assert (made / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_long_completion_is_told_by_its_start_and_its_end(made):
    run = folder.read(made)
    long = "so " * 9000 + "<answer>4</answer>"
    texts = [record | {"completion": long} for record in run.completions]
    told = summary.completions(dataclasses.replace(run, completions=texts))
    assert max(map(len, told)) < 2000
    assert sum("so so" in line and line.endswith("<answer>4</answer>") for line in told) == 5


def test_a_page_of_too_many_bytes_has_some_steps_evenly_spaced():
    steps = [{"step": step, "train": ["x" * 1000], "eval": []} for step in range(100)]
    kept = story.thin(steps, 20_000)
    numbers = [step["step"] for step in kept]
    assert numbers[0] == 0 and numbers[-1] == 99 and 15 <= len(numbers) <= 20
    gaps = [b - a for a, b in zip(numbers, numbers[1:])]
    assert max(gaps) - min(gaps) <= 1
    assert story.thin(steps, 10**9) == steps


def test_what_prompts_share_is_cut_at_a_templates_mark_not_within_a_question():
    prompts = [f"<s>Be brief.\n<u>What is {i}?</u>\n<a>" for i in (12, 13)]
    assert story.common_parts(prompts) == ("<s>Be brief.\n<u>", "</u>\n<a>")
    assert story.common_parts(prompts[:1]) == ("", "")


def test_a_name_that_is_html_stays_text_in_the_file():
    told = page.render({"name": "</title><script>x</script>", "text": "</script>"})
    assert "<script>x" not in told and told.count("</script>") == 2


# What a step records of its tokens ----------------------------------------------------------------


def test_the_texts_of_tokens_add_up_to_the_text_of_all(tokenizer):
    rng = random.Random(0)
    ids = tokenizer.encode(
        "Zürich 🙂👩‍👩‍👧 日本語 <think>\n\t x²</think>", add_special_tokens=False
    )
    for case in [ids, [rng.randrange(len(tokenizer)) for _ in range(300)]]:
        parts = pieces(tokenizer, case)
        assert len(parts) == len(case)
        assert "".join(parts) == tokenizer.decode(case)
    assert " 🙂" in pieces(tokenizer, ids)


RECORDED = {"train_type": "full", "beta": 0, "save_steps": 1, "log_completions": "true"}
RECORDED |= {"num_iterations": 2, "max_steps": 4, "learning_rate": 3e-3, "eval_steps": 4}
RECORDED |= {"lr_scheduler_type": "constant"}  # so that a shorter run is its beginning


@pytest.fixture(scope="module")
def recorded(model_folder, plugin, tmp_path_factory):
    """Two batches of two steps each, with the tokens of two groups a step."""
    path = tmp_path_factory.mktemp("recorded") / "run"
    train_here(*flags_for(model_folder, plugin, path, **RECORDED, log_tokens=2))
    return path


def token_lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "tokens.jsonl").read_text().splitlines()]


def test_before_and_after_are_the_log_probabilities_of_the_steps_checkpoints(
    recorded, model_folder, tiny_tokenizer
):
    from transformers import AutoModelForCausalLM

    found = token_lines(recorded)
    assert [line["step"] for line in found] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [line["drawn"] for line in found] == [1, 1, 1, 1, 3, 3, 3, 3]
    folders = [model_folder, *(recorded / f"checkpoint-{step}" for step in (2, 4))]
    models = {
        step: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for step, path in zip((0, 2, 4), folders)
    }
    for line in found:
        prompt = tiny_tokenizer.encode(line["prompt"], add_special_tokens=False)
        for done in line["completions"]:
            for step, name in ((line["step"] - 1, "before"), (line["step"], "after")):
                if step in models:
                    logps, entropies = log_probabilities(models[step], prompt, done["ids"])
                    assert done[name] == pytest.approx(logps, rel=1e-3, abs=2e-4)
                    if name == "before":
                        assert done["entropy"] == pytest.approx(entropies, rel=1e-3)
            ratio = [math.exp(b - s) for b, s in zip(done["before"], done["sampled"])]
            assert done["ratio"] == pytest.approx(ratio, rel=1e-2)
            assert done["length"] == len(done["ids"]) == len(done["tokens"])
    moved = [abs(a - b) for d in found[0]["completions"] for a, b in zip(d["after"], d["before"])]
    assert max(moved) > 1e-3


@torch.no_grad()
def log_probabilities(model, prompt, ids) -> tuple[list, list]:
    """Of one completion, by the model as transformers has it, token by token."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 0.9
    table = torch.log_softmax(logits, dim=-1)
    entropies = -(table.exp() * table).sum(dim=-1)
    return [table[i, token].item() for i, token in enumerate(ids)], entropies.tolist()


def test_recording_changes_nothing_of_the_run(recorded, model_folder, plugin, tmp_path):
    changes = RECORDED | {"max_steps": 3, "save_steps": 500}
    train_here(*flags_for(model_folder, plugin, tmp_path, **changes))
    assert not (tmp_path / "tokens.jsonl").exists()
    without, beside = timeless(read_metrics(tmp_path)), timeless(read_metrics(recorded))
    assert without == beside[:3]
    assert drawn(tmp_path) == drawn(recorded)


def drawn(path) -> list[dict]:
    lines = (path / "completions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if record["phase"] == "train"]


def test_two_ranks_record_what_one_does(recorded, model_folder, plugin, tmp_path):
    changes = RECORDED | {"per_device_train_batch_size": 8, "deepspeed": "zero3", "log_tokens": 2}
    changes |= {"max_steps": 2, "save_steps": 500}
    run_forked(flags_for(model_folder, plugin, tmp_path / "two", **changes), 2, tmp_path / "ranks")
    for one, two in zip(token_lines(recorded)[:4], token_lines(tmp_path / "two"), strict=True):
        for a, b in zip(one.pop("completions"), two.pop("completions"), strict=True):
            for name in ("sampled", "before", "after", "entropy", "ratio"):
                assert b.pop(name) == pytest.approx(a.pop(name), rel=2e-2, abs=2e-3)
            assert a.pop("advantage") == pytest.approx(b.pop("advantage"), abs=1e-4)
            assert a == b
        assert one == two


def test_the_page_of_a_real_run_has_each_steps_groups_and_their_tokens(recorded):
    told = story.story(folder.read(recorded))
    assert [step["step"] for step in told["steps"]] == [1, 2, 3, 4]
    first, second = told["steps"][:2]
    assert len(first["train"]) == 4 and len(told["steps"][3]["eval"]) > 0
    with_tokens = [group for group in first["train"] if "tokens" in group["completions"][0]]
    assert len(with_tokens) == 2  # beside the others of their step
    assert len(second["train"]) == 2  # of the same batch, which was told at step 1
    assert "/" not in "".join(told["about"])  # names, no folders: a page may be sent on
