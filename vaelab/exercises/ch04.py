"""第 04 章“重参数化”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number, numbers, tensor


def _cut_off(z: object, **inputs: Tensor) -> str:
    """``z`` 的梯度传不到的那几个输入的名字；都传得到时为空。"""
    if not isinstance(z, Tensor) or not z.requires_grad:  # numpy 的数组也没有梯度
        return " 与 ".join(inputs)
    # 求梯度也会因作答里的原地改写而出错，那同样是作答的错
    gradients = ask(lambda: torch.autograd.grad(z.sum(), tuple(inputs.values()), allow_unused=True))
    return " 与 ".join(name for name, gradient in zip(inputs, gradients) if gradient is None or not gradient.any())


@checks("4.1")
def std_and_slope(answer: object) -> None:
    """已知 log_var = log 9、ε = −2，交标准差与 ∂z/∂log σ²。"""
    std, slope = numbers(answer, 2, "两个数 (std, 斜率)")
    log_var = torch.tensor(9.0, dtype=torch.float64).log().requires_grad_()
    normal = Normal(torch.zeros((), dtype=torch.float64), log_var.exp().sqrt())
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


known_wrong(
    "4.1",
    ("应交两个数 (std, 斜率)", 3.0),  # 只交了 std
    ("标准差还要开平方", (9.0, -9.0)),
    ("log_var 是方差的对数", (math.log(9), -math.log(9))),  # 把 log_var 当标准差
    ("log_var 是方差的对数", (4.5, -4.5)),  # ½ 放到了指数外面
    ("符号反了", (3.0, 3.0)),
    ("斜率大了一倍", (3.0, -6.0)),
    ("这是 ∂z/∂σ = ε", (3.0, -2.0)),
    ("用链式法则", (3.0, -1.0)),  # ½ε，忘了乘 σ
)


@checks("4.2")
def many_samples_at_once(answer: object) -> None:
    """每张图抽 n 个 z，返回 [n, B, L]。"""
    mu = torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    log_var = torch.tensor([[4.0, 0.25, 1.0], [1.0, 9.0, 0.25]], dtype=torch.float64).log().requires_grad_()
    n = 20_000

    def draw(seed: int) -> object:
        return ask(answer, mu, log_var, n, torch.Generator().manual_seed(seed))

    reply = draw(0)
    z = tensor(reply, (n, 2, 3), f"形状 [n, B, L] = [{n}, 2, 3] 的张量", "核对标准差是怎样由 log_var 得到的")
    if lost := _cut_off(reply, mu=mu, log_var=log_var):
        raise Wrong(f"梯度没有传回 {lost}：z 要写成它们的可导函数，不能用 sample() 或 torch.normal。")

    def same(seed: int) -> bool:
        return torch.equal(z, tensor(draw(seed), (n, 2, 3), f"形状 [n, B, L] = [{n}, 2, 3] 的张量"))

    if not same(0):
        raise Wrong("同一颗种子两次结果不同：随机数没有来自传入的 generator。")
    if same(1):
        raise Wrong("换一颗种子结果不变：随机数没有来自传入的 generator。")
    true = Normal(mu.detach(), log_var.detach().exp().sqrt())
    noise = ((z - true.mean) / true.stddev).reshape(n, -1)
    if (z - z[:1]).abs().max() < 1e-9:
        raise Wrong("n 个样本全都一样：ε 少了 n 这一维，被广播成了同一个。")
    if (z.std(0) / true.variance - 1).abs().max() < 0.05:
        raise Wrong("样本的标准差等于方差 exp(log_var)：指数上少了 ½。")
    if (noise.mean(0) - 0.5).abs().max() < 0.05:
        raise Wrong("样本整体偏了半个标准差：用的是均匀噪声 rand，应该用标准正态 randn。")
    correlation = noise.T.corrcoef() - torch.eye(6, dtype=noise.dtype)
    if correlation.abs().max() > 0.05:
        raise Wrong("批内或各维的 ε 相互不独立：ε 的形状应是完整的 [n, B, L]，不能靠广播。")
    if noise.mean(0).abs().max() > 0.05 or (noise.var(0) - 1).abs().max() > 0.08:
        raise Wrong("样本的均值或方差与 N(mu, exp(log_var)) 不符。")
    if abs(noise.pow(4).mean() - 3) > 0.3:  # E[ε⁴] = 3；均匀的噪声缩放到方差 1 之后只有 1.8
        raise Wrong("样本的均值与方差都对，分布却不是正态：ε 要用标准正态 randn。")


def _draws(noise, std=lambda log_var: torch.exp(0.5 * log_var)):
    """抽样的函数：噪声由 ``noise(n, B, L, generator)`` 给出，标准差由 ``std(log_var)`` 给出。"""
    return lambda mu, log_var, n, generator: (mu + std(log_var) * noise(n, *mu.shape, generator)).expand(n, *mu.shape)


def _full(n, B, L, generator):
    return torch.randn(n, B, L, generator=generator)


known_wrong(
    "4.2",
    ("应返回形状 [n, B, L]", lambda mu, log_var, n, generator: mu + torch.exp(0.5 * log_var) * torch.randn(mu.shape, generator=generator)),
    ("出现了 NaN", _draws(_full, torch.sqrt)),  # 把 log_var 当成了方差
    ("传回 mu 与 log_var：", lambda mu, log_var, n, generator: Normal(mu, torch.exp(0.5 * log_var)).sample((n,))),
    ("传回 mu 与 log_var：", lambda mu, log_var, n, generator: (mu + torch.exp(0.5 * log_var) * _full(n, *mu.shape, generator)).detach().numpy()),
    ("传回 log_var：", _draws(_full, lambda log_var: torch.exp(0.5 * log_var.detach()))),
    ("两次结果不同", lambda mu, log_var, n, generator: Normal(mu, torch.exp(0.5 * log_var)).rsample((n,))),
    ("换一颗种子结果不变", _draws(lambda n, B, L, generator: _full(n, B, L, torch.Generator().manual_seed(0)))),
    ("全都一样", _draws(lambda n, B, L, generator: torch.randn(B, L, generator=generator))),
    ("等于方差", _draws(_full, torch.exp)),
    ("偏了半个标准差", _draws(lambda n, B, L, generator: torch.rand(n, B, L, generator=generator))),
    ("相互不独立", _draws(lambda n, B, L, generator: torch.randn(n, 1, L, generator=generator))),
    ("相互不独立", _draws(lambda n, B, L, generator: torch.randn(n, B, 1, generator=generator))),
    ("均值或方差与 N(mu, exp(log_var)) 不符", _draws(_full, lambda log_var: 0.5 * torch.exp(log_var))),  # ½ 放到了指数外面
    ("均值或方差与 N(mu, exp(log_var)) 不符", lambda mu, log_var, n, generator: torch.exp(0.5 * log_var) * (mu + _full(n, *mu.shape, generator))),
    ("分布却不是正态", _draws(lambda n, B, L, generator: math.sqrt(12) * (torch.rand(n, B, L, generator=generator) - 0.5))),
)


@checks("4.3")
def best_baseline(answer: object) -> None:
    """对 log σ² 的得分估计，方差最小的基线 b。"""
    eps = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(eps).exp()
    for mu, log_var, a in ((0.3, -0.4, 1.0), (-1.0, 0.5, 0.5), (2.0, 0.0, 2.0)):
        got = number(ask(answer, mu, log_var, a))
        f = (mu + math.exp(0.5 * log_var) * eps - a) ** 2

        def near(weight: Tensor, got: float = got, f: Tensor = f) -> bool:
            """``got`` 是不是以 ``weight`` 为权的 f 的平均。"""
            mean = float(torch.trapezoid(density * weight * f, eps) / torch.trapezoid(density * weight, eps))
            return abs(got - mean) < 1e-5 * mean

        if near(torch.ones_like(eps)):
            raise Wrong("你用的是 f 的平均值 E[f]；它是不错的基线，但权重 (ε²−1)² 没有算进去，方差还不是最小。")
        if near(eps**2):
            raise Wrong("这是对 μ 的梯度的最优基线；换成 log σ² 之后，得分变成 (ε²−1)/2，权重也要换。")
        if not near((eps**2 - 1) ** 2):
            raise Wrong(f"μ={mu}、log σ²={log_var}、a={a} 时方差最小的 b 不是 {got:.4g}；对 b 求导并令其为 0 再看看。")


known_wrong(
    "4.3",
    ("应交一个数", lambda mu, log_var, a: ((mu - a) ** 2, 5 * math.exp(log_var))),  # 两项没有相加
    ("f 的平均值 E[f]", lambda mu, log_var, a: (mu - a) ** 2 + math.exp(log_var)),
    ("对 μ 的梯度的最优基线", lambda mu, log_var, a: (mu - a) ** 2 + 3 * math.exp(log_var)),
    ("对 b 求导", lambda mu, log_var, a: (mu - a) ** 2 + 10 * math.exp(log_var)),  # 10σ² 忘了除以分母 2
    ("对 b 求导", lambda mu, log_var, a: (mu - a) ** 2 + 5 * math.exp(0.5 * log_var)),  # 用了 σ
)


@checks("4.4")
def laplace_from_uniform(answer: object) -> None:
    u = torch.tensor([0.01, 0.2, 0.45, 0.55, 0.9, 0.999], dtype=torch.float64)
    loc = torch.tensor([0.7, -1.2, 0.3, 0.7, -0.4, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([1.5, 0.8, 2.5, 1.5, 3.0, 0.6], dtype=torch.float64, requires_grad=True)
    reply = ask(answer, loc, scale, u.clone())
    z = tensor(reply, (6,), "与 u 同形的张量 [6]", "检查对数里的量在 u < ½ 与 u > ½ 时是否都为正")
    mid = loc.detach()
    true, left = Laplace(mid, scale.detach()).icdf(u), u < 0.5

    def near(value: Tensor, where: Tensor = left | ~left) -> bool:
        return torch.allclose(z[where], value[where])

    if near(true, ~left) and not near(true, left):
        if near(2 * mid - true, left):
            raise Wrong("u > ½ 的一半对，u < ½ 的一半不对：绝对值要分两段，左半边的符号再看看。")
        raise Wrong("u > ½ 的一半对，u < ½ 的一半不对：左半边 |z − μ| = μ − z，要另写一支。")
    if near(true, left) and not near(true, ~left):
        raise Wrong("u < ½ 的一半对，u > ½ 的一半不对：右半边的概率从 1 往回数。")
    if near(2 * mid - true):
        raise Wrong("左右颠倒了：u 增大时 z 应该增大，你的在减小。")
    if near(Normal(mid, scale.detach()).icdf(u)):
        raise Wrong("这是正态分布的反函数，题目要的是拉普拉斯。")
    if not near(true):
        raise Wrong("与拉普拉斯分布的反函数不符；先核对 u = ½ 时 z 应等于 loc。")
    if lost := _cut_off(reply, loc=loc, scale=scale):
        raise Wrong(f"数值对了，梯度没有传回 {lost}：结果里要保留对它们的依赖。")


def _side(u):
    """−1 在左半边，+1 在右半边。"""
    return torch.sign(u - 0.5)


def _tail(u):
    """ln(1 − 2|u − ½|)，总是负的。"""
    return torch.log1p(-2 * (u - 0.5).abs())


known_wrong(
    "4.4",
    ("应返回与 u 同形的张量", lambda loc, scale, u: torch.stack([loc + scale * torch.log(2 * u), loc - scale * torch.log(2 - 2 * u)])),  # 两支都交了
    ("检查对数里的量", lambda loc, scale, u: torch.where(u < 0.5, loc + scale * torch.log(2 * u), loc - scale * torch.log(1 - 2 * u))),
    ("左半边的符号", lambda loc, scale, u: loc - scale * _tail(u)),
    ("要另写一支", lambda loc, scale, u: loc - scale * torch.log(2 * (1 - u))),
    ("从 1 往回数", lambda loc, scale, u: loc + scale * torch.log(2 * u)),
    ("从 1 往回数", lambda loc, scale, u: loc + scale * _tail(u)),
    ("左右颠倒了", lambda loc, scale, u: loc + scale * _side(u) * _tail(u)),
    ("正态分布的反函数", lambda loc, scale, u: loc + scale * math.sqrt(2) * torch.erfinv(2 * u - 1)),
    ("与拉普拉斯分布的反函数不符", lambda loc, scale, u: loc - _side(u) * _tail(u) / scale),  # 指数里的 b 没有移过来
    ("与拉普拉斯分布的反函数不符", lambda loc, scale, u: loc - scale * _side(u) * torch.log1p(-(u - 0.5).abs())),
    ("梯度没有传回 loc 与 scale：", lambda loc, scale, u: Laplace(loc.detach(), scale.detach()).icdf(u)),
    ("梯度没有传回 loc 与 scale：", lambda loc, scale, u: Laplace(loc, scale).icdf(u).detach().numpy()),
    ("梯度没有传回 scale：", lambda loc, scale, u: loc - scale.detach() * _side(u) * _tail(u)),
)
