"""没有指明的设置怎样定：自己的图片，由边长、张数、设备与量得的速度来定，并说出为什么。

名字里有的数据（faces、mnist……）用 :class:`vaelab.config.TrainConfig` 与 ``MODEL_DEFAULTS`` 的缺省值，课程里的数都由它们来。
那一套是给画出来的脸的：16 维装不下照片，固定的权重在别的边长上是另一个 σ²，固定的轮数在小文件夹上只是几十步。
"""

from __future__ import annotations

import copy
import math
import time

import torch
from torch import Tensor

from vaelab.config import MODEL_DEFAULTS, TrainConfig
from vaelab.data import NAMES
from vaelab.images import ImageSet
from vaelab.plan import make_plan
from vaelab.processes import World
from vaelab.step import learning_rate
from vaelab.stepper import Stepper
from vanilla_vae import VanillaVAE

MINUTES = {"cpu": 2.1, "mps": 2.0, "cuda": 1.0}  # 没有指明轮数时训练多久；两个 CPU 核上，连同解码与画图在三分钟之内
MOST_EPOCHS = 150  # 再多，几百张图早已背下来，测试 ELBO 不再升
LOPSIDED = 0.01  # 左右的差别不到这么多，就当作分不出，见 :func:`lopsided`
FEW = 200  # 少于这么多张训练图，要说一句


def image_size(source: str, device: torch.device) -> int:
    """图像边长：自己的图片在 CPU 上 32，其余 64。"""
    return 32 if source not in NAMES and device.type == "cpu" else 64


def model_defaults(source: str, size: int) -> dict:
    """隐变量的维数与各级的通道数：自己的图片 128 维，最深一级的特征图是 4×4 上下。"""
    if source in NAMES:
        return dict(MODEL_DEFAULTS)
    return {"latent_dim": 128, "hidden_dims": [min(512, 32 * 2**level) for level in range(max(1, round(math.log2(max(size, 8) / 4))))]}


def config_defaults(source: str, images: Tensor, processes: int = 1) -> dict:
    """训练的设置：自己的图片 σ² 取最优，批大小不超过训练图的一半、由各进程均分，左右分不出就随机翻转。"""
    if source in NAMES:
        return {}
    return {
        "kld_weight": "optimal",
        "batch_size": max(2, min(TrainConfig.batch_size, len(images) // 2) // processes) * processes,
        "mirror": lopsided(images) < LOPSIDED,
    }


def lopsided(images: Tensor) -> float:
    """图片左右有多不对称：uint8 ``[N, C, H, W]`` → 平均图与它的镜像之差，占逐像素标准差的平方平均，扣去抽样误差的一份。

    左右分不出的照片是 0 上下，一千张的数字是 0.06：平均图之差 d、每张图的差的方差 v，像素上平均 d²/v − 1/N。
    """
    some = images[:: -(-len(images) // 2000)].to(torch.float32)
    gap = some - some.flip(3)
    spread = gap.var(dim=0) if len(some) > 1 else torch.zeros_like(gap[0])
    moved = spread > 0
    return float((gap.mean(dim=0)[moved].square() / spread[moved]).mean() - 1 / len(some)) if moved.any() else 0.0


def pace(model: VanillaVAE, data: ImageSet, config: TrainConfig, device: torch.device, world: World, **how) -> float:
    """这台机器上走一步要几秒：在模型的副本上真的走十二步，取最快的一步：机器一时忙，不至于少训练几倍。多个进程时以第 0 个为准。"""
    plan = make_plan(data, config, model, device=device, **{**how, "compile": "off"})
    seconds: list[float] = []
    with Stepper(copy.deepcopy(model), data, config, plan, world) as stepper:
        while len(seconds) < 12:
            for batch in stepper.feed(0):
                started = time.perf_counter()
                stepper(batch, 0, learning_rate(0, 100, config.lr)).tolist()  # 取回一个数，设备才真的走完
                seconds.append(time.perf_counter() - started)
                if len(seconds) == 12:
                    break
    return world.from_first(lambda: min(seconds[2:]))


def epochs_within(minutes: float | None, seconds: float, config: TrainConfig, data: ImageSet, device: torch.device, world: World) -> tuple[int, str]:
    """``minutes`` 分钟里走得完几轮，与一句为什么；至少一轮。

    Args:
        minutes: None 取 ``MINUTES``，那时也不多于 ``MOST_EPOCHS`` 轮。
        seconds: 一步要几秒，见 :func:`pace`。
    """
    per_epoch = config.steps_per_epoch(len(data.train), world.size)
    # 一轮之后的评价：每张测试图一次编码、两次解码，没有反向，约合训练一张的六成。
    epoch = seconds * (per_epoch + 0.6 * len(data.test) / config.batch_size)
    budget = 60 * (minutes or MINUTES.get(device.type, 2.0))
    fitting = max(1, int(budget / epoch))
    epochs = fitting if minutes else min(fitting, MOST_EPOCHS)
    limit = f"{budget:.0f} 秒里走得完这么多" if epochs == fitting else f"{MOST_EPOCHS} 轮为限，再多只是背下来"
    return epochs, f"{limit}：量得每步 {1000 * seconds:.3g} 毫秒，共约 {duration(epochs * epoch)}"


def why(given: dict, model: VanillaVAE, config: TrainConfig) -> str:
    """没有指明而定下的几样，各自的理由。"""
    parts = {
        "image_size": f"边长 {model.image_size}（CPU 上先求几分钟里看得出样子；--image-size 64 更清楚，每步约四倍时间）"
        if model.image_size == 32
        else "",
        "latent_dim": f"隐变量 {model.latent_dim} 维（照片要的维数比画出来的脸多；用不上的维，KL 自己归零）",
        "hidden_dims": f"各级通道 {list(model.hidden_dims)}（最深一级的特征图 {model.bottom}×{model.bottom}）",
        "kld_weight": "KL 权重 optimal（σ² 取这一批的 MSE，与边长、通道数无关）",
        "flip": f"训练时{'随机左右翻转（平均图左右对称' if config.mirror else '不翻转（平均图左右不对称'}；--flip on、off 可以指定）",
    }
    return "没有指明而定下的：" + "；".join(text for name, text in parts.items() if text and name not in given)


def duration(seconds: float) -> str:
    """给人看的时长。"""
    return f"{seconds:.0f} 秒" if seconds < 90 else f"{seconds / 60:.1f} 分钟" if seconds < 5400 else f"{seconds / 3600:.1f} 小时"
