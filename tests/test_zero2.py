"""ZeRO-2 by the numbers: parameters beside torch.optim.AdamW, bytes held, bytes sent, and what overlaps with what."""

import gc
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from test_dist import BATCH, MAX_NORM, STEPS, Model, batch_of, learning_rate, loss_of

import dist

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import zero  # noqa: E402

# Sharded or not, and elements in a bucket: a parameter in each, few, many, all.
RUNS = [(True, 1), (True, 80), (True, 170), (True, 10**6), (False, 80)]
LAYERS, WIDTH = 16, 512
P = LAYERS * WIDTH * WIDTH


class WithBranch(Model):
    """And a layer that only some steps and micro-batches use."""

    def __init__(self):
        super().__init__()
        self.branch = torch.nn.Linear(13, 13)


def micro_batches(step):
    """Pairs of sequences, and whether the branch is used for them."""
    ids, targets = batch_of(step)
    return [(ids[i : i + 2], targets[i : i + 2], step % 3 == 0 and i < BATCH // 2) for i in range(0, BATCH, 2)]


def micro_loss(model, ids, targets, branch):
    if not branch:
        return loss_of(model, ids, targets)
    handle = model.embed.register_forward_hook(lambda module, inputs, x: x + model.branch(x))
    with handle:
        return loss_of(model, ids, targets)


def run_torch():
    """One process, with a zero gradient where there is none; and in which steps the branch had none."""
    model = WithBranch()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]]
    groups = [{"params": g, "weight_decay": decay} for g, decay in zip(groups, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    norms, without = [], []
    for step in range(STEPS):
        for micro in micro_batches(step):
            micro_loss(model, *micro).backward()
        without.append(model.branch.weight.grad is None)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters()), norms, without


def run_ours(rank, ranks, shard, bucket_size):
    model = WithBranch()
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": MAX_NORM}
    optimizer = dist.ZeroAdamW(model.named_parameters(), **settings, bucket_size=bucket_size, shard=shard)
    norms = []
    for step in range(STEPS):
        micros = micro_batches(step)
        mine = micros[len(micros) * rank // ranks : len(micros) * (rank + 1) // ranks]
        if step == 5:  # all of it is one rank's
            mine = micros if rank == ranks - 1 else [None] * len(micros)
        for micro in mine:
            optimizer.backward(micro_loss(model, *micro) if micro else 0.0 * micro_loss(model, *micros[0]))
        norms.append(optimizer.step(learning_rate(step)))
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def layers(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)])


def bytes_of_a_step(micro_batches):
    model = layers(torch.float32)
    optimizer = dist.ZeroAdamW(model.named_parameters(), bucket_size=3 * WIDTH**2)

    def step():
        for _ in range(micro_batches):
            optimizer.backward(model(torch.ones(1, WIDTH)).sum())
        optimizer.step(1e-3)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return zero.bytes_sent()

    return -step() + step()


def bytes_held():
    """Bytes after each phase of two steps of a bfloat16 model with a layer in each bucket, from the model on, and the
    most there were when a gradient had just come."""
    held, seen = {}, []

    def make_model():
        held["model"] = layers(torch.bfloat16)

    def make_optimizer():
        held["optimizer"] = dist.ZeroAdamW(held["model"].named_parameters(), bucket_size=WIDTH**2)
        for parameter in held["model"].parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: seen.append(zero.bytes_held()))

    def backward():
        held["optimizer"].backward(held["model"](torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum())

    def update():
        held["optimizer"].step(1e-3)

    layers(torch.bfloat16)(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum().backward()  # what kernels keep for good
    gc.collect()
    start = zero.bytes_held()
    phases = zero.memory(make_model, make_optimizer, backward, update, backward, backward, update)
    return [end for end, _ in phases], max(seen) - start


def reduced_during_backward():
    """How many buckets were on their way when the gradient of the first layer, which comes last, came."""
    model, seen = layers(torch.float32), []
    optimizer = dist.ZeroAdamW(model.named_parameters(), bucket_size=WIDTH**2)
    model[0].weight.register_hook(lambda grad: seen.append(optimizer.next))
    optimizer.backward(model(torch.ones(1, WIDTH)).sum())
    return seen


def seconds_waited(rank):
    """The last rank comes half a second late."""
    model = layers(torch.float32)
    optimizer = dist.ZeroAdamW(model.named_parameters())
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.5 * (rank + 1 == torch.distributed.get_world_size()))
    optimizer.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step(1e-3)
    return optimizer.seconds_waited(), optimizer.seconds_waited()


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    zero.malloc_by_pages()
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    result = {
        "runs": {(shard, b): run_ours(rank, ranks, shard, b) for shard, b in RUNS},
        "sent": {k: bytes_of_a_step(k) for k in (1, 3)},
        "held": bytes_held(),
        "reduced": reduced_during_backward(),
        "waited": seconds_waited(rank),
    }
    torch.save(result, f"{folder}/rank{rank}.pt")
    dist.stop()


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def ranks(request, tmp_path_factory):
    """What each of 1, 2, 3 and 4 processes has to tell."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.spawn(work, (request.param, folder), nprocs=request.param)
    return [torch.load(f"{folder}/rank{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize(("shard", "bucket_size"), RUNS)
def test_parameters_equal_torch_adamw_though_some_get_no_gradient_in_some_steps(ranks, shard, bucket_size):
    """Accumulation over 12 micro-batches shared out, clipping, a frozen layer, tied weights, a branch that is used by
    some micro-batches in every third step, and a step whose whole batch is one rank's."""
    expected, expected_norms, without = run_torch()
    for rank in ranks:
        parameters, norms = rank["runs"][shard, bucket_size]
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert min(expected_norms) < MAX_NORM < max(expected_norms) and {*without} == {True, False}


def test_gradients_master_weights_and_moments_take_16_bytes_a_parameter_over_all_ranks(ranks):
    for rank in ranks:
        n, ((model, made, first, updated, _, second, last), peak) = len(ranks), rank["held"]
        assert model == pytest.approx(2 * P, rel=0.01)
        for none_yet in (made, updated, last):
            assert none_yet - model == pytest.approx(12 * P / n, rel=0.05)
        for all_there in (first, second):
            assert all_there - model == pytest.approx(16 * P / n, rel=0.05)
        # While it runs: a bucket that fills, and one that is sent and, from more than one rank, received.
        buckets = (2 + (n > 1)) * 2 * WIDTH**2
        assert peak - model <= 1.05 * 16 * P / n + buckets


def test_a_step_sends_two_elements_a_parameter_and_one_more_for_each_further_micro_batch(ranks):
    """As the kernel counts the bytes of this process's connections."""
    for rank in ranks:
        share = 4 * P * (len(ranks) - 1) / len(ranks)
        assert rank["sent"][1] == pytest.approx(2 * share, rel=0.01)
        assert rank["sent"][3] == pytest.approx(4 * share, rel=0.01)


def test_buckets_are_reduced_while_the_backward_pass_runs(ranks):
    assert all(rank["reduced"] == [LAYERS - 1] for rank in ranks)


def test_time_spent_waiting_is_that_of_the_ranks_that_are_early(ranks):
    *early, (late, _) = [rank["waited"] for rank in ranks]
    assert all(0.4 < seconds < 5 and then == 0 for seconds, then in early)
    assert late < 0.4
