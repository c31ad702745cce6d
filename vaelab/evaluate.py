r"""VAE 学得怎样：测试集上的 ELBO、重要性加权下界，和读懂它们所需的几个量。

模型约定：先验 p(z) = N(0, I)，解码器 p(x|z) = N(decode(z), σ²I)，近似后验 q(z|x) = N(mu, diag(exp(log_var)))。
所有对数都取自然对数，单位 nat；所有高斯常数都保留。像素坐标在 [-1, 1]，D = C·H·W。

来源：ELBO 见 Kingma & Welling, arXiv:1312.6114，式 (3)；最优 σ² 见 Rybkin et al., arXiv:2006.13202；
重要性加权下界与活跃维数见 Burda et al., arXiv:1509.00519，式 (8) 与第 5.2 节。
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vaelab.images import to_float
from vanilla_vae import eval_mode, positive_int

Number = TypeVar("Number", float, Tensor)
ACTIVE_VARIANCE = 0.01
"""一维隐变量算作活跃的门槛：它的后验均值 mu_j 在数据上的方差超过此数（arXiv:1509.00519，第 5.2 节）。"""


def gaussian_log_density(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """逐元素的 log N(x; mean, exp(log_var))，单位 nat，形状由三者广播而来。"""
    return -0.5 * (math.log(2 * math.pi) + log_var + (x - mean) ** 2 * torch.exp(-log_var))


def gaussian_log_likelihood(mse: Number, sigma2: float, dim: int) -> Number:
    """log N(x; x̂, σ²I) = −D/2·(log 2πσ² + MSE/σ²)，单位 nat；``mse`` 是 D 个像素平方误差的平均。"""
    return -0.5 * dim * (math.log(2 * math.pi * sigma2) + mse / sigma2)


def kl_to_standard_normal(mu: Tensor, log_var: Tensor) -> Tensor:
    """逐维的 KL(N(mu, exp(log_var)) ‖ N(0, 1))，``[B, L]`` → ``[B, L]``，单位 nat（arXiv:1312.6114，附录 B）。"""
    # expm1 在 log_var ≈ 0 处不损失精度：坍塌的维给出 0，而不是负的舍入误差。
    return 0.5 * (mu**2 + torch.expm1(log_var) - log_var)


def elbo_from_mse(mse: float, kld: float, dim: int) -> float:
    """σ² 取最优值（即 MSE 本身）时的 ELBO = −D/2·(log(2π·MSE) + 1) − KL，单位 nat/图。

    MSE 为 0 时密度没有上界，返回 ``inf``。
    """
    return (gaussian_log_likelihood(mse, mse, dim) if mse else math.inf) - kld


def optimal_kld_weight(mse: Number, dim: int) -> Number:
    """σ² = MSE 对应的 KL 权重 w = 2σ²/D，可直接作为 ``loss_function`` 的 ``M_N``。"""
    return 2 * mse / dim


def bits_per_dim(log_density: float, dim: int) -> float:
    r"""[-1, 1]^D 上的对数密度（nat/图）→ 以 8 位灰阶为单位的比特/维。

    灰阶 y = 127.5·(x + 1)，故 p(y) = p(x) / 127.5^D，−log₂ p(y) / D = −log p(x) / (D·ln 2) + log₂ 127.5。
    这是在整数灰阶处取的密度，没有加去量化噪声：它不是码长，可以低于 0，
    只宜与同样计算的数比较，不宜与离散似然模型的比特/维比较。
    """
    return -log_density / (dim * math.log(2)) + math.log2(127.5)


@dataclass(frozen=True)
class Evaluation:
    """:func:`evaluate` 的结果；对图像取平均的量按每张图计。

    Attributes:
        count: 图像数 N。
        dim: 每张图的元素数 D = C·H·W。
        mse: 每张图取一个 z ~ q(z|x) 重建的 MSE，[-1, 1] 坐标的平方。
        sigma2: 算 ELBO 所用的解码器方差；不指定就是本集合上最优的，即 mse 本身。
        elbo: 解码器方差取 sigma2 时的 ELBO，nat/图，= reconstruction − kld。
        elbo_stderr: elbo 的标准误差，来自图与图之间的差异；只有一张图时是 ``nan``。
        reconstruction: E_q[log p(x|z)]，nat/图。
        kld: KL(q(z|x) ‖ p(z))，nat/图，非负。
        bits_per_dim: ELBO 换成 8 位灰阶的比特/维，越低越好；它是密度，限度见函数 :func:`bits_per_dim`。
        kld_per_dim: 每一维隐变量的 KL ``[L]``，float64，nat。
        active_units: 活跃维数，即 Var_x(mu_j) > 0.01 的 j 的个数。
        psnr: 由 mu 重建（不抽样）的峰值信噪比，dB，峰峰值 2；由整个集合的 MSE 算得，不是逐图 PSNR 的平均。
        baseline_mse: 对照：每个像素都猜本集合的平均图时的 MSE。
        optimal_kld_weight: 2·mse/D，见函数 :func:`optimal_kld_weight`。
    """

    count: int
    dim: int
    mse: float
    sigma2: float
    elbo: float
    elbo_stderr: float
    reconstruction: float
    kld: float
    bits_per_dim: float
    kld_per_dim: Tensor
    active_units: int
    psnr: float
    baseline_mse: float
    optimal_kld_weight: float

    def summary(self) -> str:
        """给终端看的几行中文，带单位。"""
        return "\n".join(
            (
                f"测试集 {self.count} 张图，每张 D = {self.dim} 个数",
                f"  ELBO      {self.elbo:.1f} nat/图，{self.bits_per_dim:.3f} 比特/维（8 位灰阶的密度，不是码长）",
                f"  重建项    {self.reconstruction:.1f} nat/图",
                f"  KL        {self.kld:.2f} nat/图，活跃维数 {self.active_units}/{len(self.kld_per_dim)}",
                f"  MSE       {self.mse:.5f}（只猜平均图：{self.baseline_mse:.5f}），PSNR {self.psnr:.2f} dB",
                f"  最优 σ²   {self.mse:.5f}，在这些图上拟合；对应的 KL 权重 2σ²/D = {self.optimal_kld_weight:.3g}",
            )
        )


class _Moments:
    """逐坐标的均值与方差，一批一批地合并，float64（Chan, Golub & LeVeque, 1983）。"""

    def __init__(self) -> None:
        self.count, self.mean, self.m2 = 0, 0.0, 0.0

    def update(self, values: Tensor) -> None:
        """并入一批 ``[B, ...]``。"""
        size = len(values)
        mean = values.mean(dim=0)
        delta, total = mean - self.mean, self.count + size
        self.m2 = self.m2 + (values - mean).square().sum(dim=0) + delta**2 * (self.count * size / total)
        self.mean, self.count = self.mean + delta * (size / total), total


class _Probe:
    """把模型包成 CPU 上 float64 的三步：取一批图、编码、由 z 求逐图 MSE。"""

    def __init__(self, model: nn.Module, images: Tensor, seed: int) -> None:
        self.model, self.images = model, images
        self.weight = next(model.parameters())
        # numpy 的正态抽样逐个进行，分几次抽与一次抽完相同，所以结果与批大小无关；torch.randn 不是这样。
        self.rng = np.random.default_rng(seed)

    def batches(self, size: int) -> Iterator[Tensor]:
        for start in range(0, len(self.images), size):
            yield to_float(self.images[start : start + size].to(self.weight.device))  # 搬的是 uint8，只搬一次

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.model.encode(x.to(self.weight.dtype))
        return mu.cpu().double(), log_var.cpu().double()  # 先搬后转：MPS 没有 float64

    def draw(self, mu: Tensor, log_var: Tensor, samples: int) -> Tensor:
        """z ~ q(z|x)，``[B, L]`` → ``[B, samples, L]``。"""
        eps = torch.from_numpy(self.rng.standard_normal((len(mu), samples, mu.shape[1])))
        return mu[:, None] + torch.exp(0.5 * log_var)[:, None] * eps

    def mse(self, x: Tensor, z: Tensor) -> Tensor:
        """``x [B, C, H, W]``、``z [B, S, L]`` → 每张图每个样本的 MSE ``[B, S]``。"""
        recons = self.model.decode(z.flatten(0, 1).to(self.weight.dtype).to(self.weight.device))
        recons = recons.unflatten(0, z.shape[:2])
        dtype = torch.promote_types(recons.dtype, torch.float32)  # 半精度的误差也用 float32 求和
        error = recons.to(dtype) - x[:, None].to(dtype)
        return error.square().flatten(2).mean(dim=2).cpu().double()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, *, sigma2: float | None = None, batch_size: int = 256, seed: int = 0) -> Evaluation:
    """在一组图像上评价模型；不改动模型，占用的内存不随 N 增长。

    不指定 ``sigma2``，它就取在这组图像上最优的值：在测试集上也拟合了一个数，ELBO 因此不低于用别的 σ² 的。
    要测试集完全没有参与，用训练集上的：``evaluate(model, test, sigma2=evaluate(model, train).mse)``。

    Args:
        model: 有 ``encode(x) -> [mu, log_var]`` 与 ``decode(z)`` 的模块，在哪个设备都可以。
        images: uint8 ``[N, C, H, W]``。
        sigma2: 解码器方差，正数；None 取这组图像上最优的，即 MSE。
        batch_size: 一次送入模型的图像数；除舍入外不影响结果。
        seed: 噪声的种子，非负；同一颗种子在任何设备上噪声相同。

    Raises:
        TypeError, ValueError: 图像不是非空的 uint8 ``[N, C, H, W]``，或其余参数不合要求。
    """
    _check(images, seed)
    if sigma2 is not None:
        _check_variance(sigma2)
    probe = _Probe(model, images, seed)
    pixels, means, terms = _Moments(), _Moments(), _Moments()
    kld_per_dim, sampled_error, mean_error = 0.0, 0.0, 0.0
    with eval_mode(model):
        for x in probe.batches(positive_int("batch_size", batch_size)):
            mu, log_var = probe.encode(x)
            kl = kl_to_standard_normal(mu, log_var)
            error = probe.mse(x, probe.draw(mu, log_var, 1))[:, 0]
            kld_per_dim = kld_per_dim + kl.sum(dim=0)
            sampled_error += error.sum().item()
            terms.update(torch.stack([error, kl.sum(dim=1), error + kl.sum(dim=1)], dim=1))
            mean_error += probe.mse(x, mu[:, None]).sum().item()
            pixels.update((x.cpu() if x.device.type == "mps" else x).double())  # MPS 没有 float64
            means.update(mu)
    count, dim = len(images), images[0].numel()
    mse, kld_per_dim = sampled_error / count, kld_per_dim / count
    kld = kld_per_dim.sum().item()
    reconstruction = elbo_from_mse(mse, 0.0, dim) if sigma2 is None else gaussian_log_likelihood(mse, sigma2, dim)
    sigma2 = mse if sigma2 is None else sigma2
    return Evaluation(
        count=count,
        dim=dim,
        mse=mse,
        sigma2=sigma2,
        elbo=reconstruction - kld,
        elbo_stderr=_elbo_stderr(terms, sigma2, dim),
        reconstruction=reconstruction,
        kld=kld,
        bits_per_dim=bits_per_dim(reconstruction - kld, dim),
        kld_per_dim=kld_per_dim,
        active_units=int((means.m2 / count > ACTIVE_VARIANCE).sum()),
        psnr=10 * math.log10(4 * count / mean_error) if mean_error else math.inf,
        baseline_mse=(pixels.m2 / count).mean().item(),
        optimal_kld_weight=optimal_kld_weight(mse, dim),
    )


def _elbo_stderr(terms: _Moments, sigma2: float, dim: int) -> float:
    """逐图的 D·MSE/(2σ²) + KL 的平均的标准误差；``terms`` 是 MSE、KL 与两者之和，协方差由和的方差得来。

    σ² 在同一组图上取了最优也照样成立：那里 ELBO 对 σ² 的导数为零。
    """
    if terms.count < 2 or not sigma2:
        return math.nan
    error, kl, both = (terms.m2 / (terms.count - 1)).tolist()
    a = dim / (2 * sigma2)
    return math.sqrt(max(0.0, (a * a - a) * error + a * both + (1 - a) * kl) / terms.count)


@torch.no_grad()
def log_likelihood_bound(model: nn.Module, images: Tensor, sigma2: float, num_samples: int, *, chunk: int = 64, seed: int = 0) -> tuple[float, float]:
    r"""重要性加权下界 E[log 1/K Σ_k p(x, z_k) / q(z_k|x)]，z_k ~ q（arXiv:1509.00519，式 (8)）。

    K = 1 时期望等于 ELBO；K 越大越紧，趋于 log p(x)。是期望不超过真值：一次估计可以因抽样误差略高于它。

    Args:
        model, images, seed: 同 :func:`evaluate`。
        sigma2: 解码器方差，通常取 ``evaluate(...).sigma2``。
        num_samples: 每张图的样本数 K。
        chunk: 一次解码的 z 的个数；内存只随它增长，除舍入外不影响结果。

    Returns:
        ``(下界, 标准误差)``，nat/图，对图像取平均；标准误差来自图像之间的差异，只有一张图时是 ``nan``。
    """
    _check(images, seed)
    _check_variance(sigma2)
    num_samples, chunk = positive_int("num_samples", num_samples), positive_int("chunk", chunk)
    probe = _Probe(model, images, seed)
    dim, bounds, zero = images[0].numel(), _Moments(), torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        for x in probe.batches(max(1, chunk // num_samples)):
            mu, log_var = probe.encode(x)
            log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64)
            for start in range(0, num_samples, chunk):
                z = probe.draw(mu, log_var, min(chunk, num_samples - start))
                log_prior = gaussian_log_density(z, zero, zero).sum(dim=2)
                log_q = gaussian_log_density(z, mu[:, None], log_var[:, None]).sum(dim=2)
                log_w = gaussian_log_likelihood(probe.mse(x, z), sigma2, dim) + log_prior - log_q
                log_sum = torch.logaddexp(log_sum, log_w.logsumexp(dim=1))
            bounds.update(log_sum - math.log(num_samples))
    n = bounds.count
    return float(bounds.mean), math.sqrt(bounds.m2 / (n - 1) / n) if n > 1 else math.nan


def _check(images: Tensor, seed: int) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        came = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"评价用的图像应为 uint8 张量 [N, C, H, W]，收到 {came}；[-1, 1] 的浮点图像请先换回 uint8。")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"评价用的图像应为非空的 [N, C, H, W]，收到 {list(images.shape)}；请至少给一张图。")
    if seed < 0:
        raise ValueError(f"seed 应为非负整数，收到 {seed}；请改为 0 或更大的整数。")


def _check_variance(sigma2: float) -> None:
    if not (math.isfinite(sigma2) and sigma2 > 0):
        raise ValueError(f"sigma2（解码器方差）应为有限的正数，收到 {sigma2}；通常取 evaluate(...).sigma2。")
