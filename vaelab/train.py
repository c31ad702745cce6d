"""训练：一个读者能看懂的循环，以及让它快、让它断了能续、让几个进程一起跑的几样东西。

每一步的随机数只取决于种子与步数（:func:`step_seed`），每一轮的次序只取决于种子与轮数，
所以从检查点续训与一口气训完，几个进程与一个进程，走的是同样的路、得到同样的数（舍入除外）。
"""

from __future__ import annotations

import csv
import ctypes
import io
import math
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from tqdm.auto import tqdm

from vaelab.data import ImageSet, batches, to_float
from vaelab.evaluate import evaluate, optimal_kld_weight
from vanilla_vae import VanillaVAE, eval_mode, positive_int

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.csv"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
SWITCHES = ("auto", "on", "off")
PLACES = ("auto", "device", "host")
LOSSES = ("loss", "Reconstruction_Loss", "KLD", "kld_weight")  # 每一步记下的四个数
WARMUP = 0.1  # 学习率升到最高处所用的步数，占总步数的比例


@dataclass(frozen=True)
class TrainConfig:
    """训练的设置，随检查点保存。

    Attributes:
        epochs: 轮数；一轮是把训练集看一遍。
        batch_size: 批大小，≥ 2（批归一化要有可统计的量）；几个进程一起训练时是各进程之和。
        lr: 学习率的最高值；先线性升高，再按余弦降到 0。
        kld_weight: KL 的权重 w = 2σ²/D，或 ``"optimal"``：每一步取 σ² = 这一批的 MSE（arXiv:2006.13202）。
        seed: 次序、噪声的种子。
        precision: ``auto``、``fp32``，或自动混合精度的 ``bf16``、``fp16``（后者带损失缩放）。
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 3e-3
    kld_weight: float | str = 4e-4
    seed: int = 0
    precision: str = "auto"

    def __post_init__(self) -> None:
        positive_int("epochs", self.epochs)
        if positive_int("batch_size", self.batch_size) == 1:
            raise ValueError("batch_size 应至少为 2，收到 1：批归一化要在一批图之间统计均值与方差；请加大它。")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed 应为非负整数，收到 {self.seed!r}；请改为 0 或更大的整数。")
        if not (isinstance(self.lr, (int, float)) and math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr（学习率）应为正数，收到 {self.lr!r}；常用 0.0005 到 0.005。")
        number = isinstance(self.kld_weight, (int, float)) and not isinstance(self.kld_weight, bool)
        if self.kld_weight != "optimal" and not (number and math.isfinite(self.kld_weight) and self.kld_weight >= 0):
            raise ValueError(f"kld_weight 应为非负数或 optimal，收到 {self.kld_weight!r}；它的含义是 2σ²/D，例如 0.00025。")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision 应为 {'、'.join(PRECISIONS)} 之一，收到 {self.precision!r}。")


class TrainingError(RuntimeError):
    """训练不能继续；信息说明在哪一步、可能的原因与办法。"""


# ---------------------------------------------------------------- 循环


def train(
    model: VanillaVAE,
    data: ImageSet,
    config: TrainConfig,
    out: str | os.PathLike | None = None,
    *,
    device: str | torch.device = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
    data_on: str = "auto",
    sync_batch_norm: bool = True,
    resume: bool = False,
    extra: dict | None = None,
    progress: bool = True,
) -> list[dict]:
    """训练 ``model``（就地改动，结束时在 eval 模式），每一轮之后在测试集上评价，并存下检查点。

    按 Ctrl-C（或收到 SIGTERM）会在当前这一步之后停下：存一份精确到步的检查点，``resume=True`` 从那里接着走。
    在 :func:`join` 之内调用，几个进程就一起训练：各算每一批的一份，梯度取平均，只有第 0 个进程写文件。

    Args:
        model: 图像大小、通道数须与 ``data`` 相符。
        data: 训练与测试图像。
        config: 训练的设置。
        out: 存放 ``checkpoint.pt`` 与 ``history.csv`` 的文件夹；None 则什么也不存。
        device, compile, cuda_graphs, data_on: 怎样跑，见 :func:`make_plan`。
        sync_batch_norm: 几个进程时，批归一化是否在整批上统计；关掉就各算各的，快一点，数不再与一个进程相同。
        resume: 从 ``out`` 里的检查点接着训练，直到 ``config.epochs`` 轮；进程数可以与原来不同。
        extra: 一并存进检查点的设置（字典，只含数、字符串与列表），例如数据从哪里来。
        progress: 是否显示进度条，并先用一行说明这样跑的理由。

    Returns:
        每一轮一行的历史，列见 ``history.csv``。

    Raises:
        TrainingError: 损失不再是有限的数，检查点存不下，内存装不下一批，或与别的进程失去联系。
        ValueError: 设置与数据、与检查点不相符，或设备做不到所要求的。
    """
    world, device = current_world(), pick_device(device)
    if config.batch_size > len(data.train):
        raise ValueError(f"batch_size 应不大于训练图数 {len(data.train)}，收到 {config.batch_size}；请减小它。")
    if config.batch_size % world.size or (world.size > 1 and config.batch_size < 2 * world.size):
        nearest = max(2, round(config.batch_size / world.size)) * world.size
        raise ValueError(f"batch_size 应能由 {world.size} 个进程均分，每份至少 2 张，收到 {config.batch_size}；请改用 {nearest}。")
    steps_per_epoch = len(data.train) // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    saved = world.from_first(lambda: load_checkpoint(out)) if resume else None
    plan = make_plan(
        data, config, device=device, compile=compile, cuda_graphs=cuda_graphs, data_on=data_on,
        total_steps=total_steps, before=(saved or {}).get("ran_on"),
    )  # fmt: skip
    plan = world.from_first(lambda: plan).on(plan.device)
    show = progress and world.rank == 0
    if show:
        print(plan.why(), flush=True)

    optimizer = prepare(model, config, plan.device)
    memory, share = available_memory(plan.device), config.batch_size // world.size
    if plan.device.type == "cpu" and (refusal := _too_large(model, share, plan.precision, memory)):
        raise ValueError(refusal)  # 真的用尽时，系统会不声不响地结束进程，所以先算
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.precision == "fp16")
    run = _Run(model, optimizer, scaler, config, None if out is None or world.rank else Path(out), steps_per_epoch, extra or {})
    run.ran_on = {"device": plan.device.type, "precision": plan.precision, "compile": plan.compile}
    if saved:
        run.restore(saved)
    else:
        run.save()  # 从第一步之前起，任何时刻被杀都有可载入的检查点
    objective = prepared_objective(model, config, plan, world, sync_batch_norm)
    images_on_device = data.train.to(plan.device) if plan.resident else data.train
    noise = torch.Generator(plan.device)

    images_total, images_done = (n * config.batch_size for n in (total_steps, run.step))
    bar = tqdm(total=images_total, initial=images_done, unit="图", unit_scale=True, smoothing=0.1, disable=not show)
    with bar, _stop_on_signal() as stop_asked, _clear_errors(run, world, lambda: _too_large(model, share, plan.precision, memory)):
        stop = False
        while run.step < total_steps and not stop:
            epoch, done_in_epoch = divmod(run.step, steps_per_epoch)
            bar.set_description(f"第 {epoch + 1}/{config.epochs} 轮")
            shuffle = torch.Generator().manual_seed(step_seed(config.seed, epoch))
            started, started_at, pending = time.perf_counter(), run.step, None
            model.train()
            order = batches(images_on_device, config.batch_size, shuffle, shard=(world.rank, world.size))
            for images in ahead(islice(order, done_in_epoch, None), data, plan):
                shape = (config.batch_size, model.latent_dim)
                eps = torch.randn(shape, generator=noise.manual_seed(step_seed(config.seed, run.step)), device=plan.device)
                lr = learning_rate(run.step, total_steps, config.lr)
                record = train_step(objective, optimizer, scaler, images, eps.chunk(world.size)[world.rank], lr)
                run.step += 1
                # 看的是上一步：等它的几个数时，这一步已经在设备上排着，设备不会闲下来。
                stop = _read(pending, run, config) or (world.size == 1 and stop_asked())
                pending = (run.step, fetch_later(world.mean(record, stop_asked())))
                bar.update(config.batch_size)
                if stop:
                    break
                if run.step % 10 == 0:
                    bar.set_postfix_str(f"MSE {run.last[1]:.4f}，KL {run.last[2]:.1f}" if run.last else "", refresh=False)
            stop = _read(pending, run, config) or stop
            if run.step % steps_per_epoch == 0:
                seconds = time.perf_counter() - started
                speed = (run.step - started_at) * config.batch_size / seconds
                if world.rank == 0:
                    data.require_whole()
                    run.finish_epoch(evaluate(model, data.test, seed=config.seed), speed, seconds)
            run.save()
    optimizer.zero_grad(set_to_none=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    if world.size > 1:
        _swap_batch_norm(model, nn.BatchNorm2d)
    model.eval()
    return run.history


class Objective(nn.Module):
    """模型连同损失，一次前向：uint8 图像与噪声 → 损失各项。

    噪声从外面来，里面没有随机数，所以编译与否、一个还是几个进程，算的都是同一个函数。

    Args:
        model: 所训练的模型，是它的子模块。
        kld_weight: 见 :class:`TrainConfig`。
        precision: ``fp32``、``bf16`` 或 ``fp16``；损失总是 float32。
    """

    AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def __init__(self, model: VanillaVAE, kld_weight: float | str, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.optimal, self.dtype = model, kld_weight == "optimal", self.AUTOCAST.get(precision)
        self.processes = current_world().size
        weight = torch.tensor(0.0 if self.optimal else float(kld_weight))
        self.register_buffer("fixed_weight", weight.to(model.fc_mu.weight.device), persistent=False)

    def forward(self, images: Tensor, eps: Tensor) -> dict[str, Tensor]:
        """uint8 ``[B, C, H, W]`` 与标准正态噪声 ``[B, L]`` → 零维张量的字典，键见 ``LOSSES``；只有 ``loss`` 带梯度。"""
        x = to_float(images).contiguous(memory_format=memory_layout(images.device))
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            mu, log_var = self.model.encode(x)
            z = mu + torch.exp(0.5 * log_var) * eps  # 即 model.reparameterize
            recons = self.model.decode(z)
        weight = optimal_weight(recons, x, self.processes) if self.optimal else self.fixed_weight
        return {**self.model.loss_function(recons, x, mu, log_var, M_N=weight), "kld_weight": weight}


def optimal_weight(recons: Tensor, x: Tensor, processes: int = 1) -> Tensor:
    """KL 的权重 2σ²/D，σ² 取整批（几个进程合起来）的 MSE：零维张量，不回传梯度（arXiv:2006.13202）。"""
    mse = F.mse_loss(recons.detach().to(x.dtype), x)
    if processes > 1:
        dist.all_reduce(mse)
        mse = mse / processes
    return optimal_kld_weight(mse, x[0].numel())


def prepare(model: VanillaVAE, config: TrainConfig, device: torch.device) -> torch.optim.Adam:
    """把模型搬到 ``device``，排成训练最快的样子，并配好优化器。"""
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device, memory_format=memory_layout(device)).train()
    return make_optimizer(model, config.lr)


def memory_layout(device: torch.device) -> torch.memory_format:
    """卷积更快的内存排列：channels_last；MPS 上用通常的排列。

    MPS 的批归一化收到 channels_last 时，梯度会悄悄算错或直接崩溃（pytorch/pytorch#175189）。
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    eps: Tensor,
    lr: float,
) -> Tensor:
    """一步训练：uint8 ``[B, C, H, W]`` 与噪声 ``[B, L]`` → 这一步的 ``[loss, MSE, KL, w]``，留在设备上。"""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)  # 先于前向：CUDA 图重放时，上一步的梯度所在的内存要拿来再用
    # MPS 上 non_blocking 会读到已经放掉的内存，数悄悄就错了（pytorch/pytorch#189690），所以只在 CUDA 上用
    images = images.to(eps.device, non_blocking=eps.device.type == "cuda")
    losses = objective(images, eps)
    scaler.scale(losses["loss"]).backward()  # 只有 fp16 真的缩放，免得小的梯度下溢成 0
    scaler.step(optimizer)
    scaler.update()
    return torch.stack([losses[name].detach() for name in LOSSES])


