"""似然的梯子：同一个小 VAE 换十种似然，与无损压缩器比每个像素的比特数；09 章的表。

一个像素的整数灰阶 k 占 x = [k/256, (k+1)/256] 那一格。离散的似然给出这一格的概率；密度给像素加上格内均匀的噪声再评价，
乘格宽 1/256，平均起来不小于这一格的码长（Jensen）。``bernoulli`` 两样都不是：它在 256 级上加起来不是 1，列出来作对照。
测试 ELBO 每张图取一个 z，是平均码长的上界的无偏估计；网络自己的大小不算，零阶直方图与左邻表的大小也不算。
"""

from __future__ import annotations

import bz2
import io
import lzma
import math
import os
import statistics
import zlib
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from vaelab.data import load
from vaelab.evaluate import gaussian_log_density, kl_to_standard_normal

WIDTH = 1 / 256  # 一个灰阶的宽度，x 的单位
HIDDEN, LATENT, BATCH, LR, STEPS = 300, 20, 128, 1e-3, 1500
OUTPUTS = {  # 每种似然：网络给每个像素几个数
    "bernoulli": 1, "gauss": 1, "laplace": 1, "logistic": 1, "continuous_bernoulli": 1, "gauss_pixel": 2,
    "gauss_mass": 1, "logistic_mass": 1, "logistic_mass_pixel": 2, "logistic_mass_zero": 3,
}  # fmt: skip


def log_sigmoid_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(σ(a) − σ(b))，a > b；由 σ(a) − σ(b) = σ(a)·σ(−b)·(1 − e^(b−a))，两端也不相消。"""
    return F.logsigmoid(a) + F.logsigmoid(-b) + torch.log(-torch.expm1(b - a))


def log_normal_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(Φ(a) − Φ(b))，a > b；两点都在右半边时翻到左半边，尾巴才不相消。"""
    right = a + b > 0
    a, b = torch.where(right, -b, a), torch.where(right, -a, b)
    high = torch.special.log_ndtr(a)
    return high + torch.log(-torch.expm1(torch.special.log_ndtr(b) - high))


def log_mass(name: str, k: Tensor, out: Tensor, log_scale: Tensor, u: Tensor) -> Tensor:
    """灰阶 ``k``（浮点的整数）的对数概率，nat；密度是 log(密度 · 格宽)，在 ``(k + u)/256`` 处评价。

    Args:
        name: :data:`OUTPUTS` 的一个键。
        k: ``[B, D]``，0 到 255。
        out: ``[B, D, 1 到 3]``：位置（或 logit）、对数刻度、零膨胀的 logit。
        log_scale: 不随像素变的对数刻度，x 的单位。
        u: ``[B, D]``，格内的均匀噪声；离散的似然不用。
    """
    place = out[..., 0]
    if name == "bernoulli":
        return -F.binary_cross_entropy_with_logits(place, k / 255, reduction="none")
    if name == "continuous_bernoulli":  # 格的概率 ∝ e^(η·k/256)，归一化是等比级数
        step = place * WIDTH
        small = step.abs() < 1e-6
        size = torch.where(small, torch.ones_like(step), step).abs()
        log_total = 255 * step.clamp(min=0) + torch.log(torch.expm1(-256 * size) / torch.expm1(-size))
        return k * step - torch.where(small, math.log(256) + 127.5 * step, log_total)
    log_scale = out[..., 1].clamp(-8, 3) if OUTPUTS[name] > 1 else log_scale.clamp(-8, 3)
    if name in ("gauss", "gauss_pixel", "laplace", "logistic"):
        gap = (k + u) * WIDTH - place
        if name == "laplace":
            return -gap.abs() * torch.exp(-log_scale) - log_scale - math.log(2) + math.log(WIDTH)
        if name == "logistic":
            scaled = gap * torch.exp(-log_scale)
            return F.logsigmoid(scaled) + F.logsigmoid(-scaled) - log_scale + math.log(WIDTH)
        return gaussian_log_density(gap, torch.zeros_like(gap), 2 * log_scale) + math.log(WIDTH)
    upper, lower = (((k + edge) * WIDTH - place) * torch.exp(-log_scale) for edge in (1, 0))
    if name == "gauss_mass":
        first, last, inside = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower), log_normal_difference(upper, lower)
    else:
        first, last, inside = F.logsigmoid(upper), F.logsigmoid(-lower), log_sigmoid_difference(upper, lower)
    found = torch.where(k == 0, first, torch.where(k == 255, last, inside))
    if name == "logistic_mass_zero":  # π 的机会恰好是 0，其余照离散 logistic
        rest = F.logsigmoid(-out[..., 2]) + found
        return torch.where(k == 0, torch.logaddexp(F.logsigmoid(out[..., 2]), rest), rest)
    return found


