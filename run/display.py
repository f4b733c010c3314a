"""What a run shows while it goes on: a panel that follows it on a terminal, lines anywhere else.

    with phase("generate"):             where the run is: train.py, checkpoints.py and others say so
    for micro in counted("train", …):   the same, with "3 of 8"
    report(212, 2048, 9, 16)            from within the sampler, at each token
    screen.step(…), say(line)           what came of it, from run/log.py

What trains leaves marks, and never waits: attributes of `screen`. A thread of rich's looks at them
twice a second, on rank 0 and on a terminal alone. The cursor stays where one sees it, so that no
end, however sudden, leaves a terminal without. This module imports rich when there is a panel.
"""

import atexit
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from run.console import harmless

LOOKS = 2  # a second
SAMPLES = 20.0  # seconds between two sample tables
ROWS = 4  # completions of one
TOKENS = " {:,} of {:,} tokens, {} of {} going"
GROUPS = " {} of {} prompts answered"
BYTES = " {:,.1f} of {:,.1f} MB"
BARS = "▁▂▃▄▅▆▇█"
CURVE = 40  # characters of the rewards' curve, at most
NARROW = 60  # columns: with fewer a table keeps what matters


class Phase:
    """A part of the run that is under way, or was the last one."""

    def __init__(self, name: str, total: int = 0):
        self.name, self.total, self.number = name, total, 0
        self.started, self.over = time.monotonic(), False

    def __str__(self) -> str:
        return f"{self.name} {self.number} of {self.total}" if self.total else self.name


class Screen:
    """There is one for the process, as there is one terminal."""

    def __init__(self):
        self.live = self.console = None  # of rich, while there is a panel
        self.phases: list[Phase] = []  # each within the one before it
        self.drawn = None  # how far the sampler is: a form and its numbers
        self.took = {"evaluate": [], "save": []}  # seconds, of each so far
        self.max_steps = 0  # there is no training yet
        self.facts, self.sample, self.sampled = {}, None, 0.0
        self.rewards: list[float] = []

    # The marks that a run leaves

    def begin(self, step: int, max_steps: int, to_come: Callable[[int], dict[str, int]]) -> None:
        """Training begins. to_come: from a step to the evaluations and saves behind it."""
        self.step_now, self.first_step, self.to_come = step, step, to_come
        self.began = self.since = time.monotonic()
        self.step_took: deque[float] = deque(maxlen=50)  # seconds
        self.took = {"evaluate": [], "save": []}
        self.facts, self.sample, self.rewards = {}, None, []
        self.max_steps = max_steps

    def step(self, step: int, facts: dict[str, str], metrics: dict[str, float]) -> None:
        """A step is done. facts: what to show of it."""
        self.step_took.append(metrics["time/step"])
        self.rewards.append(metrics["reward"])
        self.step_now, self.facts, self.since = step, facts, time.monotonic()

    def wants_sample(self) -> bool:
        return self.live is not None and time.monotonic() > self.sampled + SAMPLES

    def show_sample(
        self, question: str, reference: str, rows: list[tuple[str, str, float]]
    ) -> None:
        """rows: an answer, its rewards in words, its advantage."""
        from rich.table import Table
        from rich.text import Text

        self.sampled, width = time.monotonic(), self.console.width
        told = f"{self.fit(question, width)}\nreference: {self.fit(reference, width - 12)}"
        table = Table(title=Text(told), title_justify="left", expand=True, title_style="")
        table.add_column("answer", ratio=3, overflow="fold")
        if width < NARROW:
            table.box, table.show_header = None, False
        else:
            table.add_column("rewards", ratio=2)
        table.add_column("advantage", justify="right", no_wrap=True)
        for answer, rewards, advantage in rows:
            color = "green" if advantage > 0 else "red" if advantage < 0 else ""
            cells = [Text(self.fit(answer, width)), Text(f"{advantage:+.2f}", color)]
            if width >= NARROW:
                cells.insert(1, Text(self.fit(rewards, 60)))
            table.add_row(*cells)
        lines = self.console.render_lines(table)  # once, not at each look
        self.sample = [Line(line) for line in lines]

    def seconds(self) -> float:
        """Since training began, in this process."""
        return time.monotonic() - self.began

    # What one sees

    def open(self) -> None:
        """Show a panel from now on."""
        from rich.console import Console
        from rich.live import Live

        class Terminal(Console):
            def show_cursor(self, show: bool = True) -> bool:
                return False

        streams = sys.stdout, sys.stderr

        def leave_to_parent() -> None:
            self.live = None
            sys.stdout, sys.stderr = streams

        self.console = Terminal(file=sys.stdout, highlight=False)
        settings = {"console": self.console, "transient": True, "get_renderable": self.panel}
        self.live = Live(**settings, refresh_per_second=LOOKS)
        self.live.start()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=leave_to_parent)

    def close(self) -> None:
        """Take the panel away: what is printed from now on is below all else."""
        live, self.live = self.live, None
        if live:
            with suppress(OSError, ValueError):  # of a stream that is closed
                live.stop()

    def panel(self):
        from rich.console import Group
        from rich.text import Text

        parts = [self.where()]
        if self.max_steps:
            facts, column = Text(style="default"), 0
            for name, value in self.facts.items():
                width = len(f"{name} {value}   ")
                if column and column + width > self.console.width:  # a number stays beside its name
                    facts.append("\n")
                    column = 0
                facts.append(f"{name} ", "dim").append(f"{value}   ", "bold")
                column += width
            parts = [self.progress(), *parts, facts]
            if self.unicode and len(self.rewards) > 1:
                bars = curve(self.rewards, max(1, min(CURVE, self.console.width - 8)))
                parts.append(Text("reward ", "dim").append(bars, "cyan"))
            if self.sample and self.console.height > len(self.sample) + 6:
                parts += self.sample
        return Group(*parts, Text())  # the cursor is at the start of an empty line

    def where(self):
        """The line of the phases: "evaluate 3 of 12 · generate 212 of 2,048 tokens, 9 of 16 going"."""
        from rich.text import Text

        phases = self.phases
        told = (" · " if self.unicode else " - ").join(map(str, phases))
        if self.drawn:
            form, numbers = self.drawn
            told += form.format(*numbers)
        line = Text(told, "bold cyan")
        if phases:
            line.append(f"  {clock(time.monotonic() - phases[-1].started)}", "dim")
        return line

    def progress(self):
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        told = f"step {self.step_now} of {self.max_steps}"
        times = f"{clock(self.seconds())} so far{self.left()}"
        if self.console.width < NARROW:  # which leaves no room for a bar
            return Text(told, "bold").append(f"  {times}", "not bold")
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        bar = ProgressBar(total=self.max_steps, completed=self.step_now)
        row.add_row(Text(told, "bold"), bar, Text(times))
        return row

    def left(self) -> str:
        """What is left takes as long as such things took so far: ", about 17:20 left"."""
        if not self.step_took:
            return ""
        each = sum(self.step_took) / len(self.step_took)
        under_way = min(each, time.monotonic() - self.since)
        seconds = each * (self.max_steps - self.step_now) - under_way
        unknown = ""
        for name, number in self.to_come(self.step_now).items():
            took = self.took[name]
            if took:
                seconds += number * sum(took) / len(took)
            elif number and name == "evaluate":
                unknown = f" and {number} evaluation{'s' * (number > 1)}"
        return f", about {clock(max(0.0, seconds))}{unknown} left"

    @property
    def unicode(self) -> bool:
        return self.console.encoding.lower().startswith("utf")

    def fit(self, text: str, most: int) -> str:
        """A text without what a terminal would obey, as one line, its middle left out if it is long."""
        text = " ".join(harmless(text).split())
        if not self.unicode:
            text = text.encode("ascii", "replace").decode()
        most = max(most, 20)
        if len(text) <= most:
            return text
        return f"{text[: most // 2]} ... {text[5 - most // 2 :]}"


