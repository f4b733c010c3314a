"""Decoding in fewer operations, in the place of sampler.Decoder.

What a step of few rows costs is the number of its operations, and reading the weights and the cache.

    sampler.Decoder   the model's own forward on a padded batch
    PackedDecoder     prompts prefilled in one row without padding; what all begin with is kept once:

                      keys of row b   [ what all prompts begin with | rest of its prompt, its tokens ]
                                        one product for all rows      one product for each

    LlamaDecoder      the same for models of Llama's shape, in a third of the operations: one product
                      for all linear layers that read the same input, and one for their adapters

    Tree…Decoder      either, with a row for each beginning that was drawn, not for each completion (tree.py)
    GraphDecoder      LlamaDecoder on GPUs, its step replayed as one CUDA graph (graphs.py)

`fast.decoder_for` says which of them serves a model. To try a new idea (a quantized cache, speculation),
write another class with `logits`, `step` and `keep`, and choose it there.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

import lora
from dist import forward, has_bfloat16, is_sharded
from fast import adapters
from fast.head import logits_from_hidden_states
from fast.packed import Pack
from grpo import pad
from sampler import Decoder

# Frozen weights in oneDNN's layout, and what they were made of, by the first of their layers.
KEPT: WeakKeyDictionary = WeakKeyDictionary()
ROOM = 16  # tokens that a row's cache may have room for beyond those in it (run/machine.py)


def serves(kind: type[Decoder], model: nn.Module) -> bool:
    """Whether decoders of this kind give the model's own logits, tried on two prompts."""
    if agrees(kind, model):
        return True
    for module in model.modules():
        KEPT.pop(module, None)  # what it has packed
    return False


