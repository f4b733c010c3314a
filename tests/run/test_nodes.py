"""Runs on several nodes: network namespaces with addresses and disks of their own; and what ends a run."""

import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT, read_metrics, run_train
from safetensors.torch import load_file, save_file

import dist

ADDRESSES = ("10.213.77.1", "10.213.77.2")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def flags_for(model_folder, plugin, *more):
    flags = f"--model {model_folder} --torch_dtype float32 --dataset arithmetic --external_plugins {plugin}"
    flags += " --reward_funcs vowels --num_generations 4 --per_device_train_batch_size 8 --max_completion_length 8"
    return [*flags.split(), "--learning_rate", "1e-3", *map(str, more)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def started(commands):
    """The commands, (words, changes of Popen's arguments) each, as processes; none outlives the block."""
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    processes = [
        subprocess.Popen(words, **pipes | {"env": ENVIRONMENT} | changes)
        for words, changes in commands
    ]
    try:
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.communicate(timeout=10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


# Two nodes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nodes():
    """Two network namespaces joined by a cable."""
    names = [f"grpo-{os.getpid()}-{side}" for side in "ab"]
    a, b = names
    commands = [
        f"netns add {a}",
        f"netns add {b}",
        f"link add cable netns {a} type veth peer name cable netns {b}",
    ]
    for name, address in zip(names, ADDRESSES):
        commands += [f"-n {name} addr add {address}/24 dev cable"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", "cable")]
    try:
        for command in commands:
            if (
                not shutil.which("ip")
                or subprocess.run(["ip", *command.split()], capture_output=True).returncode
            ):
                pytest.skip(
                    f"ip {command} failed: this test needs iproute2, and root that may add network namespaces"
                )
        yield names
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_node(nodes, disks, number, port, flags):
    """torchrun on a node with a disk, host name and resolver of its own."""
    (disks[number] / "hosts").write_text(
        f"127.0.0.1 localhost\n{ADDRESSES[number]} node-{number}\n"
    )
    setup = f"hostname node-{number} && mount --bind hosts /etc/hosts && mount --bind /dev/null /etc/resolv.conf"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--node_rank",
        str(number),
    ]
    torchrun += ["--master_addr", ADDRESSES[0], "--master_port", str(port), "--nproc_per_node", "1"]
    words = [
        "ip",
        "netns",
        "exec",
        nodes[number],
        "unshare",
        "--uts",
        "sh",
        "-c",
        f'{setup} && exec "$@"',
        "sh",
    ]
    return [*words, *torchrun, str(ROOT / "train.py"), *flags], {"cwd": disks[number]}


def processes_of(node):
    return subprocess.run(
        ["ip", "netns", "pids", node], capture_output=True, text=True
    ).stdout.split()


def test_a_node_that_is_cut_off_is_named_all_end_and_the_run_goes_on(
    nodes, model_folder, plugin, tmp_path
):
    disks = [tmp_path / "a", tmp_path / "b"]
    for disk in disks:
        disk.mkdir()
        shutil.copy(plugin, disk)
    flags = flags_for(
        model_folder,
        plugin.name,
        "--deepspeed",
        "zero2",
        "--save_steps",
        "2",
        "--node_timeout",
        "3",
    )
    commands = [on_node(nodes, disks, n, 29500, [*flags, "--max_steps", "100000"]) for n in (0, 1)]
    with started(commands) as processes:
        deadline = time.monotonic() + 60
        while not (disks[0] / "output" / "checkpoint-2").exists():
            assert time.monotonic() < deadline and processes[0].poll() is None, processes[
                0
            ].communicate()[0]
            time.sleep(0.1)
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "down"], check=True)
        outputs = [process.communicate(timeout=15)[0] for process in processes]
    subprocess.run(["ip", "-n", nodes[1], "link", "set", "cable", "up"], check=True)
    assert re.search(
        r"lost rank 1 on node-1: out of reach .* goes on from output/checkpoint-\d+", outputs[0]
    ), outputs
    assert re.search(
        r"lost rank 0 on node-0: out of reach .* goes on from rank 0's newest", outputs[1]
    ), outputs
    assert not processes_of(nodes[0]) and not processes_of(nodes[1])
    assert not (disks[1] / "output").exists()  # only rank 0 writes

    kept = sorted(int(p.name.split("-")[1]) for p in (disks[0] / "output").glob("checkpoint-*"))
    last = kept[-1] + 2
    flags += [
        "--max_steps",
        last,
        "--resume_from_checkpoint",
        "true",
        "--lr_scheduler_type",
        "constant",
    ]
    with started(on_node(nodes, disks, n, 29501, [*map(str, flags)]) for n in (0, 1)) as processes:
        outputs = [process.communicate(timeout=90)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = read_metrics(disks[0] / "output")
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    # The same from the same checkpoint in one process, which reads it all by itself.
    alone = tmp_path / "alone"
    shutil.copytree(disks[0] / "output", alone)
    shutil.rmtree(alone / f"checkpoint-{last}")
    batch = ["--per_device_train_batch_size", "16", "--output_dir", alone]
    run_train(*flags[:-6], *batch, *flags[-6:], "--external_plugins", plugin)
    for a, b in zip(lines[-2:], read_metrics(alone)[-2:], strict=True):
        for name in ("reward", "loss", "grad_norm", "completion_length", "num_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-5), name


# Ranks that do not fit together ---------------------------------------------------------------------------------


def ranks_of(commands, **changes):
    """A command for each rank, started by hand: plain environment variables, no torchrun."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(len(commands)),
    } | changes
    places = [{"RANK": str(rank), "GROUP_RANK": str(rank)} for rank in range(len(commands))]
    return [
        (words, {"env": ENVIRONMENT | common | place}) for words, place in zip(commands, places)
    ]


@pytest.mark.parametrize("case", ["flag", "rows"])
def test_ranks_with_other_flags_or_data_are_named_before_a_model_is_loaded(
    case, model_folder, plugin, tmp_path
):
    commands = []
    for rank in (0, 1):
        (tmp_path / f"{rank}.jsonl").write_text(
            "".join(f'{{"prompt": "{n}?"}}\n' for n in range(8 + rank))
        )
        changes = {
            "flag": ["--temperature", 0.7 + rank],
            "rows": ["--dataset", tmp_path / f"{rank}.jsonl"],
        }[case]
        flags = flags_for(
            model_folder, plugin, "--max_steps", 1, "--output_dir", tmp_path / str(rank), *changes
        )
        commands.append([sys.executable, str(ROOT / "train.py"), *flags])
    with started(ranks_of(commands)) as processes:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    values = {"flag": ("0.7", "1.7"), "rows": (r"\(8 rows, \w+\)", r"\(9 rows, \w+\)")}[case]
    flag = {"flag": "--temperature", "rows": "--dataset"}[case]
    here = socket.gethostname()
    expected = (
        f"train.py: {flag} {values[0]}: on rank 0 on {here}, but {values[1]} on rank 1 on {here}; "
    )
    assert re.search(f"^{expected}", outputs[0], re.M) and "train.py:" not in outputs[1], outputs
    assert not (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_nodes_with_other_weights_are_named(model_folder, plugin, tmp_path):
    other = shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    folders = [model_folder, other]
    flags = [
        flags_for(f, plugin, "--max_steps", 1, "--output_dir", tmp_path / f.name) for f in folders
    ]
    with started(
        ranks_of([[sys.executable, str(ROOT / "train.py"), *words] for words in flags])
    ) as processes:
        outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    here = socket.gethostname()
    expected = rf"train.py: --model \(weights \w+\): on rank 0 on {here}, but \(weights \w+\) on rank 1 on {here}; "
    assert re.search(f"^{expected}", outputs[0], re.M), outputs


# The watch ------------------------------------------------------------------------------------------------------

TIMEOUT = 1.0


def rank_of_a_run(case: str) -> None:
    """What each rank of the tests below does; run as a program."""

    def lost(line):
        print(line)
        os._exit(1)

    world = dist.find_world()
    meeting = 3.0 if case == "absent" else 30.0
    dist.Watch.PATIENCE = 2.0 if case == "late" else 15.0
    if case == "late" and world.rank == 2:
        time.sleep(4 * TIMEOUT + 1)
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.PrefixStore(
            "train/0", torch.distributed.TCPStore(*address, is_master=False)
        )
        port = int(store.get("watch").split()[0])
        socket.create_connection(
            ("127.0.0.1", port)
        ).close()  # a stranger, who looks for open ports
    try:
        watch = dist.start(world, TIMEOUT, lost, meeting)
    except ValueError as error:
        print(error)
        sys.exit(2)
    print("ready")
    if case == "busy" and world.rank == 1:
        ctypes.PyDLL(None).usleep(2_500_000)  # holds Python's lock, for less than 4 · TIMEOUT
    if case == "done" and world.rank == 2:
        time.sleep(3)  # the others have ended by then
    if case == "failed" and world.rank == 1:
        print("my own reason")
        watch.close()
        return
    if case == "busy":
        world.barrier()  # the others wait for it
    while case not in ("done", "busy", "late"):
        try:
            world.barrier()
        except RuntimeError:
            watch.defer()
            raise
    watch.close(watch.DONE)


@pytest.mark.parametrize(
    "case, expected",
    [
        ("killed", "lost rank 1 on HOST: its process has ended"),
        ("stopped", "lost rank 1 on HOST: no sign of life for 4 s"),
        ("failed", "lost rank 1 on HOST: it failed, and has told why"),
    ],
)
def test_every_rank_ends_with_the_name_of_the_one_that_is_lost(case, expected):
    with started(ranks_of([[sys.executable, __file__, case]] * 3)) as processes:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        if case != "failed":
            processes[1].send_signal({"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[case])
        for process in (processes[0], processes[2]):
            output, _ = process.communicate(timeout=15)
            assert process.returncode == 1 and output.count("lost") == 1, output
            assert expected.replace("HOST", socket.gethostname()) in output.splitlines()
            assert "Traceback" not in output


@pytest.mark.parametrize("case", ["done", "busy", "late"])
def test_a_rank_that_ends_early_holds_pythons_lock_or_comes_late_is_not_lost(case):
    with started(ranks_of([[sys.executable, __file__, case]] * 3)) as processes:
        for rank, process in enumerate(processes):
            output, _ = process.communicate(timeout=30)
            waits = "waiting for rank 2 of 3\n" if (case, rank) == ("late", 0) else ""
            assert (process.returncode, output) == (0, waits + "ready\n")


def test_ranks_that_never_come_and_a_port_in_use_are_one_line():
    with socket.create_server(("", 0)) as server:
        taken = ranks_of(
            [[sys.executable, __file__, "taken"]] * 2, MASTER_PORT=str(server.getsockname()[1])
        )[:1]
        absent = ranks_of([[sys.executable, __file__, "absent"]] * 3)
        unreached = ranks_of([[sys.executable, __file__, "absent"]] * 2)[1:]
        with started([*taken, *absent[:2], *unreached]) as processes:
            outputs = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    said = [[line for line in lines if line.startswith("--")] for lines in outputs]
    assert (
        "in use on this machine" in said[0][0]
        and "--nnodes: rank 2 of 3 did not come" in said[1][0]
    ), outputs
    assert "did not meet rank 0 there within 3 s" in said[3][0], outputs
    assert processes[2].returncode and "Traceback" not in str(outputs)


if __name__ == "__main__":
    rank_of_a_run(sys.argv[1])
