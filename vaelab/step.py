"""一步训练：从 uint8 图像与噪声到损失，到梯度，到更新；以及每一步的学习率与种子。"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from vaelab.config import LOSSES
from vaelab.evaluate import optimal_kld_weight
from vaelab.images import to_float
from vaelab.processes import current_world
from vanilla_vae import VanillaVAE

WARMUP = 0.1  # 学习率升到最高处所用的步数，占总步数的比例


class Objective(nn.Module):
    """模型连同损失，一次前向：uint8 图像与噪声 → 损失各项。

    噪声从外面来，里面没有随机数，所以编译与否、一个还是几个进程，算的都是同一个函数。

    Args:
        model: 所训练的模型，是它的子模块。
        kld_weight: 见 :class:`TrainConfig`。
        precision: ``fp32``、``bf16`` 或 ``fp16``；损失总是 float32。
    """

    fixed_weight: Tensor
    AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def __init__(self, model: VanillaVAE, kld_weight: float | str, precision: str = "fp32") -> None:
        super().__init__()
        self.model, self.optimal, self.dtype = model, kld_weight == "optimal", self.AUTOCAST.get(precision)
        self.processes = current_world().size
        weight = torch.tensor(0.0 if self.optimal else float(kld_weight), dtype=torch.float32)
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


def train_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: Tensor,
    eps: Tensor,
    lr: float | Tensor,
) -> Tensor:
    """一步训练：uint8 ``[B, C, H, W]`` 与噪声 ``[B, L]`` → 这一步的 ``[loss, MSE, KL, w]``，留在设备上。

    录进 CUDA 图时，``lr`` 是零维张量，重放之前改它的值。
    """
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


def make_optimizer(model: nn.Module, lr: float, capturable: bool = False) -> torch.optim.Adam:
    """Adam，不含紧跟着批归一化的卷积偏置：批归一化减去均值，偏置的梯度恒为 0，不必算。

    ``capturable`` 的可以录进 CUDA 图：步数也在设备上。
    """
    frozen = set()
    for block in model.modules():
        if isinstance(block, nn.Sequential):
            for layer, following in zip(block, block[1:]):
                if isinstance(following, nn.BatchNorm2d) and getattr(layer, "bias", None) is not None:
                    frozen.add(layer.bias)
    for parameter in frozen:
        parameter.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("模型应有可训练的参数，收到的除了紧跟着批归一化的偏置，全部冻结了（requires_grad 都是 False）；请至少放开一层。")
    return torch.optim.Adam(trained, lr, fused=trained[0].device.type in ("cpu", "cuda"), capturable=capturable)


def learning_rate(step: int, total_steps: int, peak: float) -> float:
    """第 ``step`` 步（从 0 数）的学习率：前一成线性升到 ``peak``，其余按余弦降到 0。"""
    warmup = max(1, int(total_steps * WARMUP))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def step_seed(seed: int, index: int) -> int:
    """第 ``index`` 步（或轮）的种子：相邻的步、相邻的种子都不相撞。"""
    return (seed * 1_000_003 + index) % 2**31


def memory_layout(device: torch.device) -> torch.memory_format:
    """卷积更快的内存排列：channels_last；MPS 上用通常的排列。

    MPS 的批归一化收到 channels_last 时，梯度会悄悄算错或直接崩溃（pytorch/pytorch#175189）。
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last
