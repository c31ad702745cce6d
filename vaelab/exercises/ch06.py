"""第 06 章“ELBO 与 KL 的权重”的练习：检查，以及它认得的错答。"""

from collections.abc import Callable

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong


@checks("6.1")
def weight_when_things_change(answer: object) -> None:
    try:
        ranged, enlarged, averaged = (float(value) for value in answer)  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交三个数，收到 {answer!r}。") from error

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
    if abs(implied(ranged, (3, 64, 64), total, 2.0) / goal - 1) > 0.02:
        if abs(ranged / 0.00025 - 2) < 0.02:
            raise Wrong("第 1 问只乘了 2：标准差大 2 倍，w 里的是方差。")
        if ranged < 0.00025:
            raise Wrong("第 1 问方向反了：值域变宽，同样的相对噪声，σ² 要变大。")
        raise Wrong(f"第 1 问的 {ranged:g} 不对：值域宽了 2 倍，σ 应是原来的几倍，σ² 呢？")
    if abs(implied(enlarged, (3, 128, 128), total, 1.0) / goal - 1) > 0.02:
        if abs(enlarged / 0.00025 - 0.5) < 0.02:
            raise Wrong("第 2 问只除以 2：边长加倍，像素数 D 是原来的几倍？")
        if enlarged >= 0.00025:
            raise Wrong("第 2 问：D 变大而 σ² 不变，w = 2σ²/D 应当变小。")
        raise Wrong(f"第 2 问的 {enlarged:g} 不对：由 w = 2σ²/D，σ² 不变，只有 D 变了。")
    if abs(implied(averaged, (3, 64, 64), torch.mean, 1.0) / goal - 1) > 0.02:
        if averaged < 0.00025:
            raise Wrong("第 3 问方向反了：取平均已经把 KL 除以 128，权重要乘回来。")
        raise Wrong(f"第 3 问的 {averaged:g} 不对：对 128 维取平均，KL 小了 128 倍。")


@checks("6.2")
def noise_behind_another_loss(answer: object) -> None:
    generator = torch.Generator().manual_seed(62)
    for a, b, D, L in [(1.0, 1.0, 12, 1), (0.5, 1.0, 48, 3), (3.0, 0.2, 27, 5), (1.0, 7.0, 300, 16)]:
        x, x_hat = torch.randn(2, 4, D, generator=generator, dtype=torch.float64)
        mu = torch.randn(4, L, generator=generator, dtype=torch.float64).requires_grad_()
        x_hat.requires_grad_()
        loss = a * (x - x_hat).square().sum(dim=1).mean() + b * (0.5 * mu**2).mean()
        by_mu, by_x_hat = torch.autograd.grad(loss, [mu, x_hat])
        truth = float((by_mu / mu.detach()).mean() / (by_x_hat / (x_hat - x).detach()).mean())
        try:
            got = float(ask(answer, a, b, D, L))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Wrong("应返回一个数。") from error
        where = f"a={a:g}、b={b:g}、D={D}、L={L} 时"
        if abs(got / truth - 1) < 1e-6:
            continue
        if abs(got / truth - D) < 1e-6 * D:
            raise Wrong(f"{where}大了 D 倍：这份代码的 SE 是求和，没有除以 D，式(6.10) 里的 D 来自取平均。")
        if abs(got * D / truth - 1) < 1e-6:
            raise Wrong(f"{where}小了 D 倍：SE 已经是求和，−log p(x|z) 里的也是求和，D 不出现。")
        if L > 1 and abs(got / truth - L) < 1e-6 * L:
            raise Wrong(f"{where}大了 L 倍：KL 对 L 维取了平均，等于权重除以 L。")
        if abs(got / truth - 2) < 1e-6 or abs(got / truth - 0.5) < 1e-6:
            raise Wrong(f"{where}差一个 2 倍：SE 在 −log p(x|z) 里的系数是 1/(2σ²)。")
        raise Wrong(f"{where}你给出 {got:.4g}，由梯度之比得到的是 {truth:.4g}；先把损失整理成 SE/(2σ²) + KL 的倍数。")


