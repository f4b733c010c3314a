"""Chat templates: what they open of an answer."""

import re
import uuid


def opening(tokenizer, prompt: list[dict], template=None) -> str:
    """What the chat template opens behind the assistant's header, such as the "<think>" of R1's
    distills: it is in the prompt, and part of the answer.

    prompt: one that `data.encode` has taken. The header is what stands in front of what the
    assistant has said earlier.
    """
    mark = uuid.uuid4().hex  # what no prompt holds
    earlier = [*prompt, {"role": "assistant", "content": mark}, prompt[-1]]
    settings = {"tokenize": False, **(template or {})}
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **settings)
    try:
        header = tokenizer.apply_chat_template(earlier, **settings).partition(mark)[0]
    except Exception:  # what a template may raise that takes no second question
        header = None
    if header and asked.startswith(header):
        return asked.removeprefix(header)
    tag = re.search(r"<\w+>\s*(</\w+>\s*)?$", asked)  # the header of the last turn is another one
    return tag[0] if tag else ""
