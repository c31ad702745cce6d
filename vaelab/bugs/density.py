"""练习 12.2 的题：密度与抽样。写完测试之前先别看。"""

import math

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from vaelab.bugs.registry import right, wrong

LOG_2PI = math.log(2 * math.pi)

# —— log_normal ——
# 错：每个元素减了 D 份 ½log 2π，再对 D 求和，成了 D² 份。D = 1 时看不出。
# 最便宜的测试：D = 2 的网格上积分应为 1；或与 torch 比。
# 出自：自己写对数密度的正规流、归一化常数“为了好看”写全的 VAE。


@right("log_normal")
def log_normal(x: Tensor, mu: Tensor, log_var: Tensor) -> Tensor:
    """对角高斯的对数密度 log N(x; mu, σ²)。

    三个参数都是 [B, D]，log_var 是 log σ²；返回 [B]，单位 nat，对 D 求和，常数写全。
    """
    return -0.5 * (LOG_2PI + log_var + (x - mu) ** 2 / log_var.exp()).sum(1)


@right("log_normal")
def _(x, mu, log_var):
    return Independent(Normal(mu, (0.5 * log_var).exp()), 1).log_prob(x)


@right("log_normal")
def _(x, mu, log_var):
    eps = (x - mu) * (-0.5 * log_var).exp()
    return -0.5 * eps.square().sum(1) - 0.5 * log_var.sum(1) - 0.5 * x.shape[1] * LOG_2PI


@wrong("log_normal", "密度的积分应为 1；一维看不出的，用二维")
def _(x, mu, log_var):
    constant = 0.5 * x.shape[1] * LOG_2PI
    return (-constant - 0.5 * log_var - 0.5 * (x - mu) ** 2 / log_var.exp()).sum(1)


# —— flow_log_prob ——
# 错：log|det| 已经对 D 求过和，又加到每一维上，再求和，算了 D 次。D = 1 或 Σ log_scale = 0 时看不出。
# 最便宜的测试：D = 2 的网格上积分应为 1。
# 出自：拿正规流作先验的 VAE。


@right("flow_log_prob")
def flow_log_prob(x: Tensor, shift: Tensor, log_scale: Tensor) -> Tensor:
    """x = shift + exp(log_scale)·u，u ~ N(0, I)：x 的对数密度。

    x 是 [B, D]，shift、log_scale 是 [D]；返回 [B]，单位 nat。
    """
    u = (x - shift) * (-log_scale).exp()
    return -0.5 * (u**2 + LOG_2PI).sum(1) - log_scale.sum()


@right("flow_log_prob")
def _(x, shift, log_scale):
    return Normal(shift, log_scale.exp()).log_prob(x).sum(-1)


@right("flow_log_prob")
def _(x, shift, log_scale):
    factor = torch.diag(log_scale.exp())
    return MultivariateNormal(shift, scale_tril=factor).log_prob(x)


@wrong("flow_log_prob", "密度的积分应为 1；一维、或缩放互相抵消时看不出")
def _(x, shift, log_scale):
    u = (x - shift) / log_scale.exp()
    log_det = -log_scale.sum()
    return (-0.5 * (u**2 + LOG_2PI) + log_det).sum(1)


# —— learned_prior ——
# 错：抽样的标准差写成 exp(log_var)，密度却是对的。log_var = 0 时看不出。
# 最便宜的测试：抽许多个，(z − mu)²/exp(log_var) 的平均应为 1。
# 出自：学出来的先验、条件先验的抽样。


@right("learned_prior")
def learned_prior(mu: Tensor, log_var: Tensor):
    """对角高斯先验，给出（抽样，对数密度）两个函数。

    mu、log_var 是 [L]。draw(n) 返回 [n, L]，来自同一个先验；log_prob(z) 收 [n, L]，返回 [n]，单位 nat。样本不必可导。
    """

    def draw(n: int) -> Tensor:
        return mu + (log_var / 2).exp() * torch.randn(n, len(mu), dtype=mu.dtype)

    def log_prob(z: Tensor) -> Tensor:
        return -0.5 * ((z - mu) ** 2 / log_var.exp() + log_var + LOG_2PI).sum(1)

    return draw, log_prob


