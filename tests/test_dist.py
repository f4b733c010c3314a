"""The sharded AdamW in real processes against torch.optim.AdamW in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file

import dist

STEPS, BATCH, MICRO, MAX_NORM = 20, 24, 2, 40.0


class Model(torch.nn.Module):
    """Tied embeddings, a frozen layer, a norm, a bias, and 7 × 13, 5 × 13 and 13 numbers that no rank count divides."""

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
    return torch.randint(7, (BATCH, 4), generator=generator), torch.randint(7, (BATCH, 4), generator=generator)


def loss_of(model, ids, targets):
    """Summed over the step's sequences, so that the parts of ranks and micro-batches add up."""
    logits = model(ids).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / (BATCH * 4) * 10


def learning_rate(step):
    return 1e-2 / (1 + step)


def run_torch(steps=STEPS):
    model = Model()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    norms = []
    for step in range(steps):
        loss_of(model, *batch_of(step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trained, MAX_NORM).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def train(rank, ranks, folder, shard, bucket_size, first=0, last=STEPS, load=None, dtype=torch.float32):
    """One rank's part: its slice of each batch, in micro-batches; rank 0 keeps parameters, norms and state."""
    torch.set_num_threads(1)
    if ranks > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=ranks)
    model = Model(dtype)
    optimizer = dist.ZeroAdamW(
        model.named_parameters(),
        betas=(0.9, 0.95),
        weight_decay=0.1,
        max_grad_norm=MAX_NORM,
        bucket_size=bucket_size,
        shard=shard,
    )
    if load:
        optimizer.load_state_dict(load_file(load))
    norms = []
    for step in range(first, last):
        ids, targets = batch_of(step)
        mine = torch.arange(BATCH * rank // ranks, BATCH * (rank + 1) // ranks)
        for part in mine.chunk(MICRO):
            optimizer.backward(loss_of(model, ids[part], targets[part]))
        assert all(p.grad is None for p in model.parameters())
        norms.append(optimizer.step(learning_rate(step)))
    shards = sum(len(bucket.master) for bucket in optimizer.buckets)
    whole = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pieces = ranks if shard else 1
    assert whole / pieces <= shards <= whole / pieces + len(optimizer.buckets)
    state = optimizer.state_dict()
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save((parameters, norms), f"{folder}/rank{rank}.pt")
    if rank == 0:
        save_file(state, f"{folder}/state.safetensors")
    dist.stop()


def launch(ranks, folder, *args):
    folder.mkdir(exist_ok=True)
    if ranks == 1:
        train(0, 1, str(folder), *args)
    else:
        multiprocessing.spawn(train, (ranks, str(folder), *args), nprocs=ranks)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("shard", [True, False])
@pytest.mark.parametrize(("ranks", "bucket_size"), [(1, 1), (1, 10**6), (2, 100), (3, 10**6), (4, 1), (4, 10**6)])
def test_twenty_steps_equal_torch_adamw_in_one_process(ranks, bucket_size, shard, tmp_path):
    expected, expected_norms = run_torch()
    for parameters, norms in launch(ranks, tmp_path / "run", shard, bucket_size):
        assert norms == pytest.approx(expected_norms, rel=1e-4)
        for name, value in parameters.items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert min(expected_norms) < MAX_NORM < max(expected_norms)  # clipped in some steps and not in others


def test_a_state_saved_by_four_ranks_goes_on_in_two_and_in_one(tmp_path):
    expected, _ = run_torch()
    launch(4, tmp_path / "four", True, 100, 0, 10)
    for ranks in (2, 1):
        state = str(tmp_path / "four" / "state.safetensors")
        for parameters, _ in launch(ranks, tmp_path / f"to{ranks}", True, 10**6, 10, STEPS, state):
            for name, value in parameters.items():
                torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


def test_bfloat16_parameters_are_updated_through_float32_master_weights(tmp_path):
    """Against the same by hand with torch's AdamW: gradients of a bfloat16 model, summed and applied in float32."""
    model, master = Model(torch.bfloat16), Model(torch.bfloat16).float()
    trained = [p for p in master.parameters() if p.requires_grad]
    groups = [[p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]]
    groups = [{"params": g, "weight_decay": decay} for g, decay in zip(groups, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(STEPS):
        ids, targets = batch_of(step)
        for part in torch.arange(BATCH).chunk(MICRO):
            loss_of(model, ids[part], targets[part]).backward()
            for p, m in zip(model.parameters(), master.parameters()):
                if p.requires_grad:
                    m.grad = p.grad.float() if m.grad is None else m.grad + p.grad.float()
                    p.grad = None
        torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, m in zip(model.parameters(), master.parameters()):
                p.copy_(m)
    [(parameters, _)] = launch(1, tmp_path / "one", True, 10**6, 0, STEPS, None, torch.bfloat16)
    state = load_file(tmp_path / "one" / "state.safetensors")
    for name, value in master.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(state[f"master.{name}"], value.detach(), atol=1e-5, rtol=0)
            assert torch.equal(parameters[name], state[f"master.{name}"].bfloat16())
    two, other = launch(2, tmp_path / "two", True, 10**6, 0, STEPS, None, torch.bfloat16)
    assert all(torch.equal(value, other[0][name]) for name, value in two[0].items())  # ranks agree to the bit


def test_a_gradient_that_is_not_finite_stops_before_the_update():
    model = Model()
    optimizer = dist.ZeroAdamW(model.named_parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.backward(loss_of(model, *batch_of(0)) * float("nan"))
    with pytest.raises(FloatingPointError, match="nan"):
        optimizer.step(1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_one_process_needs_no_process_group():
    world = dist.find_world()
    dist.start(world)
    assert (world.rank, world.size, world.is_main) == (0, 1, True) and not torch.distributed.is_initialized()
    assert world.sum({"a": 1.5}) == {"a": 1.5} and world.gather([1, 2]) == [1, 2]


def test_processes_of_a_machine_share_its_free_memory(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = dist.free_memory(torch.device("cpu"))
    assert 0 < alone < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert dist.free_memory(torch.device("cpu")) == pytest.approx(alone / 4, rel=0.2)


@pytest.mark.parametrize("processes, threads", [(2, "4\n"), (3, "2\n"), (16, "1\n")])
def test_processes_of_a_machine_share_its_cores(processes, threads):
    """Of 8 cores; torchrun sets one thread for each of several processes, and alone, PyTorch takes all cores."""
    program = "import os, dist; os.sched_getaffinity = lambda _: range(8); dist.start(dist.find_world())"
    command = [sys.executable, "-c", f"{program}; import torch; print(torch.get_num_threads())"]
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, env=environment, cwd=Path(dist.__file__).parent, capture_output=True, text=True, check=True
    )
    assert run.stdout == threads
