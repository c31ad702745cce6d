"""练习 12.1 的题：KL 与求和。写完测试之前先别看。"""

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vaelab.bugs.registry import right, wrong

# —— gaussian_kl ——
# 错：对数项写成 log_var_p − log_var_q，少了 ½。q = p 时它仍是 0，最小值却挪到了别处，那里是负的。
# 最便宜的测试：q = p 处的梯度应为零，或随手取一些参数看有没有负的。
# 出自：条件先验、分层 VAE 的教程里两个高斯之间的 KL。


@right("gaussian_kl")
def gaussian_kl(mu_q: Tensor, log_var_q: Tensor, mu_p: Tensor, log_var_p: Tensor) -> Tensor:
    """KL(q‖p)，q、p 都是对角高斯。

    四个参数都是 [B, L]，log_var 是对数方差 log σ²；返回 [B]，单位 nat，对 L 求和。
    """
    ratio = (log_var_q - log_var_p).exp()
    return 0.5 * (log_var_p - log_var_q + ratio + (mu_q - mu_p) ** 2 / log_var_p.exp() - 1).sum(1)


@right("gaussian_kl")
def _(mu_q, log_var_q, mu_p, log_var_p):
    q, p = Normal(mu_q, (log_var_q / 2).exp()), Normal(mu_p, (log_var_p / 2).exp())
    return kl_divergence(q, p).sum(-1)


@right("gaussian_kl")
def _(mu_q, log_var_q, mu_p, log_var_p):
    cross = 0.5 * (log_var_p + (log_var_q.exp() + (mu_q - mu_p).square()) * (-log_var_p).exp())  # 交叉熵，省去 ½log 2π
    return (cross - 0.5 * (1 + log_var_q)).sum(dim=1)  # 减去熵


@wrong("gaussian_kl", "KL 在 q = p 处不只是 0，那里还应当是最小值：试试那里的梯度，或找找有没有负的")
def _(mu_q, log_var_q, mu_p, log_var_p):
    ratio = (log_var_q.exp() + (mu_q - mu_p) ** 2) / log_var_p.exp()
    return (log_var_p - log_var_q + 0.5 * (ratio - 1)).sum(1)


# —— kl_from_log_std ——
# 错：方差该是 exp(2·log_std)，写成了 exp(log_std)。log_std = 0 时看不出。最小值在标准差 2 处，是负的。
# 最便宜的测试：不小于 0；或 log_std 不为 0 时与 torch 的 kl_divergence 比。
# 出自：编码器输出 log_std 的实现，从输出 log_var 的代码改来。


@right("kl_from_log_std")
def kl_from_log_std(mu: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mu, std²)‖N(0, 1))。

    mu、log_std 都是 [B, L]，log_std 是对数标准差 log σ；返回 [B]，单位 nat，对 L 求和。
    """
    return 0.5 * (mu**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)


@right("kl_from_log_std")
def _(mu, log_std):
    return kl_divergence(Normal(mu, log_std.exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(1)


@right("kl_from_log_std")
def _(mu, log_std):
    return (0.5 * mu.square() + 0.5 * torch.expm1(2 * log_std) - log_std).sum(dim=-1)


@wrong("kl_from_log_std", "log_std = 0 时什么都看不出；换一个标准差")
def _(mu, log_std):
    return 0.5 * (mu**2 + log_std.exp() - 1 - 2 * log_std).sum(1)


# —— kl_of_batch ——
# 错一：sum() 没有写维，整批都加了起来；批大一倍，KL 大一倍。错二：对 L 也取了平均。
# 最便宜的测试：把一批复制一遍，值不应变；再拿一张图自己的 KL 来比。
# 出自：各家的训练循环；换一个批的大小，KL 的权重就变了。


@right("kl_of_batch")
def kl_of_batch(mu: Tensor, log_var: Tensor) -> Tensor:
    """一批图的 KL(N(mu, σ²)‖N(0, 1))。

    mu、log_var 都是 [B, L]；返回零维张量，单位 nat 每张图：对 L 求和，对 B 平均。
    """
    return 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(dim=1).mean()


@right("kl_of_batch")
def _(mu, log_var):
    return -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum() / len(mu)


@right("kl_of_batch")
def _(mu, log_var):
    return mu.shape[1] * (0.5 * (mu**2 + log_var.expm1() - log_var)).mean()


@wrong("kl_of_batch", "把一批复制一遍，平均不应变")
def _(mu, log_var):
    return -0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp())


@wrong("kl_of_batch", "复制一批看不出的，换一个办法：一张图、几维，值应当是各维的和")
def _(mu, log_var):
    return -0.5 * torch.mean(1 + log_var - mu**2 - log_var.exp())


# —— full_kl ——
# 错：−½L 里的 L 取成了批的大小 B。B = L 时分毫不差。
# 最便宜的测试：B ≠ L 的批；或标准正态自己，KL 应为 0。
# 出自：序列、全协方差的 KL，维数从错的那一维读来。


@right("full_kl")
def full_kl(mean: Tensor, cov: Tensor) -> Tensor:
    """KL(N(mean, cov)‖N(0, I))，全协方差。

    mean 是 [B, L]，cov 是 [B, L, L]，对称正定；返回 [B]，单位 nat。
    """
    trace = cov.diagonal(dim1=1, dim2=2).sum(1)
    return 0.5 * (trace + mean.square().sum(1) - mean.shape[1] - torch.logdet(cov))


@right("full_kl")
def _(mean, cov):
    q = MultivariateNormal(mean, cov)
    return kl_divergence(q, MultivariateNormal(torch.zeros_like(mean), torch.eye(mean.shape[1], dtype=mean.dtype)))


@right("full_kl")
def _(mean, cov):
    values = torch.linalg.eigvalsh(cov)  # [B, L]
    return 0.5 * (values - 1 - values.log()).sum(1) + 0.5 * (mean * mean).sum(1)


@wrong("full_kl", "你的批，B 与 L 是不是一样大？让各个大小都不同")
def _(mean, cov):
    count = len(mean)
    return 0.5 * (cov.diagonal(dim1=1, dim2=2).sum(1) + (mean**2).sum(1) - count - torch.logdet(cov))
