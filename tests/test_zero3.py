"""ZeRO-3 in real processes: against torch.optim.AdamW, against unsharded models, and from stage to
stage. Whole runs of train.py: run/test_zero3_runs.py."""

import pytest
import torch
from conftest import tiny_model
from processes import forget_tensors, in_processes, settled_bytes
from test_dist import (
    ALONE,
    STEPS,
    Model,
    assert_close,
    batch_of,
    loss_of,
    our_adamw,
    run_torch,
    train,
)
from test_sampler import ENDS, prompts_of
from torch.distributed.tensor import DTensor

import dist
import grpo
import lora
from run.checkpoints import load_optimizer_state, optimizer_state
from sampler import Decoder, ModelSampler

STAGES = {"none": 14, "zero2": 2 + 12 / 2, "zero3": 14 / 2}  # bytes a parameter of two ranks
SAMPLED = [(adapted, gather) for adapted in (False, True) for gather in (None, True, False)]


def sharded_model(dtype=torch.float32):
    model = Model(dtype)
    dist.shard_parameters(model, [model.frozen, model.up, model.down])
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


# What ranks do ------------------------------------------------------------------------------------


def steps_of(world, model, load=None, last=STEPS):
    """→ parameters, norms, the optimizer's state after 10 steps and after all."""
    optimizer, norms, states = our_adamw(model), [], {}
    if load:
        load_optimizer_state(optimizer, load)
    while optimizer.steps < last:
        parameters, more = train(world, model, optimizer, last=optimizer.steps + 10)
        norms += more
        states[optimizer.steps] = optimizer_state(optimizer)
    return parameters, norms, states


