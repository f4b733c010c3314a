"""What makes training quick: one file a trick, each in the place of one plain function.

Without this folder, or with --plain true, training is slower and gives the same.

    part            file         in the place of                       on          compared with
    packed rows     packed.py    the padded pass of completion_logps   CPU, CUDA   that function
      one kernel    varlen.py    the blocks of packed rows             CUDA        the blocks
    chunked head    head.py      the logits of completion_logps        CPU, CUDA   that function
    remade norms    remade.py    the forward of RMS norms              CPU, CUDA   the model's own
    remade gates    remade.py    the forward of SwiGLU MLPs            CPU, CUDA   the model's own
    adapters        adapters.py  lora.LoRALinear.forward               CPU, CUDA   that function
    quick decoder   decoder.py   sampler.Decoder                       CPU, CUDA   that class
      its weights   decoder.py   products of linear layers             CPU         the layers' own
      its rows      tree.py      a row for each completion             CPU         sampler.Decoder
      its step      graphs.py    a step kernel by kernel               CUDA        sampler.Decoder
    drawing         draw.py      sampler.sample_tokens                 CPU, CUDA   that function
    threads, heap   cpu.py       PyTorch's and the C library's ways    CPU         their settings

`prepare` decides which parts a model takes and leaves the choice on the model: in its attention
implementation, its modules' `forward`, and `has_known_head`. To add a part, give it the signature
of what it replaces, a line in this table, a place in `prepare`, and a test that compares the two.
"""

from collections.abc import Callable

import torch
from torch import Tensor

import dist
import grpo
import sampler
from fast import adapters, remade
from fast.cpu import use_cpu_well
from fast.decoder import LlamaDecoder, PackedDecoder, serves
from fast.draw import draw_for, sample_tokens
from fast.graphs import GraphDecoder
from fast.head import LOGITS_AT_ONCE, head_is_plain, logps_from_hidden_states
from fast.packed import MAX_SCORES, QUERIES_AT_ONCE, completion_hidden_states, hidden_states
from fast.tree import TreeLlamaDecoder, TreePackedDecoder
from grpo import Rows

__all__ = [
    "LOGITS_AT_ONCE",
    "MAX_SCORES",
    "QUERIES_AT_ONCE",
    "completion_logps",
    "decoder_for",
    "draw_for",
    "prepare",
    "sample_tokens",
    "use_cpu_well",
]


