"""训练循环：与手写的循环一致，断了能续，坏输入不丢东西。"""

import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from conftest import ROOT
from vaelab import plan as plan_room
from vaelab import stepper
from vaelab.checkpoint import CHECKPOINT, HISTORY, load_checkpoint, load_model
from vaelab.config import TrainConfig, TrainingError
from vaelab.data import load
from vaelab.images import batches, to_float
from vaelab.interrupts import Terminated, terminated_by_signal
from vaelab.memory import out_of_memory
from vaelab.plan import COMPILE_STEPS, Plan, bf16_speedup, make_plan
from vaelab.processes import pick_device
from vaelab.step import (
    learning_rate,
    make_optimizer,
    optimal_weight,
    step_seed,
)
from vaelab.train import train
from vanilla_vae import VanillaVAE

CONFIG = TrainConfig(epochs=3, batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return load("faces", image_size=16, count=100)


def new_model(seed: int = 0, **kwargs) -> VanillaVAE:
    torch.manual_seed(seed)
    return VanillaVAE(**{"in_channels": 3, "latent_dim": 4, "hidden_dims": [8, 16], "image_size": 16, **kwargs})


def same_weights(a: VanillaVAE, b: VanillaVAE) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return all(torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- 循环本身


@pytest.mark.parametrize("weight", [1e-3, "optimal"])
def test_train_agrees_with_the_loop_written_out(data, weight):
    """另一份实现：最朴素的循环，NCHW、普通的 Adam、偏置也训练。"""
    config = replace(CONFIG, epochs=2, kld_weight=weight)
    model, plain = new_model(), new_model()
    history = train(model, data, config, device="cpu", progress=False)

    optimizer, step, losses = torch.optim.Adam(plain.parameters()), 0, []
    plain.train()
    for epoch in range(config.epochs):
        shuffle = torch.Generator().manual_seed(step_seed(config.seed, epoch))
        for images in batches(data.train, config.batch_size, shuffle):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 10, config.lr)
            torch.manual_seed(step_seed(config.seed, step))
            recons, x, mu, log_var = plain(to_float(images))
            mse = F.mse_loss(recons, x)
            w = 2 * mse.item() / x[0].numel() if weight == "optimal" else weight
            kld = (0.5 * (mu**2 + log_var.exp() - 1 - log_var)).sum(1).mean()
            optimizer.zero_grad()
            (mse + w * kld).backward()
            optimizer.step()
            step += 1
            losses.append((mse + w * kld).item())
    assert step == 10
    means = [sum(losses[:5]) / 5, sum(losses[5:]) / 5]
    assert [row["loss"] for row in history] == pytest.approx(means, rel=2e-3)


def test_training_beats_the_mean_image_and_leaves_the_model_usable(data):
    model = new_model()
    state = torch.get_rng_state()
    history = train(model, data, replace(CONFIG, epochs=60, lr=1e-2, kld_weight=1e-5), device="cpu", progress=False)
    x = to_float(data.test)
    baseline = F.mse_loss(to_float(data.train).mean(0, keepdim=True).expand_as(x), x).item()
    assert history[-1]["test_mse"] < 0.75 * baseline
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)  # 不动全局的随机状态


def test_bias_before_batch_norm_has_no_gradient():
    """不训练这些偏置的理由：float64 下它们的梯度是舍入误差，而权重的不是。"""
    model = new_model().double().train()
    x = torch.rand(8, 3, 16, 16, dtype=torch.float64) * 2 - 1
    model.loss_function(*model(x), M_N=0.1)["loss"].backward()
    trained = {id(p) for p in make_optimizer(model, 1e-3).param_groups[0]["params"]}
    skipped = [p for p in model.parameters() if id(p) not in trained]
    assert len(skipped) == 2 + 1 + 1
    assert all(p.grad.abs().max() < 1e-14 for p in skipped)
    assert min(p.grad.abs().max() for p in model.parameters() if id(p) in trained) > 1e-8


