"""练习 12.3 的题：界、估计量与参考答案。写完测试之前先别看。"""

import math

import torch
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from vaelab.bugs.registry import right, wrong

LOG_2PI = math.log(2 * math.pi)

# —— elbo ——
# 错一：抽样的标准差是 exp(log_var)，KL 里却是 exp(log_var / 2)。错二：eps 乘了 0.01（“先把噪声调小，好训练”）。
# 两样都让重建占了便宜而 KL 不付钱，ELBO 可以高过 log p(x)。
# 最便宜的测试：线性高斯的 log p(x) 有闭式解，ELBO 不能超过它；q 取真后验时，两者相等。
# 出自：各家的 reparameterize。


@right("elbo")
def elbo(x: Tensor, mu: Tensor, log_var: Tensor, weight: Tensor, noise_var: float, n: int) -> Tensor:
    """线性解码器 p(x|z) = N(weight·z, noise_var·I)、先验 N(0, I)、q = N(mu, diag(exp(log_var))) 的 ELBO。

    x 是 [B, D]，mu、log_var 是 [B, L]，weight 是 [D, L]；由至多 n 个样本估计，所以可以带抽样的误差。
    返回 [B]，单位 nat，常数写全。只约定值，不约定梯度。
    """
    z = mu + (log_var / 2).exp() * torch.randn(n, *mu.shape, dtype=mu.dtype)  # [n, B, L]
    misfit = (x - z @ weight.T).square().sum(2).mean(0)
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)
    return -0.5 * (misfit / noise_var + x.shape[1] * (LOG_2PI + math.log(noise_var))) - kl


@right("elbo")
def _(x, mu, log_var, weight, noise_var, n):
    q, std = Independent(Normal(mu, (log_var / 2).exp()), 1), math.sqrt(noise_var)
    z = q.sample((n,))
    log_joint = Normal(z @ weight.T, std).log_prob(x).sum(2) + Normal(0.0, 1.0).log_prob(z).sum(2)
    return (log_joint - q.log_prob(z)).mean(0)


@right("elbo")
def _(x, mu, log_var, weight, noise_var, n):
    spread = log_var.exp() @ weight.square().sum(0)  # 期望由闭式解，一个样本也不抽
    misfit = (x - mu @ weight.T).square().sum(1) + spread
    kl = kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0 * mu, 1 + 0 * mu)).sum(1)
    return -misfit / (2 * noise_var) - x.shape[1] / 2 * math.log(2 * math.pi * noise_var) - kl


@wrong("elbo", "界不能高过 log p(x)：线性高斯的 log p(x) 有闭式解，让 q 贴近真后验，log_var 不要是 0")
def _(x, mu, log_var, weight, noise_var, n):
    z = mu + log_var.exp() * torch.randn(n, *mu.shape, dtype=mu.dtype)
    misfit = (x - z @ weight.T).square().sum(2).mean(0)
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)
    return -0.5 * (misfit / noise_var + x.shape[1] * (LOG_2PI + math.log(noise_var))) - kl


@wrong("elbo", "界不能高过 log p(x)：线性高斯的 log p(x) 有闭式解，让 q 贴近真后验")
def _(x, mu, log_var, weight, noise_var, n):
    z = mu + 0.01 * (log_var / 2).exp() * torch.randn(n, *mu.shape, dtype=mu.dtype)
    log_lik = Normal(z @ weight.T, math.sqrt(noise_var)).log_prob(x).sum(2).mean(0)
    return log_lik - 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)


# —— iwae ——
# 错：权重取成 softmax(+loss)，最差的样本最重。K = 1 时看不出。
# 最便宜的测试：权重 1 与 3，答案是 log 2；或不低于 log_w 的平均（Jensen）。
# 出自：由“损失”改写成重要性加权的实现，正负号只改了一处。


@right("iwae")
def iwae(log_w: Tensor) -> Tensor:
    """重要性加权下界 log (1/K) Σ_k w_k。

    log_w 是 [K, B]，log w = log p(x, z_k) − log q(z_k|x)；返回 [B]，单位 nat。
    """
    return log_w.logsumexp(0) - math.log(len(log_w))


@right("iwae")
def _(log_w):
    top = log_w.amax(0)
    return top + (log_w - top).exp().mean(0).log()


@right("iwae")
def _(log_w):
    total = log_w[0]
    for each in log_w[1:]:
        total = torch.logaddexp(total, each)
    return total - math.log(log_w.shape[0])


@wrong("iwae", "K = 1 时看不出；几个权重不同的样本，答案写得出来")
def _(log_w):
    loss = -log_w
    return -(loss.softmax(0) * loss).sum(0)


# —— total_correlation ——
# 错：混合的密度漏了 −log N。联合的一份漏一个，各维的漏 L 个，差 (L − 1)·log N。N = 1 或 L = 1 时看不出。
# 最便宜的测试：N 个后验一模一样，各维独立，应为 0。
# 出自：把 KL 拆成互信息、总相关与各维 KL 的实现。


