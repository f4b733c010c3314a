"""The output head and log softmax in one, so that no table of tokens × vocabulary exists.

Replaces the last lines of `grpo.completion_logps`, which make all logits and then pick from them.
16 completions of 2,048 tokens with a vocabulary of 152 k would take 20 GB; a chunk at a time takes
a few hundred MB, whatever the vocabulary, and two gradients of a head that is trained.

With z = logits / temperature, p = softmax(z), H the entropy of p, and o the token that was drawn:

    log p_o = z_o - log Σ exp(z)            d log p_o / dz_j = [j = o] - p_j
    H       = - Σ p_j log p_j               d H / dz_j       = - p_j (log p_j + H)

To teach it a head that does more, change `logits_from_hidden_states`; `head_is_plain` finds whether
it gives a model's own logits, and what it does not know takes the plain way.
"""

import functools

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24  # 64 MiB in float32


def logps_from_hidden_states(
    model: torch.nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of N tokens, both (N,) and with a gradient.

    hidden (N, D), targets (N,) → in float32, in float64 for float64.
    """
    head = functools.partial(logits_from_hidden_states, model)
    parameters = model.get_output_embeddings().parameters()
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return HeadLogps.apply(hidden, targets, temperature, head, *trained)


class HeadLogps(torch.autograd.Function):
    """The two functions of the module's docstring, a chunk of LOGITS_AT_ONCE logits at a time.

    A token's log-probability depends on its own hidden state alone, so its gradient by that is
    made ahead, while the logits are there: `slopes`, (N, D). The logits are made a second time
    where that is not enough: for a head that is trained itself, and for the entropies' gradient.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, targets: Tensor, temperature: float, head, *trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        N, V = len(hidden), head(hidden[:1]).shape[1]
        size = max(1, LOGITS_AT_ONCE // V)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        device = hidden.device
        # Every chunk uses the same memory again.
        scratch = torch.empty(2, min(size, N), V, dtype=dtype, device=device)
        logps, entropies, normalizers = torch.empty(3, N, dtype=dtype, device=device)
        ahead = ctx.needs_input_grad[0] and not trained
        slopes = torch.empty_like(hidden) if ahead else None
        for start in range(0, N, size):
            part = slice(start, start + size)
            drawn = targets[part, None]  # (n, 1)
            n = len(drawn)
            logits, weights = scratch[:, :n]  # (n, V) each
            with torch.set_grad_enabled(ahead):
                inputs = hidden[part].detach().requires_grad_(ahead)
                outputs = head(inputs)
            scaled(outputs, temperature, out=logits)
            chosen = logits.gather(1, drawn)
            largest = logits.amax(1, keepdim=True)
            logits.sub_(largest)
            torch.exp(logits, out=weights)
            total = weights.sum(1, keepdim=True)  # of exp(z - its largest), (n, 1)
            log_total = total.log()
            normalizer = largest + log_total
            normalizers[part] = normalizer[:, 0]
            logps[part] = (chosen - normalizer)[:, 0]
            logits.mul_(weights)
            mean = logits.sum(1, keepdim=True) / total
            entropies[part] = (log_total - mean)[:, 0]
            if ahead:
                weights.div_(-temperature * total)
                ones = torch.full_like(chosen, 1 / temperature)
                weights.scatter_add_(1, drawn, ones)
                grad = weights.to(outputs.dtype)
                (slopes[part],) = torch.autograd.grad(outputs, inputs, grad)
        ctx.save_for_backward(hidden, targets, normalizers, entropies, slopes, *trained)
        ctx.temperature, ctx.head = temperature, head
        ctx.size, ctx.vocabulary = size, V
        ctx.set_materialize_grads(False)  # None tells that nobody asked for an output's gradient
        return logps, entropies

    @staticmethod
    def backward(ctx, grad_logps: Tensor | None, grad_entropies: Tensor | None) -> tuple:
        hidden, targets, normalizers, entropies, slopes, *trained = ctx.saved_tensors
        if grad_logps is None:
            grad_logps = torch.zeros_like(normalizers)
        if slopes is not None and grad_entropies is None:
            grad_hidden = slopes * grad_logps[:, None].to(slopes.dtype)
            return grad_hidden, None, None, None

        by_logps = grad_logps / ctx.temperature
        by_entropies = None
        if grad_entropies is not None:
            by_entropies = grad_entropies / ctx.temperature
        columns = (targets, normalizers, entropies, by_logps, by_entropies)
        tables = 1 if by_entropies is None else 2  # as many as `chunk_gradient` works in
        shape = (tables, min(ctx.size, len(hidden)), ctx.vocabulary)
        scratch = torch.empty(shape, dtype=normalizers.dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        # Sums of hundreds of chunks, so in float32: bfloat16 soon rounds away what each adds.
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in trained]
        sums = [torch.zeros_like(p, dtype=dtype) for p, dtype in zip(trained, dtypes)]
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            with torch.enable_grad():
                inputs = hidden[part].detach().requires_grad_()
                outputs = ctx.head(inputs)
            n = len(inputs)
            logits = scaled(outputs, ctx.temperature, out=scratch[0, :n])
            own = [column if column is None else column[part, None] for column in columns]
            grad = chunk_gradient(logits, *own, spare=scratch[-1, :n])
            wanted = [inputs, *trained]
            grads = torch.autograd.grad(outputs, wanted, grad.to(outputs.dtype))
            grad_hidden[part] = grads[0]
            for sum_, one in zip(sums, grads[1:]):
                sum_ += one
        grad_trained = [sum_.to(p.dtype) for sum_, p in zip(sums, trained)]
        return grad_hidden, None, None, None, *grad_trained


def chunk_gradient(
    logits: Tensor, drawn, normalizers, entropies, by_logps, by_entropies, *, spare: Tensor
) -> Tensor:
    """The loss by z, where it is by_logps by log p_o and by_entropies by H, or None by H.

    logits z (n, V) and `spare`, which may be `logits` where by_entropies is None, are written over;
    the others are (n, 1).

        by_logps · ([j = o] - p_j) - by_entropies · p_j (log p_j + H)
    """
    log_p = logits.sub_(normalizers)
    if by_entropies is None:
        grad = log_p.exp_().mul_(-by_logps)
    else:
        grad = torch.exp(log_p, out=spare)
        slope = log_p.add_(entropies)
        slope.mul_(by_entropies).add_(by_logps)
        grad.mul_(slope.neg_())
    return grad.scatter_add_(1, drawn, by_logps)


def scaled(logits: Tensor, temperature: float, out: Tensor) -> Tensor:
    """logits / temperature, written into `out` in its precision."""
    out.copy_(logits.detach())
    return out if temperature == 1.0 else out.div_(temperature)


def logits_from_hidden_states(model: torch.nn.Module, hidden: Tensor) -> Tensor:
    """The output head with what some architectures do after it: Cohere and Granite scale, Gemma 2
    caps. hidden (…, D) → (…, V)."""
    logits = model.get_output_embeddings()(hidden)
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale = scale / (getattr(config, "logits_scaling", None) or 1.0)
    if scale != 1.0:
        logits = logits * scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits


@torch.no_grad()
def head_is_plain(model: torch.nn.Module) -> bool:
    """Whether `logits_from_hidden_states` gives this model's own logits, tried on a few tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(7, device=device)[None]  # the first may be padding, embedded as zeros
    try:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        ours = logits_from_hidden_states(model, hidden).float()
    except (AttributeError, RuntimeError, TypeError):  # it has other parts
        return False
    # After ours: at its end the model's own forward gives up what ZeRO-3 has gathered.
    own = model(input_ids=ids).logits.float()
    if ours.shape != own.shape:
        return False
    return bool((ours - own).abs().max() <= 0.02 * own.abs().max())