def test_optimal_weight_is_the_gradient_of_the_sigma_vae():
    """w = 2·MSE/D 时的梯度，等于 (2·MSE/D) 倍的 ∇[D/2·log MSE + KL]（arXiv:2006.13202）。"""
    torch.manual_seed(0)
    x, recons = torch.rand(4, 3, 8, 8).double(), torch.rand(4, 3, 8, 8).double().requires_grad_()
    mu = torch.randn(4, 2).double().requires_grad_()
    dim, kl = 192, lambda: 0.5 * (mu**2).sum(1).mean()
    weight = optimal_weight(recons, x)
    ours = torch.autograd.grad(F.mse_loss(recons, x) + weight * kl(), (recons, mu))
    bound = torch.autograd.grad(dim / 2 * F.mse_loss(recons, x).log() + kl(), (recons, mu))
    scale = 2 * F.mse_loss(recons, x).item() / dim
    for a, b in zip(ours, bound):
        torch.testing.assert_close(a, scale * b, rtol=1e-6, atol=0)


@given(total=st.integers(1, 10_000), peak=st.floats(1e-6, 1))
def test_learning_rate_rises_to_the_peak_then_falls(total, peak):
    rates = [learning_rate(step, total, peak) for step in range(total)]
    top = rates.index(max(rates))
    assert 0 < min(rates) and max(rates) == pytest.approx(peak)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(data, precision):
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("这个 CPU 没有 fp16 指令")
    runs = [train(new_model(), data, replace(CONFIG, precision=p), device="cpu", progress=False) for p in ("fp32", precision)]
    losses = [[row["loss"] for row in run] for run in runs]
    assert losses[0] != losses[1]  # 真的换了精度
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


# ---------------------------------------------------------------- 怎样跑


