"""What a command shows on a terminal, as a picture: the ones in docs/ are made so.

python examples/picture.py docs/evaluate.svg python -m run.evaluate output/demo …
echo 'What is 23 + 45?' | python examples/picture.py docs/chat.svg python -m run.chat output/demo
WHEN='step 3 of.*generate 1. of' python examples/picture.py docs/train.svg python train.py demo …

With WHEN, a pattern, the picture is of the moment when the screen shows that. The command is then
ended.
"""

import os
import re
import shlex
import subprocess
import sys
import termios
from collections.abc import Iterator

import pyte
from rich.console import Console
from rich.text import Text

WIDTH, HEIGHT = 90, 40


def output(process: subprocess.Popen, terminal: int) -> Iterator[bytes]:
    """What the process writes to its terminal, piece by piece."""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side is closed
            part = b""
        if not part:
            break
        yield part
    if process.wait():
        command = shlex.join(process.args)
        sys.exit(f"{command}: ended with status {process.returncode}")


def shown(command: list[str], when: str | None) -> Text:
    """What stands on a terminal of WIDTH columns at the command's end, or as soon as it shows `when`."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (HEIGHT, WIDTH))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    if when is None:
        text = b"".join(output(process, ours))
        return Text.from_ansi(text.decode().replace("\r\n", "\n"))
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.ByteStream(screen)
    for part in output(process, ours):
        stream.feed(part)
        if re.search(when, "\n".join(screen.display), re.DOTALL):
            process.kill()
            return text_of(screen)
    sys.exit(f"{shlex.join(command)}: never showed {when!r}")


def text_of(screen: pyte.Screen) -> Text:
    """A screen with its colours."""
    text = Text()
    last = max(y for y, line in enumerate(screen.display) if line.strip())
    for y in range(last + 1):
        for x in range(WIDTH):
            character = screen.buffer[y][x]
            color = "" if character.fg == "default" else character.fg.replace("brown", "yellow")
            if len(color) == 6 and color.isalnum() and any(map(str.isdigit, color)):
                color = f"#{color}"  # of 256
            text.append(character.data, f"{'bold ' * character.bold}{color}".strip())
        text.append("\n")
    return text


def main(file: str, command: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text(f"$ {shlex.join(command)}", style="bold"))
        console.print(shown(command, os.environ.get("WHEN")))
        console.save_svg(file, title=command[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
