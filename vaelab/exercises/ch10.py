"""第 10 章“后验坍塌”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.nn import BatchNorm1d

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number, numbers, shown, tensor


def _steps(lam: float, sigma2: float, a_0: float, lr: float, share: float, *, power: float = 2.0, largest: bool = False, unit: bool = False) -> float:
    """a 从 a_0 长到 share·a* 的步数：解 ȧ = κa(1 − a²/a*²)；κ 由海森矩阵的特征值得到。"""
    noise = 1.0 if unit else sigma2
    hessian = torch.tensor([[1 / noise, -lam / noise], [-lam / noise, lam]], dtype=torch.float64)
    lowest, highest = torch.linalg.eigvalsh(hessian).tolist()
    kappa = highest if largest else -lowest
    top = lam - sigma2

    def away(a2: float) -> float:
        return top / a2 - 1

    return math.log(away(a_0**power) / away(share**2 * top)) / (2 * kappa) / lr


@checks("10.1")
def steps_to_escape(answer: object) -> None:
    """由式(10.5) 预言逃逸的步数。"""
    for lam, sigma2, a_0, lr, share in (
        (1.2, 1.0, 1e-3, 0.05, 0.5),
        (0.9, 0.6, 1e-2, 0.02, 0.9),
        (3.0, 2.5, 1e-4, 0.1, 0.3),
        (0.8, 1.0, 1e-3, 0.05, 0.5),
    ):
        got = number(ask(answer, lam, sigma2, a_0, lr, share), "一个数：步数", infinite=True)
        where = f"λ = {lam:g}、σ² = {sigma2:g}、a₀ = {a_0:g}、学习率 {lr:g}、到 {share:g} 倍时"
        if lam <= sigma2:
            if got != math.inf:
                raise Wrong(f"{where}坍塌的点是坑，没有下坡，永远走不出来：应返回 math.inf，你给出 {got:.4g}。")
            continue
        truth = _steps(lam, sigma2, a_0, lr, share)

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6 * abs(value)

        if near(truth):
            continue
        if got == math.inf:
            raise Wrong(f"{where}λ > σ²，是鞍点，走得出来；无穷只在坑里。")
        if near(truth * lr):
            raise Wrong(f"{where}这是时间，不是步数：再除以学习率。")
        if near(truth * lr * lr):
            raise Wrong(f"{where}学习率用反了：步数 = 时间 ÷ 学习率。")
        if near(2 * truth):
            raise Wrong(f"{where}大了一倍：u = a*²/a² − 1 以 2κ 的速率缩小。")
        if near(_steps(lam, sigma2, a_0, lr, share, largest=True)):
            raise Wrong(f"{where}κ 用了最大的特征值：下坡的是负的那一个。")
        if sigma2 != 1 and near(_steps(lam, sigma2, a_0, lr, share, unit=True)):
            raise Wrong(f"{where}κ 里把 σ² 当成了 1。")
        if near(_steps(lam, sigma2, a_0, lr, share, power=1.0)):
            raise Wrong(f"{where}用了 a₀，应是 a₀²：u = a*²/a² − 1。")
        if share != 0.5 and near(_steps(lam, sigma2, a_0, lr, 0.5)):
            raise Wrong(f"{where}这是到一半的步数：题目要到 share 倍。")
        kappa_lr = (truth / _steps(lam, sigma2, a_0, lr, 0.5)) * math.log(((lam - sigma2) / a_0**2 - 1) / 3) / (2 * truth)
        if near(math.log(share * math.sqrt(lam - sigma2) / a_0) / kappa_lr):
            raise Wrong(f"{where}这是一直指数增长的步数：快到 a* 时会慢下来，要用 ȧ = κa(1 − a²/a*²) 的解。")
        raise Wrong(f"{where}你给出 {got:.6g} 步，应为 {truth:.6g}；先核对 κ，再由 u = a*²/a² − 1 解时间。")


known_wrong(
    "10.1",
    ("应返回 math.inf", lambda lam, sigma2, a_0, lr, share: _steps(lam, sigma2, a_0, lr, share) if lam > sigma2 else 1e9),
    ("无穷只在坑里", lambda *given: math.inf),
    ("这是时间", lambda lam, sigma2, a_0, lr, share: _steps(lam, sigma2, a_0, 1.0, share)),
    ("学习率用反了", lambda lam, sigma2, a_0, lr, share: lr * _steps(lam, sigma2, a_0, 1.0, share)),
    ("大了一倍", lambda *given: 2 * _steps(*given)),
    ("最大的特征值", lambda *given: _steps(*given, largest=True)),
    ("当成了 1", lambda *given: _steps(*given, unit=True)),
    ("应是 a₀²", lambda *given: _steps(*given, power=1.0)),
    ("到一半的步数", lambda lam, sigma2, a_0, lr, share: _steps(lam, sigma2, a_0, lr, 0.5)),
    ("一直指数增长", lambda *given: _exponential(*given)),
    ("先核对 κ", lambda *given: 100.0),
)


def _exponential(lam: float, sigma2: float, a_0: float, lr: float, share: float) -> float:
    trace, det = 1 / sigma2 + lam, lam / sigma2 * (1 - lam / sigma2)
    return math.log(share * math.sqrt(lam - sigma2) / a_0) / (0.5 * (math.sqrt(trace**2 - 4 * det) - trace)) / lr


_WHAT_10_2 = "三个数：A、B、C"


def _free_bits(kl: Tensor, delta: float) -> tuple[float, float, float]:
    """式(10.12)，逐个数地算。"""
    columns = [sum(column) / len(column) for column in kl.T.tolist()]
    a = sum(max(delta, mean) for mean in columns)
    b = sum(max(delta, value) for row in kl.tolist() for value in row) / len(kl)
    c = sum(mean for mean in columns if mean > delta)
    return a, b, c


@checks("10.2")
def free_bits_three_ways(answer: object) -> None:
    """free bits 的三种写法。"""
    generator = torch.Generator().manual_seed(102)
    for count, dims, delta in ((6, 4, 0.4), (9, 3, 0.6), (5, 5, 0.25)):
        kl = 2 * torch.rand(count, dims, generator=generator, dtype=torch.float64) ** 3
        kl[:, 0] *= 0.1  # 有一维整个在免费额之下
        given = kl.clone()
        got = numbers(ask(answer, given, delta), 3, _WHAT_10_2)
        if not torch.equal(given, kl):
            raise Wrong("你就地改了 kl：别处还要用它。")
        where = f"B = {count}、L = {dims}、δ = {delta:g} 时"
        truth = _free_bits(kl, delta)
        mean = kl.mean(0)

        def same(k: int, value: object, got: list[float] = got) -> bool:
            return abs(got[k] - float(value)) < 1e-9 * (1 + abs(float(value)))  # type: ignore[arg-type]

        if all(same(k, truth[k]) for k in range(3)):
            continue
        if same(0, truth[1]) and same(1, truth[0]):
            raise Wrong(f"{where}A 与 B 对调了：A 先在一批上平均，后取最大。")
        if same(0, mean.sum().clamp_min(delta)):
            raise Wrong(f"{where}A 是先对各维求和再取最大：免费额是一维一份。")
        if same(1, kl.sum(1).clamp_min(delta).mean()):
            raise Wrong(f"{where}B 是先对各维求和再取最大：免费额是一维一份。")
        if same(2, (kl * (kl > delta)).sum(1).mean()):
            raise Wrong(f"{where}C 的掩码看的是每张图的 KL，应看一批的平均。")
        if same(2, truth[0]):
            raise Wrong(f"{where}C 与 A 相同了：掩码之下是 0，不是 δ；值不同，梯度才相同。")
        if same(2, (mean - delta).clamp_min(0).sum()):
            raise Wrong(f"{where}C 减去了 δ：掩码不改变超过的那几维的值。")
        if same(0, truth[0] / dims) or same(1, truth[1] / dims):
            raise Wrong(f"{where}对各维取了平均：KL 对各维是求和。")
        if same(1, truth[1] * count):
            raise Wrong(f"{where}B 没有对一批取平均。")
        k = next(k for k in range(3) if not same(k, truth[k]))
        raise Wrong(f"{where}{'ABC'[k]} 应为 {truth[k]:.6g}，你给出 {got[k]:.6g}。")


def _three(**changed: object):
    """三种写法，其中一种可以换成写错的。"""

    def answer(kl: Tensor, delta: float) -> tuple[object, ...]:
        right = dict(zip("ABC", _free_bits(kl, delta)))
        return tuple(changed[k](kl, delta) if k in changed else right[k] for k in "ABC")  # type: ignore[operator]

    return answer


def _in_place(kl: Tensor, delta: float) -> tuple[float, float, float]:
    found = _free_bits(kl, delta)
    kl.clamp_(min=delta)
    return found


known_wrong(
    "10.2",
    ("应交三个数", lambda kl, delta: 1.0),
    ("你就地改了", _in_place),
    ("A 与 B 对调", lambda kl, delta: (_free_bits(kl, delta)[1], _free_bits(kl, delta)[0], _free_bits(kl, delta)[2])),
    ("A 是先对各维求和", _three(A=lambda kl, delta: kl.mean(0).sum().clamp_min(delta))),
    ("B 是先对各维求和", _three(B=lambda kl, delta: kl.sum(1).clamp_min(delta).mean())),
    ("C 的掩码看的是每张图", _three(C=lambda kl, delta: (kl * (kl > delta)).sum(1).mean())),
    ("C 与 A 相同", _three(C=lambda kl, delta: _free_bits(kl, delta)[0])),
    ("C 减去了 δ", _three(C=lambda kl, delta: (kl.mean(0) - delta).clamp_min(0).sum())),
    ("对各维取了平均", _three(A=lambda kl, delta: kl.mean(0).clamp_min(delta).mean())),
    ("B 没有对一批取平均", _three(B=lambda kl, delta: kl.clamp_min(delta).sum())),
    ("应为", _three(C=lambda kl, delta: 0.0)),
)


def _floor_reached(raw: Tensor, eps: float) -> float:
    """过真的批归一化（γ = 1，β = 0），σ = 1 时的 KL 是下界 L/2 的几成。"""
    norm = BatchNorm1d(raw.shape[1], eps=eps, dtype=torch.float64)
    return float(0.5 * norm(raw).detach().square().sum(1).mean() / (raw.shape[1] / 2))


@checks("10.3")
def a_broken_floor(answer: object) -> None:
    """打破批归一化的下界。"""
    for count, dims, eps, share in ((16, 3, 1e-5, 0.25), (9, 4, 1e-3, 0.9), (32, 2, 1e-5, 0.01)):
        raw = tensor(ask(answer, count, dims, eps, share), (count, dims), f"形状 [{count}, {dims}] 的张量：编码器的输出")
        where = f"N = {count}、L = {dims}、eps = {eps:g}、share = {share:g} 时"
        spread = raw.var(0, correction=0)
        if bool((raw == raw[0]).all(0).any()):
            raise Wrong(f"{where}有一维对谁都一样：题目要各维都在变；编码器缩小得再厉害，也没有缩成常数。")
        got = _floor_reached(raw, eps)
        if abs(got - share) < 1e-6 * share:
            continue
        if got > 0.999:
            raise Wrong(f"{where}KL 还是下界的 {got:.4g} 倍：方差比 eps 大得多，批归一化照样把它拉回 1。")
        if torch.allclose(spread, torch.full_like(spread, share * eps), rtol=1e-6):
            raise Wrong(f"{where}方差取了 share·eps，得到 {got:.4g} 倍：v/(v + eps) = share，解出来分母里还有 1 − share。")
        if torch.allclose(raw.var(0), torch.full_like(spread, share * eps / (1 - share)), rtol=1e-6):
            raise Wrong(f"{where}方差除以了 N − 1，得到 {got:.6g} 倍：批归一化在训练时除以 N。")
        if torch.allclose(raw.std(0, correction=0), torch.full_like(spread, share * eps / (1 - share)), rtol=1e-6):
            raise Wrong(f"{where}那是方差，你当成了标准差：得到 {got:.3g} 倍。")
        if torch.allclose(spread, torch.full_like(spread, share), rtol=1e-6):
            raise Wrong(f"{where}方差直接取了 share：批归一化会把它除掉，方差要与 eps 相比。")
        raise Wrong(f"{where}KL 是下界的 {got:.4g} 倍，应是 {share:g} 倍；一维的 KL 是下界的 v/(v + eps) 倍，v 是这一维的方差。")


def _raw(variance, correction: int = 0, root: bool = True):
    """各维方差（除以 N − correction）恰是 variance(eps, share) 的一批；root 为假时把它当作标准差。"""

    def answer(count: int, dims: int, eps: float, share: float) -> Tensor:
        unit = torch.linspace(-1, 1, count, dtype=torch.float64)[:, None].repeat(1, dims)
        size = variance(eps, share)
        return unit / unit.std(0, correction=correction) * (math.sqrt(size) if root else size)

    return answer


known_wrong(
    "10.3",
    ("对谁都一样", lambda count, dims, eps, share: torch.zeros(count, dims, dtype=torch.float64)),
    ("照样把它拉回 1", _raw(lambda eps, share: 10.0)),
    ("分母里还有 1 − share", _raw(lambda eps, share: share * eps)),
    ("批归一化在训练时除以 N", _raw(lambda eps, share: share * eps / (1 - share), correction=1)),
    ("你当成了标准差", _raw(lambda eps, share: share * eps / (1 - share), root=False)),
    ("方差要与 eps 相比", _raw(lambda eps, share: share if eps > 5e-4 else share * eps / (1 - share))),
    ("一维的 KL 是下界的", _raw(lambda eps, share: 0.37 * eps)),
)

_NAMES = ("没有坍塌", "编码器落后", "卡在鞍点", "噪声太大", "坍塌就是最优", "平地")
_RECORDS = (  # kl, gap, stderr, rho, short
    (1.3, 0.2, 0.01, 2.0, math.inf),
    (0.02, 0.9, 0.02, 2.7, math.inf),
    (0.0, 0.004, 0.0005, 1.0, 0.001),  # 间隙小，可是八个标准误差
    (0.001, 0.03, 0.02, 1.25, math.inf),  # 间隙只有一个半标准误差
    (0.0, 0.0, 0.0, 0.6, math.inf),
    (0.003, 0.001, 0.002, 1.004, 0.003),
    (0.0, 0.0, 0.001, 0.997, 0.4),
    (0.05, 0.3, 0.01, 0.5, math.inf),  # 间隙先问
    (0.0, -0.01, 0.004, 1.5, math.inf),  # 负的间隙是噪声
)


def _disease(kl: float, gap: float, stderr: float, rho: float, short: float, *, order: str = "kgr", times: float = 4.0, floor: float = 0.0) -> str:
    """诊断树；问的次序、几个标准误差、间隙的门槛可以换成写错的。"""
    if "k" in order and kl > 0.1:
        return "没有坍塌"
    late = abs(gap) if "a" in order else gap
    if "g" in order and late > max(times * stderr, floor):
        return "编码器落后"
    if rho > 1.01:
        return "卡在鞍点"
    if rho < 0.99:
        return "噪声太大"
    if "s" in order:
        return "坍塌就是最优"
    return "坍塌就是最优" if short < 0.02 else "平地"


@checks("10.4")
def the_right_disease(answer: object) -> None:
    """由五个数说出病名。"""
    for record in _RECORDS:
        got = ask(answer, *record)
        if not isinstance(got, str) or got not in _NAMES:
            raise Wrong(f"应返回病名，{'、'.join(_NAMES)}之一，收到 {shown(got)}。")
        truth = _disease(*record)
        if got == truth:
            continue
        kl, gap, stderr, rho, short = record
        facts = f"KL {kl:g}、间隙 {gap:g} ± {stderr:g}、ρ {rho:g}、离上限 {short:g}"
        if truth == "没有坍塌":
            raise Wrong(f"{facts}：KL 大于 0.1，没有坍塌，先问这一句。")
        if got == "没有坍塌":
            raise Wrong(f"{facts}：KL 不到 0.1，是坍塌。")
        if truth == "编码器落后" and gap > 0.1:
            raise Wrong(f"{facts}：间隙远超标准误差，编码器落后；这一句要在 ρ 之前问，解码器已经在用 z，ρ 说的是另一个点。")
        if truth == "编码器落后":
            raise Wrong(f"{facts}：间隙虽小，是标准误差的八倍，算数；不要另设门槛。")
        if got == "编码器落后" and gap < 0:
            raise Wrong(f"{facts}：间隙是负的。IWAE 不会真的比 ELBO 低，这是噪声。")
        if got == "编码器落后":
            raise Wrong(f"{facts}：间隙不到四个标准误差，不算数。")
        if truth == "平地":
            raise Wrong(f"{facts}：ρ 是 1，可是 ELBO 离上限还远，二阶看不出；不能说坍塌就是最优。")
        if truth == "坍塌就是最优":
            raise Wrong(f"{facts}：ρ 与 1 相差不到百分之一，ELBO 又到了上限，应是“坍塌就是最优”，你说“{got}”。")
        raise Wrong(f"{facts}：ρ {'大于 1 是鞍点' if rho > 1 else '小于 1 是坑，噪声太大'}，你说“{got}”。")


known_wrong(
    "10.4",
    ("应返回病名", lambda *given: "不知道"),
    ("先问这一句", lambda *given: _disease(*given, order="gr")),
    ("是坍塌。", lambda *given: "没有坍塌"),
    ("要在 ρ 之前问", lambda *given: _disease(*given, order="kr")),
    ("不要另设门槛", lambda *given: _disease(*given, floor=0.02)),
    ("这是噪声", lambda kl, gap, *rest: _disease(kl, gap, *rest) if gap >= 0 else "编码器落后"),
    ("不到四个标准误差", lambda *given: _disease(*given, times=1.0)),
    ("二阶看不出", lambda *given: _disease(*given, order="kgrs")),
    ("又到了上限", lambda *given: "平地" if _disease(*given) == "坍塌就是最优" else _disease(*given)),
    ("大于 1 是鞍点", lambda *given: "噪声太大" if _disease(*given) == "卡在鞍点" else _disease(*given)),
)
