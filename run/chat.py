"""Talk to a checkpoint.

    python -m run.chat CHECKPOINT                     a conversation, until Ctrl-D or Ctrl-C
    echo 'What is 12 + 7?' | python -m run.chat …     a line is a turn; the answers come out alone

Tokens are drawn as in the run's evaluations: its system prompt, template and temperature, and the
worked example of the built-in task. On a terminal what a model thinks, between <think> and </think>,
is dim and stands apart. Control characters that it writes are shown as signs and not sent to the
terminal, which would obey them.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import suppress

from data import BUILTINS, EXAMPLE, GUIDE_PROMPT, UsageError
from run import console, flags, trained
from run.console import harmless

NAMES = trained.ASKING
TAG = re.compile(r"</?think>")


def main(argv: list[str]) -> None:
    parser = trained.make_parser("run.chat", "Talk to a checkpoint.", NAMES)
    try:
        typed = trained.typed(parser, argv)
        checkpoint = trained.find(typed["checkpoint"])
        args = trained.flags_of(checkpoint, (*NAMES, "dataset", "temperature_eval"), typed)
        if "temperature" not in typed:
            args.temperature = args.temperature_eval
        trained.begin(checkpoint)
        chat(Model(args))
    except UsageError as error:
        flags.fail(str(error))
    except FloatingPointError as error:
        flags.fail(str(error), status=1)
    except KeyboardInterrupt:
        print("\ngood-bye")
        sys.exit(130)


def chat(model: "Model") -> None:
    """Read turns and show answers until there are no more. It keeps the conversation."""
    screen, turns = Screen(), []
    for question in screen.questions():
        turns.append({"role": "user", "content": question})
        answer = ""
        try:
            for text in model.answer(turns):
                answer += text
                screen.show(text)
        except UsageError as error:  # a turn that is too long: another may follow
            turns.pop()
            print(f"run.chat: {error}", file=sys.stderr, flush=True)
            continue
        screen.end()
        if model.was_cut:
            length = model.args.max_completion_length
            room = f"; --max_completion_length {2 * length} has room"
            screen.note(f"cut at {length} tokens{room if 2 * length < model.context else ''}")
        turns.append({"role": "assistant", "content": answer})


# The model --------------------------------------------------------------------------------------


class Model:
    """A checkpoint that answers, with train.py's own sampler."""

    def __init__(self, args: argparse.Namespace):
        import dist
        import train
        from run import checks, models, readers, setup
        from sampler import GREEDY

        config = models.model_config(args)
        tokenizer = models.load_tokenizer(args)
        self.args, self.context = args, models.context_of(config)
        self.was_cut = False  # the last answer, at its largest length
        if args.temperature == 0:
            vars(args).update(GREEDY)
        self.template = models.template_of(args)
        self.system, self.opening = readers.read_system(args.system), []
        if set(args.dataset) & set(BUILTINS):  # as each of its questions is asked
            self.opening = EXAMPLE
            if self.system is None:
                self.system = GUIDE_PROMPT.read_text(encoding="utf-8").strip()
        world = dist.find_world()
        policy, _ = setup.load_model(args, world, train.quick(args))
        inputs = checks.Inputs(tokenizer, [], [], None, "")
        self.run = train.make_run(args, world, policy.eval(), inputs)

    def answer(self, turns: list[dict]) -> Iterator[str]:
        """The answer to the last turn, piece by piece. When the model's context has no room for all
        turns, the oldest are left out, in place; UsageError if the last one alone is too long."""
        import data
        import train
        from run import templates

        tokenizer, args = self.run.tokenizer, self.args
        system = [{"role": "system", "content": self.system}] if self.system else []
        settings = {"prefix": args.response_prefix, "template": self.template}
        while True:
            prompt = [*system, *self.opening, *turns]
            (row,), _ = data.encode([{"prompt": prompt}], tokenizer, **settings)
            if len(row["prompt_ids"]) + args.max_completion_length <= self.context:
                break
            if len(turns) == 1:
                longest = self.context - args.max_completion_length
                raise UsageError(
                    f"{len(row['prompt_ids'])} tokens are more than the {longest} that the model "
                    f"has room for with --max_completion_length {args.max_completion_length}"
                )
            del turns[:2]
        opened = templates.opening(tokenizer, prompt, self.template) + args.response_prefix
        if opened:
            yield opened
        seed = train.seed_of(args.seed, len(turns), 0)
        decoded, token = Pieces(tokenizer), None
        for token in draw(self.run.sampler, row["prompt_ids"], seed):
            if token not in self.run.silent:
                yield decoded.add(token)
        self.was_cut = token is not None and token not in self.run.sampler.ends


