"""第 06 章“ELBO 与 KL 的权重”的练习：检查，以及它认得的错答。"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal, kl_divergence

from vaelab.evaluate import kl_to_standard_normal
from vaelab.exercises.judging import Wrong, ask, checks, finite, known_wrong, number, numbers, tensor


@checks("6.1")
def weight_when_things_change(answer: object) -> None:
    """值域、边长、KL 的归约各改一样，w 应改成多少。"""
    ranged, enlarged, averaged = numbers(answer, 3, "三个数")

    def implied(w: float, shape: tuple[int, ...], reduce: Callable[[Tensor], Tensor], scale: float) -> float:
        """噪声的标准差占值域的比例：由梯度之比求出，见式(6.11)。"""
        generator = torch.Generator().manual_seed(61)
        x, x_hat = torch.rand(2, 2, *shape, generator=generator, dtype=torch.float64) * scale
        mu = torch.randn(2, 128, generator=generator, dtype=torch.float64).requires_grad_()
        x_hat.requires_grad_()
        loss = torch.nn.functional.mse_loss(x_hat, x) + w * reduce(0.5 * mu**2)
        by_mu, by_x_hat = torch.autograd.grad(loss, [mu, x_hat])
        variance = (by_mu / mu.detach()).mean() / (by_x_hat / (x_hat - x).detach()).mean()
        return float(variance**0.5) / scale if variance > 0 else 0.0

    def total(kl: Tensor) -> Tensor:
        return kl.sum(dim=1).mean()

    goal = implied(0.00025, (3, 64, 64), total, 1.0)

    def off(which: int, w: float, *setting: object) -> bool:
        """σ 与原来的差过千分之二；差得不多的先说：三个数都恰好是原来的几倍，不必取近似。"""
        ratio = implied(w, *setting) / goal
        if 0.002 < abs(ratio - 1) < 0.1:
            raise Wrong(f"第 {which} 问的 {w:g} 很近了，可是不准：它恰好是 0.00025 的整数倍或几分之一，不必取近似。")
        return abs(ratio - 1) > 0.002

    if off(1, ranged, (3, 64, 64), total, 2.0):
        if abs(ranged / 0.00025 - 2) < 0.02:
            raise Wrong("第 1 问只乘了 2：标准差大 2 倍，w 里的是方差。")
        if 0 < ranged < 0.00025:
            raise Wrong("第 1 问方向反了：值域变宽，同样的相对噪声，σ² 要变大。")
        raise Wrong(f"第 1 问的 {ranged:g} 不对：值域宽了 2 倍，σ 应是原来的几倍，σ² 呢？")
    if off(2, enlarged, (3, 128, 128), total, 1.0):
        if abs(enlarged / 0.00025 - 0.5) < 0.02:
            raise Wrong("第 2 问只除以 2：边长加倍，像素数 D 是原来的几倍？")
        if enlarged >= 0.00025:
            raise Wrong("第 2 问：D 变大而 σ² 不变，w = 2σ²/D 应当变小。")
        raise Wrong(f"第 2 问的 {enlarged:g} 不对：由 w = 2σ²/D，σ² 不变，只有 D 变了。")
    if off(3, averaged, (3, 64, 64), torch.mean, 1.0):
        if 0 < averaged < 0.00025:
            raise Wrong("第 3 问方向反了：取平均已经把 KL 除以 128，权重要乘回来。")
        raise Wrong(f"第 3 问的 {averaged:g} 不对：对 128 维取平均，KL 小了 128 倍。")


known_wrong(
    "6.1",
    ("应交三个数", (0.001, 0.0000625)),
    ("第 1 问只乘了 2", (0.0005, 0.0000625, 0.032)),
    ("第 1 问方向反了", (0.00025 / 4, 0.0000625, 0.032)),
    ("σ 应是原来的几倍", (0.00025, 0.0000625, 0.032)),  # 以为值域不影响
    ("第 2 问只除以 2", (0.001, 0.000125, 0.032)),
    ("应当变小", (0.001, 0.001, 0.032)),
    ("应当变小", (0.001, 0.00025, 0.032)),  # 以为边长不影响
    ("只有 D 变了", (0.001, 0.00025 / 16, 0.032)),  # 面积的 4 倍又平方了一次
    ("第 3 问方向反了", (0.001, 0.0000625, 0.00025 / 128)),
    ("KL 小了 128 倍", (0.001, 0.0000625, 0.00025)),  # 以为取平均不影响
    ("KL 小了 128 倍", (0.001, 0.0000625, float(2**20))),
    ("第 1 问的 0.00103 很近了", (0.00103, 0.0000625, 0.032)),
    ("第 2 问的 6.1e-05 很近了", (0.001, 0.000061, 0.032)),
    ("第 3 问的 0.0317 很近了", (0.001, 0.0000625, 0.0317)),
)


@checks("6.2")
def noise_behind_another_loss(answer: object) -> None:
    """由损失 a·SE + b·KL.mean() 求默认的解码器方差 σ²。"""
    generator = torch.Generator().manual_seed(62)
    # 第一组 a = b = L = 1，只看 D；其余各组的数取得让不同的错差出不同的倍数
    for a, b, D, L in [(1.0, 1.0, 12, 1), (0.7, 1.0, 48, 3), (3.0, 0.3, 27, 5), (1.0, 7.0, 300, 16)]:
        x, x_hat = torch.randn(2, 4, D, generator=generator, dtype=torch.float64)
        mu = torch.randn(4, L, generator=generator, dtype=torch.float64).requires_grad_()
        x_hat.requires_grad_()
        loss = a * (x - x_hat).square().sum(dim=1).mean() + b * (0.5 * mu**2).mean()
        by_mu, by_x_hat = torch.autograd.grad(loss, [mu, x_hat])
        truth = float((by_mu / mu.detach()).mean() / (by_x_hat / (x_hat - x).detach()).mean())
        got = number(ask(answer, a, b, D, L))
        where = f"a={a:g}、b={b:g}、D={D}、L={L} 时"

        def times(ratio: float, got: float = got, truth: float = truth) -> bool:
            return abs(got / truth / ratio - 1) < 1e-5

        if times(1):
            continue
        if times(D):
            raise Wrong(f"{where}大了 D 倍：这份代码的 SE 是求和，没有除以 D，式(6.10) 里的 D 来自取平均。")
        if times(1 / D):
            raise Wrong(f"{where}小了 D 倍：SE 已经是求和，−log p(x|z) 里的也是求和，D 不出现。")
        if times(L):
            raise Wrong(f"{where}大了 L 倍：KL 对 L 维取了平均，等于权重除以 L。")
        if times(truth**-0.5):
            raise Wrong(f"{where}你交的是标准差 σ，题目要的是方差 σ²。")
        if times(a):
            raise Wrong(f"{where}大了 a 倍：SE 前面的 a 就是 1/(2σ²) 的一部分，也要除。")
        if times(1 / b):
            raise Wrong(f"{where}漏了 b：整个损失要先除以 KL 的系数，让 KL 前面变成 1。")
        if times((a / b) ** 2):
            raise Wrong(f"{where}除反了：a 大，说明更在乎重建，σ² 要小。")
        if times(2) or times(0.5):
            raise Wrong(f"{where}差一个 2 倍：SE 在 −log p(x|z) 里的系数是 1/(2σ²)。")
        raise Wrong(f"{where}你给出 {got:.4g}，由梯度之比得到的是 {truth:.4g}；先把损失整理成 SE/(2σ²) + KL 的倍数。")


known_wrong(
    "6.2",
    ("应交一个数", lambda a, b, D, L: (a * L / b, 1 / 2)),  # 交了两边的系数
    ("大了 D 倍", lambda a, b, D, L: b * D / (2 * a * L)),
    ("小了 D 倍", lambda a, b, D, L: b / (2 * a * L * D)),
    ("大了 L 倍", lambda a, b, D, L: b / (2 * a)),
    ("差一个 2 倍", lambda a, b, D, L: b / (a * L)),
    ("差一个 2 倍", lambda a, b, D, L: b / (4 * a * L)),
    ("除反了", lambda a, b, D, L: a / (2 * b * L)),
    ("大了 a 倍", lambda a, b, D, L: b / (2 * L)),
    ("漏了 b", lambda a, b, D, L: 1 / (2 * a * L)),
    ("你交的是标准差", lambda a, b, D, L: math.sqrt(b / (2 * a * L))),
    ("先把损失整理成", lambda a, b, D, L: b / (2 * a) - L),
    ("先把损失整理成", lambda a, b, D, L: 0.5),  # 第一组碰巧对的常数
)


@checks("6.3")
def negative_elbo(answer: object) -> None:
    generator = torch.Generator().manual_seed(63)
    for shape, L, sigma2 in [((3, 4, 4), 5, 0.5), ((1, 6, 6), 2, 0.05)]:
        recons, x = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
        mu, log_var = torch.randn(2, 3, L, generator=generator, dtype=torch.float64)
        pixel_nll = -Normal(recons, sigma2**0.5).log_prob(x)
        kl = kl_divergence(Normal(mu, (0.5 * log_var).exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu)))
        nll, kl_total = pixel_nll.flatten(1).sum(dim=1), kl.sum(dim=1)
        truth, dim = nll + kl_total, x[0].numel()
        what = "每张图一个数，形状 [3]（只对像素和隐变量求和，不要对批求和或平均）"
        returned = ask(answer, recons.clone(), x.clone(), mu.clone(), log_var.clone(), sigma2)
        got = tensor(finite(returned, what) if isinstance(returned, (list, tuple)) else returned, (3,), what)
        half_se = (x - recons).square().flatten(1).sum(dim=1) / 2

        def near(value: Tensor, got: Tensor = got) -> bool:
            return torch.allclose(got, value, rtol=1e-5, atol=1e-5)

        constant, spread = dim / 2 * math.log(2 * math.pi), dim / 2 * math.log(sigma2)
        if near(truth):
            continue
        if near(-truth):
            raise Wrong("符号反了：题目要 −ELBO = −log p(x|z) + KL。")
        if near(truth - constant - spread):
            raise Wrong("丢了 D/2·log(2πσ²)：没有它，不同 σ² 的数不能相比。")
        if near(truth - constant):
            raise Wrong("丢了 D/2·log 2π；log σ² 那一半是对的。")
        if near(nll + kl.mean(dim=1)):
            raise Wrong("KL 应对 L 维求和，你取了平均。")
        if near(nll / dim + kl_total) or near((nll - constant - spread) / dim + constant + spread + kl_total):
            raise Wrong("重建项应对 D 个像素求和，你取了平均。")
        if near(truth - (dim - 1) / dim * (constant + spread)):
            raise Wrong("常数只加了一份；D 个像素各有一份 ½·log(2πσ²)。")
        if near(nll - kl_total):
            raise Wrong("KL 的符号反了：它在 −ELBO 里是加上去的。")
        if near(nll):
            raise Wrong("只有重建项，漏了 KL。")
        if near(kl_total):
            raise Wrong("只有 KL，漏了 −log p(x|z)。")
        if near(nll + 2 * kl_total) or near(nll + kl_total / 2):
            raise Wrong("KL 差一个 2 倍：它是 ½ Σ (mu² + σ² − 1 − log σ²)，½ 只有一个。")
        if near(truth + half_se / sigma2) or near(truth - half_se / sigma2 / 2):
            raise Wrong("重建项里的 SE 差一个 2 倍：它除以 2σ²。")
        if near(truth - half_se / sigma2 + half_se / sigma2**0.5) or near(truth - half_se / sigma2 + half_se / sigma2**2):
            raise Wrong("SE 要除以 2σ²，sigma2 已经是方差 σ²，不要再开方或平方。")
        if near(truth - spread / 2) or near(truth + spread):
            raise Wrong("D/2·log(2πσ²) 里是方差 σ²，sigma2 已经是它，不要再开方或平方。")
        if near(truth + constant + spread) or near(truth - (constant + spread) / 2):
            raise Wrong("常数差一个 2 倍：D 个像素各有 ½·log(2πσ²)，合起来是 D/2·log(2πσ²)。")
        if near(nll + kl.sum()) or near(nll + kl.sum() / 3) or near(nll + kl_total.sum()):
            raise Wrong("你把一批的 KL 合成了一个数，加到每张图上；每张图只加自己的 KL。")
        if any(near(truth - (1 - count / dim) * (constant + spread)) for count in (x[0, 0].numel(), x.numel())):
            raise Wrong("常数里的 D 数错了：D = C·H·W，通道要算，批不算。")
        stds = kl_divergence(Normal(mu, log_var.exp()), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum(dim=1)
        if near(nll + stds):
            raise Wrong("log_var 是 log σ²，你当成了 log σ：方差是 exp(log_var)，不是它的平方。")
        raise Wrong(f"σ² = {sigma2:g} 时第一张图你给出 {float(got[0]):.6g}，应为 {float(truth[0]):.6g}；分别核对两项。")


def _se(recons, x):
    return (x - recons).square().flatten(1)


def _constant(x, sigma2, inside=2 * math.pi):
    return x[0].numel() / 2 * math.log(inside * sigma2)


def _elbo_loss(nll=lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + _constant(x, sigma2), kl=lambda each: each.sum(1)):
    """−ELBO：重建项、KL 的归约都可以换成写错的。"""
    return lambda recons, x, mu, log_var, sigma2: nll(recons, x, sigma2) + kl(kl_to_standard_normal(mu, log_var))


known_wrong(
    "6.3",
    ("不要对批求和或平均", lambda *inputs: _elbo_loss()(*inputs).mean()),
    ("出现了 NaN", lambda recons, x, mu, log_var, sigma2: _elbo_loss()(recons, x, mu, log_var.log(), sigma2)),  # 把 log_var 当成了方差
    ("题目要 −ELBO", lambda *inputs: -_elbo_loss()(*inputs)),
    ("丢了 D/2·log(2πσ²)", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2))),
    ("丢了 D/2·log 2π；", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + _constant(x, sigma2, inside=1))),
    ("KL 应对 L 维求和", _elbo_loss(kl=lambda each: each.mean(1))),
    ("重建项应对 D 个像素求和", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).mean(1) / (2 * sigma2) + 0.5 * math.log(2 * math.pi * sigma2))),
    ("重建项应对 D 个像素求和", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).mean(1) / (2 * sigma2) + _constant(x, sigma2))),
    ("常数只加了一份", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + 0.5 * math.log(2 * math.pi * sigma2))),
    ("KL 的符号反了", _elbo_loss(kl=lambda each: -each.sum(1))),
    ("分别核对两项", _elbo_loss(lambda recons, x, sigma2: -Normal(recons, sigma2).log_prob(x).flatten(1).sum(1))),  # 把 σ² 当成了 σ
    ("漏了 KL", _elbo_loss(kl=lambda each: 0 * each.sum(1))),
    ("漏了 −log p", _elbo_loss(lambda recons, x, sigma2: 0.0)),
    ("½ 只有一个", _elbo_loss(kl=lambda each: 2 * each.sum(1))),
    ("½ 只有一个", _elbo_loss(kl=lambda each: each.sum(1) / 2)),
    ("除以 2σ²。", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / sigma2 + _constant(x, sigma2))),
    ("不要再开方或平方", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2**0.5) + _constant(x, sigma2))),
    ("里是方差 σ²", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + _constant(x, sigma2**0.5))),
    ("常数差一个 2 倍", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + 2 * _constant(x, sigma2))),
    ("合成了一个数", _elbo_loss(kl=lambda each: each.sum())),
    ("合成了一个数", _elbo_loss(kl=lambda each: each.sum(1).mean())),
    ("通道要算", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + _constant(x[:, 0], sigma2))),
    ("批不算", _elbo_loss(lambda recons, x, sigma2: _se(recons, x).sum(1) / (2 * sigma2) + _constant(x[None], sigma2))),
    ("当成了 log σ", lambda recons, x, mu, log_var, sigma2: _elbo_loss()(recons, x, mu, 2 * log_var, sigma2)),
    ("一个数，形状", lambda recons, x, mu, log_var, sigma2: [1.0, 2.0]),  # 列表也收，长度要对
)


@checks("6.4")
def optimal_weight_for_l1(answer: object) -> None:
    generator = torch.Generator().manual_seed(64)
    # 批、通道、高、宽各不相同，且都不是 2：漏掉其中一个，差出的倍数不会与别的错混淆
    x = torch.rand(5, 3, 4, 7, generator=generator, dtype=torch.float64) * 2 - 1
    x_hat = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64) + 0.1  # 偏亮一点：误差的平均不是 0
    w = number(ask(answer, x.clone(), x_hat.clone()), "一个数：一批图共用一个 b")
    dim = x[0].numel()
    if w <= 0:
        raise Wrong(f"权重应是正数，收到 {w:.4g}。")

    def fits(weight: float) -> bool:
        """weight 所对应的 b 使 −log p 的导数为零：损失除以 weight，重建项的系数应是 1/b。"""
        log_b = torch.tensor(weight * dim, dtype=torch.float64).log().requires_grad_()
        Laplace(x_hat, log_b.exp(), validate_args=False).log_prob(x).mean().backward()
        return abs(float(log_b.grad)) < 1e-5

    if fits(w):
        return
    if fits(w / 2):
        raise Wrong("大了 2 倍：高斯的 2σ²/D 里的 2 来自 SE/(2σ²)，拉普拉斯的 |x−x̂|/b 没有这个 2。")
    if fits(w / dim):
        raise Wrong("大了 D 倍：损失里的 L1 对像素取了平均，别忘了除以 D。")
    if fits(w / len(x)) or fits(w * len(x)):
        raise Wrong("差了批大小的倍数：b 是所有图、所有像素的平均绝对误差。")
    mse = float((x - x_hat).square().mean())
    if abs(w / (2 * mse / dim) - 1) < 1e-5 or abs(w / (mse / dim) - 1) < 1e-5:
        raise Wrong("你用的是 MSE；对 b 求导，剩下的是绝对误差的平均。")
    raise Wrong(f"w = {w:.4g} 对应的 b 不是最好的：写出 −log p(x|z) = Σ|x−x̂|/b + D·log 2b，对 b 求导。")


known_wrong(
    "6.4",
    ("一批图共用一个 b", lambda x, x_hat: (x - x_hat).abs().flatten(1).mean(1) / x[0].numel()),  # 每张图一个
    ("权重应是正数", lambda x, x_hat: (x - x_hat).mean() / x[0].numel()),  # 忘了绝对值
    ("大了 2 倍", lambda x, x_hat: 2 * (x - x_hat).abs().mean() / x[0].numel()),
    ("大了 D 倍", lambda x, x_hat: (x - x_hat).abs().mean()),
    ("差了批大小的倍数", lambda x, x_hat: (x - x_hat).abs().sum() / x[0].numel() ** 2),
    ("差了批大小的倍数", lambda x, x_hat: (x - x_hat).abs().mean() / x.numel()),
    ("你用的是 MSE", lambda x, x_hat: 2 * (x - x_hat).square().mean() / x[0].numel()),
    ("你用的是 MSE", lambda x, x_hat: (x - x_hat).square().mean() / x[0].numel()),
    ("对应的 b 不是最好的", lambda x, x_hat: (x - x_hat).square().mean().sqrt() / x[0].numel()),  # 均方根误差
    ("对应的 b 不是最好的", lambda x, x_hat: (x - x_hat).abs().mean() / x[0, 0].numel()),  # D 漏了通道
)
