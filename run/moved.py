"""Where a path that a run has recorded lies now: its folder may have gone to another checkout, or to
another machine.

    models/base                             in the working folder, else beside the checkpoint
    /gone/models/SmolLM2-135M-Instruct      the embedded model of this checkout
    /gone/examples/train/grpo/plugin/…      a plugin of its own
"""

import functools
import os
import sys
from pathlib import Path

from run.console import harmless

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED_MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PLUGIN = ROOT / "examples" / "train" / "grpo" / "plugin" / "close.py"
OWN = (EMBEDDED_MODEL, PLUGIN)  # which every checkout has


def places(recorded: str, *folders: Path) -> list[Path]:
    """Where to look for it, in this order. folders: what a relative path may be relative to."""
    path = Path(recorded)
    found = [path]
    if not path.is_absolute():
        found += [folder / path for folder in folders]
    if own := counterpart(path):
        found.append(own)
    return list(dict.fromkeys(found))


def counterpart(path: Path) -> Path | None:
    """This checkout's own file or folder, of a path that ends like it."""
    for own in OWN:
        ending = own.relative_to(ROOT).parts
        if path.parts[-len(ending) :] == ending:
            return own
    return None


def here(value):
    """A value of args.json: one of another checkout's own paths becomes this one's."""
    if isinstance(value, list):
        return [here(each) for each in value]
    if isinstance(value, str) and (own := counterpart(Path(value))) and not os.path.exists(value):
        tell(f"{value} is not there: {own} takes its place")
        return str(own)
    return value


@functools.cache
def tell(line: str) -> None:
    """Once, however often flags are read."""
    if os.environ.get("RANK", "0") == "0":
        print(harmless(line), file=sys.stderr, flush=True)
