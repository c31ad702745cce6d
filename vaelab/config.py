"""训练的设置，与训练不能继续时的错误。"""

from __future__ import annotations

from dataclasses import dataclass

from vanilla_vae import positive_int

LOSSES = ("loss", "Reconstruction_Loss", "KLD", "kld_weight")  # 每一步记下的四个数
DATA_DEFAULTS = {"data": "faces", "root": "data", "image_size": 64, "channels": None, "count": 10_000, "data_seed": 0}
MODEL_DEFAULTS = {"latent_dim": 16, "hidden_dims": [16, 32, 64, 128]}  # 命令行不指明时的模型
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


MAX_SEED = 2**63 - 1  # torch.manual_seed 收的最大的数
MAX_COUNT = 10**9  # 轮数、批大小、通道数的上限：再大一定是写错了


@dataclass(frozen=True)
class TrainConfig:
    """训练的设置，随检查点保存。

    Attributes:
        epochs: 轮数；一轮是把训练集看一遍。
        batch_size: 批大小，≥ 2（批归一化要有可统计的量）；几个进程一起训练时是各进程之和。
        lr: 学习率的最高值；先线性升高，再按余弦降到 0。
        kld_weight: KL 的权重 w = 2σ²/D，或 ``"optimal"``：每一步取 σ² = 这一批的 MSE（arXiv:2006.13202）。
        seed: 次序、噪声的种子。
        mirror: 训练时每张图有一半的机会左右翻转；几百上千张照片因此不容易背下来，有左右之分的（文字、数字）不要用。
        precision: ``auto``、``fp32``，或自动混合精度的 ``bf16``、``fp16``（后者带损失缩放）。
    """

    epochs: int = 5
    batch_size: int = 32
    lr: float = 3e-3
    kld_weight: float | str = 4e-4
    seed: int = 0
    precision: str = "auto"
    mirror: bool = False

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            if positive_int(name, value) > MAX_COUNT:
                raise ValueError(f"{name} 应不大于 {MAX_COUNT}，收到 {value}；请减小它。")
        if self.batch_size == 1:
            raise ValueError("batch_size 应至少为 2，收到 1：批归一化要在一批图之间统计均值与方差；请加大它。")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed 应为 0 到 2⁶³ − 1 的整数，收到 {self.seed!r}；请改为这个范围里的，例如 0。")
        if not (_is_number(self.lr) and self.lr > 0):
            raise ValueError(f"lr（学习率）应为正数，收到 {self.lr!r}；常用 0.0005 到 0.005。")
        if not (self.kld_weight == "optimal" or _is_number(self.kld_weight) and float(self.kld_weight) >= 0):
            raise ValueError(f"kld_weight 应为非负数或 optimal，收到 {self.kld_weight!r}；它的含义是 2σ²/D，例如 0.00025。")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision 应为 {'、'.join(PRECISIONS)} 之一，收到 {self.precision!r}。")

    def steps_per_epoch(self, images: int, processes: int = 1) -> int:
        """``images`` 张训练图一轮走多少步；批大小与图数、进程数不相符就报 ValueError。"""
        if images < 2:
            raise ValueError(f"训练图应至少有 2 张（批归一化要在一批图之间统计），收到 {images} 张；请放入更多图片。")
        if self.batch_size > images:
            raise ValueError(f"batch_size 应不大于训练图数 {images}，收到 {self.batch_size}；请减小它。")
        if self.batch_size % processes or (processes > 1 and self.batch_size < 2 * processes):
            nearest = max(2, round(self.batch_size / processes)) * processes
            raise ValueError(f"batch_size 应能由 {processes} 个进程均分，每份至少 2 张，收到 {self.batch_size}；请改用 {nearest}。")
        return images // self.batch_size


def _is_number(value: object) -> bool:
    """有限的实数，float32 也装得下。"""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3e38  # NaN 与无穷都不小于它


def gentler(lr: float) -> float:
    """训练爆了之后该试的学习率：四分之一，至多是缺省的那么大。"""
    return min(lr / 4, TrainConfig.lr)


class TrainingError(RuntimeError):
    """训练不能继续；信息说明在哪一步、可能的原因与办法。"""