def ahead(order: Iterator[Tensor], data: ImageSet, plan: Plan) -> Iterator[Tensor]:
    """要搬运的数据由另一个线程先取好一批，放在锁页内存里；已在设备上、或在 CPU 的内存里的，原样给出。"""
    if plan.resident or (plan.device.type != "cuda" and data.mapped is None):
        yield from order
        return

    def fetch() -> Tensor | None:
        data.require_whole()
        images = next(order, None)
        return images.pin_memory() if images is not None and plan.device.type == "cuda" else images

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch)
        while (images := waiting.result()) is not None:
            waiting = pool.submit(fetch)
            yield images


def step_seed(seed: int, index: int) -> int:
    """第 ``index`` 步（或轮）的种子：相邻的步、相邻的种子都不相撞。"""
    return (seed * 1_000_003 + index) % 2**31


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """第 ``step`` 步（从 0 数）的学习率：前一成线性升到 ``peak``，其余按余弦降到 0。"""
    warmup = max(1, int(total_steps * WARMUP))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam，不含紧跟着批归一化的卷积偏置：批归一化减去均值，偏置的梯度恒为 0，不必算。"""
    frozen = set()
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for layer, following in zip(block, block[1:]):
                if isinstance(following, nn.BatchNorm2d) and getattr(layer, "bias", None) is not None:
                    frozen.add(layer.bias)
    for parameter in frozen:
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr, fused=trained[0].device.type in ("cpu", "cuda"))


def fetch_later(record: Tensor) -> Callable[[], list[float]]:
    """开始把设备上的几个数取回来；返回的函数等它们到齐，而不等排在后面的计算。

    CUDA 上直接 ``.item()`` 要等当前队列里的一切，包括刚排上的下一步；记一个事件，就只等到事件为止。
    """
    if record.device.type != "cuda":
        return record.tolist
    numbers = torch.empty(record.shape, dtype=record.dtype, pin_memory=True).copy_(record, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(record.device))
    return lambda: arrived.synchronize() or numbers.tolist()


def _read(pending: tuple[int, Callable[[], list[float]]] | None, run: _Run, config: TrainConfig) -> bool:
    """取回一步的结果：不是有限的数就报错，否则累计；返回是否有进程要求停下。"""
    if pending is None:
        return False
    step, fetched = pending[0], pending[1]()
    values = run.last = fetched[: len(LOSSES)]
    if math.isfinite(values[0]):
        run.add(values)
        return any(fetched[len(LOSSES) :])
    saved = "" if run.path is None else "上一轮的检查点完好，减小 --lr 后可加 --resume 接着训练；"
    raise TrainingError(
        f"第 {step} 步的损失不再是有限的数（MSE {values[1]:.3g}，KL {values[2]:.3g}）：多半是学习率 "
        f"{config.lr:g} 太大；{saved}也可以先试 lr = {config.lr / 4:g}。"
    )


@contextmanager
def _stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Ctrl-C（SIGINT）与 SIGTERM 只记下来，由循环在一步走完之后停下；再按一次 Ctrl-C 立即中断。只有主线程能装信号处理。"""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def handler(signum: int, frame: object) -> None:
        if requested.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        requested.set()

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested.is_set
    except BaseException:
        if current_world().size > 1:  # torchrun 看见有进程死了，就向其余的发 SIGTERM；不理它，才来得及说出原因
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _clear_errors(run: _Run, world: World, too_large: Callable[[], str | None]) -> Iterator[None]:
    """把内存不够、进程失联这两种来自深处的错误，换成说得清的一句话。"""
    try:
        yield
    except RuntimeError as error:
        saved = "" if run.path is None else f"检查点停在第 {run.saved_step} 步，加 --resume 可接着训练。"
        if _out_of_memory(error):
            what = None
            with suppress(RuntimeError):  # 估算也要一点内存，可能连它也没有
                what = too_large()
            raise TrainingError((what or "内存装不下这一批；请减小 --batch-size。") + saved) from error
        if world.size > 1 and not isinstance(error, TrainingError):
            reason = re.sub(r"^\[\S*\] *", "", str(error).splitlines()[0])[:120]  # 去掉 gloo 的源码位置
            raise TrainingError(
                f"第 {run.step + 1} 步时与别的进程失去了联系（{reason}）：多半有一个进程已经退出，请看它的错误，"
                f"再重新启动，进程数可以不同。{saved}"
            ) from error
        raise


