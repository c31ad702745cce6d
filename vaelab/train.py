"""训练：一个读者能看懂的循环，以及让它快、让它断了能续的几样东西。

每一步的随机数只取决于种子与步数（:func:`step_seed`），每一轮的次序只取决于种子与轮数，
所以从检查点续训与一口气训完，走的是同样的路、得到同样的数。
"""

from __future__ import annotations

import csv
import ctypes
import io
import math
import os
import pickle
import signal
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from vaelab.data import ImageSet, batches, to_float
from vaelab.evaluate import evaluate, optimal_kld_weight
from vanilla_vae import VanillaVAE, positive_int

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.csv"
PRECISIONS = ("auto", "fp32", "bf16")
WARMUP = 0.1  # 学习率升到最高处所用的步数，占总步数的比例


@dataclass(frozen=True)
class TrainConfig:
    """训练的设置，随检查点保存。

    Attributes:
        epochs: 轮数；一轮是把训练集看一遍。
        batch_size: 批大小，≥ 2（批归一化要有可统计的量）。
        lr: 学习率的最高值；先线性升高，再按余弦降到 0。
        kld_weight: KL 的权重 w = 2σ²/D，或 ``"optimal"``：每一步取 σ² = 这一批的 MSE（arXiv:2006.13202）。
        seed: 次序、噪声的种子。
        precision: ``auto``、``fp32`` 或 ``bf16``（自动混合精度）。
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
    resume: bool = False,
    extra: dict | None = None,
    progress: bool = True,
) -> list[dict]:
    """训练 ``model``（就地改动，结束时在 eval 模式），每一轮之后在测试集上评价，并存下检查点。

    按 Ctrl-C 会在当前这一步之后停下：存一份精确到步的检查点，``resume=True`` 从那里接着走。

    Args:
        model: 图像大小、通道数须与 ``data`` 相符。
        data: 训练与测试图像。
        config: 训练的设置。
        out: 存放 ``checkpoint.pt`` 与 ``history.csv`` 的文件夹；None 则什么也不存。
        device: ``auto`` 依次选 cuda、mps、cpu。
        resume: 从 ``out`` 里的检查点接着训练，直到 ``config.epochs`` 轮。
        extra: 一并存进检查点的设置（字典，只含数、字符串与列表），例如数据从哪里来。
        progress: 是否显示进度条。

    Returns:
        每一轮一行的历史，列见 ``history.csv``。

    Raises:
        TrainingError: 损失不再是有限的数，或检查点存不下。
        ValueError: 设置与数据、与检查点不相符。
    """
    device = pick_device(device)
    use_bf16 = pick_precision(config.precision, device) == "bf16"
    if config.batch_size > len(data.train):
        raise ValueError(f"batch_size 应不大于训练图数 {len(data.train)}，收到 {config.batch_size}；请减小它。")
    steps_per_epoch = len(data.train) // config.batch_size
    total_steps = config.epochs * steps_per_epoch

    optimizer = prepare(model, config, device)
    run = _Run(model, optimizer, config, None if out is None else Path(out), steps_per_epoch, extra or {})
    if resume:
        run.restore()
    elif out is not None:
        run.save()  # 从第一步之前起，任何时刻被杀都有可载入的检查点

    images_total, images_done = (n * config.batch_size for n in (total_steps, run.step))
    bar = tqdm(total=images_total, initial=images_done, unit="图", unit_scale=True, smoothing=0.1, disable=not progress)
    with bar, _stop_on_ctrl_c() as stop_requested, torch.random.fork_rng(_cuda_index(device)):
        while run.step < total_steps and not stop_requested():
            epoch, done_in_epoch = divmod(run.step, steps_per_epoch)
            bar.set_description(f"第 {epoch + 1}/{config.epochs} 轮")
            shuffle = torch.Generator().manual_seed(step_seed(config.seed, epoch))
            started, started_at, pending = time.perf_counter(), run.step, None
            model.train()
            for images in islice(batches(data.train, config.batch_size, shuffle), done_in_epoch, None):
                losses = train_step(model, optimizer, images, config, run.step, total_steps, use_bf16)
                run.step += 1
                run.add(losses)
                # 查的是上一步：等它的结果时，这一步已经在设备上排着，设备不会闲下来。
                _check_finite(pending, run, config)
                pending = (run.step, losses)
                bar.update(config.batch_size)
                if run.step % 10 == 0:
                    bar.set_postfix_str(f"MSE {losses['Reconstruction_Loss']:.4f}，KL {losses['KLD']:.1f}", refresh=False)
                if stop_requested():
                    break
            _check_finite(pending, run, config)
            if run.step % steps_per_epoch == 0:
                seconds = time.perf_counter() - started
                speed = (run.step - started_at) * config.batch_size / seconds
                run.finish_epoch(evaluate(model, data.test, seed=config.seed), speed, seconds)
            run.save()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    return run.history


def prepare(model: VanillaVAE, config: TrainConfig, device: torch.device) -> torch.optim.Adam:
    """把模型搬到 ``device``，排成训练最快的样子，并配好优化器。"""
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device, memory_format=torch.channels_last).train()
    return make_optimizer(model, config.lr)


def train_step(
    model: VanillaVAE,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    config: TrainConfig,
    step: int,
    total_steps: int,
    use_bf16: bool = False,
) -> dict:
    """一步训练：uint8 ``[B, C, H, W]`` → 损失各项，见 ``VanillaVAE.loss_function``，外加所用的 ``kld_weight``。"""
    device = model.fc_mu.weight.device
    x = to_float(images.to(device)).contiguous(memory_format=torch.channels_last)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, total_steps, config.lr)
    torch.manual_seed(step_seed(config.seed, step))
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
        recons, _, mu, log_var = model(x)
    weight = kld_weight(config.kld_weight, recons, x)
    losses = model.loss_function(recons, x, mu, log_var, M_N=weight)
    optimizer.zero_grad(set_to_none=True)
    losses["loss"].backward()
    optimizer.step()
    return {**losses, "kld_weight": weight}


def step_seed(seed: int, index: int) -> int:
    """第 ``index`` 步（或轮）的种子：相邻的步、相邻的种子都不相撞。"""
    return (seed * 1_000_003 + index) % 2**31


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """第 ``step`` 步（从 0 数）的学习率：前一成线性升到 ``peak``，其余按余弦降到 0。"""
    warmup = max(1, int(total_steps * WARMUP))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def kld_weight(setting: float | str, recons: Tensor, x: Tensor) -> float | Tensor:
    """KL 的权重：给定的数，或 ``optimal`` 时的 2·MSE/D（零维张量，不回传梯度）。"""
    if setting != "optimal":
        return float(setting)
    return optimal_kld_weight(F.mse_loss(recons.detach().float(), x), x[0].numel())


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


def _check_finite(pending: tuple[int, dict] | None, run: _Run, config: TrainConfig) -> None:
    if pending is None or math.isfinite(pending[1]["loss"].item()):
        return
    step, losses = pending
    saved = "" if run.path is None else "上一轮的检查点完好，减小 --lr 后可加 --resume 接着训练；"
    raise TrainingError(
        f"第 {step} 步的损失不再是有限的数（MSE {losses['Reconstruction_Loss']:.3g}，KL {losses['KLD']:.3g}）：多半是学习率 "
        f"{config.lr:g} 太大；{saved}也可以先试 lr = {config.lr / 4:g}。"
    )


@contextmanager
def _stop_on_ctrl_c() -> Iterator:
    """Ctrl-C（SIGINT）只记下来，由循环在一步走完之后停下；再按一次立即中断。只有主线程能装信号处理。"""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set
        return

    def handler(signum: int, frame: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


# ---------------------------------------------------------------- 检查点与历史


class _Run:
    """一次训练的进度：走到第几步、这一轮的累计、历史，以及它们与磁盘之间的来往。"""

    FORMAT = 1

    def __init__(self, model, optimizer, config: TrainConfig, path: Path | None, steps_per_epoch: int, extra: dict):
        self.model, self.optimizer, self.config, self.extra = model, optimizer, config, extra
        self.path, self.steps_per_epoch = path, steps_per_epoch
        self.step, self.history, self.sums = 0, [], {}

    def add(self, losses: dict) -> None:
        """累计这一步；留在设备上，不逐步取回。"""
        for name, value in losses.items():
            if isinstance(value, Tensor) and value.device.type != "mps":  # MPS 没有 float64
                value = value.detach().double()
            self.sums[name] = self.sums.get(name, 0) + value

    def finish_epoch(self, test, images_per_s: float, seconds: float) -> None:
        mean = {name: float(total) / self.steps_per_epoch for name, total in self.sums.items()}
        self.sums = {}
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
            "sums": {name: float(total) for name, total in self.sums.items()},
            "history": self.history,
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CHECKPOINT, lambda file: torch.save(state, file))
            write_atomically(self.path / HISTORY, lambda file: file.write(_as_csv(self.history).encode("utf-8")))
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"第 {self.step} 步的检查点写不进 {self.path}（{error}）；请腾出磁盘空间或检查权限，"
                "再加 --resume 从上一份完好的检查点接着训练。"
            ) from error

    def restore(self) -> None:
        state = load_checkpoint(self.path)
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


# ---------------------------------------------------------------- 设备、精度、内存


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` 依次选 cuda、mps、cpu；指名的设备须真在。"""
    if str(device) == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"用不了设备 {device}；这台机器上有 {'、'.join(have)}，请改用其中之一或 auto。") from error
    return chosen


def pick_precision(precision: str, device: torch.device) -> str:
    """``auto`` 在 bf16 真正更快的设备上选 bf16，其余选 fp32。

    CUDA 看硬件是否原生支持。CPU 上有指令不等于更快（要看有没有 AMX 一类的矩阵单元），所以各算一层卷积，量出来再定。
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16" if _conv_seconds(torch.float32) > 1.2 * _conv_seconds(torch.bfloat16) else "fp32"
    return "fp32"


def _conv_seconds(dtype: torch.dtype) -> float:
    """一层有代表性的卷积前向加反向所用的时间，取几次里最短的。"""
    conv = nn.Conv2d(64, 128, 3, stride=2, padding=1).to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.ones(32, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        conv(x).sum().backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


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


def _cuda_index(device: torch.device) -> list[int]:
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
