r"""拟合的先验：训练集的隐变量用混合高斯拟合，从它抽样，比从 N(0, I) 抽更像训练集。

训练把 q(z|x) 拉向 N(0, I)，却不保证它们合起来 q(z) = E_x[q(z|x)] 就是 N(0, I)：两者之差 KL(q(z) ‖ p(z)) 是平均 KL 的一部分
（Hoffman & Johnson, *ELBO surgery*, 2016）。解码器只见过 q(z) 的样本，从 N(0, I) 抽到它没见过的地方，画出来就不像。
换一个先验不必重新训练；拿留出的图算，任何先验的对数似然比 N(0, I) 高多少，ELBO 就高多少。

拟合的对象是样本 z ~ q(z|x)，不是均值 mu：要拟合的是 q(z)，而 mu 的分布比它窄，少了各个 q(z|x) 自己的方差
（坍塌的维上 mu 恒为 0，q(z) 却是 N(0, 1)）。

来源：EM 见 Dempster, Laird & Rubin, 1977；起点 k-means++ 见 Arthur & Vassilvitskii, 2007；
协方差的先验（MAP-EM）见 Fraley & Raftery, *Bayesian Regularization for Normal Mixture Estimation*, 2007。
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from vaelab.files import write_atomically
from vaelab.images import to_float
from vanilla_vae import VanillaVAE, eval_mode, positive_int

COMPONENTS = (1, 2, 4, 8, 16, 32)
"""试几个分量；留出的对数似然连着两次不再升高，就不再加。"""
MAX_CODES = 20_000  # 拟合用的图至多这么多：再多，几十个高斯也不会更准，时间却成比例地长
FLOOR = 1e-6  # 方差的下限，以 N(0, 1) 的方差为单位：比它更窄，解码出来已看不出差别


@dataclass(frozen=True, eq=False)
class Mixture:
    """混合高斯 Σ_k π_k N(m_k, Σ_k)，全协方差，float64，在 CPU 上。

    Attributes:
        weights: π ``[K]``，正，和为 1。
        means: ``[K, L]``。
        covariances: ``[K, L, L]``，正定。
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    factors: Tensor = field(init=False, repr=False)  # Σ = F Fᵀ，[K, L, L]

    def __post_init__(self) -> None:
        k, dim = self.means.shape if self.means.dim() == 2 else (-1, -1)
        shapes = [list(each.shape) for each in (self.weights, self.means, self.covariances)]
        if shapes != [[k], [k, dim], [k, dim, dim]]:
            raise ValueError(f"混合高斯要权重 [K]、均值 [K, L]、协方差 [K, L, L]，收到 {shapes[0]}、{shapes[1]}、{shapes[2]}。")
        factors, failed = torch.linalg.cholesky_ex(self.covariances)
        if failed.any():
            which = int(failed.nonzero()[0])
            raise ValueError(f"第 {which} 个分量的协方差不是正定的（从 0 数）：有的方向方差是 0；请加上一个下限，或用 fit_mixture。")
        object.__setattr__(self, "factors", factors)

    def log_joint(self, z: Tensor) -> Tensor:
        """log π_k N(z; m_k, Σ_k)，``[N, L]`` → ``[N, K]``，nat。"""
        z, dim = z.double(), self.means.shape[1]
        columns = []
        for weight, mean, factor in zip(self.weights, self.means, self.factors):  # 逐个分量：内存只有 [N, L]
            white = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)  # [L, N]
            log_det = factor.diagonal().log().sum()
            columns.append(weight.log() - log_det - 0.5 * (dim * math.log(2 * math.pi) + white.square().sum(0)))
        return torch.stack(columns, dim=1)

    def log_prob(self, z: Tensor) -> Tensor:
        """对数密度，``[N, L]`` → ``[N]``，nat，float64。"""
        return self.log_joint(z).logsumexp(dim=1)

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """抽 ``n`` 个样本 ``[n, L]``，float64；``generator`` 须在 CPU 上。"""
        chosen = torch.multinomial(self.weights, positive_int("n", n), replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=torch.float64, generator=generator)
        for k, (mean, factor) in enumerate(zip(self.means, self.factors)):
            z[chosen == k] = mean + z[chosen == k] @ factor.T
        return z


