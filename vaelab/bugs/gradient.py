"""练习 12.4 的题：损失的值对，梯度不对。写完测试之前先别看。"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaelab.bugs.registry import right, wrong

# —— make_encoder ——
# 错：log_var 由 mu 的那一层算出，fc_var 的两个参数从不参与，没有梯度；log_var 与 mu 恒等。
# 最便宜的测试：反传之后，每个参数都该有梯度，而且不是零。
# 出自：复制一行忘了改名字的编码器。


class _TwoHeads(nn.Module):
    def __init__(self, inputs: int, latent: int, width: int, mistaken: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.Tanh())
        self.fc_mu, self.fc_var = nn.Linear(width, latent), nn.Linear(width, latent)
        self.mistaken = mistaken

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.fc_mu(features), (self.fc_mu if self.mistaken else self.fc_var)(features)


class _OneHead(nn.Module):
    def __init__(self, inputs: int, latent: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, 2 * latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, log_var = self.second(torch.tanh(self.first(x))).chunk(2, dim=1)
        return mu, log_var


class _Plain(nn.Module):
    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.mean, self.spread = nn.Linear(inputs, latent), nn.Linear(inputs, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), 0.1 * self.spread(x)


@right("make_encoder")
def make_encoder(inputs: int, latent: int, width: int) -> nn.Module:
    """造一个编码器：收 [B, inputs]，给出 (mu, log_var)，各 [B, latent]，两者各有各的权重。

    width 是中间一层的宽度，没有中间层的不用它；网络的样子、参数的名字不作约定。
    """
    return _TwoHeads(inputs, latent, width)


@right("make_encoder")
def _(inputs, latent, width):
    return _OneHead(inputs, latent, width)


@right("make_encoder")
def _(inputs, latent, width):
    return _Plain(inputs, latent)


@wrong("make_encoder", "反传之后，每个参数都有梯度吗？")
def _(inputs, latent, width):
    return _TwoHeads(inputs, latent, width, mistaken=True)


# —— iwae_surrogate ——
# 错：权重没有 detach，梯度里多出一项。值照样像个损失，照样往下走。K = 1 或 log_w 全相同时看不出。
# 最便宜的测试：与 logsumexp 的自动求导比。
# 出自：重要性加权 VAE 的训练循环。


@right("iwae_surrogate")
def iwae_surrogate(log_w: Tensor) -> Tensor:
    """替身损失：它对 log_w 的梯度，等于 Σ_B log (1/K) Σ_k w_k 的梯度。

    log_w 是 [K, B]；返回零维张量，可以反传。值不作约定，只约定梯度。
    """
    return (log_w.detach().softmax(0) * log_w).sum()


@right("iwae_surrogate")
def _(log_w):
    return log_w.logsumexp(0).sum()


@right("iwae_surrogate")
def _(log_w):
    with torch.no_grad():
        shares = (log_w - log_w.logsumexp(0)).exp()
    return (shares * (log_w - log_w.detach())).sum()  # 值恒为 0


@wrong("iwae_surrogate", "只有梯度有约定：与 logsumexp 的自动求导比，K 大于 1，各个 log_w 不同")
def _(log_w):
    return (log_w.softmax(0) * log_w).sum()


# —— vector_quantize ——
# 错一：β 乘在码本那一项上。两项的值相同，损失逐位相同；编码器的梯度大到 1/β 倍，码本的小到 β 倍。
# 错二：z 先换成直通的 z_q，再拿它算码本损失，码本从此没有梯度。
# 最便宜的测试：对 z 与 codebook 各看一次梯度。
# 出自：VQ-VAE 的教学实现；错一在许多仓库里互相抄。


@right("vector_quantize")
def vector_quantize(z: Tensor, codebook: Tensor, beta: float):
    """每个 z 换成码本里最近的一行；直通估计。

    z 是 [B, L]，codebook 是 [K, L]，beta > 0。返回（z_q [B, L]，loss 零维）：z_q 的值是最近的一行，梯度原样传给 z；
    loss 是 ‖sg(z) − e‖² + beta·‖z − sg(e)‖² 对 B 与 L 的平均，sg 是 detach，前一项只训练码本，后一项只训练编码器。
    """
    e = codebook[torch.cdist(z, codebook).argmin(1)]
    loss = F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())
    return z + (e - z).detach(), loss


@right("vector_quantize")
def _(z, codebook, beta):
    distance = (z[:, None] - codebook).square().sum(2)  # [B, K]
    e = F.one_hot(distance.argmin(1), len(codebook)).to(z.dtype) @ codebook
    commit, update = (z - e.detach()).square().mean(), (e - z.detach()).square().mean()
    return e.detach() + (z - z.detach()), update + beta * commit


@right("vector_quantize")
def _(z, codebook, beta):
    index = (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)
    e = codebook.index_select(0, index)
    loss = (beta * (z - e.detach()) ** 2 + (z.detach() - e) ** 2).mean()
    return z + e.detach() - z.detach(), loss


@wrong("vector_quantize", "损失的值说明不了什么：看编码器的梯度，beta 不要取 1")
def _(z, codebook, beta):
    e = codebook[torch.cdist(z, codebook).argmin(1)]
    loss = beta * F.mse_loss(e, z.detach()) + F.mse_loss(z, e.detach())
    return z + (e - z).detach(), loss


@wrong("vector_quantize", "编码器的梯度对了，码本的呢？")
def _(z, codebook, beta):
    e = codebook[torch.cdist(z, codebook).argmin(1)]
    commit = F.mse_loss(z, e.detach())
    e = z + (e - z).detach()  # 直通
    return e, F.mse_loss(e.detach(), z.detach()) + beta * commit


# —— free_bits ——
# 错：先乘权重、后取最大，于是永远在地板上，梯度为零。权重为 1 时看不出。
# 最便宜的测试：KL 高过地板时，梯度应等于权重。
# 出自：把 KL 按像素数缩小之后再套免费比特的实现。


@right("free_bits")
def free_bits(kl: Tensor, floor: float, weight: float) -> Tensor:
    """免费比特：每一维的 KL 低于 floor 就按 floor 算，求和之后乘以权重。

    kl 是 [L]，一批的平均，单位 nat；floor 也是 nat。返回零维张量 weight·Σ_j max(kl_j, floor)，可以反传；恰在 floor 上的梯度不作约定。
    """
    return weight * kl.clamp_min(floor).sum()


@right("free_bits")
def _(kl, floor, weight):
    return weight * (torch.relu(kl - floor) + floor).sum()


@right("free_bits")
def _(kl, floor, weight):
    return sum(weight * torch.maximum(each, torch.tensor(floor, dtype=kl.dtype)) for each in kl)


@wrong("free_bits", "权重不为 1，KL 高过地板：那里的梯度应是多少？")
def _(kl, floor, weight):
    return torch.clamp(weight * kl, min=floor).sum()


# —— beta_loss ——
# 错：收下 beta，没有用。
# 最便宜的测试：beta 换两个值，差应恰是 KL 的那么多倍。
# 出自：参数传了三层，最后一层忘了乘。


@right("beta_loss")
def beta_loss(recons: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, beta: float) -> Tensor:
    """beta-VAE 的损失，每张图：½‖x − recons‖² + beta·KL(N(mu, σ²)‖N(0, 1))，可以差一个常数。

    recons、x 是 [B, D]，mu、log_var 是 [B, L]；返回零维张量：对 D、L 求和，对 B 平均。
    常数与四个张量、beta 都无关，可以与 D 有关。
    """
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)
    return (0.5 * (x - recons).square().sum(1) + beta * kl).mean()


@right("beta_loss")
def _(recons, x, mu, log_var, beta):
    log_lik = torch.distributions.Normal(recons, 1.0).log_prob(x).sum(1)  # 带着 ½D·log 2π
    kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
    return (beta * kl - log_lik).mean()


@right("beta_loss")
def _(recons, x, mu, log_var, beta):
    misfit = F.mse_loss(recons, x, reduction="sum") / (2 * len(x))
    return misfit + beta * 0.5 * (mu**2 + log_var.expm1() - log_var).sum() / len(x)


@wrong("beta_loss", "损失可以差一个常数，所以要看差：beta 换两个值，差了多少？")
def _(recons, x, mu, log_var, beta):
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1)
    return (0.5 * (x - recons).square().sum(1) + kl).mean()
