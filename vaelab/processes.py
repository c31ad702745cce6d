"""几个进程一起训练：谁在哪块设备上，怎样会合与散开，怎样得到与一个进程同样的数。"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from vaelab.config import TrainingError

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

    def agree(self, value: str, what: str) -> None:
        """各进程的 ``value`` 须相同。

        Raises:
            ValueError: 不同；每个进程都报，各台机器上都看得见。
        """
        if self.size == 1:
            return
        values = [""] * self.size
        dist.all_gather_object(values, value)
        if others := [rank for rank, each in enumerate(values) if each != values[0]]:
            raise ValueError(
                f"各进程的{what}应相同，第 {others[0]} 个进程是 {values[others[0]]}，第 0 个是 {values[0]}；请让每台机器上的一样，再重新启动。"
            )

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """这一段由每台机器的第 0 个进程先走完，本机其余的再走；先走的出了错，后面的不再走。"""
        ahead = _from_environment("LOCAL_RANK") == 0
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


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """``auto`` 依次选 cuda、mps、cpu；指名的设备须真在。几个进程时，每个进程用自己的那一块 GPU。"""
    if str(device) in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{process_gpu(_from_environment('LOCAL_RANK'), torch.cuda.device_count())}"
    if str(device) == "auto":
        return torch.device("mps" if torch.backends.mps.is_available() and current_world().size == 1 else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 名字过时了之类，下面一句话说清
            chosen = torch.device(device)
        torch.ones(1, device=chosen).item()  # 真的算得出一个数：meta 上建得了张量，却没有数
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # 流、事件、通信都以它为准
    except Exception as error:  # 各后端抛出的类型不一：没有编译进来，没有驱动，编号太大，名字不认得
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        have = ["cpu", *(f"cuda:{index}" for index in range(gpus)), *["mps"] * torch.backends.mps.is_available()]
        name = str(device) if str(device).isprintable() else repr(str(device))
        raise ValueError(f"用不了设备 {name[:40]}；这台机器上有 {'、'.join(have)}，请改用其中之一或 auto。") from error
    return torch.device("cpu") if chosen.type == "cpu" else chosen  # cpu:3 也就是 cpu


def process_gpu(local_rank: int, gpus: int) -> int:
    """本机第 ``local_rank`` 个进程用第几块 GPU；进程比 GPU 多就报 ValueError。"""
    if local_rank >= gpus:
        raise ValueError(
            f"每个进程应有自己的 GPU，这台机器有 {gpus} 块，却起了至少 {local_rank + 1} 个进程；请用 --nproc_per_node {gpus}，或加 --device cpu。"
        )
    return local_rank


def _from_environment(name: str, default: int = 0) -> int:
    """torchrun 设的环境变量；没有就是 ``default``，不是非负整数就报 ValueError。"""
    text = os.environ.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"环境变量 {name} 应为非负整数，由 torchrun 设好，收到 {text[:40]!r}；请 unset {name} 再试。")
    return int(text)


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
    size = _from_environment("WORLD_SIZE", 1)
    if size <= 1 or not dist.is_available() or not {"RANK", "MASTER_ADDR"} <= os.environ.keys():
        yield World()
        return
    if not 0 < timeout <= 1e6:
        raise ValueError(f"等其余进程的秒数应大于 0，不超过 1000000，收到 {timeout!r}；默认是 300。")
    chosen, rank, port = pick_device(device), _from_environment("RANK"), _from_environment("MASTER_PORT", 29500)
    if rank >= size or not 0 < port < 2**16:
        raise ValueError(f"环境变量 RANK 应小于 WORLD_SIZE，MASTER_PORT 应在 1 与 65535 之间，收到 {rank}、{size}、{port}；请用 torchrun 启动。")
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
    finally:
        # DDP 用过的 gloo，散开之后线程还在：手里最后一件活要拿到 GIL 才放得下。解释器恰在此时退出，进程会中止（SIGABRT）；
        # 等一下，让它放下。
        time.sleep(0.2)
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


def swap_batch_norm(model: nn.Module, kind: type[nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """就地把全部批归一化换成 ``kind``，参数与统计量还是原来的张量；返回换下的 (上级, 名字, 原来的模块)，换回去时用。"""
    swaps = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                swapped = kind(child.num_features, child.eps, child.momentum)
                swapped.weight, swapped.bias = child.weight, child.bias
                swapped.running_mean, swapped.running_var = child.running_mean, child.running_var
                swapped.num_batches_tracked = child.num_batches_tracked
                setattr(module, name, swapped)
                swaps.append((module, name, child))
    return swaps
