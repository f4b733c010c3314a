"""The GRPO objective: advantages, log-probabilities, the clipped loss.

DeepSeekMath (arXiv 2402.03300), eq. 3 and 4. For one prompt the policy samples a group of G completions o_1 … o_G,
which earn the rewards r_1 … r_G. There is no value network; the group itself is the baseline:

    A_i  = (r_i - mean(r)) / (std(r) + 1e-4)                      the same for every token of o_i
    ρ_it = π_new(o_it) / π_old(o_it)                               π_old is the policy that sampled
    J    = mean_i mean_t [ min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i) - β k3_it ]
    k3   = exp(ref - new) - (ref - new) - 1                        an unbiased, never negative estimate of KL(new ‖ ref)

and the loss is -J. On a fresh batch every ρ is 1, so the loss is the mean advantage with its sign changed plus β·KL:
close to zero, whatever the model has learned. Its gradient is not.

To try a new idea, change `group_advantages` (Dr. GRPO drops the std, RLOO leaves one out) or `grpo_loss` (DAPO's
two-sided ε, a mean over all tokens): both are plain functions of small tensors.
"""

import functools
import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ADVANTAGE_EPS = 1e-4  # added to the group's standard deviation, as TRL and ms-swift do
LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32
TOKENS_AT_ONCE = 4096  # in one forward pass: enough for the matrix products
MAX_SCORES = 1 << 25  # 64 MiB of attention scores a layer in bfloat16; see grouped_attention


def group_advantages(rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """Advantages of completions whose groups lie side by side (DeepSeekMath, section 4.1.2, outcome supervision).

    rewards (N,) with N = groups × G → advantages (N,) and the groups' standard deviations (N / G,), both with n - 1 in
    the denominator. A group whose rewards are all equal teaches nothing: its advantages are exactly 0.
    """
    groups = rewards.view(-1, num_generations)
    std = groups.std(dim=1, keepdim=True)
    std = std.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0.0)  # no rounding left-overs
    centred = (groups - groups.mean(dim=1, keepdim=True)).masked_fill(std == 0, 0.0)
    return (centred / (std + ADVANTAGE_EPS)).flatten(), std.flatten()


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Per-token estimate of KL(policy ‖ reference), any shape (Schulman, "Approximating KL divergence", k3)."""
    difference = ref_logps - logps
    return torch.exp(difference) - difference - 1


def grpo_loss(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    weights: Tensor | None = None,
    *,
    epsilon: float,
    beta: float,
    num_completions: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's part of the loss of an optimizer step with `num_completions` completions on all ranks.

    logps, old_logps, ref_logps, completion_mask (B, T); advantages (B,); weights (B, T) from `importance_weights`, or
    None where the sampler's policy is π_old exactly. Because every part is divided by the number of
    completions of the whole step, the parts of all micro-batches and ranks add up to the loss, however it was split.
    The metrics are parts of a mean in the same way. Without `ref_logps` (β = 0) there is no KL term.
    """

    def mean(per_token: Tensor) -> Tensor:  # over the tokens of a completion, then over the step's completions
        return ((per_token * completion_mask).sum(1) / completion_mask.sum(1)).sum() / num_completions

    advantages = advantages[:, None]  # (B, 1): one advantage for all tokens of a completion
    ratio = torch.exp(logps - old_logps)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)
    if weights is not None:
        surrogate = surrogate * weights
    clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    metrics = {"clip_ratio": mean(clipped.float())}
    if ref_logps is not None:
        kl = k3(logps, ref_logps)
        surrogate = surrogate - beta * kl
        metrics["kl"] = mean(kl.detach())
    loss = -mean(surrogate)
    metrics["loss"] = loss.detach()
    return loss, metrics


def importance_weights(old_logps: Tensor, sampler_logps: Tensor, clip_max: float) -> Tensor:
    """π_old / π_sampler for each token, any shape, at most clip_max: truncated importance sampling.

    Another engine's kernels round differently, so it samples from a policy that is not quite π_old; weighting the
    objective by this ratio corrects for that, and the bound keeps one odd token from ruling the step (Yao et al.,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025; TRL's token_truncate).
    """
    return torch.exp(old_logps - sampler_logps).clamp(max=clip_max)


