"""几个进程一起训练：梯度、历史与一个进程的相同；有进程不来、被杀，都有说得清的结局。这里的进程是真的。"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from conftest import ROOT
from vaelab import cli
from vaelab.checkpoint import BEST, CHECKPOINT, HISTORY, load_checkpoint, load_model
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.files import LOCK
from vaelab.images import batches
from vaelab.plan import make_plan
from vaelab.processes import World, current_world, join, process_gpu
from vaelab.step import Objective
from vaelab.stepper import Stepper
from vaelab.using import PRIOR
from vanilla_vae import VanillaVAE

SMALL = "--count 120 --image-size 16 --hidden-dims 4,8 --latent-dim 3 --batch-size 16 --precision fp32".split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]

GRADIENTS = """
import sys, torch
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.plan import make_plan
from vaelab.processes import join
from vaelab.stepper import Stepper
from vanilla_vae import VanillaVAE
data = load("faces", image_size=16, count=40)
images = data.train[:8]
def one_step(world, weight):
    torch.manual_seed(0)
    model = VanillaVAE(3, 3, [4, 8], image_size=16)
    config = TrainConfig(batch_size=8, kld_weight=weight, precision="fp32")
    plan = make_plan(data, config, device="cpu")
    with Stepper(model, data, config, plan, world) as stepper:
        record = world.mean(stepper(images.chunk(world.size)[world.rank], 0, 0.0), False)[:4]
        if world.rank == 0:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch.save([record, gradients, list(model.buffers())], f"{sys.argv[1]}-{weight}")
with join("cpu") as world:
    for weight in (1e-3, "optimal"):
        one_step(world, weight)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**extra: str) -> dict:
    fixed = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # 有 GPU 也用 CPU
    return {**os.environ, **fixed, **extra}


def together(*arguments: object) -> subprocess.Popen:
    """torchrun 起两个进程训练。"""
    command = [*TORCHRUN, free_port(), ROOT / "vanilla_vae.py", "train", *SMALL, *arguments]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "encoding": "utf-8"}
    return subprocess.Popen([*map(str, command)], env=environment(), **both)


def alone(*arguments: object) -> None:
    """这个进程里训练。"""
    assert cli.main([*map(str, ["train", *SMALL, *arguments])]) == 0


