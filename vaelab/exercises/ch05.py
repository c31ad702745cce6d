"""第 05 章“KL 散度”的练习：检查，以及它认得的错答。"""

import math

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from vaelab.exercises.judging import Wrong, ask, checks, close, known_wrong, numbers, tensor


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


@checks("5.2")
def kl_of_two_gaussians(answer: object) -> None:
    """两个对角高斯的 KL，返回 [B]。"""
    generator = torch.Generator().manual_seed(52)
    mu_q, lv_q, mu_p, lv_p = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    q, p = Normal(mu_q, (lv_q / 2).exp()), Normal(mu_p, (lv_p / 2).exp())
    each = kl_divergence(q, p)

    def kl(*inputs: Tensor) -> Tensor:
        got = ask(answer, *(value.clone() for value in inputs))  # 作答可能原地改写收到的张量
        hints = {(5, 3): "还没有对 L（dim=1）求和", (3,): "求和的是批那一维，应对 dim=1 求和", (): "多归约了一维，批不要动"}
        if isinstance(got, Tensor) and got.shape != (5,):
            raise Wrong(f"应返回 [B] = [5]，收到 {list(got.shape)}：{hints.get(tuple(got.shape), '请检查归约的维度')}。")
        return tensor(got, (5,), "张量 [B]")

    got = kl(mu_q, lv_q, mu_p, lv_p)
    if close(got, each.mean(1)):
        raise Wrong("你对 L 取了平均；各维独立时应求和。")
    if close(got, kl_divergence(p, q).sum(1)):
        raise Wrong("方向反了：你算的是 KL(p‖q)；出样本的是 q，分母应是 p 的方差。")
    if close(got, (each + (lv_p - lv_q) / 2).sum(1)):
        raise Wrong("对数项少了 ½：log(σ_p/σ_q) = ½(log_var_p − log_var_q)。")
    if close(got, -each.sum(1)):
        raise Wrong("符号反了：KL 不会是负的。")
    if close(got, kl_divergence(Normal(mu_q, lv_q.exp()), Normal(mu_p, lv_p.exp())).sum(1)):
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if not close(got, each.sum(1)):
        if kl(mu_q, lv_q, mu_q, lv_q).abs().max() > 1e-6:
            clue = "q = p 时你的结果不是 0，先从这里查"
        elif not close(kl(mu_p, lv_q, mu_p, lv_p), kl_divergence(Normal(mu_p, q.stddev), p).sum(1)):
            clue = "均值相等时也不一致，查对数项的正负号与方差之比谁除以谁"
        else:
            clue = "均值相等时是对的，查均值之差那一项：要平方，再除以 p 的方差"
        raise Wrong(f"数值与 torch.distributions 不一致；{clue}。")


def _kl(log=lambda lv_q, lv_p: lv_p - lv_q, ratio=lambda lv_q, lv_p: (lv_q - lv_p).exp(), gap=lambda d, lv_q, lv_p: d**2 / lv_p.exp(), one=1):
    """各维的 KL，[B, L]；对数项、方差之比、均值之差、减去的 1 都可以换成写错的。"""
    return lambda mu_q, lv_q, mu_p, lv_p: 0.5 * (log(lv_q, lv_p) + ratio(lv_q, lv_p) + gap(mu_q - mu_p, lv_q, lv_p) - one)


def _summed(kl):
    return lambda *inputs: kl(*inputs).sum(dim=1)


known_wrong(
    "5.2",
    ("应返回张量 [B]", lambda *inputs: _kl()(*inputs).sum().item()),
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
    ("q = p 时你的结果不是 0", _summed(_kl(one=0))),  # 漏了最后的 −½
    ("均值相等时也不一致", _summed(_kl(log=lambda lv_q, lv_p: lv_q - lv_p))),
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
        v = tensor(ask(answer, cov.clone()), (d,), f"各维的方差，形状 [d] = [{d}]")
        precision = torch.linalg.inv(cov).diagonal()
        if close(v, cov.diagonal()):
            raise Wrong("照抄对角线是矩匹配，它使 KL(p‖q) 最小；这里要最小的是另一个方向 KL(q‖p)。")
        if not bool((v > 0).all()):
            raise Wrong("方差应为正数。")
        if close(v, precision):
            raise Wrong("你返回的是 Σ⁻¹ 的对角线（精度）；由 −1/v_j + (Σ⁻¹)_jj = 0 解出的 v_j 是它的倒数。")
        if close(v, precision.rsqrt()):
            raise Wrong("你返回的是标准差；这里要方差。")
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
    ("各维依次偏大、偏大、偏大", lambda cov: 2 / torch.linalg.inv(cov).diagonal()),  # ½ 只乘了两项中的一项
    ("各维依次偏小、偏大、偏大", lambda cov: 1 / cov.diagonal()),  # 把 Σ 当成了 Σ⁻¹
    ("各维依次偏大、偏大、正好", lambda cov: torch.linalg.cholesky(cov).diagonal() ** 2),  # 只以前面各维为条件
)


