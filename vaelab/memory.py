"""内存：一步要多少，还有多少，装不下时怎么说，以及释放了的怎样留着再用。"""

from __future__ import annotations

import ctypes
import math
import re
import sys

import psutil
import torch
from torch import Tensor

from vaelab.step import Objective
from vanilla_vae import VanillaVAE, eval_mode

OVERHEAD = 250_000_000  # 卷积库的代码与工作区，字节；CPU 上量得约 180 MB


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
            loss = objective(images, torch.zeros(batch, model.latent_dim, device=device, dtype=torch.float32))["loss"]
        stored.append(sum(saved.values()))
        del loss
    largest = model.hidden_dims[0] * model.image_size**2 * (4 if precision == "fp32" else 2)  # 最后一级的激活
    fixed = 4 * 4 * sum(p.numel() for p in model.parameters())
    return fixed, (stored[1] - stored[0]) // 2 + 5 * largest


def available_memory(device: torch.device) -> int:
    """还能用的内存，字节：GPU 上是空着的显存，连同 torch 已经占下而没有用的；CPU 上是此刻空着的，并且不超过给这个进程的限额。"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    try:
        import resource
    except ImportError:  # Windows 没有这种限额
        return free
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if soft == resource.RLIM_INFINITY else min(free, soft - psutil.Process().memory_info().vms)


def model_memory(model_args: dict) -> float:
    """一份参数要多少字节；只在 meta 设备上建，不占内存。大到数不出来就是 ``inf``。参数的错误同 :class:`VanillaVAE`。"""
    try:
        with torch.device("meta"):
            return 4.0 * sum(parameter.numel() for parameter in VanillaVAE(**model_args).parameters())
    except (RuntimeError, OverflowError):  # 元素的个数超出 int64
        return math.inf


def require_memory(need: float, what: str, remedy: str) -> None:
    """做之前先算：``what`` 要 ``need`` 字节，此刻的内存装不下就报 ValueError。"""
    free = available_memory(torch.device("cpu"))
    if need > free:
        much = f"约需 {need / 1e9:,.1f} GB" if math.isfinite(need) else "要的内存大得数不出来"
        raise ValueError(f"{what}应装得进内存，{much}，能用的有 {free / 1e9:.1f} GB；{remedy}。")


def too_large(model: VanillaVAE, batch: int, precision: str, memory: int, exhausted: bool = False) -> str | None:
    """``memory`` 字节里装不下 ``batch`` 张图的一步时的话，含装得下的最大的批；装得下则是 None。

    ``exhausted``：真的用尽了。估计说装得下，就是估计偏小，那时劝人减半。
    """
    fixed, each = step_memory(model, precision)
    need = fixed + OVERHEAD + batch * each
    if need <= memory and not exhausted:
        return None
    fits = int(0.95 * memory - fixed - OVERHEAD) // each  # 留一点余地：空着的内存时多时少
    fits = min(fits, batch // 2) if need <= memory else fits
    remedy = f"请把 --batch-size 减到 {fits}" if fits >= 2 else "请减小 --image-size 或 --hidden-dims"
    return f"batch_size 应使一步装得进内存，收到每个进程 {batch} 张，约需 {need / 1e6:.0f} MB，能用的有 {memory / 1e6:.0f} MB；{remedy}。"


def out_of_memory(error: BaseException | None) -> bool:
    """是不是内存用尽：可能来自分配器、cuDNN 或 cuBLAS，也可能藏在录 CUDA 图的错误后面。"""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or re.search("DefaultCPUAllocator|out of memory|ALLOC_FAILED", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


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