@torch.inference_mode()
def agrees(kind: type[Decoder], model: nn.Module) -> bool:
    """`serves`, with whatever such a decoder keeps."""
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None):
        return False
    a, b, c, d = ((config.vocab_size // 2 + i) % config.vocab_size for i in range(4))
    # Long enough that positions count.
    prompts = [a, b] + [a, c, d] * 20 + [b], [a, c] + [b, d, a, a] * 20
    rows = torch.tensor([0, 1, 1], device=next(model.parameters()).device)
    limit = 0.05 if model.dtype == torch.bfloat16 else 1e-3
    try:
        general, quick = PackedDecoder(model, prompts, rows), kind(model, prompts, rows)
        # A graph (fast/graphs.py) is recorded at the second and replayed from then on.
        for token in ([b, c, d], [d, d, a], [c, b, a], [a, a, b]):
            token = rows.new_tensor(token)
            expected, logits = general.step(token), quick.step(token).float()
    except torch.OutOfMemoryError:  # which no other part is to blame for
        raise
    except (AttributeError, RuntimeError, TypeError):  # it has other parts
        return False
    return bool((expected - logits).norm() <= limit * expected.norm())


# Packed prompts ---------------------------------------------------------------------------------


class DecodingLayer(DynamicLayer):
    """One layer's keys and values, laid out for one query a row, and attention to them.

    keys, values: (N, key heads, d) of a pack, the first `shared` of them those that all rows begin
    with; places (B, L): where each row's own are. Buffers have room for up to ROOM tokens more and
    are made anew every ROOM steps, not once for the longest completion: products read them whole,
    since oneDNN copies a part of a buffer to multiply it.
    """

    def __init__(self, keys: Tensor, values: Tensor, shared: int, places: Tensor):
        super().__init__()
        self.shared = shared
        self.length = places.shape[1]  # of a row's own
        # (key heads, shared, d)
        self.shared_keys = keys[:shared].transpose(0, 1).contiguous()
        self.shared_values = values[:shared].transpose(0, 1).contiguous()
        # (key heads, B, size, d): the length and room for more, a multiple of ROOM.
        room = ROOM - self.length % ROOM
        self.keys = with_room(keys[places].permute(2, 0, 1, 3), room)
        self.values = with_room(values[places].permute(2, 0, 1, 3), room)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Take a position more of each row, (B, key heads, 1, d)."""
        if self.length == self.keys.shape[2]:
            self.keys = with_room(self.keys, ROOM)
            self.values = with_room(self.values, ROOM)
        self.keys[:, :, self.length] = key_states[:, :, 0].transpose(0, 1)
        self.values[:, :, self.length] = value_states[:, :, 0].transpose(0, 1)
        self.length += 1
        return self, self  # "grouped" attention has it attend

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """query (B, heads, d); mask (B, 1, 1, shared + own), True where a row may look → like query.

        One matrix product for all rows attends to the beginning, which is read once and not once a
        row. The query heads that share a key head are queries of that head, so that no key or value
        is repeated.
        """
        heads, rows, size, dim = self.keys.shape
        query = (query * scale).view(rows, heads, -1, dim)
        query = query.transpose(0, 1).contiguous()  # (key heads, B, queries, d)

        keys = self.keys.view(heads * rows, size, dim)
        scores = torch.bmm(query.view(heads * rows, -1, dim), keys.mT)
        scores = scores.view(heads, rows, -1, size)
        self.hide(scores, mask)
        if self.shared:
            beginning = torch.bmm(query.view(heads, -1, dim), self.shared_keys.mT)
            beginning = beginning.view(heads, rows, -1, self.shared)
            scores = torch.cat([scores, beginning], dim=-1)

        weights = scores.softmax(-1)  # (key heads, B, queries, size + shared)
        values = self.values.view(heads * rows, size, dim)
        own = weights[..., :size].flatten(0, 1)
        out = torch.bmm(own, values).view(heads, rows, -1, dim)
        if self.shared:
            beginning = weights[..., size:].flatten(1, 2)
            out += torch.bmm(beginning, self.shared_values).view(out.shape)
        return out.transpose(0, 1).reshape(rows, -1, dim)

    def hide(self, scores: Tensor, mask: Tensor | None) -> None:
        """Take scores (key heads, B, queries, size) away where a row may not look."""
        lowest = torch.finfo(scores.dtype).min
        scores[..., self.length :].fill_(lowest)  # room where nothing is yet
        if mask is not None:
            own = mask[:, 0, :, self.shared :]  # (B, 1, length)
            scores[..., : self.length].masked_fill_(~own, lowest)

    def batch_select_indices(self, rows: Tensor) -> None:
        self.keys = self.keys.index_select(1, rows)
        self.values = self.values.index_select(1, rows)

    def get_seq_length(self) -> int:
        return self.shared + self.length


class PackedDecoder(Decoder):
    """Decoder of a model that packs (fast/packed.py): attention is "grouped".

    Prompts are prefilled as one row of N tokens. The cache holds what all prompts begin with once
    for all rows, and each row's own in a layout that its products read as it is.
    """

    layer_type = DecodingLayer

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        self.model = model
        pack = Pack(prompts, [], model.config.get_text_config(), row_of.device)
        pack.keys_and_values = []  # filled by the layers' attention, a pair each
        self.logits = forward(prefill, model, pack)[row_of]  # (B, V)

        places, mask = pad(pack.rests, "left", row_of.device)  # (P, L), in the pack
        layers = [
            self.layer_type(keys, values, pack.shared, places[row_of])
            for keys, values in pack.keys_and_values
        ]
        self.cache = Cache(layers=layers)
        beginning = mask.new_ones(len(mask), pack.shared)
        self.mask = torch.cat([beginning, mask], dim=1)[row_of]  # (B, shared + L)
        self.position = self.mask.sum(1)  # (B,) of each row's next token


def prefill(model: nn.Module, pack: Pack) -> Tensor:
    """Run a pack of prompts → logits behind each, (P, V)."""
    last = [rest[-1] for rest in pack.rests]
    hidden = pack.run(model.get_decoder())[last]  # (P, D)
    return logits_from_hidden_states(model, hidden)


def with_room(x: Tensor, tokens: int) -> Tensor:
    """A copy of x (key heads, B, L, d) with zeros for so many tokens more."""
    return F.pad(x, (0, 0, 0, tokens))


# Llama's shape ----------------------------------------------------------------------------------


class LlamaDecoder(PackedDecoder):
    """The same for models of Llama's shape (Qwen 2 and 3, SmolLM 2, …), whose layers it runs itself.

    Their weights are put together once a call of `generate`, as they are at that moment. Frozen ones
    stay, unless the model is sharded (ZeRO-3).
    """

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], row_of: Tensor):
        super().__init__(model, prompts, row_of)
        pairs = zip(model.model.layers, self.cache.layers)
        keep = not is_sharded(model)  # whose ranks would keep all weights each
        self.layers = [LlamaLayer(layer, cache, keep) for layer, cache in pairs]
        self.head = FusedLinear(model.lm_head, keep=keep)
        self.padded = len({len(prompt) for prompt in prompts}) > 1

    def step(self, token: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        mask = None
        if self.padded:
            mask = self.mask.bool()[:, None, None]  # (B, 1, 1, shared + own)
        logits = self.run(token, mask)
        self.position = self.position + 1
        return logits

    def run(self, token: Tensor, mask: Tensor | None) -> Tensor:
        """Put a token (B,) behind each row, at its position → logits (B, V) of the next one."""
        model = self.model.model
        x = model.embed_tokens(token)  # (B, D)
        cos, sin = model.rotary_emb(x, self.position[None])  # (1, B, d) each
        cos, sin = cos[0, :, None], sin[0, :, None]  # (B, 1, d)
        # x cos + rotate_half(x) sin: half of the signs go into the table, and the rest is a roll.
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat([-first, second], dim=-1)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.head(norm(model.norm, x))


class LlamaLayer:
    """One layer's step of all rows: x (B, D) → (B, D)."""

    def __init__(self, layer: nn.Module, cache: DecodingLayer, keep: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.attention, self.mlp, self.cache = attention, mlp, cache
        self.attention_norm = layer.input_layernorm
        self.mlp_norm = layer.post_attention_layernorm
        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj, keep=keep)
        self.o = FusedLinear(attention.o_proj, keep=keep)
        self.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj, keep=keep)
        self.down = FusedLinear(mlp.down_proj, keep=keep)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        attention, cache = self.attention, self.cache
        key_heads = len(cache.keys)
        heads = self.qkv(norm(self.attention_norm, x))
        heads = heads.view(len(x), -1, attention.head_dim)  # (B, heads + 2 · key heads, d)
        qk, v = heads.tensor_split([-key_heads], dim=1)
        if hasattr(attention, "q_norm"):
            q, k = qk.tensor_split([-key_heads], dim=1)
            qk = torch.cat([norm(attention.q_norm, q), norm(attention.k_norm, k)], dim=1)
        half = qk.shape[-1] // 2
        qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
        q, k = qk.tensor_split([-key_heads], dim=1)
        cache.update(k[:, :, None], v[:, :, None])
        out = cache.attend(q, mask, attention.scaling)
        x = self.o(out.flatten(1), plus=x)

        gate, up = self.gate_up(norm(self.mlp_norm, x)).chunk(2, dim=1)
        return self.down(self.mlp.act_fn(gate) * up, plus=x)


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Root-mean-square norm."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


class FusedLinear:
    """Linear layers that read the same input, with their adapters beside them.

    On a CPU they become one product with its weights in the layout that oneDNN wants, which F.linear
    makes anew at every call. The adapters are one product of their own, added to it:

        y = W x + b + s B (A x)

    keep: W stays from one call of `generate` to the next, if it is frozen.
    """

    def __init__(self, *linears: nn.Linear, keep: bool = False):
        self.linears = linears
        self.weight = self.A = self.bias = None
        if not is_fused(linears[0].weight) or not all(map(is_known, linears)):
            return
        adapted = [x for x in linears if isinstance(x, lora.LoRALinear) and x.enabled]
        if adapted:
            parts = [linear.lora_A for linear in adapted]
            self.A = torch.cat(parts).to(linears[0].weight.dtype)  # (all ranks together, in)
            self.B = self._scaled_B(adapted)  # (out, all ranks together)
        if linears[0].bias is not None:
            self.bias = torch.cat([linear.bias for linear in linears])
        self.weight = (kept_weight if keep else fused_weight)(linears)

    def _scaled_B(self, adapted: list[lora.LoRALinear]) -> Tensor:
        """s B of all adapters: each has the rows of its layer's outputs, and columns of its own."""
        sizes = [linear.out_features for linear in self.linears]
        B = self.A.new_zeros(sum(sizes), len(self.A))
        end = 0
        for linear, rows in zip(self.linears, B.split(sizes)):
            if linear in adapted:
                start, end = end, end + len(linear.lora_A)
                rows[:, start:end] = linear.scale * linear.lora_B
        return B

    def __call__(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """x (B, in) → all layers' outputs side by side, (B, out), added to `plus`."""
        if self.weight is None:
            return self._one_by_one(x, plus)
        if self.A is not None:
            low_rank = F.linear(x, self.A)
            plus = F.linear(low_rank, self.B) if plus is None else plus.addmm(low_rank, self.B.T)
        product = torch.ops.mkldnn._linear_pointwise
        if plus is None:
            return product(x, self.weight, self.bias, "none", [], "")
        return product.binary(x, plus, self.weight, self.bias, "add")

    def _one_by_one(self, x: Tensor, plus: Tensor | None) -> Tensor:
        parts = [linear(x) for linear in self.linears]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return y if plus is None else plus + y


def fused_weight(linears: Sequence[nn.Linear]) -> Tensor:
    """Their weights, one below the other, in oneDNN's layout."""
    weight = torch.cat([linear.weight for linear in linears])
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def kept_weight(linears: Sequence[nn.Linear]) -> Tensor:
    """`fused_weight`, the one of the last call as long as their weights have not changed.

    Weights that learn change at every step, and are not kept. A change through `.data` is not seen.
    """
    weights = [linear.weight for linear in linears]
    if any(weight.requires_grad or weight.is_inference() for weight in weights):
        return fused_weight(linears)
    made_of = [(weight.data_ptr(), weight._version) for weight in weights]
    before, fused, _ = KEPT.get(linears[0], (None, None, None))
    if before != made_of:
        fused = fused_weight(linears)
        # With the weights, so that no others come to lie where they do.
        KEPT[linears[0]] = made_of, fused, [weight.detach() for weight in weights]
    return fused


def is_known(linear: nn.Linear) -> bool:
    """Whether a layer computes what is fused here: adapters of another kind (DoRA) do not."""
    return type(linear) is nn.Linear or adapters.is_lean(linear)


def is_fused(weight: Tensor) -> bool:
    """Whether oneDNN multiplies by such weights quickly."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return has_bfloat16(weight.device)
    return weight.dtype == torch.float32
