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
    weights = torch.linspace(0.5, 1.5, z.numel(), dtype=z.dtype).view(z.shape)  # 不等的权：成对相反的样本，梯度才不会恰好抵消
    gradients = ask(lambda: torch.autograd.grad((weights * z).sum(), tuple(inputs.values()), allow_unused=True, retain_graph=True))
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
    if std < 0:
        raise Wrong(f"std = {std:g} 是负的：标准差是方差的正平方根，exp(·) 也总是正的。")
    if abs(std - true_std) > 1e-3:
        raise Wrong(f"std = {std:g} 不对：log_var 是方差的对数，方差是 9。")
    if abs(slope + true_slope) < 1e-3:
        raise Wrong("斜率的大小对了，符号反了：ε 是负的，σ 变大时 z 往哪边走？")
    if abs(slope - 2 * true_slope) < 1e-3:
        raise Wrong("斜率大了一倍：σ 对 log σ² 的导数是 ½σ，这个 ½ 丢了。")
    if abs(slope - true_slope / 2) < 1e-3:
        raise Wrong("斜率只有一半：exp(½·log_var) 求导时，½ 掉下来一次，你乘了两次。")
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
    ("用链式法则", (3.0, -6.0 * math.log(9))),
    ("斜率只有一半", (3.0, -1.5)),
    ("它不是有限的数", (3.0, math.nan)),
    ("是负的", (-3.0, 3.0)),
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
    if (z - mu.detach()).abs().max() < 1e-9:
        raise Wrong("没有加噪声：每个样本都等于 mu，还要加 std·ε。")
    if (z - z[:1]).abs().max() < 1e-9:
        raise Wrong("n 个样本全都一样：ε 少了 n 这一维，被广播成了同一个。")
    if z.mean(0).abs().max() < 0.1:  # 该是 0、1、−2、3、0.5、0；σ 最大是 3，两万次的平均偏不到 0.1
        raise Wrong("六处样本的均值都是 0：少加了 mu。")
    if lost := _cut_off(reply, mu=mu, log_var=log_var):
        why = "z 要写成它们的可导函数，不能用 sample() 或 torch.normal" if "与" in lost else "算 z 时它是不是被 detach 了，或换成了不求导的数"
        raise Wrong(f"梯度没有传回 {lost}：{why}。")

    def same(seed: int) -> bool:
        return torch.equal(z, tensor(draw(seed), (n, 2, 3), f"形状 [n, B, L] = [{n}, 2, 3] 的张量"))

    if not same(0):
        raise Wrong("同一颗种子两次结果不同：随机数没有来自传入的 generator。")
    if same(1):
        raise Wrong("换一颗种子结果不变：随机数没有来自传入的 generator。")
    true = Normal(mu.detach(), log_var.detach().exp().sqrt())
    noise = ((z - true.mean) / true.stddev).reshape(n, -1)
    ordered, columns = noise.flatten().sort().values, noise.sort(0).values
    if (z.std(0) / true.variance - 1).abs().max() < 0.05:
        raise Wrong("样本的标准差等于方差 exp(log_var)：指数上少了 ½。")
    if (noise.mean(0) - 0.5).abs().max() < 0.05:
        raise Wrong("样本整体偏了半个标准差：用的是均匀噪声 rand，应该用标准正态 randn。")
    centered = noise - noise.mean()
    if abs(centered.pow(4).mean() / centered.var() ** 2 - 1.8) < 0.1:  # 均匀分布的四阶矩是方差平方的 1.8 倍，正态的是 3 倍
        raise Wrong("用的是均匀噪声，移到了 0 附近也还是均匀的，没有尾巴：ε 要用标准正态 randn。")
    correlation = noise.T.corrcoef() - torch.eye(6, dtype=noise.dtype)
    if correlation.abs().max() > 0.05:
        raise Wrong("批内或各维的 ε 相互不独立：ε 的形状应是完整的 [n, B, L]，不能靠广播。")
    if noise.mean(0).abs().max() > 0.05 or (noise.var(0) - 1).abs().max() > 0.08 or abs(noise.var() - 1) > 0.03:
        worst = int(((noise.var(0) - 1).abs() + noise.mean(0).abs()).argmax())
        raise Wrong(
            f"样本的均值或方差与 N(mu, exp(log_var)) 不符：该是 N({true.mean.flatten()[worst]:g}, {true.variance.flatten()[worst]:g}) 的那一个，"
            f"抽到的均值 {z.mean(0).flatten()[worst]:.3g}、方差 {z.var(0).flatten()[worst]:.3g}；ε 要均值 0、方差 1，再乘 exp(½·log_var)、加 mu。"
        )
    values = ordered.unique()
    if len(values) < 100:
        raise Wrong(f"样本的均值与方差都对，分布却不是正态：ε 总共只取 {len(values)} 个值；要用标准正态 randn。")
    ranks = (torch.arange(len(ordered), dtype=torch.float64) + 0.5) / len(ordered)
    if (Normal(0.0, 1.0).cdf(ordered) - ranks).abs().max() > 0.01 or ordered[-1] < 3.5 or ordered[0] > -3.5:
        raise Wrong("样本的均值与方差都对，分布却不是正态：各处的频率与正态的概率不符，或少了尾巴；ε 要用标准正态 randn，不截断。")
    if (columns.diff(dim=0) < 1e-9).double().mean() > 0.2:
        raise Wrong("有的 ε 用了不止一次：n·B·L 个样本要 n·B·L 个不同的 ε，不要重复、不要取相反数凑数。")
    if (columns + columns.flip(0)).abs().max() < 1e-4:
        raise Wrong("有的 ε 与另一个恰好相反：样本之间不再独立，直接抽 n·B·L 个。")
    if (noise[1:] * noise[:-1]).mean().abs() > 0.02:
        raise Wrong("相邻两次抽样的 ε 相关：n 个样本要相互独立。")
    by_mu, by_log_var = (each.detach() for each in torch.autograd.grad(reply.sum(), (mu, log_var)))
    if (by_mu / n - 1).abs().max() > 1e-4:
        raise Wrong(f"样本对了，对 mu 的梯度不对：每个样本的 ∂z/∂mu 应是 1，你的平均是 {by_mu.mean() / n:.3g}。")
    if not torch.allclose(by_log_var, 0.5 * (z - mu.detach()).sum(0), rtol=1e-3, atol=1e-2):
        raise Wrong("样本对了，对 log_var 的梯度不对：∂z/∂log_var 应是 (z − mu)/2；看看是不是有一段被切断，或绕了别的路。")