@right("total_correlation")
def total_correlation(z: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """总相关的估计：log q(z) − Σ_j log q(z_j) 对 z 的平均，q(z) 是 N 个后验的等权混合。

    z 是 [B, L]，mu、log_var 是 [N, L]；返回零维张量，单位 nat。
    """
    each = Normal(mu, (log_var / 2).exp()).log_prob(z[:, None])  # [B, N, L]
    joint = each.sum(2).logsumexp(1) - math.log(len(mu))
    marginals = each.logsumexp(1) - math.log(len(mu))  # [B, L]
    return (joint - marginals.sum(1)).mean()


@right("total_correlation")
def _(z, mu, log_var):
    each = -0.5 * ((z[:, None] - mu) ** 2 / log_var.exp() + log_var + LOG_2PI)
    count, dim = mu.shape
    return (each.sum(2).logsumexp(1) - each.logsumexp(1).sum(1)).mean() + (dim - 1) * math.log(count)


@right("total_correlation")
def _(z, mu, log_var):
    each = -0.5 * ((z[:, None] - mu) ** 2 / log_var.exp() + log_var)  # ½log 2π 两边各有 L 份，相消
    scale = each.amax(1, keepdim=True)
    marginals = ((each - scale).exp().mean(1)).log() + scale[:, 0]
    whole = each.sum(2)
    top = whole.amax(1, keepdim=True)
    return ((whole - top).exp().mean(1).log() + top[:, 0] - marginals.sum(1)).mean()


@wrong("total_correlation", "各维独立时应为 0：N 个后验一模一样就是这样；N、L 都要大于 1")
def _(z, mu, log_var):
    each = Normal(mu, (log_var / 2).exp()).log_prob(z[:, None])
    return (each.sum(2).logsumexp(1) - each.logsumexp(1).sum(1)).mean()


# —— fit_ppca ——
# 错：噪声方差取成残差绝对值的平均再平方，W 也没有减去噪声方差。画出来的主方向仍然是对的。
# 最便宜的测试：模型的协方差，迹应等于数据的；前 K 个特征值也应相等。
# 出自：概率 PCA 的演示。


@right("fit_ppca")
def fit_ppca(x: Tensor, K: int):
    """概率 PCA 的最大似然解：x ~ N(平均, weight·weightᵀ + noise_var·I)。

    x 是 [N, D]，K < D；返回（weight [D, K]，noise_var：一个数或零维张量）。协方差除以 N。weight 可以差一个旋转或正负号。
    """
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))  # 从小到大
    noise_var = values[:-K].mean()
    return vectors[:, -K:] * (values[-K:] - noise_var).clamp_min(0).sqrt(), noise_var


@right("fit_ppca")
def _(x, K):
    centred = x - x.mean(0)
    _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
    values = singular**2 / len(x)
    noise_var = (centred.square().sum() / len(x) - values[:K].sum()) / (x.shape[1] - K)
    return rows[:K].T * (values[:K] - noise_var).clamp_min(0).sqrt(), noise_var


@right("fit_ppca")
def _(x, K):
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    noise_var = float(values[:-K].mean())
    rotation = torch.linalg.qr(torch.randn(K, K, dtype=x.dtype)).Q
    return vectors[:, -K:] @ (values[-K:] - noise_var).clamp_min(0).sqrt().diag() @ rotation, noise_var


@wrong("fit_ppca", "模型自己的协方差，与数据的相比怎样？迹应相等，前 K 个特征值也应相等")
def _(x, K):
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    kept = vectors[:, -K:]
    residual = centred - centred @ kept @ kept.T
    return kept * values[-K:].sqrt(), residual.abs().mean() ** 2


# —— cyclical_weights ——
# 错：位置由一轮之内的第几批算，循环在每一轮里都重来；批数够多时每轮走完几个循环，不够时从来走不到顶。
# 最便宜的测试：只有一个循环，后一半应全是 1。
# 出自：循环退火（cyclical annealing）的训练脚本。


@right("cyclical_weights")
def cyclical_weights(epochs: int, batches: int, cycles: int) -> Tensor:
    """KL 权重的循环退火：整个训练均分成 cycles 段，每段前一半由 0 直线升到 1，后一半停在 1。

    共 epochs·batches 步，步数能被 2·cycles 整除；第 t 步取所在段内的进度 s ∈ [0, 1)，权重 min(1, 2s)。
    返回 [epochs·batches]。
    """
    steps = epochs * batches
    progress = torch.arange(steps) * cycles % steps / steps
    return (2 * progress).clamp_max(1.0)


@right("cyclical_weights")
def _(epochs, batches, cycles):
    length = epochs * batches // cycles
    weights = []
    for epoch in range(epochs):
        for batch in range(batches):
            step = (epoch * batches + batch) % length
            weights.append(min(1.0, 2 * step / length))
    return torch.tensor(weights)


@right("cyclical_weights")
def _(epochs, batches, cycles):
    half = epochs * batches // cycles // 2
    one = torch.cat([torch.arange(half) / half, torch.ones(half)])
    return one.repeat(cycles)


@wrong("cyclical_weights", "一段要比一轮长，或除不尽一轮：最省事的是好几轮、只有一个循环；看后一半是不是 1")
def _(epochs, batches, cycles):
    length = epochs * batches // cycles
    within = torch.arange(batches).repeat(epochs)  # 每一轮都从头数
    return (2 * (within % length) / length).clamp_max(1.0)