@checks("5.4")
def kl_to_a_laplace_prior(answer: object) -> None:
    """正态到标准拉普拉斯分布的 KL，逐元素。"""
    mu = torch.tensor([0.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    log_var = torch.tensor([0.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    got = tensor(ask(answer, mu.clone(), log_var.clone()), (4,), "与 mu 同形的张量 [4]")
    # 期望用积分算，不用闭式解：x = mu + σ·eps
    eps = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    weight = Normal(0.0, 1.0).log_prob(eps).exp()

    def mean_abs(std: Tensor) -> Tensor:
        return torch.trapezoid(weight * (mu[:, None] + std[:, None] * eps).abs(), eps)

    # log q 在 x 处是 log N(eps; 0, 1) − log σ；log p 是 −log 2 − |x|
    entropy = -torch.trapezoid(weight * Normal(0.0, 1.0).log_prob(eps), eps) + log_var / 2
    std, log_2 = (log_var / 2).exp(), math.log(2)
    truth = -entropy + log_2 + mean_abs(std)
    if close(got, truth - log_2):
        raise Wrong("少了 log 2：log p(x) = −log 2 − |x|，拉普拉斯密度前有一个 ½。")
    if close(got, truth + 0.5):
        raise Wrong("多了 ½：E_q[log q] = −½log 2π − log σ − ½，最后的 ½ 漏掉了。")
    if close(got, truth - log_var / 2):
        raise Wrong("log σ = ½·log_var：对数项少了 ½。")
    swollen = truth - mean_abs(std) + mean_abs(log_var.exp())
    if close(got, swollen) or close(got, swollen - log_var / 2):
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if close(got, truth - mean_abs(std) + mu.abs()):
        raise Wrong("你用了 |μ| 当 E|x|；|x| 的期望比 |E x| 大，请用题中的公式。")
    if any(close(got, truth - 2 * flipped) for flipped in (mean_abs(std), log_2, log_2 + mean_abs(std))):
        raise Wrong("出现了负的 KL；请检查 −E_q[log p] = log 2 + E_q|x| 的符号。")
    if not close(got, truth):
        raise Wrong("数值与积分不一致；按三步各自核对：E_q|x|、E_q[log q]、−E_q[log p]。")


def _mean_abs(mu, sigma):
    """题中的公式。"""
    return sigma * math.sqrt(2 / math.pi) * torch.exp(-(mu**2) / (2 * sigma**2)) + mu * torch.erf(mu / (sigma * math.sqrt(2)))


def _laplace_kl(mean_abs=_mean_abs, std=lambda log_var: (0.5 * log_var).exp(), cross=lambda mean: math.log(2) + mean, log_std=0.5, rest=0.5):
    """KL：矩、标准差、−E_q[log p]、log σ 里 log_var 的系数、最后的 ½ 都可以换成写错的。"""
    return lambda mu, log_var: cross(mean_abs(mu, std(log_var))) - 0.5 * math.log(2 * math.pi) - log_std * log_var - rest


known_wrong(
    "5.4",
    ("应返回与 mu 同形的张量", lambda mu, log_var: _laplace_kl()(mu, log_var).sum()),
    ("出现了 NaN", _laplace_kl(std=torch.sqrt)),  # 把 log_var 当成了方差
    ("少了 log 2", _laplace_kl(cross=lambda mean: mean)),
    ("多了 ½", _laplace_kl(rest=0)),
    ("对数项少了 ½", _laplace_kl(log_std=1)),
    ("当成了标准差", _laplace_kl(std=torch.exp)),
    ("当成了标准差", _laplace_kl(std=torch.exp, log_std=1)),
    ("你用了 |μ| 当 E|x|", _laplace_kl(mean_abs=lambda mu, sigma: mu.abs())),
    ("出现了负的 KL", _laplace_kl(cross=lambda mean: math.log(2) - mean)),
    ("出现了负的 KL", _laplace_kl(cross=lambda mean: -math.log(2) + mean)),
    ("出现了负的 KL", _laplace_kl(cross=lambda mean: -math.log(2) - mean)),
    ("数值与积分不一致", lambda mu, log_var: _laplace_kl()(mu, log_var) + 0.5 * math.log(2 * math.pi)),  # E_q[log q] 漏了 −½log 2π
    ("数值与积分不一致", _laplace_kl(mean_abs=lambda mu, sigma: _mean_abs(mu, sigma) - mu * torch.erf(mu / (sigma * math.sqrt(2))))),
)