def _out_of_memory(error: BaseException | None) -> bool:
    """是不是内存用尽：可能来自分配器、cuDNN 或 cuBLAS，也可能藏在录 CUDA 图的错误后面。"""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or re.search("DefaultCPUAllocator|out of memory|ALLOC_FAILED", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------- 检查点与历史


class _Run:
    """一次训练的进度：走到第几步、这一轮的累计、历史，以及它们与磁盘之间的来往。"""

    FORMAT = 1

    def __init__(self, model, optimizer, scaler, config: TrainConfig, path: Path | None, steps_per_epoch: int, extra: dict):
        self.model, self.optimizer, self.scaler, self.config, self.extra = model, optimizer, scaler, config, extra
        self.path, self.steps_per_epoch = path, steps_per_epoch
        self.step, self.saved_step, self.history, self.sums = 0, 0, [], dict.fromkeys(LOSSES, 0.0)
        self.last: list[float] | None = None  # 最近取回的一步
        self.ran_on: dict[str, str | bool] = {}  # 设备、精度、编译与否；续训时自动选的照旧

    def add(self, values: list[float]) -> None:
        """累计一步的四个数，次序见 ``LOSSES``。"""
        for name, value in zip(LOSSES, values):
            self.sums[name] += value

    def finish_epoch(self, test, images_per_s: float, seconds: float) -> None:
        mean = {name: total / self.steps_per_epoch for name, total in self.sums.items()}
        self.sums = dict.fromkeys(LOSSES, 0.0)
        self.history.append(
            {
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "loss": mean["loss"],
                "mse": mean["Reconstruction_Loss"],
                "kld": mean["KLD"],
                "kld_weight": float(f"{mean['kld_weight']:.6g}"),
                "test_mse": test.mse,
                "test_kld": test.kld,
                "test_elbo": test.elbo,
                "test_bits_per_dim": test.bits_per_dim,
                "images_per_s": round(images_per_s, 1),
                "seconds": round(seconds, 2),
            }
        )

    def save(self) -> None:
        """检查点先写在旁边，写全后改名就位；历史随检查点走，CSV 由它写出。"""
        if self.path is None:
            return
        state = {
            "format": self.FORMAT,
            "model_args": model_args(self.model),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": asdict(self.config),
            "extra": self.extra,
            "steps_per_epoch": self.steps_per_epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "ran_on": self.ran_on,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CHECKPOINT, lambda file: torch.save(state, file))
            write_atomically(self.path / HISTORY, lambda file: file.write(_as_csv(self.history).encode("utf-8")))
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"第 {self.step} 步的检查点写不进 {self.path}（{error}）；请腾出磁盘空间或检查权限，"
                "再加 --resume 从上一份完好的检查点接着训练。"
            ) from error
        self.saved_step = self.step

    def restore(self, state: dict) -> None:
        if state["model_args"] != model_args(self.model):
            raise ValueError(
                f"检查点里的模型是 {state['model_args']}，这次给的是 {model_args(self.model)}；"
                "续训须用同样的结构，请改回原来的参数，或换一个 --out 重新训练。"
            )
        old, done = state["config"], state["step"] / state["steps_per_epoch"]
        if state["steps_per_epoch"] != self.steps_per_epoch or old["batch_size"] != self.config.batch_size:
            raise ValueError(
                f"检查点每轮 {state['steps_per_epoch']} 步、批大小 {old['batch_size']}，这次是 {self.steps_per_epoch} 步、"
                f"{self.config.batch_size}；续训须用同样的数据与批大小，请改回原来的参数。"
            )
        if done >= self.config.epochs:
            raise ValueError(
                f"这次训练已走完 {done:g} 轮，要求的是 {self.config.epochs} 轮，没有可续的；"
                f"请把 --epochs 设为大于 {math.floor(done)} 的数。"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "scaler" in state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.sums = state["step"], state["history"], dict(state["sums"])


def model_args(model: VanillaVAE) -> dict:
    """重建这个模型所需的构造参数。"""
    return {
        "in_channels": model.in_channels,
        "latent_dim": model.latent_dim,
        "hidden_dims": list(model.hidden_dims),
        "image_size": model.image_size,
    }


def load_checkpoint(path: str | os.PathLike) -> dict:
    """读检查点（文件，或含 ``checkpoint.pt`` 的文件夹）到 CPU；只收张量与普通的值，不执行其中的代码。

    Raises:
        FileNotFoundError: 没有检查点。
        ValueError: 不完整、含有代码，或不是本项目写下的。
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"没有检查点 {path}；请给出训练过的文件夹，或先用 train 训练一次。")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 不是检查点的文件，错误由下面说清，不必再警告
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":
            raise ValueError(f"{path} 里除张量外还有可执行的内容，为安全起见不载入；请只用可信的、本项目写下的检查点。") from error
        raise ValueError(f"{path} 不是检查点；请给出由 train 写下的 {CHECKPOINT}。") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} 不完整或不是检查点；请换一份，或重新训练。") from error
    wanted = {"format", "model_args", "model", "optimizer", "config", "extra", "step", "steps_per_epoch", "history"}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["format"] != _Run.FORMAT:
        raise ValueError(f"{path} 不是本项目写下的检查点；若是别处的权重，请自建 VanillaVAE 再 load_state_dict。")
    return state


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> VanillaVAE:
    """由检查点重建模型，置于 eval 模式。参数与错误同 :func:`load_checkpoint`。"""
    state = load_checkpoint(path)
    model = VanillaVAE(**state["model_args"])
    model.load_state_dict(state["model"])
    return model.to(pick_device(device)).eval()


def write_atomically(path: Path, write) -> None:
    """``write(file)`` 写二进制文件：写在旁边、落盘、改名就位；中途死掉，原来的文件不受影响。"""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _as_csv(history: list[dict]) -> str:
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue()


# ---------------------------------------------------------------- 怎样跑：设备、精度、编译、数据放哪里


@dataclass(frozen=True)
class Plan:
    """这一次怎样跑，以及每一项的理由。

    Attributes:
        device: 在哪里算。
        precision: ``fp32``、``bf16`` 或 ``fp16``。
        compile: 是否用 ``torch.compile``。
        cuda_graphs: 是否把一步的全部核函数录成一张图重放。
        resident: 训练集是否整个放在设备上。
        reasons: 各项的理由，依次是设备、精度、编译、数据。
    """

    device: torch.device
    precision: str
    compile: bool
    cuda_graphs: bool
    resident: bool
    reasons: tuple[str, ...]

    def why(self) -> str:
        """一行话：这样跑，以及为什么。"""
        return "为什么这样跑：" + "；".join(self.reasons)

    def on(self, device: torch.device) -> Plan:
        """同样的安排，换成这个进程自己的设备。"""
        return replace(self, device=device)


OVERHEAD = 250_000_000  # 卷积库的代码与工作区，字节；CPU 上量得约 180 MB
COMPILE_STEPS = 10_000  # 少于这么多步就不编译：两个 CPU 核上编译要半分钟，每步省 4 到 14 毫秒，2000 到 7000 步才抵得回来；GPU 上还没有量过


def make_plan(
    data: ImageSet,
    config: TrainConfig,
    *,
    device: str | torch.device = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
    data_on: str = "auto",
    total_steps: int = 0,
    before: dict | None = None,
) -> Plan:
    """按机器与任务的大小决定怎样跑；每一项都可以指定。

    Args:
        data, config: 训练的数据与设置。
        device: ``auto`` 依次选 cuda、mps、cpu。
        compile, cuda_graphs: ``auto``、``on`` 或 ``off``。没有编译器时退回不编译，理由里会说。
        data_on: ``device`` 把训练集整个放到设备上，``host`` 逐批搬运，``auto`` 看放不放得下。
        total_steps: 一共要走多少步；不到 ``COMPILE_STEPS`` 步，``auto`` 不编译。
        before: 续训时，检查点里记着的 ``ran_on``：在同一种设备上，``auto`` 照旧，不重新选，数才接得上。

    Raises:
        ValueError: 选项不认得，或设备做不到。
    """
    for name, value, known in (("compile", compile, SWITCHES), ("cuda_graphs", cuda_graphs, SWITCHES), ("data_on", data_on, PLACES)):
        if value not in known:
            raise ValueError(f"{name} 应为 {'、'.join(known)} 之一，收到 {value!r}。")
    device = pick_device(device)
    on_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} 线程" if device.type == "cpu" else ""
    before = before if before and before["device"] == device.type else {}
    precision, why_precision = _choose_precision(config.precision, device, before.get("precision"))
    use_compile, why_compile = _choose_compile(compile, device, total_steps, before.get("compile"))
    can_graph = on_cuda and use_compile and current_world().size == 1
    if cuda_graphs == "on" and not can_graph:
        raise ValueError("cuda_graphs=on 要有 CUDA 设备，要编译（compile=on），而且只有一个进程；请改为 auto，或补上所缺的。")
    use_graphs = cuda_graphs != "off" and can_graph
    if use_graphs:
        why_compile += "，一步录成一张 CUDA 图"
    resident, why_data = _choose_place(data_on, data, device)
    reasons = (f"{device.type}" + f"（{where}）" * bool(where), why_precision, why_compile, why_data)
    return Plan(device, precision, use_compile, use_graphs, resident, reasons)


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` 依次选 cuda、mps、cpu；指名的设备须真在。几个进程时，每个进程用自己的那一块 GPU。"""
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{process_gpu(int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count())}"
    if str(device) == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() and current_world().size == 1 else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # 流、事件、通信都以它为准
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"用不了设备 {device}；这台机器上有 {'、'.join(have)}，请改用其中之一或 auto。") from error
    return chosen