@right("learned_prior")
def _(mu, log_var):
    own = Independent(Normal(mu, log_var.exp().sqrt()), 1)
    return (lambda n: own.sample((n,))), own.log_prob


@right("learned_prior")
def _(mu, log_var):
    own = MultivariateNormal(mu, log_var.exp().diag())

    def draw(n):
        eps = torch.randn(len(mu), n, dtype=mu.dtype).T  # 另一种次序
        return mu - eps * log_var.mul(0.5).exp()

    return draw, own.log_prob


@wrong("learned_prior", "抽出来的，与密度说的是同一个分布吗？log_var 全是 0 时看不出")
def _(mu, log_var):
    def draw(n):
        return mu + log_var.exp() * torch.randn(n, len(mu), dtype=mu.dtype)

    def log_prob(z):
        return -0.5 * ((z - mu) ** 2 / log_var.exp() + log_var + LOG_2PI).sum(1)

    return draw, log_prob


# —— mixture_log_prob ——
# 错：先在每一维上混合，再把各维的对数相加。它也是一个密度，积分也是 1，只是另一个分布。L = 1 时看不出。
# 最便宜的测试：两个离得远的分量，z 恰在其中一个的均值上，应比那个分量的密度低 log 2，不论几维；分量相同时看不出。
# 出自：混合先验（VampPrior 一类）的教学实现。


@right("mixture_log_prob")
def mixture_log_prob(z: Tensor, means: Tensor, log_vars: Tensor) -> Tensor:
    """K 个对角高斯等权混合的对数密度：先抽一个分量，整个 z 都来自它。

    z 是 [B, L]，means、log_vars 是 [K, L]；返回 [B]，单位 nat。
    """
    each = -0.5 * ((z[:, None] - means) ** 2 / log_vars.exp() + log_vars + LOG_2PI).sum(2)  # [B, K]
    return each.logsumexp(1) - math.log(len(means))


@right("mixture_log_prob")
def _(z, means, log_vars):
    parts = Independent(Normal(means, (log_vars / 2).exp()), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(means), dtype=z.dtype)), parts).log_prob(z)


@right("mixture_log_prob")
def _(z, means, log_vars):
    total = torch.full((len(z),), -math.inf, dtype=z.dtype)
    for mean, log_var in zip(means, log_vars):
        total = torch.logaddexp(total, Normal(mean, (log_var / 2).exp()).log_prob(z).sum(1))
    return total - math.log(means.shape[0])


@wrong("mixture_log_prob", "两个分量、两维：各维取自不同分量的点，密度应当很小")
def _(z, means, log_vars):
    each = Normal(means, (log_vars / 2).exp()).log_prob(z[:, None])  # [B, K, L]
    return (each.logsumexp(1) - math.log(len(means))).sum(1)


# —— tempered_draw ——
# 错：标准差除以了温度，低温反而更散。温度为 1 时看不出。
# 最便宜的测试：温度很低时，样本应聚在 mu 旁边。
# 出自：分层 VAE 的“低温抽样”。


@right("tempered_draw")
def tempered_draw(mu: Tensor, log_var: Tensor, temperature: float, n: int) -> Tensor:
    """低温抽样：标准差乘以温度的 N(mu, (temperature·σ)²)。

    mu、log_var 是 [L]，temperature > 0；返回 [n, L]。
    """
    return mu + temperature * (log_var / 2).exp() * torch.randn(n, len(mu), dtype=mu.dtype)


@right("tempered_draw")
def _(mu, log_var, temperature, n):
    return Normal(mu, (0.5 * log_var + math.log(temperature)).exp()).sample((n,))


@right("tempered_draw")
def _(mu, log_var, temperature, n):
    scale = (temperature * (log_var / 2).exp()).diag()
    return MultivariateNormal(mu, scale_tril=scale).sample((n,))


@wrong("tempered_draw", "温度为 1 时看不出；温度低，样本应更靠近 mu")
def _(mu, log_var, temperature, n):
    return mu + (log_var / 2).exp() / temperature * torch.randn(n, len(mu), dtype=mu.dtype)
