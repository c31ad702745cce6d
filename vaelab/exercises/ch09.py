"""第 09 章“似然”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import Normal

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, listed, number, tensor


def _masses(k: Tensor, mu: float, sigma: float) -> Tensor:
    """离散高斯，由尾巴的互补误差函数算：两端管到无穷，远处也不相消。"""
    root = sigma * math.sqrt(2)
    found = []
    for level in k.tolist():
        near, far = sorted((abs(level - mu) - 0.5, abs(level - mu) + 0.5))
        inside = (math.erfc(near / root) - math.erfc(far / root)) / 2
        first, last = math.erfc((mu - 0.5) / root) / 2, math.erfc((254.5 - mu) / root) / 2
        found.append(first if level == 0 else last if level == 255 else inside)
    return torch.tensor(found, dtype=torch.float64)


@checks("9.1")
def discretised_gaussian(answer: object) -> None:
    """离散高斯：两端的格管到无穷。"""
    k = torch.arange(256, dtype=torch.float64)
    for levels, mu, sigma in ((k, 100.0, 12.0), (k, 3.0, 9.0), (k, 254.0, 20.0), (k[5:90].flip(0), 40.0, 6.0), (k, 128.0, 0.3)):
        given = levels.clone()
        got = tensor(ask(answer, given, mu, sigma), (len(levels),), f"形状 [{len(levels)}] 的概率")
        if not torch.equal(given, levels):
            raise Wrong("你改动了传进来的 k；请另外开一个张量。")
        truth = _masses(levels, mu, sigma)
        where = f"mu = {mu:g}、sigma = {sigma:g} 时"

        def near(value: Tensor, got: Tensor = got) -> bool:
            return bool(((got - value).abs() <= 1e-9 + 1e-6 * value).all())

        if near(truth):
            continue
        if any(bool(((each - truth).abs() < 1e-9).all()) for each in (got.exp(), torch.exp2(-got))):
            raise Wrong(f"{where}要的是概率，不是对数。")
        if got.min() < -1e-12:
            raise Wrong(f"{where}有负的概率：应是右端的累积减左端的。")
        one = torch.tensor(sigma, dtype=torch.float64)
        cdf = Normal(torch.tensor(mu, dtype=torch.float64), one).cdf
        open_ended = cdf(levels + 0.5) - cdf(levels - 0.5)
        if near(open_ended):
            raise Wrong(f"{where}加起来是 {float(got.sum()):.4f}，不是 1：两端的格没有管到无穷。")
        if near(Normal(torch.tensor(mu, dtype=torch.float64), one).log_prob(levels).exp()):
            raise Wrong(f"{where}这是格心处的密度，不是格上的积分。")
        if near(truth / truth.sum()) or near(open_ended / open_ended.sum()):
            raise Wrong(f"{where}除以了总和：那是截断的高斯；题目的尾巴归两端的格。")
        shifted = cdf(levels + 1) - cdf(levels)
        ends = torch.where(levels == 0, cdf(levels + 1), torch.where(levels == 255, 1 - cdf(levels), shifted))
        if near(ends) or near(shifted):
            raise Wrong(f"{where}格取成了 [k, k + 1]；题目是 [k − ½, k + ½]。")
        variance = Normal(torch.tensor(mu, dtype=torch.float64), one.sqrt()).cdf
        as_variance = variance(levels + 0.5) - variance(levels - 0.5)
        if near(torch.where((levels == 0) | (levels == 255), got, as_variance)):
            raise Wrong(f"{where}把 sigma 当成了方差。")
        worst = int((got - truth).abs().argmax())
        raise Wrong(f"{where}k = {levels[worst]:g} 处你给出 {got[worst]:.4g}，应为 {truth[worst]:.4g}。")


def _gauss(ends: bool = True, half: float = 0.5, shift: float = 0.0, finish=lambda p: p, spread=lambda s: s):
    """离散高斯：两端、半格、格的位置、σ 都可以换成写错的。"""

    def answer(k: Tensor, mu: float, sigma: float) -> Tensor:
        cdf = Normal(torch.tensor(mu, dtype=torch.float64), torch.tensor(spread(sigma), dtype=torch.float64)).cdf
        upper, lower = cdf(k + shift + half), cdf(k + shift - half)
        if ends:
            upper, lower = torch.where(k == 255, 1.0, upper), torch.where(k == 0, 0.0, lower)
        return finish(upper - lower)

    return answer


known_wrong(
    "9.1",
    ("形状 [256] 的概率", lambda k, mu, sigma: 1.0),
    ("你改动了传进来的 k", lambda k, mu, sigma: _gauss()(k.add_(0.25), mu, sigma)),
    ("右端的累积减左端的", _gauss(finish=lambda p: -p)),
    ("不是对数", _gauss(finish=lambda p: (p + 1e-300).log())),
    ("两端的格没有管到无穷", _gauss(ends=False)),
    ("格心处的密度", lambda k, mu, sigma: Normal(mu, sigma).log_prob(k).exp()),
    ("除以了总和", _gauss(ends=False, finish=lambda p: p / p.sum())),
    ("格取成了 [k, k + 1]", _gauss(shift=0.5)),
    ("当成了方差", _gauss(spread=math.sqrt)),
    ("处你给出", _gauss(half=1.0)),
)


def _total(mu: float, s: float, half: float, ends: bool = True) -> float:
    """逐级相加；两端照题目写的。"""
    cdf = lambda b: 1 / (1 + math.exp(-max(-700.0, min(700.0, (b - mu) / s))))
    inside = sum(cdf(k + half) - cdf(k - half) for k in range(1, 255))
    return inside + (cdf(half) + 1 - cdf(255 - half) if ends else cdf(half) - cdf(-half) + cdf(255 + half) - cdf(255 - half))


@checks("9.2")
def bits_stolen_by_a_wrong_half_bin(answer: object) -> None:
    """半格写错，256 级之和的对数。"""
    for mu, s, half in ((100.0, 8.0, 0.5), (100.0, 8.0, 1.0), (3.0, 2.0, 1.0), (250.0, 5.0, 2.0), (128.0, 1.0, 0.25), (-5.0, 4.0, 1.5)):
        got = number(ask(answer, mu, s, half))
        total = _total(mu, s, half)
        truth = math.log2(total)
        where = f"mu = {mu:g}、s = {s:g}、half = {half:g} 时"

        def near(value: float, got: float = got) -> bool:
            return abs(got - value) < 1e-6

        if near(truth):
            continue
        if near(total):
            raise Wrong(f"{where}这是总和，还要取 log₂。")
        if near(math.log(total)):
            raise Wrong(f"{where}单位是 nat；题目要比特。")
        if near(-truth):
            raise Wrong(f"{where}符号反了：和大于 1，白拿的是正的。")
        if near(math.log2(_total(mu, s, half, ends=False))):
            raise Wrong(f"{where}两端没有管到无穷。")
        if near(math.log2(2 * half)):
            raise Wrong(f"{where}log₂(2·half) 只在 mu 离两端很远时近似；把首尾相消之后剩下的几项写出来。")
        raise Wrong(f"{where}你给出 {got:.6g}，应为 {truth:.6g}；先写出 256 级之和。")


known_wrong(
    "9.2",
    ("应交一个数", lambda mu, s, half: "一倍"),
    ("还要取 log₂", _total),
    ("单位是 nat", lambda mu, s, half: math.log(_total(mu, s, half))),
    ("符号反了", lambda mu, s, half: -math.log2(_total(mu, s, half))),
    ("两端没有管到无穷", lambda mu, s, half: math.log2(_total(mu, s, half, ends=False))),
    ("只在 mu 离两端很远时近似", lambda mu, s, half: math.log2(2 * half)),
    ("先写出 256 级之和", lambda mu, s, half: 0.5),
)


def _needed(post: Tensor, q: Tensor, target: float, *, half=0.5, divergent=True, combine="product", rounding=math.ceil) -> float:
    """式(9.7) 代入对角的情形；系数、发散、怎样合起来、取整，都可以换成写错的。"""
    left = 2 / post - 1 / q
    if divergent and bool((left <= 0).any()):
        return math.inf
    each = left.abs().rsqrt() * q.sqrt() / post
    variance = float(each.prod() - 1) if combine == "product" else float((each - 1).sum())
    return max(1, rounding(half * variance / target))


@checks("9.3")
def samples_for_a_gap(answer: object) -> None:
    """由目标间隙定样本数。"""
    cases = (
        ([1.0], [1.5], 0.01),
        ([0.04, 0.1], [0.06, 0.3], 0.003),
        ([0.5, 0.5, 2.0], [0.5, 0.4, 1.2], 0.0007),
        ([1.0, 1.0], [1.0, 1.0], 0.1),
        ([1.0, 2.0], [0.4, 3.0], 0.01),
        ([1.0, 2.0], [0.4, 0.8], 0.01),
    )
    for post_list, q_list, target in cases:
        post, q = (torch.tensor(each, dtype=torch.float64) for each in (post_list, q_list))
        got = number(ask(answer, post.clone(), q.clone(), target), infinite=True)
        truth = _needed(post, q, target)
        where = f"post = {post_list}、q = {q_list}、target = {target:g} 时"
        if got == truth:
            continue
        if math.isinf(truth):
            raise Wrong(f"{where}q 有一维的方差不到后验的一半，式(9.7) 发散：应返回 math.inf，你给出 {got:g}。")
        if math.isinf(got):
            raise Wrong(f"{where}式(9.7) 并不发散：每一维的 2/post − 1/q 都大于 0。")
        if not got.is_integer():
            raise Wrong(f"{where}K 应是整数，收到 {got:g}；请向上取整。")
        if got < 1:
            raise Wrong(f"{where}K 至少是 1，收到 {got:g}。")
        if got == _needed(post, q, target, half=1.0):
            raise Wrong(f"{where}多用了一倍：忘了 ½。")
        if got == _needed(post, q, target, combine="sum"):
            raise Wrong(f"{where}各维的 Var 不能相加：1 + Var 是各维的积。")
        if got == _needed(post, q, target, rounding=math.floor):
            raise Wrong(f"{where}向下取整了：那时间隙还超过目标。")
        raise Wrong(f"{where}你给出 {got:g}，应为 {truth:g}；先写出一维的 1 + Var。")


known_wrong(
    "9.3",
    ("应交一个数", lambda post, q, target: "四"),
    ("应返回 math.inf", lambda post, q, target: _needed(post, q, target, divergent=False)),
    ("并不发散", lambda post, q, target: math.inf),
    ("请向上取整", lambda post, q, target: _needed(post, q, target, rounding=float)),
    ("K 至少是 1", lambda post, q, target: 0),
    ("忘了 ½", lambda post, q, target: _needed(post, q, target, half=1.0)),
    ("1 + Var 是各维的积", lambda post, q, target: _needed(post, q, target, combine="sum")),
    ("向下取整了", lambda post, q, target: _needed(post, q, target, rounding=math.floor)),
    ("先写出一维的", lambda post, q, target: 1000),
)

_LEGAL = {"split": "test", "depth": 8}
_ROWS = [
    {"nats": 1500.0, "dim": 784, "kind": "mass", "total": 1.0, **_LEGAL},
    {"nats": 120.0, "dim": 784, "kind": "mass", "total": 87.0, **_LEGAL},  # 灰阶上的交叉熵
    {"nats": 1700.0, "dim": 784, "kind": "mass", "total": 0.74, **_LEGAL},  # 两端没有管到无穷：浪费，合法
    {"nats": 800.0, "dim": 784, "kind": "density", "noise": True, "width": 1.0, **_LEGAL},
    {"nats": -900.0, "dim": 400, "kind": "density", "noise": True, "width": 1 / 256, **_LEGAL},
    {"nats": -5000.0, "dim": 784, "kind": "density", "noise": False, "width": 1 / 256, **_LEGAL},
    {"nats": 1400.0, "dim": 784, "kind": "mass", "total": 1.0, "split": "train", "depth": 8},
    {"nats": 700.0, "dim": 784, "kind": "mass", "total": 1.0, "split": "test", "depth": 5},
    {"nats": 1490.0, "dim": 784, "kind": "mass", "total": 1.0 + 1e-12, **_LEGAL},  # 舍入
    {"nats": 900.0, "dim": 784, "kind": "mass", "total": 2.0, **_LEGAL},  # 半格宽了一倍
]
_ALL = ("split", "depth", "total", "noise")
_WHAT = f"{len(_ROWS)} 个数或 None 的列表"


def _compare(
    rows: list[dict], rules: tuple[str, ...] = _ALL, limit: float = 1 + 1e-6, strict: bool = False, width: bool = True, unit: float = math.log(2)
):
    """能比的给比特/像素；规则、界、格宽、单位，都可以换成写错的。"""
    found: list[float | None] = []
    for row in rows:
        bad = {"split": row["split"] != "test", "depth": row["depth"] != 8}
        total = row.get("total", 1.0)
        bad |= {"total": total > limit or (strict and abs(total - 1) > 1e-6), "noise": row["kind"] == "density" and not row["noise"]}
        extra = -math.log(row["width"]) if row["kind"] == "density" and width else 0.0
        found.append(None if any(bad[rule] for rule in rules) else row["nats"] / row["dim"] / unit + extra / unit)
    return found


def _judge(rows: list[dict], got: list) -> None:
    """逐行比，遇到第一处不对就说出来。"""
    for k, (given, truth) in enumerate(zip(got, _compare(rows))):
        row = rows[k]
        if truth is None and given is not None:
            why = (
                "它是训练集上的数。" if row["split"] != "test"
                else "它的位深不是 8。" if row["depth"] != 8
                else f"它的 256 级加起来是 {row['total']:g}，超过 1，不是码长。" if row["kind"] == "mass"
                else "它是没有加噪声的密度，没有下限。"
            )  # fmt: skip
            raise Wrong(f"第 {k} 行不能比：{why}")
        if truth is None:
            continue
        if given is None:
            if row.get("total", 1.0) < 1 - 1e-6:
                raise Wrong(f"第 {k} 行能比：加起来是 {row['total']:g}，不到 1，是浪费，仍是合法的码长。")
            if row["kind"] == "density":
                raise Wrong(f"第 {k} 行能比：加了噪声的密度是码长的上界。")
            raise Wrong(f"第 {k} 行能比：总和与 1 只差舍入。")
        bits = number(given, _WHAT)
        if abs(bits - truth) < 1e-6:
            continue
        if abs(bits - truth * math.log(2)) < 1e-6:
            raise Wrong(f"第 {k} 行的单位是 nat：换成比特要除以 ln 2。")
        if abs(bits - truth * row["dim"]) < 1e-6:
            raise Wrong(f"第 {k} 行是每张图的比特：还要除以像素数。")
        if row["kind"] == "density" and row["width"] != 1 and abs(bits - truth - math.log2(row["width"])) < 1e-6:
            raise Wrong(f"第 {k} 行漏了格宽：概率是密度乘格宽，每像素要加 −log₂ width。")
        raise Wrong(f"第 {k} 行你给出 {bits:.4g}，应为 {truth:.4g} 比特/像素。")


@checks("9.4")
def the_row_that_cannot_be_compared(answer: object) -> None:
    """哪些行能与 lzma 比，是多少比特/像素。"""
    again = [{**row, "nats": 1.1 * row["nats"]} for row in reversed(_ROWS)]  # 倒过来，数也换了：背下来的答案过不去
    for rows in (_ROWS, again):
        _judge(rows, listed(ask(answer, [dict(row) for row in rows]), _WHAT, len(rows)))


known_wrong(
    "9.4",
    ("个数或 None 的列表", lambda rows: 1.0),
    ("训练集上的数", lambda rows: _compare(rows, rules=("depth", "total", "noise"))),
    ("位深不是 8", lambda rows: _compare(rows, rules=("split", "total", "noise"))),
    ("超过 1，不是码长", lambda rows: _compare(rows, rules=("split", "depth", "noise"))),
    ("没有加噪声的密度", lambda rows: _compare(rows, rules=("split", "depth", "total"))),
    ("仍是合法的码长", lambda rows: _compare(rows, strict=True)),
    ("是码长的上界", lambda rows: [None if row["kind"] == "density" else value for row, value in zip(rows, _compare(rows))]),
    ("只差舍入", lambda rows: _compare(rows, limit=1.0)),
    ("单位是 nat", lambda rows: _compare(rows, unit=1.0)),
    ("还要除以像素数", lambda rows: [value and value * row["dim"] for row, value in zip(rows, _compare(rows))]),
    ("漏了格宽", lambda rows: _compare(rows, width=False)),
    ("第 0 行不能比", lambda rows: _compare(_ROWS)),  # 背下来的
    ("应为", lambda rows: [value and value + 1 for value in _compare(rows)]),
)