def two_ways_through(world):
    """Gradients of a loss through the model's own forward, and through its parts."""
    model, results = sharded_model(), []
    ids, targets = batch_of(0)

    def by_parts(model, ids):
        x = model.embed(ids)
        return model.head(model.norm(x + model.down(torch.tanh(model.up(model.frozen(x))))))

    for function in (
        loss_of,
        lambda model, *batch: loss_of(lambda ids: by_parts(model, ids), *batch),
    ):
        dist.forward(function, model, ids, targets).backward()
        results.append([dist.full(p.grad).clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    return results


def bytes_a_parameter(world, stage):
    """Held by this rank between two steps, and inside the forward pass's middle layer."""
    forget_tensors()
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 8}
    model = tiny_model(**sizes, dtype=torch.bfloat16)
    size, expected = sum(p.numel() for p in model.parameters()), STAGES[stage]
    if stage == "zero3":
        dist.shard_parameters(model, model.model.layers)
    optimizer = dist.ZeroAdamW(model.named_parameters(), shard=stage == "zero2")
    seen = []

    def look(*_):
        seen.append(settled_bytes(model, most=(expected + room(stage)) * size))

    model.model.layers[4].self_attn.register_forward_pre_hook(look)
    for _ in range(2):
        arguments = model, [[5, 6]], [[7, 8 + world.rank]], 1.0
        logps, *_ = dist.forward(grpo.completion_logps, *arguments)
        optimizer.backward(logps.sum())
        optimizer.step(1e-3)
    del logps
    return settled_bytes(model, most=1.01 * expected * size) / size, seen[-1] / size


def room(stage):
    """Bytes a parameter within the forward pass: for activations, and with ZeRO-3 for what is full:
    one of eight layers, with the buffer that it was gathered in, and the embedding."""
    return 0.25 + (3 * 0.25 if stage == "zero3" else 0)


def sampled(world, adapted, gather, quick=None):
    """Completions of two rounds, sharded unless gather is None; quick: the folder fast/, if used."""
    model, prompts = tiny_model(), prompts_of(counts=(3, 5, 4))
    if adapted:
        torch.manual_seed(1)
        lora.inject(model, 3, 6)
        for _, layer in lora.layers(model):
            torch.nn.init.normal_(layer.lora_B)
    if gather is not None:
        dist.shard_parameters(model, model.model.layers)
    decoder = Decoder
    if quick:
        dist.forward(quick.prepare, model)
        decoder = quick.decoder_for(model, layerwise=gather is False)
    settings = {"eos_token_ids": ENDS, "max_new_tokens": 12, "gather": gather is not False}
    sampler = ModelSampler(model, **settings, decoder=decoder)
    optimizer, rounds = dist.ZeroAdamW(model.named_parameters()), []
    # The second rank gets none of the second round.
    for mine in (slice(6 * world.rank, 6 * world.rank + 6), slice(0, 2 - 2 * world.rank)):
        completions = sampler.generate(prompts[mine], range(100)[mine])
        rounds.append([(c.ids, c.finished) for c in completions])
        assert gather is None or all(isinstance(p, DTensor) for p in model.parameters())
        # Training in between moves what is sampled from, and needs what was gathered to be no
        # inference tensors.
        completion_logps = (quick or grpo).completion_logps
        logps, *_ = dist.forward(completion_logps, model, prompts[:1], [[7, 8]], 1.0)
        optimizer.backward(logps.sum() / 2)
        optimizer.step(0.1)
    return rounds, decoder.__name__


def work(world):
    twenty = steps_of(world, sharded_model())
    state = world.from_main(twenty[2][10])
    return {
        "float32": twenty,
        "went on": steps_of(world, sharded_model(), load=state),
        "zero2": steps_of(world, Model(torch.bfloat16)),
        "zero3": steps_of(world, sharded_model(torch.bfloat16)),
        "ways": two_ways_through(world),
        "bytes": {stage: bytes_a_parameter(world, stage) for stage in STAGES},
        "sampled": {case: sampled(world, *case) for case in SAMPLED},
    }


def work_of_four(world):
    return {"float32": steps_of(world, sharded_model(), last=10)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    tiny_model()  # transformers imports what it needs once, before the ranks fork
    return in_processes(2, tmp_path_factory.mktemp("two"), work)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return in_processes(4, tmp_path_factory.mktemp("four"), work_of_four)


# Training -----------------------------------------------------------------------------------------


def test_sharded_steps_equal_torch_adamw_in_one_process(two_ranks, four_ranks):
    """Tied weights, a frozen layer, and dimensions of 5, 7 and 13 that no number of ranks divides.
    Twenty steps of two ranks, ten of four."""
    for ranks, steps in ((two_ranks, STEPS), (four_ranks, 10)):
        expected, expected_norms = run_torch(steps)
        for rank in ranks:
            parameters, norms, _ = rank["float32"]
            assert norms == pytest.approx(expected_norms, rel=1e-4)
            assert_close(parameters, expected)


def test_a_state_goes_on_in_another_stage_and_number_of_processes(two_ranks, four_ranks):
    """Of ten steps of ZeRO-3 on two and on four ranks: in ZeRO-3, and in one process."""
    expected, _ = run_torch()
    for rank in two_ranks:
        assert_close(rank["went on"][0], expected)
    for ranks in (two_ranks, four_ranks):
        alone, _, _ = steps_of(ALONE, Model(), load=ranks[0]["float32"][2][10])
        assert_close(alone, expected)
        assert ranks[1]["float32"][2][10].keys() == {"steps"}  # only rank 0 has the state


def test_in_bfloat16_the_stages_differ_by_the_rounding_of_sums(two_ranks):
    """ZeRO-2 sums the ranks' gradients in float32, ZeRO-3 in bfloat16: norms, weights and moments
    are close."""
    for rank in two_ranks:
        (parameters, norms, states), (parameters3, norms3, states3) = rank["zero2"], rank["zero3"]
        assert norms == pytest.approx(norms3, rel=5e-3)
        for a, b in ((parameters, parameters3), (states[STEPS], states3[STEPS])):
            assert a.keys() == b.keys()
            for name in a:
                off = (a[name].float() - b[name].float()).norm()
                assert off <= 0.02 * b[name].float().norm(), name


def test_a_pass_through_the_models_parts_gives_the_gradients_of_its_own(two_ranks):
    model = Model()
    (2 * loss_of(model, *batch_of(0))).backward()  # both ranks had the whole batch
    expected = [p.grad for p in model.parameters() if p.requires_grad]
    for rank in two_ranks:
        for gradients in rank["ways"]:
            for gradient, other in zip(gradients, expected, strict=True):
                torch.testing.assert_close(gradient, other, atol=1e-5, rtol=1e-5)


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_its_share_of_everything(two_ranks, stage):
    """Weights 2, master weights 4 and moments 8 bytes a parameter, of which with two ranks a half
    each is left."""
    expected = STAGES[stage]
    for rank in two_ranks:
        between, within = rank["bytes"][stage]
        print(f"{stage}: {between:.2f} bytes a parameter between steps, {within:.2f} within a pass")
        assert between == pytest.approx(expected, rel=0.01)
        assert within < expected + room(stage)


# Sampling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_sharded_model_samples_what_it_samples_whole(two_ranks, adapted, gather):
    expected = [rank["sampled"][adapted, None] for rank in two_ranks]
    assert len({len(ids) for rounds, _ in expected for ids, _ in rounds[0]}) > 3
    (first, second), (_, none) = expected[0][0], expected[1][0]
    assert none == [] and second != first[:2]
    assert [rank["sampled"][adapted, gather] for rank in two_ranks] == expected