def completion_logps(
    model: torch.nn.Module,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of completions under the sampling distribution, softmax(logits / temperature).

    B prompts and B completions, ragged → logps (B, T), entropies (B, T) without a gradient, completion_mask (B, T), in
    float32 (float64 for a float64 model), right-padded with 0. Completions of one prompt should stand side by side.
    """
    device = next(model.parameters()).device
    completions, completion_mask = pad(completion_ids, "right", device)
    hidden = completion_hidden_states(model, prompt_ids, completions, completion_mask)
    mask = completion_mask.bool()
    token_logps, token_entropies = logps_from_hidden_states(model, hidden[mask], completions[mask], temperature)
    logps = torch.zeros(mask.shape, dtype=token_logps.dtype, device=device)
    entropies = torch.zeros_like(logps).masked_scatter(mask, token_entropies)
    return logps.masked_scatter(mask, token_logps), entropies, completion_mask


def completion_hidden_states(
    model: torch.nn.Module, prompt_ids: Sequence[Sequence[int]], completions: Tensor, completion_mask: Tensor
) -> Tensor:
    """The last hidden states that predict each completion token, (B, T, D).

    Each completion continues from its own prompt's keys and values, which `prefill` computed once for the whole group.
    The gradient takes the same way back, so it is that of the plain forward pass at a fraction of the work: for the
    arithmetic task, 8 groups of 8, some 1,700 tokens run instead of 11,000. Gradient checkpointing rules out a cache,
    so there the plain pass is taken.
    """
    decoder, device = model.get_decoder(), completions.device
    if getattr(model, "is_gradient_checkpointing", False):
        prompts, prompt_mask = pad(prompt_ids, "left", device)
        mask = torch.cat([prompt_mask, completion_mask], dim=1)
        ids = torch.cat([prompts, completions], dim=1)
        out = decoder(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        return out.last_hidden_state[:, prompts.shape[1] - 1 : -1]

    prompts, row_of = distinct(prompt_ids, device)
    first, cache, prompt_mask = prefill(model, prompts)
    lengths = completion_mask.sum(1)
    by_length = lengths.argsort(descending=True)
    parts = []
    for rows in by_length.split(like_sizes(lengths[by_length].tolist())):
        own = row_of[rows]
        hidden = first[own, None]  # a prompt's last position predicts the first completion token
        inputs = completions[rows, : lengths[rows[0]] - 1]
        if inputs.shape[1]:
            mask = torch.cat([prompt_mask[own], completion_mask[rows, : inputs.shape[1]]], dim=1)
            out = decoder(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions(mask)[:, prompt_mask.shape[1] :],
                past_key_values=Cache(layers=[layer.select(own) for layer in cache.layers]),
                use_cache=True,
            )
            hidden = torch.cat([hidden, out.last_hidden_state], dim=1)
        parts.append(F.pad(hidden, (0, 0, 0, completions.shape[1] - hidden.shape[1])))
    return torch.cat(parts)[by_length.argsort()]


def like_sizes(lengths: Sequence[int]) -> list[int]:
    """How many rows, longest first, to run together, so that at most a fifth of a row is padding."""
    sizes, longest = [], 0
    for length in lengths:
        if length < 0.8 * longest or not sizes or longest * (sizes[-1] + 1) > TOKENS_AT_ONCE:
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    return sizes


def distinct(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """B prompts → the P different ones among them, and for each of the B its row there, (B,)."""
    rows: dict[tuple[int, ...], int] = {}
    row_of = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompt_ids]
    return list(rows), torch.tensor(row_of, device=device)


def prefill(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Cache, Tensor]:
    """Run P different prompts → last hidden states (P, D), their keys and values, and the mask (P, L) of the latter.

    What all of them begin with (the system prompt, a worked example) runs once, in a batch of one; then each prompt
    continues from it. Prompts of different lengths are padded in front of where they differ; transformers measures a
    sliding window over that padding too, so models with such windows share nothing and are padded on the left.
    """
    decoder, device, config = model.get_decoder(), next(model.parameters()).device, model.config
    sharing = config._attn_implementation == "grouped" and not getattr(config.get_text_config(), "sliding_window", None)
    shared = os.path.commonprefix([list(prompt[:-1]) for prompt in prompts]) if sharing else []
    cache = DynamicCache()  # without the configuration: sliding windows keep their history, the mask hides it
    if shared:
        decoder(input_ids=torch.tensor([shared], device=device), past_key_values=cache, use_cache=True)
    beginnings = [(layer.keys, layer.values) for layer in cache.layers]
    cache = Cache(layers=[Layer(b) for b in beginnings or [None] * config.get_text_config().num_hidden_layers])
    rest, rest_mask = pad([prompt[len(shared) :] for prompt in prompts], "left", device)
    mask = torch.cat([rest_mask.new_ones(len(prompts), len(shared)), rest_mask], dim=1)
    out = decoder(
        input_ids=rest,
        attention_mask=mask,
        position_ids=positions(mask)[:, len(shared) :],
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1], cache, mask


class Layer(DynamicLayer):
    """One layer's keys and values: those of the beginning that all rows share, once, and each row's own.

    beginning: keys and values (1, heads, L0, head_dim), or None; own: (B, heads, L, head_dim). With a beginning,
    attention gets both as a pair, and `grouped_attention` knows what to do with it.
    """

    def __init__(
        self, beginning: tuple[Tensor, Tensor] | None, keys: Tensor | None = None, values: Tensor | None = None
    ):
        super().__init__()
        self.beginning = beginning
        if keys is not None:
            self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
            self.is_initialized = True

    def select(self, rows: Tensor) -> "Layer":
        return Layer(self.beginning, self.keys.index_select(0, rows), self.values.index_select(0, rows))

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        own = self.append(key_states, value_states)
        return tuple(zip(self.beginning, own)) if self.beginning else own

    def append(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Put new positions behind each row's own → all of its own."""
        return super().update(key_states, value_states)

    def own_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return (self.beginning[0].shape[2] if self.beginning else 0) + self.own_length()


def logps_from_hidden_states(
    model: torch.nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """hidden (N, D), targets (N,) → log-probabilities (N,) and entropies (N,) of N tokens."""
    head = functools.partial(logits_from_hidden_states, model)
    trained = [p for p in model.get_output_embeddings().parameters() if p.requires_grad]
    return HeadLogps.apply(hidden, targets, temperature, head, *trained)


class HeadLogps(torch.autograd.Function):
    """The output head and log softmax(logits / temperature) in one, so that the (N, vocabulary) table never exists.

    The head is applied to as many tokens at a time as make LOGITS_AT_ONCE logits, in memory that every chunk uses
    again; the backward pass makes the logits once more. 16 completions of 2,048 tokens with a vocabulary of 152 k would
    take 20 GB; this takes less than 200 MiB, whatever the vocabulary. The gradient of a log-probability by its logits is
    (one-hot of the target - softmax) / temperature; the entropies have none.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, temperature: float, head, *trained) -> tuple[Tensor, Tensor]:
        vocabulary = head(hidden[:1]).shape[1]
        size = max(1, LOGITS_AT_ONCE // vocabulary)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scratch = torch.empty(2, min(size, len(hidden)), vocabulary, dtype=dtype, device=hidden.device)
        logps, entropies, normalizers = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits, weights = scratch[:, : len(targets[part])]
            logits.copy_(head(hidden[part]))
            if temperature != 1.0:
                logits.div_(temperature)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            largest = logits.amax(1)
            total = torch.exp(logits.sub_(largest[:, None]), out=weights).sum(1)
            normalizers[part] = largest + total.log()
            logps[part] = chosen - normalizers[part]
            entropies[part] = total.log() - logits.mul_(weights).sum(1) / total
        ctx.save_for_backward(hidden, targets, normalizers, *trained)
        ctx.temperature, ctx.head, ctx.size, ctx.vocabulary = temperature, head, size, vocabulary
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        hidden, targets, normalizers, *trained = ctx.saved_tensors
        scratch = grad.new_empty(min(ctx.size, len(hidden)), ctx.vocabulary)
        grad_hidden, grad_trained = torch.empty_like(hidden), [torch.zeros_like(p) for p in trained]
        grad = grad[:, None] / ctx.temperature
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            with torch.enable_grad():
                inputs = hidden[part].detach().requires_grad_()
                logits = ctx.head(inputs)
            grad_logits = scratch[: len(inputs)].copy_(logits.detach())
            if ctx.temperature != 1.0:
                grad_logits.div_(ctx.temperature)
            grad_logits.sub_(normalizers[part, None]).exp_().mul_(-grad[part])
            grad_logits.scatter_add_(1, targets[part, None], grad[part])
            parts = torch.autograd.grad(logits, [inputs, *trained], grad_logits.to(logits.dtype))
            grad_hidden[part] = parts[0]
            for sum_, one in zip(grad_trained, parts[1:]):
                sum_ += one
        return grad_hidden, None, None, None, *grad_trained


def logits_from_hidden_states(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The output head with what some architectures do after it: Cohere and Granite scale, Gemma 2 caps."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    logits = logits if scale == 1.0 else logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


@torch.no_grad()
def head_is_plain(model: torch.nn.Module) -> bool:
    """Whether `logits_from_hidden_states` gives this model's own logits, tried on a few tokens."""
    ids = torch.arange(7, device=next(model.parameters()).device)[None]  # the first may be padding, embedded as zeros
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    ours, own = logits_from_hidden_states(model, hidden).float(), model(input_ids=ids).logits.float()
    return bool((ours - own).abs().max() <= 0.02 * own.abs().max())


def use_grouped_attention(model: torch.nn.Module) -> None:
    """Have a model that attends through PyTorch's SDPA do so through `grouped_attention`; others stay as they are."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("grouped")


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, with quicker ways for rows that begin alike and for grouped queries.

    query (B, heads, T, d), attention_mask (B, 1, T, L) → (B, T, heads, d). key and value (B, key heads, L, d), or each a
    pair, of the beginning that all rows share (1, key heads, L0, d) and of each row's own: then one matrix product over
    all rows attends to the beginning, which is read once and not once a row.
    Query heads that share a key head become more queries of that head, so that no key or value is repeated. A CPU's SDPA
    is slow in bfloat16 when it needs a gradient: while the table of scores is small, plain matrix products are, forward
    and backward, 6 times as fast. Beyond MAX_SCORES, SDPA's memory, linear in length, is worth its time.
    """
    rows, heads, length, dim = query.shape
    pairs = isinstance(key, tuple)
    groups, columns = (key[1].shape[1], key[0].shape[2] + key[1].shape[2]) if pairs else key.shape[1:3]
    small = rows * heads * length * columns <= MAX_SCORES and (attention_mask is not None or length == 1)
    if kwargs.get("dropout") or not (pairs and small or length == 1 or small and query.requires_grad):
        if pairs:
            key, value = (torch.cat([shared.expand(rows, -1, -1, -1), own], dim=2) for shared, own in (key, value))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or dim**-0.5
    grouped = query.reshape(rows, groups, -1, dim)
    if not pairs and length == 1:
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scale)
        return out.view(rows, heads, length, -1).transpose(1, 2), None

    def of_all_rows(x: Tensor) -> Tensor:  # (B, groups, n, ·) → (groups, B · n, ·)
        return x.transpose(0, 1).reshape(groups, -1, x.shape[-1])

    def of_each_row(x: Tensor) -> Tensor:
        return x.view(groups, rows, -1, x.shape[-1]).transpose(0, 1)

    grouped = grouped * scale
    if pairs:
        shared = of_each_row(of_all_rows(grouped) @ key[0][0].transpose(1, 2))
        scores = torch.cat([shared, grouped @ key[1].transpose(2, 3)], dim=-1)
    else:
        scores = grouped @ key.transpose(2, 3)
    if attention_mask is not None:
        bias = torch.zeros_like(attention_mask, dtype=query.dtype)
        bias.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        scores = (scores.view(rows, groups, -1, length, columns) + bias[:, :, None]).view(scores.shape)
    weights = scores.softmax(-1)
    if pairs:
        shared, own = weights.split([key[0].shape[2], key[1].shape[2]], dim=-1)
        out = of_each_row(of_all_rows(shared) @ value[0][0]) + own @ value[1]
    else:
        out = weights @ value
    return out.reshape(rows, heads, length, -1).transpose(1, 2), None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ragged token ids → ids (B, T) padded with 0 on one side, and their mask (B, T) of 1 and 0."""
    width = max(len(row) for row in rows)
    blanks = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    left = side == "left"
    join = [(blank + list(row), blank + one) if left else (list(row) + blank, one + blank)
            for row, blank, one in zip(rows, blanks, ones)]  # fmt: skip
    ids, mask = zip(*join)
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def positions(mask: Tensor) -> Tensor:
    """Position ids (B, T) that count the real tokens of a padded batch, whichever side the padding is on."""
    return (mask.cumsum(1) - 1).clamp(min=0)
