"""Ranks that talk to each other; AdamW's update and its checkpoints beside torch.optim.AdamW."""

import os
import socket

import pytest
import torch
from processes import forked, in_processes, places
from safetensors.torch import load_file, save_file

import dist
from run.checkpoints import load_optimizer_state, optimizer_state

STEPS, BATCH, MICRO, MAX_NORM = 20, 24, 2, 40.0


# A model and a task, of which test_zero2 and test_zero3 make use ----------------------------------


class Model(torch.nn.Module):
    """Tied embeddings, a frozen layer, a norm, a bias, and 7 × 13, 5 × 13 and 13 numbers that no
    rank count divides."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 13)
        self.frozen = torch.nn.Linear(13, 13).requires_grad_(False)
        self.up, self.down = torch.nn.Linear(13, 5), torch.nn.Linear(5, 13, bias=False)
        self.norm = torch.nn.LayerNorm(13)
        self.head = torch.nn.Linear(13, 7, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.down(torch.tanh(self.up(self.frozen(x))))))


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(7, (BATCH, 4), generator=generator) for _ in range(2)]


def loss_of(model, ids, targets):
    """Summed over the step's sequences, so that the parts of ranks and micro-batches add up."""
    logits = model(ids).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    return loss / (BATCH * 4) * 10


def learning_rate(step):
    return 1e-2 / (1 + step)


def torch_adamw(model):
    """Matrices decay, vectors do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95)), trained


def torch_step(optimizer, trained, step):
    """Clip and update → gradient norm."""
    norm = torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return norm


def run_torch(steps=STEPS):
    """In one process, on whole batches → parameters, gradient norms."""
    model = Model()
    optimizer, trained = torch_adamw(model)
    norms = []
    for step in range(steps):
        loss_of(model, *batch_of(step)).backward()
        norms.append(torch_step(optimizer, trained, step))
    return dict(model.named_parameters()), norms


def our_adamw(model, **settings):
    settings = {"betas": (0.9, 0.95), "weight_decay": 0.1, "max_grad_norm": MAX_NORM} | settings
    return dist.ZeroAdamW(model.named_parameters(), **settings)


def train(world, model, optimizer, last=STEPS):
    """This rank's slice of each batch, in micro-batches, from the optimizer's step to the last
    → parameters, gradient norms."""
    norms = []
    for step in range(optimizer.steps, last):
        ids, targets = batch_of(step)
        first, end = BATCH * world.rank // world.size, BATCH * (world.rank + 1) // world.size
        for part in torch.arange(first, end).chunk(MICRO):
            optimizer.backward(dist.forward(loss_of, model, ids[part], targets[part]))
        assert all(p.grad is None for p in model.parameters())
        norms.append(optimizer.step(learning_rate(step)))
    parameters = {n: dist.full(p.detach()).clone() for n, p in model.named_parameters()}
    return parameters, norms


def assert_close(parameters, expected):
    assert parameters.keys() == expected.keys()
    for name, value in parameters.items():
        torch.testing.assert_close(
            value, expected[name].detach(), atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


ALONE = dist.World(0, 1, torch.device("cpu"))


# World --------------------------------------------------------------------------------------------


def test_one_process_needs_no_process_group():
    world = dist.find_world()
    dist.start(world)
    assert not torch.distributed.is_initialized()
    assert (world.rank, world.size, world.is_main, world.spans_nodes) == (0, 1, True, False)
    assert world.sum({"a": 1.5, "b": 2}) == {"a": 1.5, "b": 2} and world.gather([1, 2]) == [1, 2]
    assert world.from_main("a") == "a"
    world.barrier()
    dist.stop()


def talk(world):
    """Rank r has the numbers r and 10·r, and a name that no other rank has."""
    own = {"rank": world.rank, f"only {world.rank}": 0.5, "tens": 10 * world.rank}
    return {
        "sum": list(world.sum(own).items()),
        "items": world.gather(["x"] * world.rank),
        "main": world.from_main(f"from {world.rank}"),
        "place": world.place,
    }


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    return in_processes(3, tmp_path_factory.mktemp("talk"), talk)


def test_sums_are_of_every_name_that_a_rank_has_in_one_order(talks):
    expected = [("rank", 3), ("only 0", 0.5), ("tens", 30), ("only 1", 0.5), ("only 2", 0.5)]
    assert [told["sum"] for told in talks] == [expected] * 3


def test_every_rank_gets_all_ranks_items_and_those_of_rank_0(talks):
    assert [told["items"] for told in talks] == [["x"] * 3] * 3
    assert [told["main"] for told in talks] == ["from 0"] * 3


def test_a_place_is_rank_and_host(talks):
    here = [f"rank {rank} on {socket.gethostname()}" for rank in range(3)]
    assert [told["place"] for told in talks] == here


def start_by_environment():
    """As a rank that torchrun started, without looking for a GPU."""
    world = dist.World(int(os.environ["RANK"]), 2, torch.device("cpu"))
    dist.start(world)
    print(world.gather([world.rank]), world.spans_nodes, torch.distributed.get_backend())
    dist.stop()


def test_without_a_store_ranks_meet_where_torchrun_says(tmp_path):
    jobs = [(start_by_environment, (), place) for place in places(2, LOCAL_WORLD_SIZE=2)]
    with forked(tmp_path, *jobs) as ranks:
        assert [rank.end(timeout=60) for rank in ranks] == [(0, "[0, 1] False gloo\n")] * 2


# AdamW --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize("bucket_size", [1, 10**6])
def test_twenty_steps_of_one_process_equal_torch_adamw(bucket_size, shard):
    """More processes: test_zero2 and test_zero3."""
    expected, expected_norms = run_torch()
    model = Model()
    optimizer = our_adamw(model, bucket_size=bucket_size, shard=shard)
    parameters, norms = train(ALONE, model, optimizer)
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert_close(parameters, expected)
    assert min(expected_norms) < MAX_NORM < max(expected_norms)  # some steps were clipped


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = Model()
    optimizer = dist.ZeroAdamW(model.named_parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.backward(loss_of(model, *batch_of(0)) * float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.step(1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def spoiled_on_the_last_rank(world, shard: bool) -> str:
    """What the ranks hear of an update that one of them alone makes infinite."""
    model = Model()
    optimizer = dist.ZeroAdamW(model.named_parameters(), shard=shard)
    optimizer.backward(loss_of(model, *batch_of(0)))
    if world.rank == world.size - 1 or not shard:
        optimizer.buckets[-1].exp_avg[-1] = float("inf")
    try:
        optimizer.step(1e-2)
    except FloatingPointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("shard", [True, False])
def test_weights_that_an_update_makes_infinite_are_every_ranks_error(shard, tmp_path):
    said = in_processes(2, tmp_path / "ranks", spoiled_on_the_last_rank, shard)
    assert said == ["update 1 made weights that are not finite"] * 2


def test_bfloat16_parameters_are_updated_through_float32_master_weights():
    """Against the same by hand with torch's AdamW: gradients of a bfloat16 model, summed and
    applied in float32."""
    model, master = Model(torch.bfloat16), Model(torch.bfloat16).float()
    optimizer, trained = torch_adamw(master)
    pairs = list(zip(model.parameters(), master.parameters()))
    for step in range(STEPS):
        ids, targets = batch_of(step)
        for part in torch.arange(BATCH).chunk(MICRO):
            loss_of(model, ids[part], targets[part]).backward()
            for p, m in pairs:
                if p.requires_grad:
                    m.grad = p.grad.float() if m.grad is None else m.grad + p.grad.float()
                    p.grad = None
        torch_step(optimizer, trained, step)
        with torch.no_grad():
            for p, m in pairs:
                p.copy_(m)
    ours = Model(torch.bfloat16)
    our_optimizer = our_adamw(ours)
    parameters, _ = train(ALONE, ours, our_optimizer)
    state = optimizer_state(our_optimizer)
    for name, value in master.named_parameters():
        if value.requires_grad:
            kept = state[f"master.{name}"]
            torch.testing.assert_close(kept, value.detach(), atol=1e-5, rtol=0)
            assert torch.equal(parameters[name], kept.bfloat16())


# More processes -----------------------------------------------------------------------------------


def save_half(world, file):
    """Ten steps → the optimizer's state in a file."""
    model = Model()
    optimizer = our_adamw(model, bucket_size=100)
    train(world, model, optimizer, last=10)
    state = optimizer_state(optimizer)
    if world.is_main:
        save_file(state, file)
    return list(state)