def process_gpu(local_rank: int, gpus: int) -> int:
    """本机第 ``local_rank`` 个进程用第几块 GPU；进程比 GPU 多就报 ValueError。"""
    if local_rank >= gpus:
        raise ValueError(f"每个进程应有自己的 GPU，这台机器有 {gpus} 块，却起了至少 {local_rank + 1} 个进程；请用 --nproc_per_node {gpus}，或加 --device cpu。")
    return local_rank


def _choose_precision(precision: str, device: torch.device, before: str | None = None) -> tuple[str, str]:
    if precision == "auto" and before:
        with suppress(ValueError):  # 换到了没有这种精度的硬件上，就重新选
            _choose_precision(before, device)
            return before, f"{before}（与续训之前相同）"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not native:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"bf16 应有硬件支持，{name} 没有；请改用 --precision fp16、fp32 或 auto。")
        if precision == "auto" and native:
            return "bf16", "bf16（硬件原生支持）"
        if precision == "auto" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "fp16 加损失缩放（有张量核心而没有 bf16）"
    if device.type == "cpu":
        supported = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(), "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported()}
        if precision == "fp16" and not supported["fp16"]:
            raise ValueError("fp16 应有硬件支持，这个 CPU 没有；请改用 --precision bf16、fp32 或 auto。")
        if precision == "bf16" and not supported["bf16"]:
            return "bf16", "bf16（你指定的；这个 CPU 没有 bf16 指令，由软件模拟，会慢）"
        if precision == "auto" and supported["bf16"]:
            # 有指令不等于更快（要看有没有 AMX 一类的矩阵单元），所以各算一层卷积，量出来再定。
            ratio = _bf16_speedup()
            return ("bf16" if ratio > 1.2 else "fp32"), f"{'bf16' if ratio > 1.2 else 'fp32'}（量得一层卷积用 bf16 的速度是 fp32 的 {ratio:.1f} 倍）"
    if precision == "auto":
        return "fp32", "fp32（这个设备上没有更快的精度）"
    return precision, f"{precision}（你指定的）"