@checks("6.3")
def negative_elbo(answer: object) -> None:
    generator = torch.Generator().manual_seed(63)
    distributions = torch.distributions
    for shape, L, sigma2 in [((3, 4, 4), 5, 0.5), ((1, 6, 6), 2, 0.05)]:
        recons, x = torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)
        mu, log_var = torch.randn(2, 3, L, generator=generator, dtype=torch.float64)
        pixel_nll = -distributions.Normal(recons, sigma2**0.5).log_prob(x)
        prior = distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
        kl = distributions.kl_divergence(distributions.Normal(mu, (0.5 * log_var).exp()), prior)
        nll, kl_total = pixel_nll.flatten(1).sum(dim=1), kl.sum(dim=1)
        truth, dim = nll + kl_total, x[0].numel()
        got = ask(answer, recons.clone(), x.clone(), mu.clone(), log_var.clone(), sigma2)
        if not isinstance(got, Tensor) or got.shape != truth.shape:
            came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"应返回每张图一个数，形状 [3]，收到 {came}；只对像素和隐变量求和，不要对批求和或平均。")

        def near(value: Tensor, got: Tensor = got) -> bool:
            return torch.allclose(got.to(value.dtype), value, rtol=1e-6, atol=1e-6)

        constant = dim / 2 * torch.log(torch.tensor(2 * torch.pi, dtype=torch.float64))
        spread = dim / 2 * torch.log(torch.tensor(sigma2, dtype=torch.float64))
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
        if near(nll / dim + kl_total):
            raise Wrong("重建项应对 D 个像素求和，你取了平均。")
        if near(truth - (dim - 1) / dim * (constant + spread)):
            raise Wrong("常数只加了一份；D 个像素各有一份 ½·log(2πσ²)。")
        if near(nll - kl_total):
            raise Wrong("KL 的符号反了：它在 −ELBO 里是加上去的。")
        raise Wrong(f"σ² = {sigma2:g} 时第一张图你给出 {float(got[0]):.4f}，应为 {float(truth[0]):.4f}；分别核对两项。")


@checks("6.4")
def optimal_weight_for_l1(answer: object) -> None:
    generator = torch.Generator().manual_seed(64)
    x = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1
    x_hat = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    try:
        w = float(ask(answer, x.clone(), x_hat.clone()))
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("应返回一个数：一批图共用一个 b。") from error
    dim = x[0].numel()
    if not 0 < w < float("inf"):
        raise Wrong(f"权重应是正数，收到 {w:.4g}。")

    def fits(weight: float) -> bool:
        """weight 所对应的 b 使 −log p 的导数为零：损失除以 weight，重建项的系数应是 1/b。"""
        log_b = torch.tensor(weight * dim, dtype=torch.float64).log().requires_grad_()
        torch.distributions.Laplace(x_hat, log_b.exp()).log_prob(x).mean().backward()
        return abs(float(log_b.grad)) < 1e-6

    if fits(w):
        return
    if fits(w / 2):
        raise Wrong("大了 2 倍：高斯的 2σ²/D 里的 2 来自 SE/(2σ²)，拉普拉斯的 |x−x̂|/b 没有这个 2。")
    if fits(w / dim):
        raise Wrong("大了 D 倍：损失里的 L1 对像素取了平均，别忘了除以 D。")
    if fits(w / len(x)) or fits(w * len(x)):
        raise Wrong("差了批大小的倍数：b 是所有图、所有像素的平均绝对误差。")
    mse = float((x - x_hat).square().mean())
    if abs(w / (2 * mse / dim) - 1) < 1e-6 or abs(w / (mse / dim) - 1) < 1e-6:
        raise Wrong("你用的是 MSE；对 b 求导，剩下的是绝对误差的平均。")
    raise Wrong(f"w = {w:.4g} 对应的 b 不是最好的：写出 −log p(x|z) = Σ|x−x̂|/b + D·log 2b，对 b 求导。")
