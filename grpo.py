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
import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import SiLUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ADVANTAGE_EPS = 1e-4  # added to the group's standard deviation, as TRL and ms-swift do
LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32
QUERIES_AT_ONCE = 256  # of one completion: what the causal mask hides behind them is not computed
MAX_SCORES = 1 << 23  # attention scores at once, some 100 MiB while they are worked on


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
    float32 (float64 for a float64 model), right-padded with 0.
    """
    completions, completion_mask = pad(completion_ids, "right", next(model.parameters()).device)
    mask = completion_mask.bool()
    hidden = completion_hidden_states(model, prompt_ids, completion_ids)
    token_logps, token_entropies = logps_from_hidden_states(model, hidden, completions[mask], temperature)
    logps = torch.zeros(mask.shape, dtype=token_logps.dtype, device=mask.device)
    entropies = torch.zeros_like(logps).masked_scatter(mask, token_entropies)
    return logps.masked_scatter(mask, token_logps), entropies, completion_mask


def completion_hidden_states(
    model: torch.nn.Module, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> Tensor:
    """The last hidden states that predict each completion token, one completion after the other, (tokens, D).

    All tokens run in one row without padding, and each prompt, and what all prompts begin with, runs once: for the
    arithmetic task, 16 groups of 4, some 1,700 tokens instead of 11,000. Models that cannot do so (see
    `prepare`) take the plain pass.
    """
    decoder, device = model.get_decoder(), next(model.parameters()).device
    if model.config._attn_implementation == "grouped":
        pack = Pack(prompt_ids, completion_ids, model.config.get_text_config(), device)
        with remaking():
            return pack.run(decoder).index_select(0, pack.predicting)

    prompts, prompt_mask = pad(prompt_ids, "left", device)
    completions, completion_mask = pad(completion_ids, "right", device)
    mask = torch.cat([prompt_mask, completion_mask], dim=1)
    ids = torch.cat([prompts, completions], dim=1)
    with remaking():
        out = decoder(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return out.last_hidden_state[:, prompts.shape[1] - 1 : -1][completion_mask.bool()]


class Pack:
    """A micro-batch as one row of N tokens, and who attends to whom.

        [ what all prompts begin with | rest of p1 | rest of p2 | … | o1 | o2 | o3 | … ]

    A completion continues the rest of its prompt, which continues the shared beginning, so a token's path is a list of
    places in the row, the token's own at its end.

    ids, positions: (1, N); shared: length of the beginning; predicting: for each completion token the place of the
    token in front of it; blocks: all of the row's tokens, in parts that attend together; rests: the places of each
    distinct prompt's rest; keys_and_values: a list for those of all layers, (N, key heads, d) each, or None.
    """

    def __init__(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], config, device):
        prompts, row_of = distinct(prompt_ids, device)
        ids, positions, paths, predicting = [], [], [], []

        def append(tokens: Sequence[int], position: int, behind: list[int]) -> list[int]:
            places = list(range(len(ids), len(ids) + len(tokens)))
            ids.extend(tokens)
            positions.extend(range(position, position + len(tokens)))
            # For every QUERIES_AT_ONCE tokens: their places, and their path.
            ends = range(QUERIES_AT_ONCE, len(tokens) + QUERIES_AT_ONCE, QUERIES_AT_ONCE)
            paths.extend((places[end - QUERIES_AT_ONCE : end], behind + places[:end]) for end in ends)
            return behind + places

        beginning = shared_beginning(prompts, config)
        self.shared = len(beginning)
        append(beginning, 0, [])
        blocks, paths = [([query], [keys], 0) for query, keys in paths], []
        shared = list(range(self.shared))
        whole = [append(prompt[self.shared :], self.shared, shared) for prompt in prompts]
        for row, completion in zip(row_of.tolist(), completion_ids):
            path = append(completion[:-1], len(prompts[row]), whole[row])
            predicting += path[len(prompts[row]) - 1 :]
        paths.sort(key=lambda path: (len(path[0]), len(path[1])), reverse=True)
        blocks += [(*zip(*part), self.shared) for part in like_sizes(paths, config.num_attention_heads)]
        self.ids, self.positions = torch.tensor([ids], device=device), torch.tensor([positions], device=device)
        self.predicting = torch.tensor(predicting, device=device)
        self.blocks = [Block(*block, self.positions[0]) for block in blocks]
        self.rests, self.keys_and_values = [path[self.shared :] for path in whole], None

    def run(self, decoder: torch.nn.Module) -> Tensor:
        """The last hidden state of each token, (N, D)."""
        no_mask = self.ids.new_empty(1, 1, 1, 1, dtype=torch.bool)  # without any, transformers makes one of N × N
        settings = {"attention_mask": no_mask, "use_cache": False, "pack": self}
        return decoder(input_ids=self.ids, position_ids=self.positions, **settings).last_hidden_state[0]


def shared_beginning(prompts: Sequence[Sequence[int]], config) -> list[int]:
    """What all prompts begin with (the system prompt, a worked example), without the last token of any.

    Nothing for models with sliding windows: what lies outside of one would have to be told for each row.
    """
    return [] if getattr(config, "sliding_window", None) else os.path.commonprefix([list(p[:-1]) for p in prompts])


def like_sizes(paths: list[tuple], heads: int) -> Iterator[list[tuple]]:
    """Parts of a list of (queries, keys), longest queries first, that make tables of MAX_SCORES at most and of like
    rows."""
    part, columns = [], 0
    for queries, keys in paths:
        longest, columns = len(part[0][0]) if part else 0, max(columns, len(keys))
        if part and (len(queries) < 0.6 * longest or (len(part) + 1) * heads * longest * columns > MAX_SCORES):
            yield part
            part, columns = [], len(keys)
        part.append((queries, keys))
    if part:
        yield part


class Block:
    """R rows of a pack that attend together, padded to T queries and L keys, of which the first `shared` are the same."""

    def __init__(self, queries: Sequence[list[int]], keys: Sequence[list[int]], shared: int, positions: Tensor):
        self.queries, query_mask = pad(queries, "right", positions.device)  # (R, T): places in the pack
        self.keys, self.key_mask = pad(keys, "right", positions.device)  # (R, L)
        self.query_mask, self.shared, self.positions = query_mask.bool(), shared, positions
        self.biases: dict[int | None, Tensor] = {}

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """0 for the keys that a query attends to, very negative elsewhere, (R, 1, T, L - shared)."""
        if window not in self.biases:
            keys, key_mask = self.keys[:, self.shared :], self.key_mask[:, self.shared :]
            distance = self.positions[self.queries][:, :, None] - self.positions[keys][:, None]
            hidden = (key_mask[:, None] == 0) | (distance < 0) | (window is not None and distance >= (window or 0))
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.biases[window] = bias.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]
        return self.biases[window]

    def weights(self, query: Tensor, key: Tensor, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """query (N, heads, d), scaled; key (N, key heads, d) → q, k, and the attention weights (key heads, R, queries,
        L): all query heads that share a key head are queries of it."""
        q, k = take(query, self.queries, key.shape[1]), take(key, self.keys, key.shape[1])
        scores, bias = q @ k.transpose(2, 3), self.bias(window, query.dtype)
        scores.unflatten(2, (-1, bias.shape[2]))[..., self.shared :].add_(bias)
        return q, k, scores.softmax(-1)

    def put_back(self, q: Tensor, out: Tensor) -> None:
        """Write rows of queries as `take` gives them to their places in out (N, heads, d)."""
        rows = q.unflatten(2, (-1, self.queries.shape[1])).permute(1, 3, 0, 2, 4).flatten(2, 3)
        out.index_copy_(0, self.queries[self.query_mask], rows[self.query_mask])

    def add_back(self, k: Tensor, sums: Tensor) -> None:
        """Add rows of keys, transposed, (key heads, R, d, L), to their places in sums (N, key heads, d)."""
        sums[: self.shared] += k[..., : self.shared].sum(1, dtype=sums.dtype).permute(2, 0, 1)
        own = k[..., self.shared :].permute(1, 3, 0, 2).flatten(0, 1)
        sums.index_add_(0, self.keys[:, self.shared :].flatten(), own.to(sums.dtype))


def take(x: Tensor, places: Tensor, key_heads: int) -> Tensor:
    """x (N, heads, d) at places (R, n) → (key heads, R, heads / key heads · n, d)."""
    rows = x.index_select(0, places.flatten()).view(*places.shape, key_heads, -1, x.shape[-1])
    return rows.permute(2, 0, 3, 1, 4).flatten(2, 3)


class PackedAttention(torch.autograd.Function):
    """Attention along the paths of a pack, without a table of N × N, and none kept for the backward pass.

    query (N, heads, d), key and value (N, key heads, d) → (N, heads, d). As FlashAttention does (Dao et al., arXiv
    2205.14135), the backward pass makes the weights P once more: dV = Pᵀ dO, dP = dO Vᵀ, dS = P ∘ (dP - rowsum(P ∘ dP)),
    dQ = dS K, dK = dSᵀ Q. Of two tables, those of tokens and not those of weights are transposed.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float, window: int | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.pack, ctx.scale, ctx.window = pack, scale, window
        out, scaled = query.new_empty(query.shape), query * scale
        for block in pack.blocks:
            _, _, weights = block.weights(scaled, key, window)
            block.put_back(weights @ take(value, block.keys, value.shape[1]), out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        scaled, grad_query = query * ctx.scale, query.new_empty(query.shape)
        # Many rows add to one key, so in float32.
        grad_key, grad_value = torch.zeros(
            2, *key.shape, dtype=torch.promote_types(key.dtype, torch.float32), device=key.device
        )
        for block in ctx.pack.blocks:
            q, k, weights = block.weights(scaled, key, ctx.window)
            dout = take(grad, block.queries, key.shape[1])
            padding = ~block.query_mask[:, None].expand(-1, q.shape[2] // block.queries.shape[1], -1).flatten(1)
            dout = dout.masked_fill_(padding[..., None], 0.0)
            block.add_back(dout.transpose(2, 3) @ weights, grad_value)
            dweights = dout @ take(value, block.keys, value.shape[1]).transpose(2, 3)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            block.put_back(dscores @ k, grad_query)
            block.add_back(q.transpose(2, 3) @ dscores, grad_key)
        return grad_query.mul_(ctx.scale), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None


def distinct(prompt_ids: Sequence[Sequence[int]], device: torch.device) -> tuple[list[tuple[int, ...]], Tensor]:
    """B prompts → the P different ones among them, and for each of the B its row there, (B,)."""
    rows: dict[tuple[int, ...], int] = {}
    row_of = [rows.setdefault(tuple(prompt), len(rows)) for prompt in prompt_ids]
    return list(rows), torch.tensor(row_of, device=device)


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
    again. 16 completions of 2,048 tokens with a vocabulary of 152 k would take 20 GB; this takes a few hundred
    MB, whatever the vocabulary, and two gradients of a head that is trained. The gradient of a log-probability by its
    logits is (one-hot of the target - softmax) / temperature; the entropies have none. A token's log-probability
    depends on its own hidden state alone, so the gradient by that, (N, D), is made while the logits are there; only a
    head that is trained itself needs them again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, targets: Tensor, temperature: float, head, *trained) -> tuple[Tensor, Tensor]:
        vocabulary = head(hidden[:1]).shape[1]
        size = max(1, LOGITS_AT_ONCE // vocabulary)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scratch = torch.empty(2, min(size, len(hidden)), vocabulary, dtype=dtype, device=hidden.device)
        logps, entropies, normalizers = torch.empty(3, len(hidden), dtype=dtype, device=hidden.device)
        ahead = ctx.needs_input_grad[0] and not trained
        slopes = torch.empty_like(hidden) if ahead else None
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits, weights = scratch[:, : len(targets[part])]
            with torch.set_grad_enabled(ahead):
                inputs = hidden[part].detach().requires_grad_(ahead)
                outputs = head(inputs)
            logits.copy_(outputs.detach())
            if temperature != 1.0:
                logits.div_(temperature)
            chosen = logits.gather(1, targets[part, None])[:, 0]
            largest = logits.amax(1)
            total = torch.exp(logits.sub_(largest[:, None]), out=weights).sum(1)
            normalizers[part] = largest + total.log()
            logps[part] = chosen - normalizers[part]
            entropies[part] = total.log() - logits.mul_(weights).sum(1) / total
            if ahead:
                weights.div_(-temperature * total[:, None])
                weights.scatter_add_(1, targets[part, None], torch.full_like(chosen, 1 / temperature)[:, None])
                (slopes[part],) = torch.autograd.grad(outputs, inputs, weights.to(outputs.dtype))
        ctx.save_for_backward(*((slopes,) if ahead else (hidden, targets, normalizers, *trained)))
        ctx.temperature, ctx.head, ctx.size, ctx.vocabulary = temperature, head, size, vocabulary
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, grad: Tensor, _) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (slopes,) = ctx.saved_tensors
            return slopes * grad[:, None].to(slopes.dtype), None, None, None
        hidden, targets, normalizers, *trained = ctx.saved_tensors
        scratch = grad.new_empty(min(ctx.size, len(hidden)), ctx.vocabulary)
        grad_hidden = torch.empty_like(hidden)
        # A sum of hundreds of chunks, so in float32: in bfloat16 what each adds would soon be rounded away.
        grad_trained = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
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
        return grad_hidden, None, None, None, *(sum_.to(p.dtype) for sum_, p in zip(grad_trained, trained))


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


@torch.no_grad()
def prepare(model: torch.nn.Module) -> None:
    """Have a model run through this module's own attention, norms and gates, each where it gives what the model's gives.

    Attention stays as it is in models that drop it out or do not attend through PyTorch's SDPA, and all three where the
    last hidden states, tried on a few tokens, differ, because that part of the model does something else.
    """
    config = model.config.get_text_config()
    plain = tried(model)
    if model.config._attn_implementation == "sdpa" and not getattr(config, "attention_dropout", 0):
        model.set_attn_implementation("grouped")
        if differs(model, plain):
            model.set_attn_implementation("sdpa")
    norms = [m for m in model.modules() if hasattr(m, "weight") and hasattr(m, "variance_epsilon")]
    gates = [m for m in model.modules() if isinstance(getattr(m, "act_fn", None), SiLUActivation)]
    gates = [m for m in gates if all(hasattr(m, name) for name in ("gate_proj", "up_proj", "down_proj"))]
    for function, modules in ((lean_norm, norms), (lean_mlp, gates)):
        modules = [m for m in modules if len(inspect.signature(m.forward).parameters) == 1 and "forward" not in vars(m)]
        for module in modules:
            module.forward = functools.partial(function, module)
        if differs(model, plain):
            for module in modules:
                del module.forward


def tried(model: torch.nn.Module) -> Tensor:
    """The last hidden states of a few short completions, (tokens, D)."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts, completions = [[0, 1, 2], [0, 1, 2], [0, 1, 3, 4]], [[5, 6, 7], [5], [7, 5, 6, 3]]
    # From the middle of the vocabulary: at its start lie special tokens, which some models have never seen.
    prompts, completions = (
        [[(vocabulary // 2 + i) % vocabulary for i in row] for row in x] for x in (prompts, completions)
    )
    return completion_hidden_states(model, prompts, completions)


def differs(model: torch.nn.Module, plain: Tensor) -> bool:
    """By more than rounding, which makes 0.01 in bfloat16 and 1e-6 in float32; or it does not run at all."""
    limit = 0.1 if plain.dtype == torch.bfloat16 else 1e-4
    try:
        hidden = tried(model)
    except (AttributeError, RuntimeError, TypeError):  # values narrower than keys, arguments of its own
        return True
    return not ((hidden - plain).norm(dim=1) / plain.norm(dim=1)).median() <= limit


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, and two ways of its own: for a pack, and for a cache that attends by itself.

    query (B, heads, T, d), key and value (B, key heads, L, d), attention_mask (B, 1, T, L) → (B, T, heads, d).
    """
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if not isinstance(key, Tensor):  # the sampler's
        return key.attend(query[:, :, 0], attention_mask, scale)[:, None], None
    pack = kwargs.pop("pack", None)
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if pack.keys_and_values is not None:
        pack.keys_and_values.append((key, value))
    return PackedAttention.apply(query, key, value, pack, scale, kwargs.get("sliding_window"))[None], None


AttentionInterface.register("grouped", grouped_attention)
AttentionMaskInterface.register("grouped", sdpa_mask)


class Remade:
    """How to make a tensor again of others: what autograd keeps, within `remaking()`, in the place of the tensor.

    A product keeps its input for the gradient of its weights. Where that is what a norm or a gate gave, it is cheap to
    make again of what these read, which is kept anyway: a third less of a layer. It is made when the backward pass
    needs it, once for all products that read it (selective recomputation: Korthikanti et al., arXiv 2205.05198). What
    `remade` did not give is kept as it is, in the same wrapper, because autograd's hooks turn off its check for changes.
    """

    # memory_of what `remade` gave → that, while it lives. Hooks see another object, so its memory is all that tells.
    known: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __init__(self, function: Callable[..., Tensor], *inputs):
        self.function, self.inputs, self.readers, self.tensor = function, inputs, 0, None
        self.versions = self.versions_now()

    def versions_now(self) -> list[int]:
        return [x._version for x in self.inputs if isinstance(x, Tensor)]

    def make(self) -> Tensor:
        if self.versions_now() != self.versions:
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        tensor = self.function(*self.inputs) if self.tensor is None else self.tensor
        self.readers -= 1
        self.tensor = tensor if self.readers > 0 else None
        return tensor

    @staticmethod
    def pack(tensor: Tensor) -> "tuple[Remade, torch.Size]":
        out = Remade.known.get(memory_of(tensor)) if tensor.is_contiguous() else None
        kept = Remade(lambda x: x, tensor) if out is None else out.remade
        kept.readers += 1
        return kept, tensor.shape

    @staticmethod
    def unpack(packed: "tuple[Remade, torch.Size]") -> Tensor:
        kept, shape = packed
        return kept.make().view(shape)


def memory_of(tensor: Tensor) -> tuple:
    """The same for a contiguous tensor and all contiguous views of the whole of it, until it is changed in place."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, tensor._version


def remaking() -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(Remade.pack, Remade.unpack)


def remade(function: Callable[..., Tensor], *inputs) -> Tensor:
    """function(*inputs), of which autograd keeps the inputs alone within `remaking()`."""
    out = function(*inputs)
    if out.requires_grad and out.is_contiguous():
        out.remade = Remade(function, *inputs)
        Remade.known[memory_of(out)] = out
    return out


def lean_norm(module: torch.nn.Module, x: Tensor) -> Tensor:
    return remade(RMSNorm.apply, x, module.weight, module.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """weight · x / sqrt(mean(x²) + eps) (Zhang and Sennrich, arXiv 1910.07467), of which x alone is kept.

    x (…, D), weight (D,) → (…, D), normalized in float32. As single operations it keeps a float32 copy of x and what the
    weight scales, too: in bfloat16 three times as much.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return RMSNorm.normalized(x, eps)[0].to(x.dtype) * weight

    @staticmethod
    def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * inverse, inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        normalized, inverse = RMSNorm.normalized(x, ctx.eps)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normalized.to(grad.dtype)).flatten(0, -2).sum(0)
        slope = (grad * weight).float()
        slope.sub_(normalized.mul_((slope * normalized).mean(-1, keepdim=True))).mul_(inverse)
        return slope.to(x.dtype), grad_weight, None


def lean_mlp(module: torch.nn.Module, x: Tensor) -> Tensor:
    return module.down_proj(remade(SwiGLU.apply, module.gate_proj(x), module.up_proj(x)))


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, any shape (Shazeer, arXiv 2002.05202), of which silu(gate) is not kept."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * torch.nn.functional.silu(gate)


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