class SmallVAE(nn.Module):
    """D-300-20 的 MLP，高斯的 q；解码器每个像素给 ``outputs`` 个数。"""

    def __init__(self, dim: int, outputs: int, hidden: int = HIDDEN, latent: int = LATENT) -> None:
        super().__init__()
        self.outputs = outputs
        linear = partial(nn.Linear, dtype=torch.float32)  # 笔记里缺省是 float64，网络不跟着变
        self.encoder = nn.Sequential(linear(dim, hidden), nn.ReLU(), linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(linear(latent, hidden), nn.ReLU(), linear(hidden, dim * outputs))
        self.log_scale = nn.Parameter(torch.tensor(math.log(0.1), dtype=torch.float32))

    def forward(self, k: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """``k [B, D]`` → 解码器的输出 ``[B, D, outputs]`` 与 KL ``[B]``，nat。"""
        mu, log_var = self.encoder(k / 255).chunk(2, dim=1)
        z = mu + torch.exp(log_var / 2) * torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
        return self.decoder(z).view(*k.shape, self.outputs), kl_to_standard_normal(mu, log_var).sum(1)


def train(name: str, images: Tensor, seed: int, steps: int = STEPS, lr: float = LR, batch: int = BATCH, **size: int) -> SmallVAE:
    """在 uint8 的 ``images [N, D]`` 上训练，Adam；``size`` 是 :class:`SmallVAE` 的 ``hidden``、``latent``。"""
    torch.manual_seed(seed)
    model = SmallVAE(images.shape[1], OUTPUTS[name], **size)
    generator = Generator().manual_seed(seed)
    network = [p for p in model.parameters() if p is not model.log_scale]
    optimizer = torch.optim.Adam([{"params": network, "lr": lr}, {"params": [model.log_scale], "lr": 10 * lr}])
    for _ in range(steps):
        k = images[torch.randint(len(images), (batch,), generator=generator)].float()
        loss = -_elbo(model, name, k, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def _elbo(model: SmallVAE, name: str, k: Tensor, generator: Generator) -> Tensor:
    out, kld = model(k, generator)
    u = torch.rand(k.shape, generator=generator, dtype=k.dtype)
    return log_mass(name, k, out, model.log_scale, u).sum(1) - kld


@torch.no_grad()
def bits_per_pixel(model: SmallVAE, name: str, images: Tensor, seed: int = 0) -> float:
    """−ELBO，比特/像素，全部 ``images [N, D]`` 的平均。"""
    generator = Generator().manual_seed(seed)
    elbo = torch.cat([_elbo(model, name, k.float(), generator).double() for k in images.split(1000)])
    return -float(elbo.mean()) / (images.shape[1] * math.log(2))


def compressors(train_images: Tensor, test_images: Tensor) -> dict[str, float]:
    """无损压缩器与三张表，比特/像素；图是 uint8 ``[N, H, W]``，测试集首尾相接当作一个文件。"""
    raw, before, count = test_images.numpy().tobytes(), train_images.numpy().tobytes(), test_images.numel()
    picture = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(test_images.reshape(-1, test_images.shape[-1]).numpy())).save(picture, "png", optimize=True)
    sizes = {"png": len(picture.getvalue()), "zlib": len(zlib.compress(raw, 9)), "bz2": len(bz2.compress(raw, 9))}
    sizes |= {"lzma": len(lzma.compress(raw, preset=9))}
    sizes |= {"lzma_after_train": len(lzma.compress(before + raw, preset=9)) - len(lzma.compress(before, preset=9))}
    return {key: 8 * size / count for key, size in sizes.items()} | tables(train_images, test_images)


def tables(train_images: Tensor, test_images: Tensor) -> dict[str, float]:
    """零阶直方图、逐像素直方图、左邻表：在训练集上数（每格先放 0.01），给测试集编码的比特/像素。"""

    def cost(context: Tensor, coded: Tensor, values: Tensor, contexts: int) -> float:
        counts = torch.bincount((context * 256 + values).flatten(), minlength=256 * contexts).view(contexts, 256) + 0.01
        bits = -torch.log2(counts / counts.sum(1, keepdim=True))
        return float(bits.flatten()[coded.flatten()].double().mean())

    found = {}
    for name in ("histogram", "pixel_histogram", "left_neighbour"):
        k, test = train_images.long(), test_images.long()
        place = torch.arange(k[0].numel()).view(k[0].shape)
        both = [{"histogram": 0 * x, "pixel_histogram": place.expand_as(x), "left_neighbour": F.pad(x[..., :-1], (1, 0))}[name] for x in (k, test)]
        found[name] = cost(both[0], both[1] * 256 + test, k, max(256, place.numel()))
    return found


def bench_likelihood(root: str | os.PathLike | None, seeds: int = 3) -> dict:
    """有 ``root`` 就用那里的 MNIST，没有就用 32×32 的灰度脸。"""
    data = load("mnist", root=root, image_size=28) if root else load("faces", image_size=32, channels=1, progress=False)
    train_images, test_images = data.train[:, 0], data.test[:, 0]
    lossless = {key: round(value, 3) for key, value in compressors(train_images, test_images).items()}
    print("，".join(f"{key} {value:.3f}" for key, value in lossless.items()), flush=True)
    rows = {}
    for name in OUTPUTS:
        found = []
        for seed in range(seeds):
            model = train(name, train_images.flatten(1), seed)
            found.append(bits_per_pixel(model, name, test_images.flatten(1)))
        rows[name] = {"bits": [round(value, 3) for value in found], "mean": round(statistics.mean(found), 3)}
        rows[name] |= {"stderr": round(statistics.stdev(found) / math.sqrt(seeds), 4)} if seeds > 1 else {}
        print(f"{name}：{rows[name]['mean']:.3f}（{seeds} 颗种子 {rows[name]['bits']}）", flush=True)
    setting = {"data": data.name, "image_size": data.test.shape[-1], "train": len(train_images), "test": len(test_images), "steps": STEPS}
    return setting | {"seeds": seeds, "hidden": HIDDEN, "latent": LATENT, "lossless": lossless, "vae": rows}