def fit_prior(model: VanillaVAE, images: Tensor, seed: int = 0) -> Mixture:
    """把 ``images`` 编码，抽样 z ~ q(z|x)，拟合混合高斯；同一颗种子得到同样的结果。

    Args:
        model: 在哪个设备都可以，用 eval 模式编码；不改动它。
        images: uint8 ``[N, C, H, W]``；多于 20,000 张就随机取这么多。
        seed: 取哪些图、噪声、留出哪些、起点的种子，非负。

    Raises:
        ValueError: 一张图也没有；模型编码不出有限的数。
    """
    if not len(images):
        raise ValueError("拟合先验要有训练图，收到 0 张；请至少给一张。")
    if len(images) > MAX_CODES:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:MAX_CODES]
        images = images[chosen.sort().values]
    return fit_mixture(codes(model, images, seed), seed)


@torch.no_grad()
def codes(model: VanillaVAE, images: Tensor, seed: int = 0) -> Tensor:
    """每张图抽一个 z ~ q(z|x)：uint8 ``[N, C, H, W]`` → float64 ``[N, L]``，在 CPU 上；噪声在任何设备上都相同。"""
    weight, rng, parts = next(model.parameters()), np.random.default_rng(seed), []
    with eval_mode(model):
        for part in images.split(256):
            mu, log_var = (value.cpu().double() for value in model.encode(to_float(part.to(weight.device)).to(weight.dtype)))
            parts.append(mu + torch.exp(0.5 * log_var) * torch.from_numpy(rng.standard_normal(mu.shape)))
    return torch.cat(parts)


