"""The page as one file of HTML: its style, its scripts and the run's data stand in it."""

import base64
import hashlib
import html
import json
import os
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "tokens.js", "page.js")


def render(story: dict) -> str:
    style = read("page.css")
    script = "\n".join(read(name) for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(story["name"]),
        "POLICY": policy(style, script),
        "STYLE": style,
        "SCRIPT": script,
    }
    page = read("page.html")
    for name, text in parts.items():
        page = page.replace(f"@{name}@", text)
    # Last, and once: what a model wrote is not searched for places to fill.
    before, _, after = page.partition("@DATA@")
    return before + embedded(story) + after


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def embedded(story: dict) -> str:
    """JSON that no `</script>` in it can end: `<` is written as an escape."""
    text = json.dumps(story, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: this style and this script, no other, and no network at all."""
    return f"default-src 'none'; style-src {fingerprint(style)}; script-src {fingerprint(script)}"


def fingerprint(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def write(file: Path, page: str) -> None:
    """Whole, or as it was: a browser may read it at any time."""
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    os.replace(unfinished, file)
