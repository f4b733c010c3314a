"""Merge a LoRA checkpoint into its base: a model's folder, which loads wherever models do.

    python -m run.merge CHECKPOINT OUT

The sums are lora.py's, in float32, and rounded once to --torch_dtype, the run's own when absent.
One layer is merged at a time and takes its base's place, so it takes the memory of one model.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from data import UsageError, one_line
from run import console, flags, trained

NAMES = ("torch_dtype",)


def read(argv: list[str]) -> tuple[argparse.Namespace, Path]:
    """The flags and the folder to write; UsageError for what is wrong with them."""
    parser = trained.make_parser("run.merge", "Merge a LoRA checkpoint into its base.", NAMES)
    parser.usage = (
        "python -m run.merge CHECKPOINT OUT [--torch_dtype bfloat16|float32] [--model BASE]"
    )
    parser.add_argument("out", metavar="OUT", help="a folder that is empty or not there")
    typed = trained.typed(parser, argv)
    checkpoint = trained.find(typed["checkpoint"])
    if not checkpoint.is_lora:
        raise UsageError(
            f"{checkpoint.folder}: holds a whole model, which needs no merging; it works as it is, "
            "with vLLM, with transformers and as --model"
        )
    out = Path(typed["out"])
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; a folder, empty or not there, works")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out}: is not empty; a folder, empty or not there, works")
    return trained.flags_of(checkpoint, NAMES, typed), out


def main(argv: list[str]) -> None:
    try:
        args, out = read(argv)
        trained.say("merging")
        merge(args, out)
    except UsageError as error:
        flags.fail(str(error))
    except OSError as error:
        flags.fail(f"{out}: could not be written ({one_line(error)})", status=1)
    except KeyboardInterrupt:
        flags.fail("interrupted; nothing was written", status=130)
    print(f"{out}: {args.model} with {args.adapters}, in {args.torch_dtype}")


def merge(args: argparse.Namespace, out: Path) -> None:
    """Write the merged model and its tokenizer; a folder that is there is whole."""
    import dist
    import lora
    import train
    from run import models, setup
    from run.checkpoints import keep_valid

    args.plain = True  # the model as transformers made it
    models.model_config(args)
    tokenizer = models.load_tokenizer(args)
    model, _ = setup.load_model(args, dist.find_world(), train.quick(args))
    lora.merge(model)
    keep_valid(model.generation_config)
    unfinished = out.with_name(f"{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        model.cpu().save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if flags_file := trained.find(args.adapters).args_file:  # how the model is to be asked
            shutil.copyfile(flags_file, unfinished / "args.json")
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(unfinished, out)  # over an empty folder, too
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


if __name__ == "__main__":
    console.settle()
    flags.program = "run.merge"
    main(sys.argv[1:])