def fit_mixture(z: Tensor, seed: int = 0, components: tuple[int, ...] = COMPONENTS) -> Mixture:
    """由样本 ``[N, L]`` 拟合混合高斯：留出五分之一，按它的对数似然选分量的个数，再用全部样本拟合一次。

    多几个分量，留出的对数似然要高出一个标准误差才算数；一个分量至少要摊到 L + 1 个样本，否则连它的协方差也定不下来；样本太少时因此退到一个高斯。
    """
    z = z.detach().cpu().double()
    if z.dim() != 2 or not z.numel():
        raise ValueError(f"拟合先验要用编码 [N, L]，收到 {list(z.shape)}；一行一个编码，至少一行。")
    if not z.isfinite().all():
        raise ValueError(f"拟合先验要用有限的数，收到的 {list(z.shape)} 里有 {int((~z.isfinite()).sum())} 个不是；请检查模型的权重。")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(z), generator=generator)
    held, kept = z[order[: len(z) // 5]], z[order[len(z) // 5 :]]
    best, chosen, misses = None, 1, 0
    for k in (k for k in components if k * (z.shape[1] + 1) <= len(kept)):
        *_, (mixture, _) = expectation_maximization(kept, k, generator)
        scores = mixture.log_prob(held)
        gain = scores if best is None else scores - best
        if best is None or gain.mean() > gain.std() / math.sqrt(len(gain)):
            best, chosen, misses = scores, k, 0
        elif (misses := misses + 1) == 2:  # 有时两个不比一个好，四个才好
            break
    *_, (mixture, _) = expectation_maximization(z, chosen, generator)
    return mixture


def expectation_maximization(
    z: Tensor, k: int, generator: Generator, max_steps: int = 60, tolerance: float = 1e-3
) -> Iterator[tuple[Mixture, float]]:
    r"""EM，每走一步给出（混合高斯，目标），目标单调不减，每个样本升得少于 ``tolerance`` nat 就停。

    每个分量的协方差有一个先验，相当于多看见一个以全体的协方差 Σ₀ 散布的样本：Σ_k = (n_k S_k + Σ₀) / (n_k + 1)。
    目标因此是 (1/N) [Σ_n log p(z_n) − ½ Σ_k (log|Σ_k| + tr(Σ_k⁻¹ Σ₀))]，M 步正是它的最大值；
    分量缩到一个点时第二项趋于 −∞，所以不会有无穷大的似然，协方差总是正定的。
    """
    pooled = _pooled_covariance(z)
    resp = _start(z, k, torch.linalg.cholesky(pooled), generator)  # [N, K]，各样本属于各分量的概率
    before = -math.inf
    for _ in range(max_steps):
        mixture = _maximize(z, resp, pooled)
        joint = mixture.log_joint(z)
        log_prob = joint.logsumexp(dim=1)
        objective = (log_prob.sum().item() + _log_prior(mixture, pooled)) / len(z)
        yield mixture, objective
        if objective - before < tolerance:
            return
        before, resp = objective, (joint - log_prob[:, None]).exp()


def _maximize(z: Tensor, resp: Tensor, pooled: Tensor) -> Mixture:
    counts = resp.sum(0)  # [K]
    empty = counts < 1e-8  # 没有样本的分量：回到全体的均值与协方差，权重趋于 0
    means = torch.where(empty[:, None], z.mean(0), resp.T @ z / counts.clamp_min(1e-8)[:, None])
    covariances = []
    for k, mean in enumerate(means):
        centred = z - mean
        scatter = (resp[:, k, None] * centred).T @ centred
        covariances.append((scatter + pooled) / (counts[k] + 1))
    weights = counts.clamp_min(1e-300) / counts.clamp_min(1e-300).sum()
    covariance = torch.stack(covariances)
    return Mixture(weights, means, (covariance + covariance.mT) / 2)


def _log_prior(mixture: Mixture, pooled: Tensor) -> float:
    log_det = 2 * mixture.factors.diagonal(dim1=1, dim2=2).log().sum(1)
    trace = torch.cholesky_solve(pooled.expand_as(mixture.factors), mixture.factors).diagonal(dim1=1, dim2=2).sum(1)
    return -0.5 * (log_det + trace).sum().item()


def _pooled_covariance(z: Tensor) -> Tensor:
    """全体的协方差 ``[L, L]``；样本不比维数多时样本协方差不满秩，于是按 L/(N + L) 向对角收缩，再加下限。"""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / len(z)
    diagonal = covariance.diagonal().diag()
    share = z.shape[1] / (len(z) + z.shape[1])
    floor = FLOOR * torch.clamp(covariance.diagonal().max(), min=1.0)
    return torch.lerp(covariance, diagonal, share) + floor * torch.eye(z.shape[1], dtype=z.dtype)


def _start(z: Tensor, k: int, factor: Tensor, generator: Generator) -> Tensor:
    """k-means++：在白化的坐标里，离已选的点越远越容易选中；每个样本归最近的点。``[N, K]``，0 或 1。"""
    white = torch.linalg.solve_triangular(factor, (z - z.mean(0)).T, upper=False).T
    distances = []  # 每个样本到各中心的平方距离
    nearest = torch.ones(len(z), dtype=z.dtype)
    for _ in range(k):
        if nearest.sum() <= 0:  # 样本都与已选的相同，再选也是重复
            break
        centre = white[torch.multinomial(nearest, 1, generator=generator)]
        distances.append((white - centre).square().sum(1))
        nearest = torch.stack(distances).amin(0)
    owner = torch.stack(distances, dim=1).argmin(1)
    return torch.nn.functional.one_hot(owner, k).to(z.dtype)


def load_prior(path: Path, key: str) -> Mixture | None:
    """存好的先验；没有、读不出，或不是 ``key`` 那一份的，都是 None，重新拟合就是。"""
    with suppress(Exception):  # 读坏了的文件，torch.load 什么错都可能报
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["key"] == key:
            return Mixture(saved["weights"], saved["means"], saved["covariances"])
    return None


def save_prior(path: Path, key: str, mixture: Mixture) -> None:
    """存下先验；``key`` 说明它是哪个模型、哪些图的。"""
    state = {"key": key, "weights": mixture.weights, "means": mixture.means, "covariances": mixture.covariances}
    write_atomically(path, lambda file: torch.save(state, file))
