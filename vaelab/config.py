"""训练的设置，与训练不能继续时的错误。"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vanilla_vae import positive_int

LOSSES = ("loss", "Reconstruction_Loss", "KLD", "kld_weight")  # 每一步记下的四个数
MODEL_DEFAULTS = {"latent_dim": 16, "hidden_dims": [16, 32, 64, 128]}  # 命令行不指明时的模型
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


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
        weight = self.kld_weight
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight) and weight >= 0
        if not (number or weight == "optimal"):
            raise ValueError(f"kld_weight 应为非负数或 optimal，收到 {weight!r}；它的含义是 2σ²/D，例如 0.00025。")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision 应为 {'、'.join(PRECISIONS)} 之一，收到 {self.precision!r}。")

    def steps_per_epoch(self, images: int, processes: int = 1) -> int:
        """``images`` 张训练图一轮走多少步；批大小与图数、进程数不相符就报 ValueError。"""
        if self.batch_size > images:
            raise ValueError(f"batch_size 应不大于训练图数 {images}，收到 {self.batch_size}；请减小它。")
        if self.batch_size % processes or (processes > 1 and self.batch_size < 2 * processes):
            nearest = max(2, round(self.batch_size / processes)) * processes
            raise ValueError(f"batch_size 应能由 {processes} 个进程均分，每份至少 2 张，收到 {self.batch_size}；请改用 {nearest}。")
        return images // self.batch_size


class TrainingError(RuntimeError):
    """训练不能继续；信息说明在哪一步、可能的原因与办法。"""