def test_plan_says_why_in_one_line_and_refuses_what_the_device_cannot_do(data):
    plan = make_plan(data, CONFIG, device="cpu")
    assert (plan.device.type, plan.precision, plan.compile, plan.cuda_graphs, plan.resident) == ("cpu", "fp32", False, False, False)
    why = plan.why()
    assert "\n" not in why and all(word in why for word in ("为什么这样跑", "cpu", "fp32（你指定的）", "不编译", "0.0691 MB 在内存里"))
    assert make_plan(data, replace(CONFIG, precision="auto"), device="cpu").precision in ("fp32", "bf16")
    for wrong, message in (
        ({"compile": "maybe"}, "compile 应为 auto、on、off 之一"),
        ({"data_on": "disk"}, "data_on 应为 auto、device、host 之一"),
        ({"cuda_graphs": "on"}, "cuda_graphs=on 要有 CUDA"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(data, CONFIG, device="cpu", **wrong)


def test_only_long_runs_compile_by_themselves_and_resuming_changes_nothing(data, monkeypatch):
    monkeypatch.setattr(plan_room, "bf16_speedup", lambda: 0.5)  # 现在选的话，是 fp32

    def plan(steps: int, **before: object) -> Plan:
        return make_plan(data, replace(CONFIG, precision="auto"), device="cpu", total_steps=steps, before=before or None)

    long, can = COMPILE_STEPS, make_plan(data, CONFIG, device="cpu", compile="on").compile
    assert not plan(long - 1).compile and f"只有 {long - 1} 步" in plan(long - 1).why()
    assert plan(long).compile == can
    kept = plan(long, device="cpu", precision="bf16", compile=False)
    assert (kept.precision, kept.compile) == ("bf16", False) and kept.why().count("与续训之前相同") == 2
    assert plan(1, device="cpu", precision="fp32", compile=True).compile == can
    elsewhere = plan(1, device="cuda", precision="bf16", compile=True)  # 换了设备，重新选
    assert (elsewhere.precision, elsewhere.compile) == ("fp32", False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    assert plan(1, device="cpu", precision="fp16", compile=False).precision == "fp32"  # 换到没有 fp16 的 CPU，重新选


def test_which_precision_is_faster_is_measured_without_touching_anything():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert 0.05 < bf16_speedup() < 20
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_compiled_training_gives_the_numbers_of_eager_training(data):
    if not make_plan(data, CONFIG, device="cpu", compile="on").compile:
        pytest.skip("这里没有能用的编译器")
    config = replace(CONFIG, epochs=1, kld_weight="optimal")
    eager, compiled = (train(new_model(), data, config, compile=c, device="cpu", progress=False)[0] for c in ("off", "on"))
    for key in ("loss", "mse", "kld", "kld_weight", "test_mse"):
        assert compiled[key] == pytest.approx(eager[key], rel=1e-3)


def test_without_a_compiler_training_goes_on_and_says_so(tmp_path):
    script = RUN_FOREVER.replace("progress=False", 'compile="on"')
    nowhere = {"CXX": "/nonexistent", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "run", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **nowhere}, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "不编译（想编译，这里没有能用的编译器：" in done.stdout
    assert load_checkpoint(tmp_path / "run")["step"] == 5


MEMORY = """
import resource, sys, psutil, torch
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.train import train
from vanilla_vae import VanillaVAE
data = load("faces", count=700)
torch.manual_seed(0)
model = VanillaVAE(3, 16, [16, 32, 64, 128])
now = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (now + 1_200_000_000,) * 2)
config = TrainConfig(epochs=1, batch_size=int(sys.argv[1]), precision="fp32")
train(model, data, config, sys.argv[2], device="cpu", progress=False)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="只有 Linux 真的按 RLIMIT_AS 限制内存")
def test_a_batch_that_does_not_fit_is_refused_and_the_named_one_works(tmp_path):
    def attempt(batch: int) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", MEMORY, str(batch), str(tmp_path / "run")]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, encoding="utf-8")

    refused = attempt(630)
    assert refused.returncode == 1 and "ValueError: batch_size 应使一步装得进内存，收到每个进程 630 张" in refused.stderr
    assert not (tmp_path / "run").exists()
    largest = int(re.search(r"减到 (\d+)。", refused.stderr)[1])
    assert 100 < largest < 600
    accepted = attempt(largest)
    assert accepted.returncode == 0, accepted.stderr


SHRINKING = """
import os, sys, time, torch
from PIL import Image
from vaelab.config import TrainConfig
from vaelab import stepper
from vaelab.data import load
from vaelab.train import train
from vanilla_vae import VanillaVAE
folder = sys.argv[1]
os.mkdir(folder)
for i in range(60):
    Image.new("RGB", (16, 16), (4 * i, 200 - 3 * i, i)).save(f"{folder}/{i}.png")
data = load(folder, image_size=16, cache_dir=folder + "-cache", progress=False)
path, size = data.mapped
steps, real = [], stepper.train_step
def shrink(*arguments):
    steps.append(1)
    if len(steps) == 5:
        time.sleep(0.3)  # 预取的那一批已经读好
        os.truncate(path, size // 2)
    return real(*arguments)
stepper.train_step = shrink
torch.manual_seed(0)
config = TrainConfig(epochs=9, batch_size=18, precision="fp32")
train(VanillaVAE(3, 2, [4], image_size=16), data, config, sys.argv[2], device="cpu", progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows 不让截短映射着的文件")
def test_a_memory_map_that_shrank_is_named_and_loses_nothing(tmp_path):
    command = [sys.executable, "-c", SHRINKING, str(tmp_path / "pictures"), str(tmp_path / "run")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1, done.stderr  # 不是 SIGBUS
    assert re.search(r"OSError: 解码缓存 .*应有 \d+ 字节，现在只有 \d+：它在使用中被改短了；请重新运行", done.stderr)
    assert load_checkpoint(tmp_path / "run")["step"] == 3  # 每轮 3 步，停在第 2 轮


def raised(error: BaseException, while_handling: BaseException | None = None) -> BaseException:
    try:
        try:
            raise while_handling or error
        except BaseException:
            raise error  # noqa: B904  要的正是隐含的上下文
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    "error, expected",
    [
        (raised(torch.OutOfMemoryError("CUDA out of memory")), True),
        (raised(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")), True),
        (raised(RuntimeError("capture failed"), torch.OutOfMemoryError("")), True),  # 录图时用尽
        (raised(RuntimeError("shape mismatch")), False),
    ],
    ids=str,
)
def test_running_out_of_memory_is_recognised_wherever_it_comes_from(error, expected):
    assert out_of_memory(error) is expected


# ---------------------------------------------------------------- 检查点、续训、被杀


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_resume_gives_the_numbers_of_an_unbroken_run(data, tmp_path, monkeypatch, number):
    """在一轮的中途按 Ctrl-C 或收到 SIGTERM（真的信号），续训之后权重逐位相同。"""
    whole = new_model()
    unbroken = train(whole, data, CONFIG, tmp_path / "a", device="cpu", progress=False)

    seen = []
    real = stepper.train_step
    monkeypatch.setattr(stepper, "train_step", lambda *a: (seen.append(1), len(seen) == 8 and signal.raise_signal(number), real(*a))[-1])
    part = new_model()
    with terminated_by_signal(), pytest.raises(Terminated if number == signal.SIGTERM else KeyboardInterrupt):
        train(part, data, CONFIG, tmp_path / "b", device="cpu", progress=False)
    saved = load_checkpoint(tmp_path / "b")
    assert len(saved["history"]) == 1 and saved["step"] == 8  # 每轮 5 步，停在第 2 轮中间
    assert not same_weights(whole, part)

    resumed = new_model(seed=99)
    history = train(resumed, data, CONFIG, tmp_path / "b", resume=True, device="cpu", progress=False)
    assert same_weights(whole, resumed)
    timeless = [[{k: v for k, v in row.items() if k not in ("images_per_s", "seconds")} for row in rows] for rows in (unbroken, history)]
    assert timeless[0] == timeless[1]
    assert (tmp_path / "b" / HISTORY).read_text(encoding="utf-8").count("\n") == 1 + CONFIG.epochs
    assert same_weights(load_model(tmp_path / "b" / CHECKPOINT), whole)


def test_resuming_keeps_the_precision_that_was_chosen(data, tmp_path, monkeypatch):
    """auto 每次现量；续训若量出另一个结果，也照旧，数才接得上。"""
    config = replace(CONFIG, epochs=1, precision="auto")
    monkeypatch.setattr(plan_room, "bf16_speedup", lambda: 2.0)
    train(new_model(), data, config, tmp_path, device="cpu", progress=False)
    chosen = load_checkpoint(tmp_path)["ran_on"]["precision"]
    monkeypatch.setattr(plan_room, "bf16_speedup", lambda: 0.5)
    assert make_plan(data, config, device="cpu").precision == "fp32"
    train(new_model(), data, replace(config, epochs=2), tmp_path, device="cpu", resume=True, progress=False)
    assert load_checkpoint(tmp_path)["ran_on"] == {"device": "cpu", "precision": chosen, "compile": False}


RUN_FOREVER = """
import sys, torch
torch.set_num_threads(1)
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.train import train
from vanilla_vae import VanillaVAE
torch.manual_seed(0)
model = VanillaVAE(3, 4, [8, 16], image_size=16)
config = TrainConfig(epochs=int(sys.argv[2]), batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")
train(model, load("faces", image_size=16, count=100), config, sys.argv[1], resume=len(sys.argv) > 3, device="cpu", progress=False)
"""


def run_script(*arguments: object) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", RUN_FOREVER, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows 没有 SIGKILL")
def test_killed_at_any_moment_leaves_a_checkpoint_that_continues_exactly(tmp_path):
    """反复 kill -9 又续训；每次被杀后检查点都可载入，最后与一气训完的逐位相同。"""
    epochs, out, steps = 60, tmp_path / "killed", []
    for attempt in range(3):
        process = run_script(out, epochs, *["resume"] * (attempt > 0))
        before = load_checkpoint(out)["step"] if attempt else 0
        while process.poll() is None and not ((out / CHECKPOINT).exists() and load_checkpoint(out)["step"] > before):
            time.sleep(0.01)
        time.sleep(0.02 + 0.013 * attempt)  # 落在写盘、训练、评价的不同时刻
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        steps.append(load_checkpoint(out)["step"])
        process.stderr.close()
    assert steps == sorted(steps) and steps[-1] < epochs * 5
    final = run_script(out, epochs, "resume")
    assert final.wait() == 0, final.stderr.read()
    final.stderr.close()
    assert not list(out.glob("*.tmp"))

    whole = new_model()
    train(whole, load("faces", image_size=16, count=100), replace(CONFIG, epochs=epochs), device="cpu", progress=False)
    assert same_weights(load_model(out / CHECKPOINT), whole)


def test_full_disk_keeps_the_last_good_checkpoint(data, tmp_path):
    resource = pytest.importorskip("resource", reason="只有 POSIX 能限制文件大小")
    train(new_model(), data, replace(CONFIG, epochs=1), tmp_path, device="cpu", progress=False)
    good = (tmp_path / CHECKPOINT).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, hard))
    try:
        with pytest.raises(TrainingError, match="腾出磁盘空间.*--resume"):
            train(new_model(), data, replace(CONFIG, epochs=2), tmp_path, resume=True, device="cpu", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / CHECKPOINT).read_bytes() == good
    assert not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- 坏输入


def test_diverging_loss_stops_with_step_cause_and_remedy(data, tmp_path):
    with pytest.raises(TrainingError, match=r"第 \d+ 步.*学习率 1e\+30 太大.*--resume"):
        train(new_model(), data, replace(CONFIG, lr=1e30), tmp_path, device="cpu", progress=False)
    state = load_checkpoint(tmp_path)["model"]
    assert all(value.isfinite().all() for value in state.values())


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_checkpoints_that_cannot_be_trusted_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    train(new_model(), data, replace(CONFIG, epochs=1), run, device="cpu", progress=False)
    whole = (run / CHECKPOINT).read_bytes()
    cases = {
        "missing": (None, FileNotFoundError, "没有检查点"),
        "empty": (b"", ValueError, "不完整"),
        "truncated": (whole[: len(whole) // 2], ValueError, "不完整"),
        "text": ("不是检查点".encode(), ValueError, "检查点"),
        "pickle": (pickle.dumps(Payload()), ValueError, "可执行"),
    }
    for name, (content, kind, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(kind, match=message):
            load_checkpoint(path)
    torch.save({"model": Payload()}, tmp_path / "zip")
    with pytest.raises(ValueError, match="可执行"):
        load_checkpoint(tmp_path / "zip")
    torch.save(new_model().state_dict(), tmp_path / "weights")
    with pytest.raises(ValueError, match="不是本项目写下的"):
        load_checkpoint(tmp_path / "weights")
    assert not (tmp_path / "executed").exists()


def test_resume_refuses_what_cannot_continue(data, tmp_path):
    config = replace(CONFIG, epochs=2)
    train(new_model(), data, config, tmp_path, device="cpu", progress=False)
    before = (tmp_path / CHECKPOINT).read_bytes()
    cases = [
        (new_model(latent_dim=5), config, "同样的结构"),
        (new_model(), replace(config, batch_size=8, epochs=9), "同样的批大小"),
        (new_model(), replace(config, epochs=1), "已走完 2 轮"),
        (new_model(), config, "已走完 2 轮"),
    ]
    for model, changed, message in cases:
        with pytest.raises(ValueError, match=message):
            train(model, data, changed, tmp_path, resume=True, device="cpu", progress=False)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    longer = train(new_model(), data, replace(config, epochs=3), tmp_path, resume=True, device="cpu", progress=False)
    assert [row["epoch"] for row in longer] == [1, 2, 3]


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0), ("batch_size", 1), ("lr", -1.0), ("lr", math.nan), ("lr", "快"), ("kld_weight", "大"),
        ("kld_weight", -1e-3), ("kld_weight", True), ("precision", "fp8"), ("seed", -1), ("seed", 0.5),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises((TypeError, ValueError), match=f"{field}.*收到"):
        TrainConfig(**{field: value})


def test_more_bad_input(data, tmp_path):
    with pytest.raises(ValueError, match="batch_size.*训练图数 90"):
        train(new_model(), data, replace(CONFIG, batch_size=91), device="cpu", progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="用不了设备 cuda.*cpu"):
            pick_device("cuda")
    with pytest.raises(ValueError, match="用不了设备"):
        pick_device("量子")
    with pytest.raises(ValueError, match="resume=True 时应给出 out"):
        train(new_model(), data, CONFIG, resume=True, device="cpu", progress=False)
    blocked = tmp_path / "文件"
    blocked.write_text("占着名字", encoding="utf-8")
    with pytest.raises(NotADirectoryError, match="结果文件夹应是文件夹"):
        train(new_model(), data, CONFIG, blocked, device="cpu", progress=False)