def finished(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return output


def timeless(folder) -> list[list[float]]:
    rows = load_checkpoint(folder)["history"]
    return [[value for name, value in row.items() if name not in ("images_per_s", "seconds")] for row in rows]


def test_two_processes_give_the_gradients_of_one(tmp_path):
    """同一批图，两个进程各算一半（SyncBatchNorm、DDP、gloo）与一个进程算整批：梯度、记录、批归一化的统计量都相同。"""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS, encoding="utf-8")
    for start, name in (([*TORCHRUN, free_port()], "two"), ([sys.executable], "one")):
        done = subprocess.run([*start, script, tmp_path / name], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for weight in (1e-3, "optimal"):
        (record, gradients, buffers), expected = torch.load(tmp_path / f"two-{weight}"), torch.load(tmp_path / f"one-{weight}")
        torch.testing.assert_close(record, expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(buffers, expected[2], rtol=1e-6, atol=1e-6)
        assert max(g.abs().max() for g in gradients) > 1e-2
        torch.testing.assert_close(gradients, expected[1], rtol=1e-6, atol=1e-6)


def test_training_and_resuming_do_not_depend_on_the_number_of_processes(tmp_path):
    """两个进程走一轮，一个进程接着走到第二轮，与一个进程一口气走完的历史相同；只有一份进度与文件。"""
    output = finished(together("--epochs", 1, "--out", tmp_path / "mixed"))
    assert output.count("为什么这样跑：") == output.count("接下来可以试") == 1 and "2 个进程均分" in output
    pictures = {f"{name}.png" for name in ("history", "kl", "reconstructions", "samples")}
    assert {path.name for path in (tmp_path / "mixed").iterdir()} == {CHECKPOINT, BEST, HISTORY, PRIOR, LOCK, *pictures}
    (first,) = timeless(tmp_path / "mixed")
    alone("--epochs", 2, "--resume", "--out", tmp_path / "mixed")

    alone("--epochs", 1, "--out", tmp_path / "one")
    assert first == pytest.approx(timeless(tmp_path / "one")[0], rel=1e-5)
    alone("--epochs", 2, "--resume", "--out", tmp_path / "one")
    assert timeless(tmp_path / "mixed")[1] == pytest.approx(timeless(tmp_path / "one")[1], rel=1e-4)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows 没有 SIGKILL")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_with_a_loadable_checkpoint(tmp_path, victim):
    process = together("--epochs", 10_000, "--out", tmp_path)
    while process.poll() is None and not ((tmp_path / CHECKPOINT).exists() and load_checkpoint(tmp_path)["step"] >= 12):
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    os.kill(child(process.pid, victim), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(r"错误：第 \d+ 步时与别的进程失去了联系", output)
    if victim:
        assert "加 --resume 可接着训练" in output
    assert load_checkpoint(tmp_path)["step"] >= 12 and load_model(tmp_path).latent_dim == 3
    alone("--epochs", load_checkpoint(tmp_path)["step"] // 6 + 1, "--resume", "--out", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_and_saves(tmp_path, number):
    process = together("--epochs", 10_000, "--out", tmp_path)
    while process.poll() is None and not ((tmp_path / CHECKPOINT).exists() and load_checkpoint(tmp_path)["step"] >= 12):
        time.sleep(0.02)
    os.kill(child(process.pid, 1), number)
    output, _ = process.communicate(timeout=60)
    step = load_checkpoint(tmp_path)["step"]
    assert process.returncode != 0 and f"已停下，第 {step} 步的进度存好了" in output, output
    assert "失去了联系" not in output and "接下来可以试" not in output and "SIGABRT" not in output


def child(parent: int, rank: int) -> int:
    """torchrun 的第 ``rank`` 个子进程。"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("没有 /proc，找不到子进程")
    with open(f"/proc/{parent}/task/{parent}/children", encoding="ascii") as file:
        for pid in map(int, file.read().split()):
            with open(f"/proc/{pid}/environ", "rb") as variables:
                if f"LOCAL_RANK={rank}".encode() in variables.read().split(b"\0"):
                    return pid
    raise AssertionError("没有这个子进程")


@pytest.mark.parametrize("rank, complaint", [(0, "第 0 个等了 2 秒，没有到齐"), (1, "联系不上 127.0.0.1")])
def test_a_process_that_never_comes_is_named(rank, complaint, tmp_path):
    one_of_two = environment(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    command = [sys.executable, str(ROOT / "vanilla_vae.py"), "train", *SMALL, "--join-timeout", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=one_of_two, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 1 and complaint in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_what_cannot_be_shared_out_is_named(tmp_path):
    process = together("--batch-size", 15, "--out", tmp_path / "run")
    output = process.communicate()[0]
    assert process.returncode != 0 and "batch_size 应能由 2 个进程均分" in output and "请改用 16" in output
    assert "TrainingError" not in output and not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="这台机器有 1 块，却起了至少 2 个进程.*--nproc_per_node 1"):
        process_gpu(1, 1)
    assert [process_gpu(k, 2) for k in (0, 1)] == [0, 1]


def test_two_processes_walk_the_same_batches():
    images = load("faces", image_size=8, count=30).train
    walk = lambda shard: list(batches(images, 6, torch.Generator().manual_seed(0), shard=shard))
    whole, parts = walk((0, 1)), [walk((k, 3)) for k in range(3)]
    assert len(whole) == 4 and all(len(part) == 2 for part in parts[0])
    for step, batch in enumerate(whole):
        assert torch.equal(batch, torch.cat([part[step] for part in parts]))


def test_a_single_process_is_a_world_of_one():
    with join("cpu") as world:
        assert world == World(0, 1) == current_world()
        assert world.from_first(lambda: 3) == 3
        data, config = load("faces", image_size=8, count=10), TrainConfig(batch_size=2, precision="fp32")
        with Stepper(VanillaVAE(3, 2, [4], 8), data, config, make_plan(data, config, device="cpu"), world) as stepper:
            assert isinstance(stepper.objective, Objective)
