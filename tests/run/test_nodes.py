"""Runs on several nodes: network namespaces with addresses and disks of their own, and ranks that
do not fit together. What a rank does when another one is lost: test_watch.py."""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, read_metrics
from processes import forked, places, run_forked
from safetensors.torch import load_file, save_file

import train
from run import setup

ADDRESSES = ("10.213.77.1", "10.213.77.2")
HERE = socket.gethostname()
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000  # <linux/sched.h>


def flags_for(model_folder, plugin, *more):
    flags = f"--model {model_folder} --torch_dtype float32 --dataset arithmetic#64"
    flags += f" --external_plugins {plugin} --reward_funcs vowels --num_generations 4"
    flags += " --per_device_train_batch_size 8 --max_completion_length 8 --learning_rate 1e-3"
    return [*flags.split(), *map(str, more)]


# Two nodes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces joined by a cable."""
    a, b = names = [f"grpo-{os.getpid()}-{side}" for side in "ab"]
    commands = [f"netns add {a}", f"netns add {b}"]
    commands += [f"link add cable netns {a} type veth peer name cable netns {b}"]
    for name, address in zip(names, ADDRESSES):
        commands += [f"-n {name} addr add {address}/24 dev cable"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", "cable")]
    needs = "this test needs iproute2, and root that may add network namespaces"
    if not shutil.which("ip"):
        pytest.skip(f"no ip: {needs}")
    try:
        for command in commands:
            if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                pytest.skip(f"ip {command} failed: {needs}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def enter(node, number, disk):
    """Make this process one of a node, which has a disk, host name and resolver of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{node}") as namespace:
        assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    assert libc.unshare(CLONE_NEWNS | CLONE_NEWUTS) == 0, os.strerror(ctypes.get_errno())
    socket.sethostname(f"node-{number}")
    (disk / "hosts").write_text(f"127.0.0.1 localhost\n{ADDRESSES[number]} node-{number}\n")
    mounts = ("--make-rprivate /", f"--bind {disk}/hosts /etc/hosts")
    for mount in (*mounts, "--bind /dev/null /etc/resolv.conf"):
        subprocess.run(["mount", *mount.split()], check=True)
    os.chdir(disk)


def become_torchrun(node, number, disk, port, flags):
    """As a user starts it on a node."""
    enter(node, number, disk)
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", number]
    words += ["--master_addr", ADDRESSES[0], "--master_port", port, "--nproc_per_node", "1"]
    os.execv(sys.executable, [*map(str, words), str(ROOT / "train.py"), *flags])


def become_rank(node, number, disk, flags):
    """Without torchrun, by its environment alone."""
    enter(node, number, disk)
    train.main(flags)


def processes_of(node):
    command = ["ip", "netns", "pids", node]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def plug(node, state):
    subprocess.run(["ip", "-n", node, "link", "set", "cable", state], check=True)


def test_a_node_that_is_cut_off_is_named_all_end_and_the_run_goes_on(
    nodes, model_folder, plugin, tmp_path
):
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        disk.mkdir()
        shutil.copy(plugin, disk)
    output = disks[0] / "output"
    flags = flags_for(model_folder, plugin.name, "--deepspeed", "zero2", "--save_steps", "2")
    flags += ["--node_timeout", "3", "--lr_scheduler_type", "constant", "--max_steps"]
    environment = {"HF_HUB_OFFLINE": 1, "OMP_NUM_THREADS": 1, "PYTHONUNBUFFERED": 1}
    where = list(zip(nodes, (0, 1), disks))
    jobs = [(become_torchrun, (*place, 29500, [*flags, "100000"]), environment) for place in where]
    with forked(tmp_path / "torchrun", *jobs) as ranks:
        deadline = time.monotonic() + 300  # a start takes long on a busy machine
        while not (output / "checkpoint-2").exists():
            assert time.monotonic() < deadline and ranks[0].process.is_alive(), ranks[0].said
            time.sleep(0.1)
        plug(nodes[1], "down")
        said = [rank.end(timeout=30)[1] for rank in ranks]
    plug(nodes[1], "up")
    lost = r"lost rank 1 on node-1: out of reach .* goes on from output/checkpoint-\d+"
    assert re.search(lost, said[0]), said
    lost = r"lost rank 0 on node-0: out of reach .* goes on from rank 0's newest"
    assert re.search(lost, said[1]), said
    assert not processes_of(nodes[0]) and not processes_of(nodes[1])
    assert not (disks[1] / "output").exists()  # only rank 0 writes

    kept = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")]
    last = max(kept) + 2
    flags += [str(last), "--resume_from_checkpoint", "true"]
    environments = places(2, MASTER_ADDR=ADDRESSES[0], LOCAL_WORLD_SIZE=1, LOCAL_RANK=0)
    jobs = [(become_rank, (*place, flags), env) for place, env in zip(where, environments)]
    with forked(tmp_path / "again", *jobs) as ranks:
        ends = [rank.end(timeout=120) for rank in ranks]
    assert [status for status, _ in ends] == [0, 0], ends
    lines = read_metrics(output)
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    # The same from the same checkpoint in one process, which reads it all by itself.
    alone = tmp_path / "alone"
    shutil.copytree(output, alone)
    shutil.rmtree(alone / f"checkpoint-{last}")
    own = ["--per_device_train_batch_size", "16", "--output_dir", alone]
    run_forked([*flags, *own, "--external_plugins", plugin], 1, tmp_path / "one")
    for a, b in zip(lines[-2:], read_metrics(alone)[-2:], strict=True):
        for name in ("reward", "loss", "grad_norm", "completion_length", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


# Ranks that do not fit together -------------------------------------------------------------------


def ends_of(flags_of_ranks, folder):
    """Exit status and words of each rank of a run; they have no torchrun and are one a node."""
    jobs = [(train.main, (f,), place) for f, place in zip(flags_of_ranks, places(2))]
    with forked(folder, *jobs) as ranks:
        return [rank.end(timeout=120) for rank in ranks]


@pytest.mark.parametrize("case", ["flag", "rows"])
def test_ranks_with_other_flags_or_data_are_named_before_a_model_is_loaded(
    case, model_folder, plugin, tmp_path, monkeypatch
):
    monkeypatch.setattr(setup, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    flags = []
    for rank in (0, 1):
        rows = tmp_path / f"{rank}.jsonl"
        rows.write_text("".join(f'{{"prompt": "{n}?"}}\n' for n in range(8 + rank)))
        change = {"flag": ["--temperature", 0.7 + rank], "rows": ["--dataset", rows]}[case]
        change += ["--max_steps", 1, "--output_dir", tmp_path / f"out-{rank}"]
        flags.append(flags_for(model_folder, plugin, *change))
    (status, said), (other_status, other) = ends_of(flags, tmp_path / "ranks")
    assert (status, other_status) == (2, 2), (said, other)
    values = {"flag": ("0.7", "1.7"), "rows": (r"\(8 rows, \w+\)", r"\(9 rows, \w+\)")}[case]
    flag = {"flag": "--temperature", "rows": "--dataset"}[case]
    line = (
        f"train.py: {flag} {values[0]}: on rank 0 on {HERE}, but {values[1]} on rank 1 on {HERE}; "
    )
    assert re.search(f"^{line}", said, re.M) and "train.py:" not in other, (said, other)
    assert not (tmp_path / "out-0").exists() and not (tmp_path / "out-1").exists()


def test_nodes_with_other_weights_are_named(model_folder, plugin, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folders = [model_folder, other]
    more = ["--max_steps", 1, "--output_dir"]
    flags = [flags_for(f, plugin, *more, tmp_path / f"out-{f.name}") for f in folders]
    (status, said), (other_status, other) = ends_of(flags, tmp_path / "ranks")
    assert (status, other_status) == (2, 2), (said, other)
    weights = r"\(weights \w+\)"
    line = f"train.py: --model {weights}: on rank 0 on {HERE}, but {weights} on rank 1 on {HERE}; "
    assert re.search(f"^{line}", said, re.M), (said, other)