def _bf16_speedup() -> float:
    """一层有代表性的卷积，前向加反向，bf16 的速度是 float32 的几倍：两边交错着走，各取最快的一次。

    只用一个线程，计这个线程自己的 CPU 时间：机器正忙时量出来也一样，选择才不会时此时彼。
    """
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = []
        for dtype in fastest:
            x, weight = (
                torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
                for shape in ((32, 64, 16, 16), (128, 64, 3, 3))
            )
            works.append((dtype, x, weight))
        for _ in range(8):
            for dtype, x, weight in works:
                started = time.thread_time()
                F.conv2d(x, weight, stride=2, padding=1).sum().backward()
                fastest[dtype] = min(fastest[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def _choose_compile(compile: str, device: torch.device, total_steps: int, before: bool | None = None) -> tuple[bool, str]:
    if compile == "off":
        return False, "不编译（你指定的）"
    why = "你指定的"
    if compile == "auto":
        if device.type not in ("cpu", "cuda"):
            return False, "不编译"
        if before is not None:
            wanted, why = before, "与续训之前相同"
        elif wanted := total_steps >= COMPILE_STEPS:
            why = f"{total_steps} 步，抵得回编译的时间"
        else:
            why = f"只有 {total_steps} 步，抵不回编译的时间"
        if not wanted:
            return False, f"不编译（{why}）"
    try:
        torch.compile(_fused_probe)(torch.ones(8, device=device))
    except Exception as error:  # 没有编译器、没有 triton……各后端抛出的类型不一
        reason = str(error).strip().splitlines()[0][:100]
        return False, f"不编译（想编译，这里没有能用的编译器：{reason}）"
    return True, f"编译（{why}）"


def _fused_probe(x: Tensor) -> Tensor:
    return torch.relu(2 * x + 1)


def _choose_place(data_on: str, data: ImageSet, device: torch.device) -> tuple[bool, str]:
    size = f"{data.train.numel() / 1e6:.3g} MB"
    at_rest = "在内存里" if data.mapped is None else "在内存映射的文件里"
    if device.type == "cpu":
        return False, f"数据 {size} {at_rest}"
    if data_on == "auto" and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        data_on = "device" if data.train.numel() < free / 2 else "host"
        return data_on == "device", f"数据 {size} {'整个放在显存里' if data_on == 'device' else at_rest + '，逐批搬运'}（显存空着 {free / 1e6:.0f} MB）"
    return data_on == "device", f"数据 {size} {'整个放在设备上' if data_on == 'device' else at_rest + '，逐批搬运'}"


def step_memory(model: VanillaVAE, precision: str = "fp32") -> tuple[int, int]:
    """训练所需的内存，字节：``(固定的, 每张图的)``。

    固定的是参数、梯度与 Adam 的两份统计；每张图的由两次小的前向量出：自动求导存下的张量随批大小增加多少，
    再加反向时同时活着的、与最大的激活同大的五份（在 CPU 上对两种宽度、两种批大小量得）。
    """
    parameters = {p.data_ptr() for p in model.parameters()}
    objective, stored = Objective(model, 0.0, precision), []
    for batch in (2, 4):
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict = saved) -> Tensor:
            if tensor.data_ptr() not in parameters:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        device = model.fc_mu.weight.device
        images = torch.zeros(batch, model.in_channels, model.image_size, model.image_size, dtype=torch.uint8, device=device)
        with eval_mode(model), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = objective(images, torch.zeros(batch, model.latent_dim, device=device))["loss"]
        stored.append(sum(saved.values()))
        del loss
    largest = model.hidden_dims[0] * model.image_size**2 * (4 if precision == "fp32" else 2)  # 最后一级的激活
    fixed = 4 * 4 * sum(p.numel() for p in model.parameters())
    return fixed, (stored[1] - stored[0]) // 2 + 5 * largest


def available_memory(device: torch.device) -> int:
    """还能用的内存，字节：GPU 上是整块显存，CPU 上是此刻空着的，并且不超过给这个进程的限额。"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    free = psutil.virtual_memory().available
    try:
        import resource
    except ImportError:  # Windows 没有这种限额
        return free
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if soft == resource.RLIM_INFINITY else min(free, soft - psutil.Process().memory_info().vms)


def _too_large(model: VanillaVAE, batch: int, precision: str, memory: int) -> str | None:
    """``memory`` 字节里装不下 ``batch`` 张图的一步时的话，含装得下的最大的批；装得下则是 None。"""
    fixed, each = step_memory(model, precision)
    need = fixed + OVERHEAD + batch * each
    if need <= memory:
        return None
    fits = int(0.95 * memory - fixed - OVERHEAD) // each  # 留一点余地：空着的内存时多时少
    remedy = f"请把 --batch-size 减到 {fits}" if fits >= 2 else "请减小 --image-size 或 --hidden-dims"
    return f"batch_size 应使一步装得进内存，收到每个进程 {batch} 张，约需 {need / 1e6:.0f} MB，能用的有 {memory / 1e6:.0f} MB；{remedy}。"


def keep_freed_memory() -> bool:
    """让 glibc 把释放的内存留着再用；返回是否生效（只在 Linux 的 glibc 上）。

    默认情况下每一步的激活用完即还给系统，下一步再要来时逐页清零，约占训练时间的三成。
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl 没有 mallopt
        return False
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


# ---------------------------------------------------------------- 几个进程

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """一起训练的进程：我是第 ``rank`` 个（从 0 数），一共 ``size`` 个。只有一个进程时是 ``World(0, 1)``。"""

    rank: int = 0
    size: int = 1

    def mean(self, record: Tensor, stop: bool) -> Tensor:
        """各进程的记录取平均，末尾添上要求停下的比例；大家由此看到同样的数，作同样的决定。"""
        if self.size == 1:
            return record
        message = F.pad(record, (0, 1), value=float(stop))  # 不另建张量：从 CPU 拷一个数会让 CUDA 的队列停下
        dist.all_reduce(message)
        return message / self.size

    def from_first(self, compute: Callable[[], T]) -> T:
        """第 0 个进程算出来，别的进程照抄；它若出错，别的进程安静地退出，由它说明。"""
        if self.size == 1:
            return compute()
        answer: list = [None, False]
        if self.rank == 0:
            try:
                answer = [compute(), True]
            except BaseException:
                dist.broadcast_object_list(answer)
                raise
        dist.broadcast_object_list(answer)
        if not answer[1]:
            raise SystemExit(1)
        return answer[0]

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """这一段由每台机器的第 0 个进程先走完，本机其余的再走；先走的出了错，后面的不再走。"""
        ahead = int(os.environ.get("LOCAL_RANK", 0)) == 0
        if self.size > 1 and not ahead:
            try:
                dist.barrier()
            except RuntimeError as error:  # 先走的已经说明原因，退出了
                raise SystemExit(1) from error
        yield
        if self.size > 1 and ahead:
            dist.barrier()


def current_world() -> World:
    """由 :func:`join` 加入的进程们；没有加入就只有自己。"""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


@contextmanager
def join(device: str = "auto", timeout: float = 300.0) -> Iterator[World]:
    """与 torchrun 起的其余进程会合，离开时散开；不是由 torchrun 起的，就什么也不做。

    GPU 之间用 NCCL，CPU 之间用 gloo。

    Args:
        device: 同 :func:`pick_device`。
        timeout: 等其余进程到齐，最多多少秒。

    Raises:
        TrainingError: 有进程没有来。
        ValueError: 进程比 GPU 多。
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or not dist.is_available() or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield World()
        return
    chosen = pick_device(device)
    rank = int(os.environ["RANK"])
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=timeout)))
        store = dist.PrefixStore("vaelab", store)
        store.add("arrived", 1)
        deadline = time.monotonic() + timeout
        while store.add("arrived", 0) < size:
            if time.monotonic() > deadline:
                raise dist.DistStoreError("没有到齐")
            time.sleep(0.05)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        own = chosen if chosen.type == "cuda" else None
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=1), device_id=own)
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        missing = "没有到齐" if rank == 0 else f"没有等到，或联系不上 {address} 上的第 0 个进程"
        raise TrainingError(
            f"应有 {size} 个进程，第 {rank} 个等了 {timeout:g} 秒，{missing}；请在每台机器上运行同样的 torchrun 命令，检查地址与端口，或减少进程数。"
        ) from error
    try:
        yield World(rank, size)
        dist.barrier()  # 等大家都做完再散，先走的不至于让还在通信的断线
        # DDP 用过的 gloo，散开之后线程还在：手里最后一件活要拿到 GIL 才放得下。解释器恰在此时退出，进程会中止（SIGABRT）；
        # 等一下，让它放下。
        time.sleep(0.2)
    finally:
        dist.destroy_process_group()


class _SumOverProcesses(torch.autograd.Function):
    """各进程的张量相加。每个进程的和都用到了每个进程的那一份，所以反向时梯度也相加。"""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.forward(ctx, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """各进程合起来统计的批归一化，用于 CPU；GPU 上用 ``torch.nn.SyncBatchNorm``。

    每个进程的批一样大，所以整批的均值是各进程均值的平均；方差先减去整批的均值再平均，不损失精度。
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` → 同形；训练时在全部进程的 ``N·B·H·W`` 个数上统计。"""
        if not self.training:
            return super().forward(x)
        size, wide = dist.get_world_size(), x.to(torch.promote_types(x.dtype, torch.float32))
        mean = _SumOverProcesses.apply(wide.mean((0, 2, 3))) / size
        centred = wide - mean[:, None, None]
        var = _SumOverProcesses.apply(centred.square().mean((0, 2, 3))) / size
        with torch.no_grad():
            count = size * x.numel() // x.shape[1]
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked.add_(1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def prepared_objective(model: VanillaVAE, config: TrainConfig, plan: Plan, world: World, sync_batch_norm: bool) -> nn.Module:
    """照 ``plan`` 编译，几个进程时再照 ``world`` 同步。"""
    if world.size > 1 and sync_batch_norm:
        _swap_batch_norm(model, nn.SyncBatchNorm if plan.device.type == "cuda" else SyncBatchNorm2d)
    objective = Objective(model, config.kld_weight, plan.precision)
    if plan.compile:
        objective = torch.compile(objective, dynamic=False, options={"triton.cudagraphs": plan.cuda_graphs})
    if world.size > 1:
        own = [plan.device] if plan.device.type == "cuda" else None
        objective = nn.parallel.DistributedDataParallel(objective, device_ids=own, gradient_as_bucket_view=True)
    return objective


def _swap_batch_norm(model: nn.Module, kind: type[nn.Module]) -> None:
    """就地把全部批归一化换成 ``kind``；参数与统计量还是原来的张量。"""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                swapped = kind(child.num_features, child.eps, child.momentum)
                swapped.weight, swapped.bias = child.weight, child.bias
                swapped.running_mean, swapped.running_var = child.running_mean, child.running_var
                swapped.num_batches_tracked = child.num_batches_tracked
                setattr(module, name, swapped)