def _draws(noise, std=lambda log_var: torch.exp(0.5 * log_var)):
    """抽样的函数：噪声由 ``noise(n, B, L, generator)`` 给出，标准差由 ``std(log_var)`` 给出。"""
    return lambda mu, log_var, n, generator: (mu + std(log_var) * noise(n, *mu.shape, generator)).expand(n, *mu.shape)


def _full(n, B, L, generator):
    return torch.randn(n, B, L, generator=generator)


def _laplace(n, B, L, generator):
    """方差 1 的拉普拉斯噪声。"""
    return Laplace(0.0, 0.5**0.5).icdf(torch.rand(n, B, L, generator=generator).clamp(1e-7, 1 - 1e-7))


def _correlated(n, B, L, generator):
    """相邻的两次各有一半相同的噪声。"""
    eps = _full(n + 1, B, L, generator)
    return (eps[1:] + eps[:-1]) / math.sqrt(2)


def _draws_with_slopes(mu_slope, log_var_slope):
    """样本对，梯度多乘了两个数。"""

    def steeper(value, slope):
        return value.detach() + slope * (value - value.detach())

    return lambda mu, log_var, n, generator: _draws(_full)(steeper(mu, mu_slope), steeper(log_var, log_var_slope), n, generator)


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
    ("均值或方差与 N(mu, exp(log_var)) 不符", _draws(lambda n, B, L, generator: 0.97 * _full(n, B, L, generator))),
    ("移到了 0 附近", _draws(lambda n, B, L, generator: torch.rand(n, B, L, generator=generator) - 0.5)),
    ("移到了 0 附近", _draws(lambda n, B, L, generator: 2 * torch.rand(n, B, L, generator=generator) - 1)),
    ("没有加噪声", lambda mu, log_var, n, generator: mu.expand(n, *mu.shape)),
    ("少加了 mu", lambda mu, log_var, n, generator: torch.exp(0.5 * log_var) * _full(n, *mu.shape, generator)),
    ("移到了 0 附近", _draws(lambda n, B, L, generator: math.sqrt(12) * (torch.rand(n, B, L, generator=generator) - 0.5))),
    ("总共只取 2 个值", _draws(lambda n, B, L, generator: 2.0 * torch.randint(2, (n, B, L), generator=generator) - 1)),  # ±1
    ("各处的频率", _draws(_laplace)),
    ("各处的频率", _draws(lambda n, B, L, generator: _full(n, B, L, generator).clamp(-2.5, 2.5) / 0.99)),
    ("用了不止一次", _draws(lambda n, B, L, generator: _full(n // 2, B, L, generator).repeat(2, 1, 1))),
    ("恰好相反", _draws(lambda n, B, L, generator: torch.cat([half := _full(n // 2, B, L, generator), -half]))),
    ("相邻两次抽样", _draws(_correlated)),
    ("对 mu 的梯度不对", _draws_with_slopes(2.0, 1.0)),
    ("对 log_var 的梯度不对", _draws_with_slopes(1.0, 2.0)),
)


@checks("4.3")
def best_baseline(answer: object) -> None:
    """对 log σ² 的得分估计，方差最小的基线 b。"""
    eps = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    density = Normal(0.0, 1.0).log_prob(eps).exp()
    cases = ((0.3, -0.4, 1.0), (-1.0, 0.5, 0.5), (2.0, 0.0, 2.0))
    replies = [number(ask(answer, *case)) for case in cases]

    def near(values: list[float]) -> bool:
        return all(abs(got - value) < 1e-5 * max(1.0, abs(value)) for got, value in zip(replies, values))

    def averages(weight: Tensor) -> list[float]:
        """三组参数下，以 ``weight`` 为权的 f 的平均。"""
        found = []
        for mu, log_var, a in cases:
            f = (mu + math.exp(0.5 * log_var) * eps - a) ** 2
            found.append(float(torch.trapezoid(density * weight * f, eps) / torch.trapezoid(density * weight, eps)))
        return found

    best = averages((eps**2 - 1) ** 2)
    if near(best):
        return
    if near(averages(torch.ones_like(eps))):
        raise Wrong("你用的是 f 的平均值 E[f]；它是不错的基线，但权重 (ε²−1)² 没有算进去，方差还不是最小。")
    if near(averages(eps**2)):
        raise Wrong("这是对 μ 的梯度的最优基线；换成 log σ² 之后，得分变成 (ε²−1)/2，权重也要换。")
    if max(replies) - min(replies) < 1e-9:
        raise Wrong(f"换了 μ、log σ²、a，你的 b 总是 {replies[0]:.4g}：要写成三者的函数，不是一个数。")
    if near([2 * value for value in best]):
        raise Wrong("大了一倍：分母 E[(ε²−1)²] = 3 − 2 + 1 = 2，没有除。")
    if near([value / 2 for value in best]):
        raise Wrong("小了一半：(ε²−1)/2 里的 ½ 在分子、分母里都有，约掉了，不必再乘。")
    if near([-value for value in best]):
        raise Wrong("大小对了，符号反了：f ≥ 0，它的加权平均也不小于 0。")
    squares = [(mu - a) ** 2 for mu, _, a in cases]
    if near([square + 10 * math.exp(log_var) for square, (_, log_var, _) in zip(squares, cases)]):
        raise Wrong("σ² 的系数是 10/2：分母 E[(ε²−1)²] = 2 只除了第一项，第二项也要除。")
    if near([square + 5 * math.exp(0.5 * log_var) for square, (_, log_var, _) in zip(squares, cases)]):
        raise Wrong("第二项用了 σ = exp(½·log_var)；要的是 σ² = exp(log_var)。")
    if near([square + 5 * log_var for square, (_, log_var, _) in zip(squares, cases)]):
        raise Wrong("第二项用了 log σ² 本身；要的是 σ² = exp(log_var)。")
    if near([5 * math.exp(log_var) for _, log_var, _ in cases]):
        raise Wrong("少了 (μ−a)²：f 里不随 ε 变的那一部分，也在加权平均里。")
    if near([(mu + a) ** 2 + 5 * math.exp(log_var) for mu, log_var, a in cases]):
        raise Wrong("第一项应是 (μ−a)²，你写的是 (μ+a)²。")
    place = next(k for k in range(3) if abs(replies[k] - best[k]) >= 1e-5 * max(1.0, best[k]))
    mu, log_var, a = cases[place]
    raise Wrong(f"μ={mu}、log σ²={log_var}、a={a} 时方差最小的 b 不是 {replies[place]:.4g}；对 b 求导并令其为 0 再看看。")


def _with(first, coefficient, scale=math.exp):
    """b = first·(μ−a)² + coefficient·scale(log σ²)。"""
    return lambda mu, log_var, a: first * (mu - a) ** 2 + coefficient * scale(log_var)


known_wrong(
    "4.3",
    ("应交一个数", lambda mu, log_var, a: ((mu - a) ** 2, 5 * math.exp(log_var))),  # 两项没有相加
    ("它不是有限的数", lambda mu, log_var, a: math.nan),
    ("f 的平均值 E[f]", _with(1, 1)),
    ("对 μ 的梯度的最优基线", _with(1, 3)),
    ("要写成三者的函数", lambda mu, log_var, a: 0.49 + 5 * math.exp(-0.4)),
    ("大了一倍", _with(2, 10)),
    ("小了一半", _with(0.5, 2.5)),
    ("符号反了", _with(-1, -5)),
    ("只除了第一项", _with(1, 10)),
    ("用了 σ = exp", _with(1, 5, lambda log_var: math.exp(0.5 * log_var))),
    ("用了 log σ² 本身", _with(1, 5, lambda log_var: log_var)),
    ("少了 (μ−a)²", _with(0, 5)),
    ("你写的是 (μ+a)²", lambda mu, log_var, a: (mu + a) ** 2 + 5 * math.exp(log_var)),
    ("对 b 求导", _with(1, 4)),
    ("μ=-1.0、log σ²=0.5、a=0.5", lambda mu, log_var, a: (mu - a) ** 2 + 5 * math.exp(-0.4) * (1 + 0.1 * abs(log_var + 0.4))),  # 只在第一组上对
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
        if near(2 * mid - true, ~left):
            raise Wrong("u < ½ 的一半对，u > ½ 的一半不对：右半边落到了 loc 的左边，差一个符号。")
        raise Wrong("u < ½ 的一半对，u > ½ 的一半不对：右半边的概率从 1 往回数。")
    if near(2 * mid - true):
        raise Wrong("左右颠倒了：u 增大时 z 应该增大，你的在减小。")
    if near(true - mid):
        raise Wrong("形状对，位置不对：少加了 loc。")
    b = scale.detach()
    if near(Normal(mid, b).icdf(u)):
        raise Wrong("这是正态分布的反函数，题目要的是拉普拉斯。")
    for factor, says in {
        1 / b: "少乘了 scale：指数上的 b 移到对数外面，是个因子",
        1 / b**2: "scale 除反了：|z − μ|/b = −ln(…)，解出 z 时 b 要乘",
        torch.full_like(b, 1 / math.log(2)): "用了以 2 为底的对数；密度里是 e",
        torch.full_like(b, 1 / math.log(10)): "用了以 10 为底的对数；密度里是 e",
        torch.full_like(b, 2.0): "大了一倍：指数是 |z − μ|/b，不是 |z − μ|/(2b)",
        torch.full_like(b, 0.5): "小了一半：指数是 |z − μ|/b，不是 2|z − μ|/b",
        torch.full_like(b, 0.5**0.5): "小了 √2 倍：题目给的 b 就是 scale，不是标准差",
    }.items():
        if near(mid + factor * (true - mid)):
            raise Wrong(f"离 loc 的远近不对：{says}。")
    if near(mid - b * torch.sign(u - 0.5) * torch.log1p(-(u - 0.5).abs())):
        raise Wrong("对数里少了因子 2：2u 与 2(1−u) 合起来是 1 − 2|u − ½|。")
    if not near(true):
        k = int((z - true).abs().argmax())
        reached = Laplace(mid, b).cdf(z)[k]
        raise Wrong(
            f"与拉普拉斯分布的反函数不符：loc = {mid[k]:g}、scale = {b[k]:g}、u = {u[k]:g} 时你的 z = {z[k]:.4g}，"
            f"代回分布函数，F(z) = {reached:.3g}，应是 {u[k]:g}。"
        )
    if lost := _cut_off(reply, loc=loc, scale=scale):
        raise Wrong(f"数值对了，梯度没有传回 {lost}：结果里要保留对它们的依赖。")
    by_loc, by_scale = torch.autograd.grad(reply.sum(), (loc, scale))  # 每个 z 只用自己的 loc 与 scale，和的梯度就是各自的
    if not torch.allclose(by_loc, torch.ones_like(u)):
        raise Wrong(f"数值对了，对 loc 的梯度不对：∂z/∂loc 应处处是 1，你的从 {by_loc.min():.3g} 到 {by_loc.max():.3g}。")
    if not torch.allclose(by_scale, (true - mid) / b):
        raise Wrong("数值对了，对 scale 的梯度不对：∂z/∂scale 应是 (z − loc)/scale；看看是不是有一段被切断。")


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
    ("左右颠倒了", lambda loc, scale, u: loc + scale * _side(u) * _tail(u)),
    ("正态分布的反函数", lambda loc, scale, u: loc + scale * math.sqrt(2) * torch.erfinv(2 * u - 1)),
    ("落到了 loc 的左边", lambda loc, scale, u: loc + scale * _tail(u)),
    ("少加了 loc", lambda loc, scale, u: 0 * loc - scale * _side(u) * _tail(u)),
    ("scale 除反了", lambda loc, scale, u: loc - _side(u) * _tail(u) / scale),  # 指数里的 b 没有移过来
    ("少乘了 scale", lambda loc, scale, u: loc - _side(u) * _tail(u) + 0 * scale),
    ("以 2 为底", lambda loc, scale, u: loc - scale * _side(u) * _tail(u) / math.log(2)),
    ("以 10 为底", lambda loc, scale, u: loc - scale * _side(u) * _tail(u) / math.log(10)),
    ("大了一倍", lambda loc, scale, u: loc - 2 * scale * _side(u) * _tail(u)),
    ("小了一半", lambda loc, scale, u: loc - 0.5 * scale * _side(u) * _tail(u)),
    ("小了 √2 倍", lambda loc, scale, u: loc - math.sqrt(0.5) * scale * _side(u) * _tail(u)),
    ("少了因子 2", lambda loc, scale, u: loc - scale * _side(u) * torch.log1p(-(u - 0.5).abs())),
    ("代回分布函数", lambda loc, scale, u: loc - scale**2 * _side(u) * _tail(u)),
    ("代回分布函数", lambda loc, scale, u: loc + scale * torch.log(u / (1 - u))),  # 逻辑斯谛分布
    ("出现了 NaN", lambda loc, scale, u: loc + scale * torch.log(2 * u - 1)),
    ("梯度没有传回 loc 与 scale：", lambda loc, scale, u: Laplace(loc.detach(), scale.detach()).icdf(u)),
    ("梯度没有传回 loc 与 scale：", lambda loc, scale, u: Laplace(loc, scale).icdf(u).detach().numpy()),
    ("梯度没有传回 scale：", lambda loc, scale, u: loc - scale.detach() * _side(u) * _tail(u)),
    ("梯度没有传回 loc：", lambda loc, scale, u: loc.detach() + 0 * loc - scale * _side(u) * _tail(u)),
    ("对 loc 的梯度不对", lambda loc, scale, u: torch.where(u < 0.5, loc, loc.detach()) - scale * _side(u) * _tail(u)),
    ("对 scale 的梯度不对", lambda loc, scale, u: loc - torch.where(u < 0.5, scale, scale.detach()) * _side(u) * _tail(u)),
)
