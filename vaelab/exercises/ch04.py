"""第 04 章“重参数化”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import ask, checks, known_wrong, Wrong


@checks("4.1")
def std_and_slope(answer: object) -> None:
    try:
        std, slope = (float(value) for value in answer)  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交两个数 (std, 斜率)，收到 {answer!r}。") from error
    log_var = torch.tensor(9.0).log().double().requires_grad_()
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), log_var.exp().sqrt())
    true_std = normal.stddev.item()
    (true_slope,) = torch.autograd.grad(-2 * normal.stddev, log_var)
    if abs(std - true_std**2) < 1e-3:
        raise Wrong("你写的 std 是方差 exp(log_var)；标准差还要开平方，指数上有个 ½。")
    if abs(std - true_std) > 1e-3:
        raise Wrong(f"std = {std:g} 不对：log_var 是方差的对数，方差是 9。")
    if abs(slope + true_slope) < 1e-3:
        raise Wrong("斜率的大小对了，符号反了：ε 是负的，σ 变大时 z 往哪边走？")
    if abs(slope - 2 * true_slope) < 1e-3:
        raise Wrong("斜率大了一倍：σ 对 log σ² 的导数是 ½σ，这个 ½ 丢了。")
    if abs(slope + 2) < 1e-3:
        raise Wrong("这是 ∂z/∂σ = ε；题目问的是对 log σ² 的导数，还要乘 ∂σ/∂log σ²。")
    if abs(slope - true_slope) > 1e-3:
        raise Wrong(f"std 对了，斜率 {slope:g} 不对：用链式法则 ∂z/∂σ · ∂σ/∂log σ²。")


@checks("4.2")
def many_samples_at_once(answer: object) -> None:
    mu = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    log_var = torch.tensor([[4.0, 0.25, 1.0], [1.0, 9.0, 0.25]], dtype=torch.float64).log().requires_grad_()
    n = 20_000
    z = ask(answer, mu, log_var, n, torch.Generator().manual_seed(0))
    if not isinstance(z, Tensor) or z.shape != (n, 2, 3):
        raise Wrong(f"应返回 [n, B, L] = [{n}, 2, 3] 的张量，收到 {list(z.shape) if isinstance(z, Tensor) else z!r}。")
    gradients = torch.autograd.grad(z.sum(), (mu, log_var), allow_unused=True) if z.requires_grad else (None, None)
    if any(gradient is None or not gradient.any() for gradient in gradients):
        raise Wrong("梯度没有传回 mu 与 log_var：z 要写成它们的可导函数，不能用 sample() 或 torch.normal。")
    if not torch.equal(z, ask(answer, mu, log_var, n, torch.Generator().manual_seed(0))):
        raise Wrong("同一颗种子两次结果不同：随机数没有来自传入的 generator。")
    z, true = z.detach(), torch.distributions.Normal(mu.detach(), log_var.detach().exp().sqrt())
    noise = ((z - true.mean) / true.stddev).reshape(n, -1)
    variance = torch.distributions.Normal(0.0, 1.0).variance
    if (z - z[:1]).abs().max() < 1e-9:
        raise Wrong("n 个样本全都一样：ε 少了 n 这一维，被广播成了同一个。")
    if (z.std(0) / true.variance - 1).abs().max() < 0.05:
        raise Wrong("样本的标准差等于方差 exp(log_var)：指数上少了 ½。")
    if (noise.mean(0) - 0.5).abs().max() < 0.05:
        raise Wrong("样本整体偏了半个标准差：用的是均匀噪声 rand，应该用标准正态 randn。")
    correlation = noise.T.corrcoef() - torch.eye(6, dtype=noise.dtype)
    if correlation.abs().max() > 0.05:
        raise Wrong("批内或各维的 ε 相互不独立：ε 的形状应是完整的 [n, B, L]，不能靠广播。")
    if noise.mean(0).abs().max() > 0.05 or (noise.var(0) - variance).abs().max() > 0.08:
        raise Wrong("样本的均值或方差与 N(mu, exp(log_var)) 不符。")


@checks("4.3")
def best_baseline(answer: object) -> None:
    eps = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(eps).exp()
    for mu, log_var, a in ((0.3, -0.4, 1.0), (-1.0, 0.5, 0.5), (2.0, 0.0, 2.0)):
        reply = ask(answer, mu, log_var, a)
        try:
            got = float(reply)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong(f"应返回一个数，收到 {reply!r}。") from error
        f = (mu + torch.tensor(log_var, dtype=torch.float64).exp().sqrt() * eps - a) ** 2

        def weighted(weight: Tensor) -> float:
            return float(torch.trapezoid(density * weight * f, eps) / torch.trapezoid(density * weight, eps))

        if abs(got - weighted(torch.ones_like(eps))) < 1e-6:
            raise Wrong("你用的是 f 的平均值 E[f]；它是不错的基线，但权重 (ε²−1)² 没有算进去，方差还不是最小。")
        if abs(got - weighted(eps**2)) < 1e-6:
            raise Wrong("这是对 μ 的梯度的最优基线；换成 log σ² 之后，得分变成 (ε²−1)/2，权重也要换。")
        if abs(got - weighted((eps**2 - 1) ** 2)) > 1e-6:
            raise Wrong(f"μ={mu}、log σ²={log_var}、a={a} 时方差最小的 b 不是 {got:.4g}；对 b 求导并令其为 0 再看看。")


@checks("4.4")
def laplace_from_uniform(answer: object) -> None:
    u = torch.tensor([0.01, 0.2, 0.45, 0.55, 0.9, 0.999], dtype=torch.float64)
    loc = torch.full((6,), 0.7, dtype=torch.float64, requires_grad=True)
    scale = torch.full((6,), 1.5, dtype=torch.float64, requires_grad=True)
    z = ask(answer, loc, scale, u)
    if not isinstance(z, Tensor) or z.shape != u.shape:
        raise Wrong(f"应返回与 u 同形的张量，收到 {list(z.shape) if isinstance(z, Tensor) else z!r}。")
    true = torch.distributions.Laplace(loc.detach(), scale.detach()).icdf(u)
    below = u < 0.5
    if not z.isfinite().all():
        raise Wrong("出现了 NaN 或无穷：检查对数里的量在 u < ½ 与 u > ½ 时是否都为正。")
    if torch.allclose(z[~below], true[~below]) and not torch.allclose(z[below], true[below]):
        raise Wrong("u > ½ 的一半对，u < ½ 的一半不对：绝对值要分两段，左半边的符号再看看。")
    if torch.allclose(z[below], true[below]) and not torch.allclose(z[~below], true[~below]):
        raise Wrong("u < ½ 的一半对，u > ½ 的一半不对：右半边的概率从 1 往回数。")
    if torch.allclose(z - loc, -(true - loc.detach())):
        raise Wrong("左右颠倒了：u 增大时 z 应该增大，你的在减小。")
    if torch.allclose(z, torch.distributions.Normal(loc.detach(), scale.detach()).icdf(u)):
        raise Wrong("这是正态分布的反函数，题目要的是拉普拉斯。")
    if not torch.allclose(z, true):
        raise Wrong("与拉普拉斯分布的反函数不符；先核对 u = ½ 时 z 应等于 loc。")
    grads = torch.autograd.grad(z.sum(), (loc, scale), allow_unused=True) if z.requires_grad else (None, None)
    if any(gradient is None for gradient in grads) or not torch.allclose(grads[1], (true - 0.7) / 1.5):
        raise Wrong("数值对了，梯度没有传回 loc 与 scale：结果里要保留对它们的依赖。")
