r"""08、13 章共用的实验台：五个因子的 32×32 小脸，几秒就训练好的 VAE，量样本的两把尺子。

一把尺子是“重画”：由图回归出因子，照因子重画一张，看差多少（:func:`make_reader`、:func:`misfit`），只管像不像；
另一把是双样本检验：分类器分不分得出两堆编码（:func:`accuracy`），管全不全。两把都只用岭回归，没有训练。
推导与核对在 08 章；这里的每个函数与那里的同名函数是同一个，只是不依赖默认的浮点类型。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from vaelab.faces import FACE_FACTORS, draw_faces
from vaelab.images import to_float
from vanilla_vae import VanillaVAE

HUES = ("hair_hue", "background")
"""色相绕一圈又回到原处：回归它们的 cos 与 sin。"""
VARYING = ("skin", "mouth_curve", "pose", *HUES)
"""变化的五个因子，其余居中。"""
D = 3 * 32 * 32
WEIGHT, L = 8e-6, 8
"""KL 的权重（σ² = wD/2 = 0.0123）与隐变量的维数。"""

_generator = Generator().manual_seed(5)
HIDDEN = 2 * torch.rand(64, 1000, generator=_generator, dtype=torch.float64) - 1
SHIFT = 4 * torch.rand(1000, generator=_generator, dtype=torch.float64) - 2
"""随机的一层 ReLU 的权重与偏置，不训练。"""


def make_faces(count: int, seed: int, varying: Sequence[str] = VARYING) -> tuple[Tensor, Tensor]:
    """``varying`` 里的因子均匀变化、其余居中：因子 ``[count, 12]`` 与脸 ``[count, D]``，值域 [-1, 1]，float64。"""
    generator = Generator().manual_seed(seed)
    factors = torch.full((count, len(FACE_FACTORS)), 0.5, dtype=torch.float64)
    for name in varying:
        factors[:, FACE_FACTORS.index(name)] = torch.rand(count, generator=generator, dtype=torch.float64)
    return factors, to_float(draw_faces(factors, 32)).double().flatten(1)


def to_patches(x: Tensor) -> Tensor:
    """4×4 的小块变成通道：``[N, 3072]`` → ``[N, 48, 8, 8]``，float32，一个数也不丢。"""
    return F.pixel_unshuffle(x.view(-1, 3, 32, 32), 4).float()


def to_faces(patches: Tensor) -> Tensor:
    """:func:`to_patches` 的逆：``[N, 48, 8, 8]`` → ``[N, 3072]``，float64。"""
    return F.pixel_shuffle(patches, 4).double().flatten(1)


def train(model: VanillaVAE, patches: Tensor, steps: int = 500, seed: int = 0) -> None:
    """就地训练：Adam，学习率先升后降（OneCycle，最高 3e-3），批 64，KL 的权重 :data:`WEIGHT`。"""
    generator = Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        batch = patches[torch.randint(len(patches), (64,), generator=generator)]
        loss = model.loss_function(*model(batch, generator), M_N=WEIGHT)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def stack(count: int, sizes: Sequence[int], generator: Generator) -> list[Tensor]:
    """``count`` 个全连接网络的权重与偏置叠在一起：每层 ``[E, 入, 出]`` 与 ``[E, 1, 出]``，float32。

    权重均匀分布在 ±1/√入 里，偏置是 0；``sizes`` 从输入的维数到输出的。一次矩阵乘，``count`` 个网络都往前走。
    """
    layers = []
    for rows, columns in zip(sizes, sizes[1:]):
        weight = (2 * torch.rand(count, rows, columns, generator=generator, dtype=torch.float64) - 1) / math.sqrt(rows)
        layers += [weight.float().requires_grad_(), torch.zeros(count, 1, columns, dtype=torch.float32, requires_grad=True)]
    return layers


def forward(layers: Sequence[Tensor], h: Tensor, activation: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
    """:func:`stack` 的网络各走各的：``[E, B, 入]`` → ``[E, B, 出]``；``activation`` 在层与层之间。"""
    for i in range(0, len(layers), 2):
        h = torch.baddbmm(layers[i + 1], activation(h) if i else h, layers[i])
    return h


def principal_axes(x: Tensor, count: int) -> Tensor:
    """``x [N, D]`` 的主方向 ``[D, count]``，长度为 1，方差从大到小；N 不大于 D 时用。"""
    centered = x - x.mean(0)
    lam, vectors = (each.flip(-1) for each in torch.linalg.eigh(centered @ centered.T))
    return centered.T @ vectors[:, :count] / lam[:count].sqrt()


def ridge(inputs: Tensor, outputs: Tensor, penalty: float = 1e-3) -> Tensor:
    """岭回归：使 ‖inputs·A − outputs‖² + penalty·‖A‖² 最小的 A。"""
    gram = inputs.T @ inputs + penalty * torch.eye(inputs.shape[1], dtype=inputs.dtype)
    return torch.linalg.solve(gram, inputs.T @ outputs)


def features(a: Tensor) -> Tensor:
    """``[N, d]``（d ≤ 64，float64）→ ``[N, 1000 + d + 1]``：随机的 ReLU、原来的数、常数 1。"""
    return torch.cat([torch.relu(a @ HIDDEN[: a.shape[1]] + SHIFT), a, torch.ones(len(a), 1, dtype=a.dtype)], dim=1)


def to_targets(factors: Tensor, varying: Sequence[str] = VARYING) -> Tensor:
    """因子 ``[N, 12]`` → 回归的目标 ``[N, ·]``：色相换成 cos 与 sin，其余照旧。"""
    columns = []
    for name in varying:
        value = factors[:, FACE_FACTORS.index(name)]
        columns += [(2 * math.pi * value).cos(), (2 * math.pi * value).sin()] if name in HUES else [value]
    return torch.stack(columns, dim=1)


def to_factors(targets: Tensor, varying: Sequence[str] = VARYING) -> Tensor:
    """:func:`to_targets` 的逆：``[N, ·]`` → ``[N, 12]``，截在 [0, 1]，不变的居中。"""
    factors, rest = torch.full((len(targets), len(FACE_FACTORS)), 0.5, dtype=targets.dtype), list(targets.T)
    for name in varying:
        value = rest.pop(0)
        factors[:, FACE_FACTORS.index(name)] = torch.atan2(rest.pop(0), value) / (2 * math.pi) % 1 if name in HUES else value
    return factors.clamp(0, 1)


def make_reader(factors: Tensor, x: Tensor, varying: Sequence[str] = VARYING) -> Callable[[Tensor], Tensor]:
    """由真脸造一个读数的：返回 ``read(images)``，``[N, D]`` → 因子 ``[N, 12]``。

    图的前 64 个主方向，过一层随机的 ReLU，再做岭回归。

    Raises:
        ValueError: 形状不对，或脸少于 65 张。
    """
    if factors.shape != (len(x), len(FACE_FACTORS)) or x.shape[1:] != (D,) or len(x) <= 64:
        raise ValueError(f"要 [N, 12] 的因子与 [N, {D}] 的脸，N 大于 64，收到 {list(factors.shape)} 与 {list(x.shape)}；用 make_faces 造。")
    mean, axes = x.mean(0), principal_axes(x[:1024], 64)
    weights = ridge(features((x - mean) @ axes / 8), to_targets(factors, varying))
    return lambda images: to_factors(features((images - mean) @ axes / 8) @ weights, varying)


def misfit(images: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """式(8.3) 的 d：读出因子，重画，比较；``[N, D]`` → ``[N]``，每像素的平方误差。"""
    return (images - to_float(draw_faces(read(images), 32)).double().flatten(1)).square().mean(1)


def accuracy(z: Tensor, y: Tensor) -> Tensor:
    """分类器（随机特征 + 岭回归）分两堆 ``[N, L]`` 的正确率：前一半训练，后一半考；分不出是 0.5。

    Raises:
        ValueError: 两堆形状不同，或有一维恒为常数（坍塌的编码）。
    """
    if z.shape != y.shape or z.dim() != 2:
        raise ValueError(f"两堆编码应同为 [N, L]，收到 {list(z.shape)} 与 {list(y.shape)}；请取一样多的样本。")
    half, scale = len(z) // 2, torch.cat([z, y]).std(0)
    if not bool((scale > 0).all()):
        raise ValueError(f"第 {int((~(scale > 0)).nonzero()[0])} 维恒为常数或不是有限的数，没有尺度可除；请去掉坍塌的维。")
    inputs, signs = features(torch.cat([z[:half], y[:half]]) / scale), torch.ones(2 * half, 1, dtype=z.dtype)
    signs[half:] = -1
    score = features(torch.cat([z[half:], y[half:]]) / scale) @ ridge(inputs, signs, penalty=1.0)
    return (score * signs > 0).double().mean()