def completion_logps(
    model: torch.nn.Module, prompt_ids: Rows, completion_ids: Rows, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`grpo.completion_logps`, quicker and in less memory.

    A model that `prepare` has not seen, or whose head does more than is known here, takes the
    plain one itself.
    """
    if not getattr(model, "has_known_head", False):
        return grpo.completion_logps(model, prompt_ids, completion_ids, temperature)
    device = next(model.parameters()).device
    completions, completion_mask = grpo.pad(completion_ids, "right", device)  # (B, T)
    mask = completion_mask.bool()
    hidden, predicting = hidden_states(model, prompt_ids, completion_ids)  # (N, D), (tokens,)
    # Completions that begin alike have predictions in common, and each is made once.
    V = int(completions.max()) + 1
    each, of_token = (predicting * V + completions[mask]).unique(return_inverse=True)
    values = logps_from_hidden_states(model, hidden[each // V], each % V, temperature)
    blank = torch.zeros(mask.shape, dtype=values[0].dtype, device=device)
    logps, entropies = (blank.masked_scatter(mask, value[of_token]) for value in values)
    return logps, entropies, completion_mask


def decoder_for(model: torch.nn.Module, layerwise: bool = False) -> type[sampler.Decoder]:
    """The quickest class that decodes this model as `sampler.Decoder` does, with its own logits.

    layerwise: the model's layers are gathered one at a time (ZeRO-3), by its own forward, so that
    stays. Collective where parameters are sharded.
    """
    if model.config._attn_implementation != "grouped":
        return sampler.Decoder
    if layerwise:
        return PackedDecoder
    on_gpu = next(model.parameters()).is_cuda  # rows cost little there, and kernels much
    kinds = [GraphDecoder, LlamaDecoder] if on_gpu else [TreeLlamaDecoder]
    training = model.training
    try:
        with dist.gathered(model.eval()):  # as it samples: dropout and recomputation keep no cache
            serving = (kind for kind in kinds if serves(kind, model))
            return next(serving, PackedDecoder if on_gpu else TreePackedDecoder)
    finally:
        model.train(training)


@torch.no_grad()
def prepare(model: torch.nn.Module) -> list[str]:
    """Have a model run through the parts of this folder → which it takes, which not, and why.

    Adapters must be in it. Every part is tried on a few tokens, and left off where the last hidden
    states differ, because that part of the model does something else. A model whose head is not
    known packs nothing, so that "grouped" attention says that both are (fast/decoder.py).
    """
    adapted = adapters.prepare(model)
    model.has_known_head = dist.forward(head_is_plain, model)
    if not model.has_known_head:
        others = "no others (it does more with its logits than the chunked head knows of)"
        return ["adapters", others] if adapted else [others]

    own = dist.forward(trial, model)
    why_not = {
        "packed rows": try_packed_rows(model, own),
        "chunked head": "",
        "remade norms": try_remade(model, own, remade.norms_of(model), remade.norm_forward),
        "remade gates": try_remade(model, own, remade.gates_of(model), remade.gate_forward),
    }
    taken = [part for part, reason in why_not.items() if not reason]
    if adapted:
        taken.append("adapters")
    if "packed rows" in taken:
        taken.append("quick decoder")
    return taken + [f"no {part} ({reason})" for part, reason in why_not.items() if reason]


def try_packed_rows(model: torch.nn.Module, own: Tensor) -> str:
    """Take them if they give the model's own hidden states → why not, or ""."""
    config = model.config.get_text_config()
    if model.config._attn_implementation != "sdpa":
        return f"its attention is {model.config._attn_implementation}"
    if getattr(config, "attention_dropout", 0):
        return "it drops attention out"
    model.set_attn_implementation("grouped")
    if not differs(model, own):
        return ""
    model.set_attn_implementation("sdpa")
    return "it attends in another way"


def try_remade(model: torch.nn.Module, own: Tensor, modules: list, forward: Callable) -> str:
    """Give these modules another `forward` if the hidden states stay → why not, or ""."""
    replaced = remade.replace(modules, forward)
    if not replaced:
        return "it has none"
    if not differs(model, own):
        return ""
    for module in replaced:
        del module.forward
    return "its own do something else"


def trial(model: torch.nn.Module) -> Tensor:
    """The last hidden states of a few short completions, (tokens, D)."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts, completions = [[0, 1, 2], [0, 1, 2], [0, 1, 3, 4]], [[5, 6, 7], [5], [7, 5, 6, 3]]
    # From the middle of the vocabulary: special tokens lie at its start, and some models have
    # never seen them.
    prompts, completions = (
        [[(vocabulary // 2 + i) % vocabulary for i in row] for row in rows]
        for rows in (prompts, completions)
    )
    return completion_hidden_states(model, prompts, completions)


def differs(model: torch.nn.Module, own: Tensor) -> bool:
    """Whether the trial's hidden states are others by more than rounding, which makes 0.01 in
    bfloat16 and 1e-6 in float32; or whether it does not run at all, unless for lack of memory."""
    limit = 0.1 if own.dtype == torch.bfloat16 else 1e-4
    try:
        hidden = dist.forward(trial, model)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        if "can't allocate memory" in str(error):
            raise
        return True  # values narrower than keys, other arguments
    errors = (hidden - own).norm(dim=1) / own.norm(dim=1)
    return not errors.median() <= limit  # so that what is not a number differs
