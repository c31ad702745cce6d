"""第 05 章“KL 散度”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vaelab.exercises.judging import Wrong, ask, checks, close, finite, known_wrong, numbers, tensor


@checks("5.1")
def kl_in_the_head(answer: object) -> None:
    """心算三个 KL：坐标放大 10 倍，均值加倍，8 个独立的维度。"""
    stretched, doubled, eight = numbers(answer, 3, "三个数，如 (1.0, 2.0, 3.0)")
    if abs(stretched - 450) < 1e-6:
        raise Wrong("第 1 问：450 忘了 p 也变宽了；均值之差要除以 p 的标准差再平方。")
    if abs(stretched - 45) < 1e-6:
        raise Wrong("第 1 问：45 是除以了 2σ_p 或只把 4.5 放大了 10 倍；分母是 2σ_p²，而换坐标不改变 q/p。")
    if abs(stretched - float(kl_divergence(Normal(30.0, 10.0), Normal(0.0, 10.0)))) > 1e-4:
        raise Wrong("第 1 问不对：x → 10x 是可逆变换，q 与 p 的密度同除以 10，比值变了吗？")
    if abs(doubled - 9) < 1e-6:
        raise Wrong("第 2 问：9 是只乘了 2；均值之差以平方进入 KL。")
    if abs(doubled - float(kl_divergence(Normal(6.0, 1.0), Normal(0.0, 1.0)))) > 1e-4:
        raise Wrong("第 2 问不对：标准差相同时，式(5.8) 只剩 (μ_q − μ_p)²/2σ_p²。")
    if abs(eight - 4.5) < 1e-6:
        raise Wrong("第 3 问：4.5 是对各维取了平均；独立的维度要求和。")
    if abs(eight - 8 * float(kl_divergence(Normal(3.0, 1.0), Normal(0.0, 1.0)))) > 1e-4:
        raise Wrong("第 3 问不对：8 个独立的维度，KL 是各维之和。")


known_wrong(
    "5.1",
    ("应交三个数", (4.5, 18.0)),
    ("450 忘了 p 也变宽了", (450.0, 18.0, 36.0)),
    ("45 是除以了 2σ_p 或", (45.0, 18.0, 36.0)),
    ("x → 10x 是可逆变换", (0.45, 18.0, 36.0)),  # 密度矮了 10 倍，就以为 KL 也小 10 倍
    ("9 是只乘了 2", (4.5, 9.0, 36.0)),
    ("标准差相同时", (4.5, 36.0, 36.0)),  # 6²，忘了除以 2
    ("对各维取了平均", (4.5, 18.0, 4.5)),
    ("KL 是各维之和", (4.5, 18.0, 4.5**8)),  # 密度相乘，就以为 KL 也相乘
)


def _returned(value: object, shape: tuple[int, ...], what: str) -> Tensor:
    """作答返回的东西当作张量；列表与 numpy 数组也收。"""
    return tensor(value if isinstance(value, Tensor) else finite(value, what), shape, what)


def _times(names: list[str], factors: Tensor) -> list[str]:
    """哪几项不是应有的 1 倍。"""
    wrong = [(name, factor) for name, factor in zip(names, factors.tolist()) if abs(factor - 1) > 1e-3]
    return [f"漏了{name.strip()}" if abs(factor) < 1e-3 else f"{name}是应有的 {factor:.3g} 倍" for name, factor in wrong]


@checks("5.2")
def kl_of_two_gaussians(answer: object) -> None:
    """两个对角高斯的 KL，返回 [B]。"""
    generator = torch.Generator().manual_seed(52)
    mu_q, lv_q, mu_p, lv_p = torch.randn(4, 7, 3, generator=generator, dtype=torch.float64)
    q, p = Normal(mu_q, (lv_q / 2).exp()), Normal(mu_p, (lv_p / 2).exp())
    each = kl_divergence(q, p)
    truth = each.sum(1)

    def kl(*inputs: Tensor) -> Tensor:
        B, L = inputs[0].shape
        got = ask(answer, *(value.clone() for value in inputs))  # 作答可能原地改写收到的张量
        got = got if isinstance(got, Tensor) else finite(got, "张量 [B]")
        hints = {(B, L): "还没有对 L（dim=1）求和", (L,): "求和的是批那一维，应对 dim=1 求和", (): "多归约了一维，批不要动"}
        if got.shape != (B,):
            raise Wrong(f"应返回 [B] = [{B}]，收到 {list(got.shape)}：{hints.get(tuple(got.shape), '请检查归约的维度')}。")
        return tensor(got, (B,), "张量 [B]")

    got = kl(mu_q, lv_q, mu_p, lv_p)
    if close(got, each.mean(1)):
        raise Wrong("你对 L 取了平均；各维独立时应求和。")
    if close(got, kl_divergence(p, q).sum(1)):
        raise Wrong("方向反了：你算的是 KL(p‖q)；出样本的是 q，分母应是 p 的方差。")
    if close(got, (each + (lv_p - lv_q) / 2).sum(1)):
        raise Wrong("对数项少了 ½：log(σ_p/σ_q) = ½(log_var_p − log_var_q)。")
    if close(got, -truth):
        raise Wrong("符号反了：KL 不会是负的。")
    if close(got, 2 * truth):
        raise Wrong("正好是两倍：式(5.8) 写成 log_var 之后，整个括号前面有一个 ½。")
    if close(got, truth / 2):
        raise Wrong("正好是一半：½ 乘了两次。")
    if close(got, kl_divergence(Normal(mu_q, lv_q.exp()), Normal(mu_p, lv_p.exp())).sum(1)):
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if float(got.std()) < 1e-6 * (1 + float(got.abs().max())) and not close(got.mean(), truth.mean()):
        raise Wrong("你的结果不随输入变：每一行都是同一个数。")
    if close(got, torch.full_like(truth, float(truth.mean()))):
        raise Wrong("你把各张图的 KL 又平均了一次，再铺回每一行；批那一维各算各的。")
    if not close(got, truth):
        # 式(5.8) 的四项，各是应有的几倍？四个未知数，七个方程
        terms = torch.stack([(lv_p - lv_q) / 2, (lv_q - lv_p).exp() / 2, (mu_q - mu_p) ** 2 / lv_p.exp() / 2, torch.full_like(lv_p, -0.5)]).sum(2).T
        factors = torch.linalg.lstsq(terms, got[:, None]).solution[:, 0]
        names = ["对数项 log(σ_p/σ_q) ", "方差之比那一项", "均值之差的平方那一项", "最后的常数 −½ "]
        if close(terms @ factors, got):
            clue = "，".join(_times(names, factors))
        elif kl(mu_q, lv_q, mu_q, lv_q).abs().max() > 1e-6:
            clue = "q = p 时你的结果不是 0，先从这里查"
        elif not close(kl(mu_p, lv_q, mu_p, lv_p), kl_divergence(Normal(mu_p, q.stddev), p).sum(1)):
            clue = "均值相等时也不一致，查对数项的正负号与方差之比谁除以谁"
        else:
            clue = "均值相等时是对的，查均值之差那一项：要平方，再除以 p 的方差"
        raise Wrong(f"数值与 torch.distributions 不一致；{clue}。")
    other = [value[:2].repeat(1, 2)[:, :4] for value in (mu_q, lv_q, mu_p, lv_p)]  # [2, 4]
    if not close(kl(*other), kl_divergence(Normal(other[0], (other[1] / 2).exp()), Normal(other[2], (other[3] / 2).exp())).sum(1)):
        raise Wrong("L = 3 时是对的，换成 L = 4 就不对了；L 不要写死，每一维各减一个 ½。")


def _kl(log=lambda lv_q, lv_p: lv_p - lv_q, ratio=lambda lv_q, lv_p: (lv_q - lv_p).exp(), gap=lambda d, lv_q, lv_p: d**2 / lv_p.exp(), one=1):
    """各维的 KL，[B, L]；对数项、方差之比、均值之差、减去的 1 都可以换成写错的。"""
    return lambda mu_q, lv_q, mu_p, lv_p: 0.5 * (log(lv_q, lv_p) + ratio(lv_q, lv_p) + gap(mu_q - mu_p, lv_q, lv_p) - one)


def _summed(kl):
    return lambda *inputs: kl(*inputs).sum(dim=1)


known_wrong(
    "5.2",
    ("应交张量 [B]", lambda *inputs: "1.0"),
    ("多归约了一维", lambda *inputs: _kl()(*inputs).sum().item()),
    ("还没有对 L（dim=1）求和", _kl()),
    ("求和的是批那一维", lambda *inputs: _kl()(*inputs).sum(dim=0)),
    ("多归约了一维", lambda *inputs: _kl()(*inputs).sum(dim=1).mean()),
    ("请检查归约的维度", lambda *inputs: _kl()(*inputs).sum(dim=1, keepdim=True)),
    ("出现了 NaN", _summed(_kl(log=lambda lv_q, lv_p: (lv_p / lv_q).log()))),  # 把 log_var 当成了方差
    ("对 L 取了平均", lambda *inputs: _kl()(*inputs).mean(dim=1)),
    ("方向反了", lambda mu_q, lv_q, mu_p, lv_p: _kl()(mu_p, lv_p, mu_q, lv_q).sum(dim=1)),
    ("对数项少了 ½", _summed(_kl(log=lambda lv_q, lv_p: 2 * (lv_p - lv_q)))),
    ("符号反了", lambda *inputs: -_kl()(*inputs).sum(dim=1)),
    ("当成了标准差", lambda mu_q, lv_q, mu_p, lv_p: _kl()(mu_q, 2 * lv_q, mu_p, 2 * lv_p).sum(dim=1)),
    ("漏了最后的常数 −½", _summed(_kl(one=0))),  # 漏了最后的 −½
    ("最后的常数 −½ 是应有的 2 倍", _summed(_kl(one=2))),
    ("对数项 log(σ_p/σ_q) 是应有的 -1 倍", _summed(_kl(log=lambda lv_q, lv_p: lv_q - lv_p))),
    ("对数项 log(σ_p/σ_q) 是应有的 0.5 倍", _summed(_kl(log=lambda lv_q, lv_p: (lv_p - lv_q) / 2))),  # ½ 乘了两次
    ("均值之差的平方那一项是应有的 2 倍", _summed(_kl(gap=lambda d, lv_q, lv_p: 2 * d**2 / lv_p.exp()))),
    ("方差之比那一项是应有的 2 倍", _summed(_kl(ratio=lambda lv_q, lv_p: 2 * (lv_q - lv_p).exp()))),
    ("正好是两倍", lambda *inputs: 2 * _kl()(*inputs).sum(dim=1)),
    ("正好是一半", lambda *inputs: 0.5 * _kl()(*inputs).sum(dim=1)),
    ("不随输入变", lambda mu_q, *rest: torch.zeros(len(mu_q))),
    ("铺回每一行", lambda *inputs: _kl()(*inputs).sum(dim=1).mean().expand(len(inputs[0]))),
    ("q = p 时你的结果不是 0", lambda mu_q, lv_q, mu_p, lv_p: _kl()(mu_q, lv_q, 0 * mu_p, 0 * lv_p).sum(dim=1)),  # 仍当先验是 N(0, 1)
    ("L 不要写死", lambda *inputs: _kl(one=0)(*inputs).sum(dim=1) - 1.5),
    ("均值相等时也不一致", _summed(_kl(ratio=lambda lv_q, lv_p: (lv_p - lv_q).exp()))),
    ("均值相等时是对的", _summed(_kl(gap=lambda d, lv_q, lv_p: d.abs() / lv_p.exp()))),  # 没有平方
    ("均值相等时是对的", _summed(_kl(gap=lambda d, lv_q, lv_p: d**2 / lv_q.exp()))),  # 除以了 q 的方差
)


@checks("5.3")
def best_diagonal_gaussian(answer: object) -> None:
    """各维独立的 q 使 KL(q‖p) 最小时，各维的方差。"""
    # 两个大小不同的 Σ：函数对任何 d 都要对
    for rows in ([[2.0, 1.2, 0.3], [1.2, 1.5, -0.4], [0.3, -0.4, 1.0]], [[1.0, 0.6], [0.6, 2.0]]):
        cov = torch.tensor(rows, dtype=torch.float64)
        d = len(cov)
        v = _returned(ask(answer, cov.clone()), (d,), f"各维的方差，形状 [d] = [{d}]")
        precision = torch.linalg.inv(cov).diagonal()
        if close(v, cov.diagonal()):
            raise Wrong("照抄对角线是矩匹配，它使 KL(p‖q) 最小；这里要最小的是另一个方向 KL(q‖p)。")
        if not bool((v > 0).all()):
            raise Wrong("方差应为正数。")
        if close(v, precision):
            raise Wrong("你返回的是 Σ⁻¹ 的对角线（精度）；由 −1/v_j + (Σ⁻¹)_jj = 0 解出的 v_j 是它的倒数。")
        if close(v, precision.rsqrt()) or close(v, cov.diagonal().sqrt()):
            raise Wrong("你返回的是标准差；这里要方差。")
        if close(v.sort().values, torch.linalg.eigvalsh(cov)):
            raise Wrong("你返回的是 Σ 的特征值：那是转到主轴坐标之后的方差；这里坐标轴不许转。")
        if close(v, 1 / cov.diagonal()):
            raise Wrong("你返回的是 1/Σ_jj；要先求逆，再取对角元：1/(Σ⁻¹)_jj。")
        # 与公式无关的判据：在最小处，KL(q‖p) 对每个 log v_j 的梯度为 0
        log_v = v.log().requires_grad_()
        zero = torch.zeros(d, dtype=torch.float64)
        kl_divergence(MultivariateNormal(zero, scale_tril=torch.diag((log_v / 2).exp())), MultivariateNormal(zero, cov)).backward()
        if float(log_v.grad.abs().max()) > 1e-5:
            signs = "、".join("正好" if abs(slope) < 1e-5 else "偏大" if slope > 0 else "偏小" for slope in log_v.grad.tolist())
            raise Wrong(f"在你给的 v 处，KL(q‖p) 还能下降：各维依次{signs}。")


known_wrong(
    "5.3",
    ("应返回各维的方差", lambda cov: torch.diag(1 / torch.linalg.inv(cov).diagonal())),  # 交了对角矩阵
    ("照抄对角线是矩匹配", lambda cov: cov.diagonal()),
    ("方差应为正数", lambda cov: -1 / torch.linalg.inv(cov).diagonal()),  # 求导时 −log v 的负号丢了
    ("Σ⁻¹ 的对角线（精度）", lambda cov: torch.linalg.inv(cov).diagonal()),
    ("你返回的是标准差", lambda cov: torch.linalg.inv(cov).diagonal().rsqrt()),
    ("你返回的是标准差", lambda cov: cov.diagonal().sqrt()),
    ("各维依次偏大、偏大、偏大", lambda cov: 2 / torch.linalg.inv(cov).diagonal()),  # ½ 只乘了两项中的一项
    ("你返回的是 1/Σ_jj", lambda cov: 1 / cov.diagonal()),  # 把 Σ 当成了 Σ⁻¹
    ("Σ 的特征值", lambda cov: torch.linalg.eigvalsh(cov)),
    ("Σ 的特征值", lambda cov: torch.linalg.eigvalsh(cov).flip(0)),
    ("KL(q‖p) 还能下降", lambda cov: torch.ones(len(cov))),
    ("各维依次偏大、偏大、正好", lambda cov: torch.linalg.cholesky(cov).diagonal() ** 2),  # 只以前面各维为条件
)


@checks("5.4")
def kl_to_a_laplace_prior(answer: object) -> None:
    """正态到标准拉普拉斯分布的 KL，逐元素。"""
    mu = torch.tensor([[0.0, 0.5, -2.0, 3.0], [1.0, -0.3, 0.0, -1.5], [2.5, -0.8, 0.2, 1.2]], dtype=torch.float64)
    log_var = torch.tensor([[0.0, -2.0, 1.0, 0.5], [-1.0, 0.7, -3.0, -0.5], [1.5, 0.2, -1.5, 2.0]], dtype=torch.float64)
    got = _returned(ask(answer, mu.clone(), log_var.clone()), (3, 4), "与 mu 同形的张量 [3, 4]")
    # 期望用积分算，不用闭式解：x = mu + σ·eps
    eps = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    weight = Normal(0.0, 1.0).log_prob(eps).exp()
    std = (log_var / 2).exp()
    mean_abs = torch.trapezoid(weight * (mu[..., None] + std[..., None] * eps).abs(), eps)
    # log q 在 x 处是 log N(eps; 0, 1) − log σ；log p 是 −log 2 − |x|
    entropy = -torch.trapezoid(weight * Normal(0.0, 1.0).log_prob(eps), eps) + log_var / 2
    truth = -entropy + math.log(2) + mean_abs
    if close(got, truth):
        return
    if close(got, -truth):
        raise Wrong("整个的符号反了：KL = E_q[log q] − E_q[log p]，不会是负的。")
    if float(got.std()) < 1e-6 * (1 + float(got.abs().max())):
        raise Wrong("你的结果不随输入变：每个元素都是同一个数。")
    if close(got, 2 * truth) or close(got, truth / 2):
        raise Wrong("与应有的正好差一倍：这里的 KL 前面没有 ½，也没有 2。")
    if close(got, 2 * entropy + truth):
        raise Wrong("E_q[log q] 的符号反了：它是熵的相反数，−½log 2π − log σ − ½。")

    def fitted(*terms: Tensor) -> list[float] | None:
        """``got`` 若是常数、log_var 与这几项的组合，给出各项的系数。"""
        columns = torch.stack([torch.ones_like(mu), log_var, *terms]).flatten(1).T
        factors = torch.linalg.lstsq(columns, got.flatten()[:, None]).solution[:, 0]
        return factors.tolist() if close(columns @ factors, got.flatten()) else None

    def halves(sigma: Tensor) -> tuple[Tensor, Tensor]:
        """题中公式的两项。"""
        return sigma * math.sqrt(2 / math.pi) * torch.exp(-(mu**2) / (2 * sigma**2)), mu * torch.erf(mu / (sigma * math.sqrt(2)))

    right, swollen = fitted(*halves(std)), fitted(*halves(log_var.exp()))
    if right is None and swollen is not None:
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if right is None and fitted(mu.abs()) is not None:
        raise Wrong("你用了 |μ| 当 E|x|；|x| 的期望比 |E x| 大，请用题中的公式。")
    if right is None and fitted(halves(std)[0], mu.abs() * torch.erf(mu.abs() / std)) is not None:
        raise Wrong("erf 里的分母是 σ√2，不是 σ。")
    if right is None:
        raise Wrong(
            f"E_q|x| 算得不对，不是题中公式的两项之和；例如 μ = {mu[0, 1]:g}、log_var = {log_var[0, 1]:g} 时 E_q|x| = {mean_abs[0, 1]:.4f}，"
            f"KL 应为 {truth[0, 1]:.4f}，你的是 {got[0, 1]:.4f}。"
        )
    raise Wrong("；".join(_misplaced(*right)) + "。")


def _misplaced(constant: float, slope: float, gaussian: float, drift: float) -> list[str]:
    """答案是常数 + 系数·log_var + 系数·(E|x| 的两项)；哪一个系数不对，各说一句。"""
    log_2, log_2pi = math.log(2), math.log(2 * math.pi)
    extra = constant - (log_2 - log_2pi / 2 - 0.5)
    known = {
        -log_2: "少了 log 2：log p(x) = −log 2 − |x|，拉普拉斯密度前有一个 ½",
        -2 * log_2: "log 2 的符号反了：log p(x) = −log 2 − |x|，减去它，log 2 是加",
        1 - log_2: "log 2 取成了 1：这里是自然对数，log 2 ≈ 0.693",
        0.5: "多了 ½：E_q[log q] = −½log 2π − log σ − ½，最后的 ½ 漏掉了",
        1.0: "E_q[log q] 里 ½ 的符号反了：−½log 2π − log σ − ½",
        log_2pi / 2: "E_q[log q] 里漏了 −½log 2π；拉普拉斯的密度里没有 2π，它不会消掉",
        log_2pi: "E_q[log q] 里 ½log 2π 的符号反了",
        -log_2pi / 2: "−½log 2π 多减了一份",
        log_2pi / 2 + 0.5: "E_q[log q] 里漏了 −½log 2π 与 −½，只剩 −log σ",
    }
    found = []
    if abs(slope + 1) < 1e-3:
        found.append("log σ = ½·log_var：对数项少了 ½")
    elif abs(slope - 0.5) < 1e-3:
        found.append("log σ 的符号反了：E_q[log q] 里是 −log σ")
    elif abs(slope) < 1e-3:
        found.append("漏了 −log σ：KL 要随 log_var 变")
    elif abs(slope + 0.5) > 1e-3:
        found.append(f"log_var 的系数是 {slope:.3g}，应为 −½")
    if abs(gaussian + 1) < 1e-3 and abs(drift + 1) < 1e-3:
        found.append("E_q|x| 的符号反了：log p(x) = −log 2 − |x|，减去它，E_q|x| 是加")
    elif abs(gaussian) < 1e-3 and abs(drift) < 1e-3:
        found.append("漏了 E_q|x|：它来自 −E_q[log p]")
    else:
        found += _times(["E_q|x| 里带指数的那一项", "E_q|x| 里带 erf 的那一项"], torch.tensor([gaussian, drift]))
    if abs(extra) > 1e-3:
        found.append(next((text for value, text in known.items() if abs(extra - value) < 1e-3), f"常数多了 {extra:.3f}：逐项对照三步里的常数"))
    return found


def _mean_abs(mu, sigma):
    """题中的公式。"""
    return sigma * math.sqrt(2 / math.pi) * torch.exp(-(mu**2) / (2 * sigma**2)) + mu * torch.erf(mu / (sigma * math.sqrt(2)))


def _laplace_kl(mean_abs=_mean_abs, std=lambda log_var: (0.5 * log_var).exp(), cross=lambda mean: math.log(2) + mean, log_std=0.5, rest=0.5):
    """KL：矩、标准差、−E_q[log p]、log σ 里 log_var 的系数、最后的 ½ 都可以换成写错的。"""
    return lambda mu, log_var: cross(mean_abs(mu, std(log_var))) - 0.5 * math.log(2 * math.pi) - log_std * log_var - rest


known_wrong(
    "5.4",
    ("应返回与 mu 同形的张量", lambda mu, log_var: _laplace_kl()(mu, log_var).sum()),
    ("应交与 mu 同形的张量", lambda mu, log_var: "1.0"),
    ("出现了 NaN", _laplace_kl(std=torch.sqrt)),  # 把 log_var 当成了方差
    ("不随输入变", lambda mu, log_var: torch.zeros_like(mu)),
    ("正好差一倍", lambda mu, log_var: 2 * _laplace_kl()(mu, log_var)),
    ("只剩 −log σ", lambda mu, log_var: _laplace_kl(rest=0)(mu, log_var) + 0.5 * math.log(2 * math.pi)),
    ("整个的符号反了", lambda mu, log_var: -_laplace_kl()(mu, log_var)),
    ("E_q[log q] 的符号反了", lambda mu, log_var: _laplace_kl()(mu, log_var) + math.log(2 * math.pi) + log_var + 1),
    ("少了 log 2", _laplace_kl(cross=lambda mean: mean)),
    ("log 2 取成了 1", _laplace_kl(cross=lambda mean: 1 + mean)),
    ("多了 ½", _laplace_kl(rest=0)),
    ("里 ½ 的符号反了", _laplace_kl(rest=-0.5)),
    ("对数项少了 ½", _laplace_kl(log_std=1)),
    ("log σ 的符号反了", _laplace_kl(log_std=-0.5)),
    ("漏了 −log σ", _laplace_kl(log_std=0)),
    ("log_var 的系数是 -0.25", _laplace_kl(log_std=0.25)),
    ("当成了标准差", _laplace_kl(std=torch.exp)),
    ("当成了标准差", _laplace_kl(std=torch.exp, log_std=1)),
    ("你用了 |μ| 当 E|x|", _laplace_kl(mean_abs=lambda mu, sigma: mu.abs())),
    (
        "erf 里的分母",
        _laplace_kl(mean_abs=lambda mu, sigma: _mean_abs(mu, sigma) - mu * torch.erf(mu / (sigma * math.sqrt(2))) + mu * torch.erf(mu / sigma)),
    ),
    ("E_q|x| 的符号反了", _laplace_kl(cross=lambda mean: math.log(2) - mean)),
    ("log 2 的符号反了", _laplace_kl(cross=lambda mean: -math.log(2) + mean)),
    ("E_q|x| 的符号反了", _laplace_kl(cross=lambda mean: -math.log(2) - mean)),
    ("log 2 的符号反了", _laplace_kl(cross=lambda mean: -math.log(2) - mean)),
    ("漏了 E_q|x|", _laplace_kl(cross=lambda mean: math.log(2) + 0 * mean)),
    ("漏了 −½log 2π", lambda mu, log_var: _laplace_kl()(mu, log_var) + 0.5 * math.log(2 * math.pi)),
    ("½log 2π 的符号反了", lambda mu, log_var: _laplace_kl()(mu, log_var) + math.log(2 * math.pi)),
    ("多减了一份", lambda mu, log_var: _laplace_kl()(mu, log_var) - 0.5 * math.log(2 * math.pi)),
    ("漏了E_q|x| 里带 erf 的那一项", _laplace_kl(mean_abs=lambda mu, sigma: _mean_abs(mu, sigma) - mu * torch.erf(mu / (sigma * math.sqrt(2))))),
    (
        "带指数的那一项是应有的 0.5 倍",
        _laplace_kl(mean_abs=lambda mu, sigma: _mean_abs(mu, sigma) - 0.5 * _mean_abs(0 * mu, sigma) * torch.exp(-(mu**2) / (2 * sigma**2))),
    ),
    ("不是题中公式的两项之和", _laplace_kl(mean_abs=lambda mu, sigma: _mean_abs(mu, sigma) ** 2)),
    ("不是题中公式的两项之和", lambda mu, log_var: kl_divergence(Normal(mu, (log_var / 2).exp()), Normal(0.0, 1.0))),  # 先验还是高斯
    ("常数多了 2.000", lambda mu, log_var: _laplace_kl()(mu, log_var) + 2),
)