def draw(sampler, prompt_ids: list[int], seed: int) -> Iterator[int]:
    """The tokens of sampler.generate([prompt_ids], [seed]), each as soon as it is drawn."""
    import torch

    from sampler import uniform_stream

    model, device = sampler.model, sampler.eos.device
    uniforms = uniform_stream(seed, sampler.max_new_tokens).to(device)
    with torch.inference_mode():
        first_row = torch.zeros(1, dtype=torch.long, device=device)
        decoder = sampler.decoder(model, [tuple(prompt_ids)], first_row)
        logits = decoder.logits  # (1, V)
        for t in range(len(uniforms)):
            token, logp = sampler.draw(logits, uniforms[t : t + 1], *sampler.distribution)
            if not logp.isfinite():
                raise FloatingPointError(
                    "the checkpoint gives log-probabilities that are not finite; an earlier one, or "
                    "a larger --temperature, works"
                )
            yield token.item()
            if token.item() in sampler.ends or t + 1 == len(uniforms):
                return
            logits = decoder.step(token)


class Pieces:
    """Tokens become text as they come: a character of several tokens comes with its last one."""

    def __init__(self, tokenizer):
        from tokenizers.decoders import DecodeStream

        self.tokenizer = tokenizer.backend_tokenizer
        self.stream = DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        return self.stream.step(self.tokenizer, token) or ""


# The screen -------------------------------------------------------------------------------------


class Screen:
    """Where turns come from, and where answers go."""

    def __init__(self):
        from rich.console import Console

        sys.stdout.reconfigure(errors="replace")  # what it cannot show must not end it
        self.console = Console(highlight=False)
        self.thinks, self.kept = False, ""

    def questions(self) -> Iterator[str]:
        """Lines that are not empty, until the input ends."""
        asks = sys.stdin.isatty()
        if asks and self.console.is_terminal:
            with suppress(ImportError):
                import readline  # noqa: F401  with it `input` edits lines, and has a history
        while True:
            try:
                line = self.ask() if asks else input()
            except (EOFError, OSError):  # the latter of a stream that is not for reading
                if asks:  # the shell's next line begins on its own
                    print(file=sys.stdout if self.console.is_terminal else sys.stderr)
                return
            if line.strip():
                if self.console.is_terminal and not asks:  # one sees what is answered
                    print(f"\n> {harmless(line)}")
                yield line.strip()

    def ask(self) -> str:
        """A line that somebody types. What else the output goes to gets answers alone."""
        if self.console.is_terminal:
            print()
            return input("> ")
        print("\n> ", end="", file=sys.stderr, flush=True)
        return input()

    def note(self, line: str) -> None:
        """Something about an answer that is no part of it."""
        if self.console.is_terminal:
            self.console.print(f"({line})", style="dim", markup=False)
        else:
            print(f"run.chat: {line}", file=sys.stderr, flush=True)

    def show(self, text: str) -> None:
        """A piece of an answer. Tags are not shown on a terminal, so the start of one waits."""
        if not self.console.is_terminal:
            self._write(text)
            return
        self.kept += text
        while match := TAG.search(self.kept):
            self._write(self.kept[: match.start()])
            thinks = match[0] == "<think>"
            if self.thinks and not thinks:
                print()  # what it says begins on a line of its own
            self.thinks, self.kept = thinks, self.kept[match.end() :]
        whole = len(self.kept) - longest_start(self.kept)
        self._write(self.kept[:whole])
        self.kept = self.kept[whole:]

    def end(self) -> None:
        """The answer is over."""
        self._write(self.kept)
        self.thinks, self.kept = False, ""
        print(flush=True)

    def _write(self, text: str) -> None:
        style = "dim italic" if self.thinks else None
        self.console.out(harmless(text), style=style, end="", highlight=False)
        self.console.file.flush()


def longest_start(text: str) -> int:
    """How many characters at the end may be the start of a tag."""
    for length in range(min(len(text), len("</think>") - 1), 0, -1):
        if any(tag.startswith(text[-length:]) for tag in ("<think>", "</think>")):
            return length
    return 0


if __name__ == "__main__":
    console.settle()
    flags.program = "run.chat"
    main(sys.argv[1:])