def go_on(world, file):
    """From a state → parameters; and those of twenty steps in bfloat16."""
    model = Model()
    optimizer = our_adamw(model)
    load_optimizer_state(optimizer, load_file(file))
    parameters, _ = train(world, model, optimizer)
    rounded = Model(torch.bfloat16)
    rounded_parameters, _ = train(world, rounded, our_adamw(rounded))
    return parameters, rounded_parameters


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """The file that four ranks have left, and the names that each of them got."""
    folder = tmp_path_factory.mktemp("four")
    names = in_processes(4, folder, save_half, folder / "state.safetensors")
    return folder / "state.safetensors", names


@pytest.fixture(scope="module")
def two_ranks(half_way, tmp_path_factory):
    return in_processes(2, tmp_path_factory.mktemp("two"), go_on, half_way[0])


def test_a_state_saved_by_four_ranks_goes_on_in_two_and_in_one(half_way, two_ranks):
    expected, _ = run_torch()
    alone, _ = go_on(ALONE, half_way[0])
    for parameters in (alone, *(parameters for parameters, _ in two_ranks)):
        assert_close(parameters, expected)


def test_a_state_is_rank_0s_and_holds_full_tensors_by_parameter_name(half_way):
    file, names = half_way
    state, trained = load_file(file), [n for n, p in Model().named_parameters() if p.requires_grad]
    kinds = ("master", "exp_avg", "exp_avg_sq")
    assert state.keys() == {"steps", *(f"{kind}.{name}" for kind in kinds for name in trained)}
    assert state["steps"].item() == 10 and state["exp_avg.up.weight"].shape == (5, 13)
    assert all(value.dtype == torch.float32 for name, value in state.items() if name != "steps")
    assert set(names[0]) == state.keys() and names[1:] == [["steps"]] * 3


def test_ranks_agree_to_the_bit_in_bfloat16(two_ranks):
    (_, mine), (_, others) = two_ranks
    assert all(torch.equal(value, others[name]) for name, value in mine.items())
