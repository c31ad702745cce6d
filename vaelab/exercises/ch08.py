"""第 08 章“隐空间”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, listed, number, whole

_WHAT_8_1 = "一个数：整批图共用一个增益"


def _gain(mean: Tensor, var: Tensor) -> float:
    """KL(N(mean, diag(var)) ‖ N(0, I))，nat。"""
    own = MultivariateNormal(mean, var.diag())
    return float(kl_divergence(own, MultivariateNormal(torch.zeros_like(mean), torch.eye(len(mean), dtype=mean.dtype))))


@checks("8.1")
def gain_of_a_diagonal_prior(answer: object) -> None:
    """由 mu、log_var 求换成矩匹配的对角高斯之后，平均 ELBO 升高多少。"""
    generator = torch.Generator().manual_seed(81)
    for count, dim in ((7, 3), (40, 5), (6, 1)):
        mu = 1.5 * torch.randn(count, dim, generator=generator, dtype=torch.float64) + 0.7
        mu[:, -1] += mu[:, 0]  # 各维相关
        log_var = torch.rand(count, dim, generator=generator, dtype=torch.float64) * 2 - 2
        got = number(ask(answer, mu.clone(), log_var.clone()), _WHAT_8_1)
        mean, between, within = mu.mean(0), mu.var(0, correction=0), log_var.exp().mean(0)
        truth = _gain(mean, between + within)
        where = f"N = {count}、L = {dim} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6 * (1 + abs(value))

        if near(truth):
            continue
        if near(-truth):
            raise Wrong("符号反了：换成更合身的先验，ELBO 升高。")
        if near(_gain(mean, between)):
            raise Wrong(f"{where}只用了 mu 的方差：q(z) 的方差还要加上各个后验自己的方差的平均。")
        if near(_gain(mean, within)):
            raise Wrong(f"{where}只用了后验自己的方差：各张图的 mu 不同，mu 的方差也是 q(z) 的。")
        if near(_gain(mean, mu.var(0) + within)):
            raise Wrong(f"{where}mu 的方差除以了 N − 1：q(z) 就是这 N 个后验的平均，应除以 N（correction=0）。")
        if near(_gain(mean, between + log_var.mean(0).exp())):
            raise Wrong(f"{where}先平均 log_var 再取指数：要平均的是方差 exp(log_var)。")
        if near(_gain(mean, between + (log_var / 2).exp().mean(0))):
            raise Wrong(f"{where}加的是标准差 exp(log_var / 2)：方差是 exp(log_var)。")
        if near(_gain(torch.zeros_like(mean), between + within)):
            raise Wrong(f"{where}漏了均值：式(8.6) 里有 mᵀm。")
        if near(2 * truth):
            raise Wrong(f"{where}大了 2 倍：忘了 ½。")
        if dim > 1 and near(truth / dim):
            raise Wrong(f"{where}小了 L 倍：各维的增益要相加，不是取平均。")
        full = mu.T.cov(correction=0) + within.diag() if dim > 1 else (between + within).diag()
        identity = torch.eye(dim, dtype=torch.float64)
        if near(float(kl_divergence(MultivariateNormal(mean, full), MultivariateNormal(torch.zeros_like(mean), identity)))):
            raise Wrong(f"{where}这是全协方差的增益：题目的先验是对角的，行列式里只有各维的方差。")
        posteriors = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1).mean()
        if near(float(posteriors)):
            raise Wrong(f"{where}这是平均 KL，不是增益：先有 q(z) 的均值与方差，再算一个高斯的 KL。")
        raise Wrong(f"{where}你给出 {got:.4g}，应为 {truth:.4g}；先分别核对 q(z) 的均值与各维的方差。")


def _diagonal(between=lambda mu: mu.var(0, correction=0), within=lambda log_var: log_var.exp().mean(0), mean=lambda mu: mu.mean(0), times=1.0):
    """对角高斯的增益：均值、两份方差、倍数都可以换成写错的。"""

    def answer(mu: Tensor, log_var: Tensor) -> float:
        var, m = between(mu) + within(log_var), mean(mu)
        return times * 0.5 * float((var + m**2 - 1 - var.log()).sum())

    return answer


def _full(mu: Tensor, log_var: Tensor) -> Tensor:
    cov = torch.atleast_2d(mu.T.cov(correction=0)) + log_var.exp().mean(0).diag()
    return 0.5 * (cov.trace() + mu.mean(0) @ mu.mean(0) - len(cov) - torch.logdet(cov))


known_wrong(
    "8.1",
    ("整批图共用一个增益", lambda mu, log_var: 0.5 * (mu**2 + log_var.exp() - 1 - log_var)),
    ("符号反了", _diagonal(times=-1.0)),
    ("只用了 mu 的方差", _diagonal(within=lambda log_var: 0.0)),
    ("只用了后验自己的方差", _diagonal(between=lambda mu: 0.0)),
    ("除以了 N − 1", _diagonal(between=lambda mu: mu.var(0))),
    ("先平均 log_var", _diagonal(within=lambda log_var: log_var.mean(0).exp())),
    ("加的是标准差", _diagonal(within=lambda log_var: (log_var / 2).exp().mean(0))),
    ("漏了均值", _diagonal(mean=lambda mu: 0 * mu.mean(0))),
    ("大了 2 倍", _diagonal(times=2.0)),
    ("小了 L 倍", lambda mu, log_var: _diagonal()(mu, log_var) / mu.shape[1]),
    ("这是全协方差的增益", _full),
    ("这是平均 KL", lambda mu, log_var: 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1).mean()),
    ("先分别核对", lambda mu, log_var: 1.0),
)


def _information(theta: float, variance: float, which: float) -> float:
    """I(z; v)，nat：由 2×2 的协方差求行列式，不用相关系数的闭式；``which`` 是系数 cos θ 或 sin θ。"""
    cov = torch.tensor([[1.0 + variance, which], [which, 1.0]], dtype=torch.float64)
    return 0.5 * float(cov.diagonal().log().sum() - torch.logdet(cov))


@checks("8.2")
def gap_after_a_rotation(answer: object) -> None:
    """转过 θ 再加噪声的编码，MIG 的分子。"""
    for theta, variance in ((0.3, 0.5), (math.pi / 4, 0.2), (1.2, 0.1), (-0.5, 2.0), (2.5, 0.3), (0.0, 1.0)):  # 0 在最后：漏了噪声的在那里除以零
        got = number(ask(answer, theta, variance))
        along, across = (_information(theta, variance, f(theta)) for f in (math.cos, math.sin))
        truth = abs(along - across)
        where = f"θ = {theta:.3g}、s² = {variance:g} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6

        if near(truth):
            continue
        if near(along - across):
            raise Wrong(f"{where}得到负数：转过 45° 之后，信息最多的是另一维；间隙是最大的减第二大的。")
        if near(2 * truth):
            raise Wrong(f"{where}大了 2 倍：两个因子的间隙相同，要取平均；或者漏了 −½ log(1 − ρ²) 里的 ½。")
        if near(along):
            raise Wrong(f"{where}只有一维的互信息，还要减去另一维的。")
        if near(along + across):
            raise Wrong(f"{where}这是两维的互信息之和：间隙是相减。")
        if near(truth / math.log(2)):
            raise Wrong(f"{where}单位是比特：题目要 nat，用自然对数。")
        if theta and near(abs(math.log(abs(math.tan(theta))))):
            raise Wrong(f"{where}漏了噪声的方差：z₁ 的方差是 1 + s²。")
        noiseless = [-0.5 * math.log(max(1e-300, 1 - f(theta) ** 2 / (1 + variance**2))) for f in (math.cos, math.sin)]
        if near(abs(noiseless[0] - noiseless[1])):
            raise Wrong(f"{where}variance 已经是方差 s²，不要再平方。")
        plain = [-0.5 * math.log(1 - abs(f(theta)) / math.sqrt(1 + variance)) for f in (math.cos, math.sin)]
        if near(abs(plain[0] - plain[1])):
            raise Wrong(f"{where}互信息里是 ρ²，你用了 ρ。")
        unscaled = [-0.5 * math.log(max(1e-300, 1 - f(theta) ** 2 / (1 + variance) ** 2)) for f in (math.cos, math.sin)]
        if near(abs(unscaled[0] - unscaled[1])):
            raise Wrong(f"{where}相关系数的分母是标准差的乘积 √(1 + s²)，你除以了方差。")
        raise Wrong(f"{where}你给出 {got:.4g}，应为 {truth:.4g}；先写出 z₁ 与 v₁、v₂ 的相关系数。")


def _gap(rho2=lambda c, variance: c**2 / (1 + variance), combine=lambda a, b: abs(a - b)):
    """间隙：ρ² 与两维怎样合起来，都可以换成写错的。"""

    def answer(theta: float, variance: float) -> float:
        return combine(*(-0.5 * math.log(1 - rho2(c, variance)) for c in (math.cos(theta), math.sin(theta))))

    return answer


known_wrong(
    "8.2",
    ("漏了噪声的方差", _gap(lambda c, variance: c**2)),
    ("应交一个数", lambda theta, variance: (_gap()(theta, variance),) * 2),  # 每个因子一个
    ("得到负数", _gap(combine=lambda a, b: a - b)),
    ("大了 2 倍", _gap(combine=lambda a, b: 2 * abs(a - b))),
    ("只有一维的互信息", lambda theta, variance: _gap(combine=lambda a, b: abs(a - b) if theta == 0 else a)(theta, variance)),
    ("两维的互信息之和", lambda theta, variance: _gap(combine=lambda a, b: abs(a - b) if theta == 0 else a + b)(theta, variance)),
    ("单位是比特", _gap(combine=lambda a, b: abs(a - b) / math.log(2))),
    ("不要再平方", _gap(rho2=lambda c, variance: c**2 / (1 + variance**2))),
    ("你用了 ρ", _gap(rho2=lambda c, variance: abs(c) / math.sqrt(1 + variance))),
    ("你除以了方差", _gap(rho2=lambda c, variance: c**2 / (1 + variance) ** 2)),
    ("先写出", lambda theta, variance: 0.0),
)


def _problem(counts: int, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """造一组逐个的增益：个体之间的起伏远大于混合之间的差，只有成对地比才看得出。"""
    generator = torch.Generator().manual_seed(seed)
    common = 5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    shared = 5 * torch.randn(rows, generator=generator, dtype=torch.float64)
    own = torch.randn(2, counts, rows, generator=generator, dtype=torch.float64)
    own -= own.mean(2, keepdim=True)
    up = torch.linspace(0, 2, counts, dtype=torch.float64)[:, None]
    before = 0.4 * torch.arange(counts - 6, 0, -1, dtype=torch.float64)
    after = torch.tensor([0.0, 0.02, 0.2, 0.9, 1.2, 2.0], dtype=torch.float64)  # 说不准、成对才看得出、……、一眼看得出
    down = 3 - torch.cat([before, after])[:, None]
    return up + common + 0.3 * own[0], down + shared + 0.5 * own[1]


def _choose(fitted: Tensor, held: Tensor, best=None, paired=True, times=2.0, rows=None) -> tuple[int, list[int]]:
    """式样答案；选谁、成对与否、几个标准误差都可以换。"""
    best = int(held.mean(1).argmax()) if best is None else best(fitted, held)
    found = []
    for k in range(len(held)):
        loss = held[best] - held[k]
        spread = loss.std() if paired else (held[best].var() + held[k].var()).sqrt()
        worse = loss.mean() > times * spread / math.sqrt(rows or len(loss))
        if k > best and worse and fitted[k].mean() > fitted[best].mean():
            found.append(k)
    return best, found


@checks("8.3")
def find_the_overfitted(answer: object) -> None:
    """该选哪一个，哪些过拟合。"""
    what = "两样：选第几个（整数），与过拟合的各个的列表"
    problems = [_problem(8, 400, 831), _problem(9, 900, 832), _problem(7, 100, 833)]
    poor = problems[0][0].clone()
    poor[-1] -= 5  # 最后一个两边都差：没有拟合好，不是过拟合
    for fitted, held in [*problems, (poor, problems[0][1])]:
        chosen, listed_ = listed(ask(answer, fitted.clone(), held.clone()), what, 2)
        chosen = whole(chosen, what, 0)
        found = sorted(whole(each, what, 0) for each in listed(listed_, what))
        best, truth = _choose(fitted, held)
        if chosen != best:
            if chosen == int(fitted.mean(1).argmax()):
                raise Wrong(f"你选了第 {chosen} 个，它在拟合用的编码上最高：那里越复杂越高，要看留出的。")
            raise Wrong(f"你选了第 {chosen} 个；留出的增益，平均最高的是第 {best} 个。")
        if found == truth:
            continue
        if found == sorted(_choose(fitted, held, paired=False)[1]):
            raise Wrong(f"你说过拟合的是 {found}，标准误差没有成对地算：两个混合用的是同一批编码，先逐个相减，再求差的标准误差。")
        if found == sorted(_choose(fitted, held, times=0.0)[1]):
            raise Wrong(f"你说过拟合的是 {found}，没有看标准误差：低得不到两个标准误差的，说不准。")
        if found == sorted(_choose(fitted, held, rows=1)[1]):
            raise Wrong(f"你说过拟合的是 {found}：标准误差是标准差除以 √N，你没有除。")
        if len(fitted) - 1 in found and fitted[-1].mean() < fitted[best].mean():
            raise Wrong("最后一个在拟合用的编码上也比选中的低：那是没有拟合好，不是过拟合。")
        if any(k < best for k in found):
            raise Wrong(f"你说过拟合的是 {found}：分量比选中的少的，是不够，不是过拟合。")
        raise Wrong(f"选中第 {best} 个之后，过拟合的应是 {truth}，你给出 {found}。")


known_wrong(
    "8.3",
    ("应交两样", lambda fitted, held: int(held.mean(1).argmax())),
    ("应交两样", lambda fitted, held: (0.5, [])),
    ("那里越复杂越高", lambda fitted, held: _choose(fitted, held, best=lambda a, b: int(a.mean(1).argmax()))),
    ("平均最高的是第", lambda fitted, held: (0, [])),
    ("没有成对地算", lambda fitted, held: _choose(fitted, held, paired=False)),
    ("没有看标准误差", lambda fitted, held: _choose(fitted, held, times=0.0)),
    ("你没有除", lambda fitted, held: _choose(fitted, held, rows=1)),
    ("那是没有拟合好", lambda fitted, held: _choose(torch.arange(len(held), dtype=torch.float64)[:, None] + 0 * fitted, held)),  # 没有看拟合用的
    ("是不够，不是过拟合", lambda fitted, held: (_choose(fitted, held)[0], [0, *_choose(fitted, held)[1]])),
    ("过拟合的应是", lambda fitted, held: (_choose(fitted, held)[0], _choose(fitted, held)[1][:-1])),
)


def _circle(h: Tensor) -> Tensor:
    return torch.stack([(2 * math.pi * h).cos(), (2 * math.pi * h).sin()], dim=1)


def _score(codes: Tensor, h: Tensor, *, targets=_circle, constant=True, train="first", test="second", centre=True) -> float:
    """圆上的分数；目标、常数、在哪一半上拟合与量、减不减平均，都可以换成写错的。"""
    half, u = len(codes) // 2, targets(h)
    parts = {"first": slice(None, half), "second": slice(half, None), "all": slice(None)}
    inputs = torch.cat([codes, torch.ones(len(codes), 1, dtype=codes.dtype)], dim=1) if constant else codes
    weights = torch.linalg.lstsq(inputs[parts[train]], u[parts[train]]).solution
    left = u[parts[test]] - inputs[parts[test]] @ weights
    around = u[parts[test]] - (u[parts[test]].mean(0) if centre else 0)
    return 1 - float(left.square().sum() / around.square().sum())


@checks("8.4")
def score_on_a_circle(answer: object) -> None:
    """周期为 1 的量，线性回归 (cos, sin) 的留出 R²。"""
    generator = torch.Generator().manual_seed(84)
    for count, dim, reach in ((60, 3, 1.0), (41, 4, 0.4), (30, 2, 1.0)):
        h = reach * torch.rand(count, generator=generator, dtype=torch.float64)  # reach < 1：平均不是 0
        mix = torch.randn(2, dim, generator=generator, dtype=torch.float64)
        codes = _circle(h) @ mix + 0.4 * torch.randn(count, dim, generator=generator, dtype=torch.float64) + 2.0
        truth = _score(codes, h)
        got = number(ask(answer, codes.clone(), h.clone()))
        where = f"N = {count}、L = {dim} 时"

        def near(got: float = got, codes: Tensor = codes, h: Tensor = h, **changed: object) -> bool:
            return abs(got - _score(codes, h, **changed)) < 1e-6

        if near():
            continue
        if near(targets=lambda h: h[:, None]):
            raise Wrong(f"{where}你回归的是 h 自己：0.01 与 0.99 是邻居，直线不知道；先换成 (cos 2πh, sin 2πh)。")
        if near(targets=lambda h: torch.stack([h.cos(), h.sin()], dim=1)):
            raise Wrong(f"{where}周期是 1，角度应是 2πh；你用了 h。")
        if near(targets=lambda h: _circle(h)[:, :1]) or near(targets=lambda h: _circle(h)[:, 1:]):
            raise Wrong(f"{where}只用了 cos 与 sin 中的一个：圆上的点要两个数。")
        if near(constant=False):
            raise Wrong(f"{where}回归没有带常数：codes 的平均不是 0。")
        if near(train="all", test="all"):
            raise Wrong(f"{where}在同一批样本上拟合与打分；应在前一半上拟合，后一半上打分。")
        if near(test="first"):
            raise Wrong(f"{where}分数是在拟合用的前一半上量的，应在后一半。")
        if near(train="second", test="first"):
            raise Wrong(f"{where}两半用反了：前一半拟合，后一半打分。")
        if near(centre=False):
            raise Wrong(f"{where}分母没有减去平均：u 的平均不一定是 0。")
        if abs(got - (1 - truth)) < 1e-6:
            raise Wrong(f"{where}这是没有解释的那一份，分数是 1 减它。")
        raise Wrong(f"{where}你给出 {got:.4g}，应为 {truth:.4g}；先核对目标 (cos 2πh, sin 2πh) 与两半。")


known_wrong(
    "8.4",
    ("应交一个数", lambda codes, h: _circle(h)),
    ("你回归的是 h 自己", lambda codes, h: _score(codes, h, targets=lambda h: h[:, None])),
    ("角度应是 2πh", lambda codes, h: _score(codes, h, targets=lambda h: torch.stack([h.cos(), h.sin()], dim=1))),
    ("只用了 cos 与 sin 中的一个", lambda codes, h: _score(codes, h, targets=lambda h: _circle(h)[:, :1])),
    ("没有带常数", lambda codes, h: _score(codes, h, constant=False)),
    ("在同一批样本上", lambda codes, h: _score(codes, h, train="all", test="all")),
    ("在拟合用的前一半上量的", lambda codes, h: _score(codes, h, test="first")),
    ("两半用反了", lambda codes, h: _score(codes, h, train="second", test="first")),
    ("分母没有减去平均", lambda codes, h: _score(codes, h, centre=False)),
    ("没有解释的那一份", lambda codes, h: 1 - _score(codes, h)),
    ("先核对目标", lambda codes, h: 0.5),
)


def _level(lam: Tensor, total: float) -> float:
    """水面 σ²：Σ min(λ, σ²) = total。Σ 对 σ² 分段线性，逐个试有几个方向露出水面。"""
    lam = lam.sort(descending=True).values
    for used in range(1, len(lam) + 1):
        level = (total - float(lam[used:].sum())) / used
        below = float(lam[used]) if used < len(lam) else 0.0
        if below <= level <= float(lam[used - 1]):
            return level
    raise ValueError(f"总的误差 {total:g} 不在 0 与 λ 之和 {float(lam.sum()):g} 之间")


@checks("8.5")
def weight_for_a_target(answer: object) -> None:
    """由目标 MSE 定 KL 的权重：反注水的水面乘 2/D。"""
    spectra = ((0.5, 9.0, 0.25, 2.0, 4.0, 1.0), (3.0, 0.0, 1.0, 0.0), (2.0, 0.1, 0.1, 5.0, 0.7), (1.5,))
    for values, part in zip(spectra, (0.3, 0.45, 0.2, 0.6)):
        lam = torch.tensor(values, dtype=torch.float64)
        target, count = part * float(lam.mean()), len(values)
        level = _level(lam, count * target)
        truth = 2 * level / count
        got = number(ask(answer, lam.clone(), target), "一个数：KL 的权重 w")
        where = f"lam = {list(values)}、target = {target:.3g} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6 * (1 + abs(value))

        if near(truth):
            continue
        if got <= 0:
            raise Wrong(f"{where}你给出 {got:.4g}：权重应是正的。")
        if near(level):
            raise Wrong(f"{where}这是 σ²；权重是 w = 2σ²/D。")
        if near(level / count):
            raise Wrong(f"{where}小了一半：w = 2σ²/D，不是 σ²/D。")
        if near(2 * target / count):
            raise Wrong(f"{where}你把 σ² 当成了 target：只有全部方向都用上时才是；λ 不到 σ² 的方向，误差只有 λ。")
        if near(2 * _level(lam, target) / count):
            raise Wrong(f"{where}target 是每个数的 MSE；Σ min(λ, σ²) 是整个样本的，是它的 D 倍。")
        reached = float(lam.clamp(max=got * count / 2).mean())
        raise Wrong(f"{where}你的 w = {got:.4g} 对应 σ² = {got * count / 2:.4g}，最优解的 MSE 是 {reached:.4g}，不是目标。")


known_wrong(
    "8.5",
    ("应交一个数", lambda lam, target: lam),
    ("权重应是正的", lambda lam, target: -1.0),
    ("这是 σ²", lambda lam, target: _level(lam, len(lam) * target)),
    ("小了一半", lambda lam, target: _level(lam, len(lam) * target) / len(lam)),
    ("只有全部方向都用上时", lambda lam, target: 2 * target / len(lam)),
    ("是它的 D 倍", lambda lam, target: 2 * _level(lam, target) / len(lam)),
    ("不是目标", lambda lam, target: 0.1),
)