class Line:
    """A line that rich has rendered before."""

    def __init__(self, segments: list):
        self.segments = segments

    def __rich_console__(self, *_):
        from rich.segment import Segment

        yield from self.segments
        yield Segment.line()


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def curve(values: list[float], most: int = CURVE) -> str:
    """Numbers as bars between the least and the largest, means where there are more than `most`."""
    size = -(-len(values) // most)
    means = [
        sum(part) / len(part) for i in range(0, len(values), size) if (part := values[i : i + size])
    ]
    low, high = min(means), max(means)
    heights = (round((x - low) / ((high - low) or 1) * (len(BARS) - 1)) for x in means)
    return "".join(BARS[height] for height in heights)


# For whoever has something to say ----------------------------------------------------------------

screen = Screen()


def start() -> None:
    """The first sign of life, before torch is imported: a panel, or a line."""
    if os.environ.get("RANK", "0") != "0":
        return
    if sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        with phase("import torch and transformers"):
            screen.open()
    else:
        say("starting: importing torch and transformers")


def say(line: str, style: str = "") -> None:
    """Print a line, above the panel if there is one."""
    if screen.live:
        from rich.text import Text

        screen.console.print(Text(line, style))
    else:
        print(line, flush=True)


def warn(line: str) -> None:
    """A line that stands out."""
    say(f"! {line}", "bold yellow")


def end(lines: list[str]) -> None:
    """The last lines. The first is broken between words, as all above a panel; the others stay as
    they are, to be copied, and no panel is left."""
    reached, *others = lines
    say(reached)
    screen.close()
    for line in others:
        say(line)


def report(tokens: int, longest: int, going: int, rows: int) -> None:
    """How far a sampler is."""
    screen.drawn = TOKENS, (tokens, longest, going, rows)


def report_groups(done: int, total: int) -> None:
    """The same of vLLM, which tells it each second."""
    screen.drawn = GROUPS, (done, total)


def report_bytes(done: int, total: int) -> None:
    """How far a download is. total: of the files that have begun."""
    screen.drawn = BYTES, (done / 1e6, total / 1e6)


@contextmanager
def phase(name: str, total: int = 0) -> Iterator[Phase]:
    """The run is at this now, and may be at others within. Shown until something else begins."""
    mark = Phase(name, total)
    screen.drawn = None
    screen.phases = [*(p for p in screen.phases if not p.over), mark]
    try:
        yield mark
        if name in screen.took:
            screen.took[name].append(time.monotonic() - mark.started)
    finally:
        mark.over = True


def counted(name: str, items: Iterable) -> Iterator:
    """The items, one after the other; which of them is the turn is shown."""
    items = list(items)
    with phase(name, len(items)) as mark:
        for mark.number, item in enumerate(items, start=1):
            screen.drawn = None
            yield item
