"""What a command shows on a terminal, as a picture: the ones in docs/ are made so.

python examples/picture.py docs/evaluate.svg python -m run.evaluate output/demo …
echo 'What is 23 + 45?' | python examples/picture.py docs/chat.svg python -m run.chat output/demo
"""

import os
import shlex
import subprocess
import sys
import termios

from rich.console import Console
from rich.text import Text

WIDTH = 90  # columns


def shown(command: list[str]) -> str:
    """What the command writes to a terminal of WIDTH columns, colours included."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, WIDTH))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
        if not part:
            break
        text += part
    if process.wait():
        sys.exit(f"{shlex.join(command)}: ended with status {process.returncode}")
    return text.decode().replace("\r\n", "\n")


def main(file: str, command: list[str]) -> None:
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
        console.print(Text(f"$ {shlex.join(command)}", style="bold"))
        console.print(Text.from_ansi(shown(command)))
        console.save_svg(file, title=command[0])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
