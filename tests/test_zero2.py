"""ZeRO-2 by the numbers: parameters beside torch.optim.AdamW, bytes held, bytes sent, and what
overlaps with what."""

import time
from pathlib import Path

import pytest
import torch
from processes import bytes_sent, forget_tensors, in_processes, settled_bytes
from test_dist import (
    BATCH,
    MAX_NORM,
    STEPS,
    Model,
    assert_close,
    batch_of,
    learning_rate,
    loss_of,
    our_adamw,
    torch_adamw,
    torch_step,
)

import dist
from run.log import Waits

# Sharded or not, elements in a bucket (a parameter in each, a few, all), and steps.
RUNS = [(True, 1, 8), (True, 80, STEPS), (True, 10**6, 8), (False, 80, 8)]
LAYERS, WIDTH = 16, 256
P = LAYERS * WIDTH * WIDTH
PAUSE = 0.5  # seconds that the last rank comes late, where the others are to wait


# Parameters ---------------------------------------------------------------------------------------


class WithBranch(Model):
    """And a layer that only some steps and micro-batches use."""

    def __init__(self):
        super().__init__()
        self.branch = torch.nn.Linear(13, 13)


def micro_batches(step):
    """Pairs of sequences, and whether the branch is used for them."""
    ids, targets = batch_of(step)
    return [
        (ids[i : i + 2], targets[i : i + 2], step % 3 == 0 and i < BATCH // 2)
        for i in range(0, BATCH, 2)
    ]


def micro_loss(model, ids, targets, branch):
    if not branch:
        return loss_of(model, ids, targets)
    handle = model.embed.register_forward_hook(lambda module, inputs, x: x + model.branch(x))
    with handle:
        return loss_of(model, ids, targets)


@pytest.fixture(scope="module")
def by_torch():
    """One process, with a zero gradient where there is none → by number of steps the parameters;
    norms, and in which steps the branch had none."""
    model = WithBranch()
    optimizer, trained = torch_adamw(model)
    parameters, norms, without = {}, [], []
    for step in range(STEPS):
        for micro in micro_batches(step):
            micro_loss(model, *micro).backward()
        without.append(model.branch.weight.grad is None)
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norms.append(torch_step(optimizer, trained, step))
        parameters[step + 1] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return parameters, norms, without


def run_ours(world, shard, bucket_size, steps):
    """→ parameters, norms, elements of this rank's state, and how many buckets there are."""
    model = WithBranch()
    optimizer, norms = our_adamw(model, bucket_size=bucket_size, shard=shard), []
    for step in range(steps):
        micros = micro_batches(step)
        first, end = (len(micros) * rank // world.size for rank in (world.rank, world.rank + 1))
        mine = micros[first:end]
        if step == 5:  # all of it is one rank's
            mine = micros if world.rank == world.size - 1 else [None] * len(micros)
        for micro in mine:
            loss = micro_loss(model, *micro) if micro else 0.0 * micro_loss(model, *micros[0])
            optimizer.backward(loss)
        assert all(p.grad is None for p in model.parameters())
        norms.append(optimizer.step(learning_rate(step)))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = sum(len(bucket.master) for bucket in optimizer.buckets)
    return parameters, norms, state, len(optimizer.buckets)


# Bytes and moments --------------------------------------------------------------------------------


def layers(dtype):
    torch.manual_seed(0)
    parts = [torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(LAYERS)]
    return torch.nn.Sequential(*parts)


def bytes_of_a_step(world, micro_batches):
    model = layers(torch.float32)
    optimizer = dist.ZeroAdamW(model.named_parameters(), bucket_size=3 * WIDTH**2)

    def step():
        for _ in range(micro_batches):
            optimizer.backward(model(torch.ones(1, WIDTH)).sum())
        optimizer.step(1e-3)
        world.barrier()
        return bytes_sent()

    return -step() + step()


def bytes_held(world):
    """Bytes of all tensors after each phase of two steps of a bfloat16 model with a layer in each
    bucket, from the model on, and the most there were when a gradient had just come."""
    forget_tensors()
    model = layers(torch.bfloat16)
    allowed = 12 * P / world.size + 2 * P
    held = {"model": settled_bytes(model, most=2 * P)}
    optimizer = dist.ZeroAdamW(model.named_parameters(), bucket_size=WIDTH**2)
    held["optimizer"] = settled_bytes(model, most=allowed)
    # When the gradient of layer k comes, those of all behind it have been summed, but for two.
    buckets = 2 if world.size == 1 else 3
    most = allowed + 4 * P / world.size + buckets * 2 * WIDTH**2
    seen = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p: seen.append(settled_bytes(model, most * 1.01, patience=2.0))
        )
    for phase in ("backward 1", "step 1", "backward 2", "backward 3", "step 2"):
        if phase.startswith("step"):
            optimizer.step(1e-3)
            held[phase] = settled_bytes(model, most=allowed * 1.01)
        else:
            optimizer.backward(model(torch.ones(1, WIDTH, dtype=torch.bfloat16)).sum())
            held[phase] = settled_bytes(model, most=(allowed + 4 * P / world.size) * 1.01)
    return held, max(seen)


def reduced_during_backward(world):
    """How many buckets were on their way when the gradient of the first layer, which comes last,
    came."""
    model, seen = layers(torch.float32), []
    optimizer = dist.ZeroAdamW(model.named_parameters(), bucket_size=WIDTH**2)
    model[0].weight.register_hook(lambda grad: seen.append(optimizer.next))
    optimizer.backward(model(torch.ones(1, WIDTH)).sum())
    return seen


def seconds_waited(world, folder):
    """The last rank comes when all others have waited for PAUSE seconds → seconds that this rank
    says it waited, that its step took, and that it says when asked again."""

    class Telling(Waits):
        def __enter__(self):
            super().__enter__()
            (folder / f"waits-{world.rank}").touch()

    model, waits = layers(torch.float32), Telling(torch.device("cpu"))
    optimizer = dist.ZeroAdamW(model.named_parameters(), waiting=waits)
    is_late = world.rank == world.size - 1
    world.barrier()
    started = time.perf_counter()
    if is_late:
        while len(list(folder.glob("waits-*"))) < world.size - 1:
            time.sleep(0.01)
        time.sleep(PAUSE)
    optimizer.backward(model(torch.ones(1, WIDTH)).sum())
    optimizer.step(1e-3)
    took = time.perf_counter() - started
    return waits.seconds(), took, waits.seconds()


def work(world, folder):
    return {
        "runs": {run: run_ours(world, *run) for run in RUNS},
        "sent": {count: bytes_of_a_step(world, count) for count in (1, 3)},
        "held": bytes_held(world),
        "reduced": reduced_during_backward(world),
        "waited": seconds_waited(world, folder),
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request, tmp_path_factory):
    """What each of 1, 2 and 3 processes has to tell."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return in_processes(request.param, folder, work, folder)


@pytest.mark.parametrize("run", RUNS)
def test_parameters_equal_torch_adamw_though_some_get_no_gradient_in_some_steps(
    ranks, by_torch, run
):
    """Accumulation over 12 micro-batches shared out, clipping, a frozen layer, tied weights, a
    branch that is used by some micro-batches in every third step, and a step whose whole batch is
    one rank's."""
    parameters_after, all_norms, without = by_torch
    steps = run[-1]
    expected_norms = all_norms[:steps]
    for rank in ranks:
        parameters, norms, *_ = rank["runs"][run]
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        assert_close(parameters, parameters_after[steps])
    assert min(expected_norms) < MAX_NORM < max(expected_norms)
    assert set(without[:steps]) == {True, False}


def test_a_rank_has_the_state_of_its_shard_alone(ranks):
    trained = sum(p.numel() for p in WithBranch().parameters() if p.requires_grad)
    for rank in ranks:
        for (shard, *_), (*_, state, buckets) in rank["runs"].items():
            share = trained / len(ranks) if shard else trained
            assert share <= state <= share + buckets


def test_gradients_master_weights_and_moments_take_16_bytes_a_parameter_over_all_ranks(ranks):
    """Counted: the memory of all tensors there are, of which nothing depends on the machine."""
    for rank in ranks:
        n, (held, peak) = len(ranks), rank["held"]
        model = held.pop("model")
        assert model == 2 * P
        for phase, there in held.items():
            bytes_a_parameter = 16 if phase.startswith("backward") else 12
            assert there - model == pytest.approx(bytes_a_parameter * P / n, rel=0.01), phase
        # While it runs: a bucket that fills, and one that is sent and, from more than one rank,
        # received.
        buckets = (2 + (n > 1)) * 2 * WIDTH**2
        assert peak - model <= 1.01 * 16 * P / n + buckets


def test_a_step_sends_two_elements_a_parameter_and_one_more_for_each_further_micro_batch(ranks):
    """As the kernel counts the bytes of this process's connections."""
    for rank in ranks:
        share = 4 * P * (len(ranks) - 1) / len(ranks)
        assert rank["sent"][1] == pytest.approx(2 * share, rel=0.01)
        assert rank["sent"][3] == pytest.approx(4 * share, rel=0.01)


def test_buckets_are_reduced_while_the_backward_pass_runs(ranks):
    assert all(rank["reduced"] == [LAYERS - 1] for rank in ranks)


def test_time_spent_waiting_is_that_of_the_ranks_that_are_early(ranks):
    """Whatever the machine is busy with: the late rank comes when it sees the others wait."""
    *early, (late, took, again) = [rank["waited"] for rank in ranks]
    assert late <= took - (PAUSE if early else 0) and again == 0
    for seconds, took, again in early:
        assert PAUSE <= seconds <= took and again == 0
