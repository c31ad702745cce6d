"""第 05 章“KL 散度”的练习：检查，以及它认得的错答。"""

import torch
from torch import Tensor

from vaelab.exercises.judging import as_double, ask, checks, close, known_wrong, Wrong


@checks("5.1")
def kl_in_the_head(answer: object) -> None:
    try:
        stretched, doubled, eight = (float(value) for value in answer)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise Wrong(f"这里应交三个数，如 (1.0, 2.0, 3.0)，收到 {answer!r}。") from error
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence
    if abs(stretched - 450) < 1e-6:
        raise Wrong("第 1 问：450 忘了 p 也变宽了；均值之差要除以 p 的标准差再平方。")
    if abs(stretched - 45) < 1e-6:
        raise Wrong("第 1 问：45 是除以了 2σ_p 或只把 4.5 放大了 10 倍；分母是 2σ_p²，而换坐标不改变 q/p。")
    if abs(stretched - float(kl(normal(30.0, 10.0), normal(0.0, 10.0)))) > 1e-4:
        raise Wrong("第 1 问不对：x → 10x 是可逆变换，q 与 p 的密度同除以 10，比值变了吗？")
    if abs(doubled - 9) < 1e-6:
        raise Wrong("第 2 问：9 是只乘了 2；均值之差以平方进入 KL。")
    if abs(doubled - float(kl(normal(6.0, 1.0), normal(0.0, 1.0)))) > 1e-4:
        raise Wrong("第 2 问不对：标准差相同时，式(5.8) 只剩 (μ_q − μ_p)²/2σ_p²。")
    if abs(eight - 4.5) < 1e-6:
        raise Wrong("第 3 问：4.5 是对各维取了平均；独立的维度要求和。")
    if abs(eight - 8 * float(kl(normal(3.0, 1.0), normal(0.0, 1.0)))) > 1e-4:
        raise Wrong("第 3 问不对：8 个独立的维度，KL 是各维之和。")


@checks("5.2")
def kl_of_two_gaussians(answer: object) -> None:
    generator = torch.Generator().manual_seed(52)
    mu_q, lv_q, mu_p, lv_p = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    got = ask(answer, mu_q, lv_q, mu_p, lv_p)
    q = torch.distributions.Normal(mu_q, (lv_q / 2).exp())
    p = torch.distributions.Normal(mu_p, (lv_p / 2).exp())
    each = torch.distributions.kl_divergence(q, p)
    if not isinstance(got, Tensor):
        raise Wrong(f"应返回张量 [B]，收到 {type(got).__name__}。")
    if got.shape != (5,):
        hint = {(5, 3): "还没有对 L（dim=1）求和", (3,): "求和的是批那一维，应对 dim=1 求和", (): "多归约了一维，批不要动"}
        raise Wrong(f"应返回 [B] = [5]，收到 {list(got.shape)}：{hint.get(tuple(got.shape), '请检查归约的维度')}。")
    if close(got, each.mean(1)):
        raise Wrong("你对 L 取了平均；各维独立时应求和。")
    if close(got, torch.distributions.kl_divergence(p, q).sum(1)):
        raise Wrong("方向反了：你算的是 KL(p‖q)；出样本的是 q，分母应是 p 的方差。")
    if close(got, (each + (lv_p - lv_q) / 2).sum(1)):
        raise Wrong("对数项少了 ½：log(σ_p/σ_q) = ½(log_var_p − log_var_q)。")
    if close(got, -each.sum(1)):
        raise Wrong("符号反了：KL 不会是负的。")
    if close(got, torch.distributions.kl_divergence(
        torch.distributions.Normal(mu_q, lv_q.exp()), torch.distributions.Normal(mu_p, lv_p.exp())
    ).sum(1)):  # fmt: skip
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if not close(got, each.sum(1)):
        same = as_double(ask(answer, mu_q, lv_q, mu_q, lv_q))
        centred = torch.distributions.kl_divergence(torch.distributions.Normal(mu_p, q.stddev), p).sum(1)
        if same.abs().max() > 1e-6:
            clue = "q = p 时你的结果不是 0，先从这里查"
        elif not close(ask(answer, mu_p, lv_q, mu_p, lv_p), centred):
            clue = "均值相等时也不一致，查对数项的正负号与方差之比谁除以谁"
        else:
            clue = "均值相等时是对的，查均值之差那一项：要平方，再除以 p 的方差"
        raise Wrong(f"数值与 torch.distributions 不一致；{clue}。")


@checks("5.3")
def best_diagonal_gaussian(answer: object) -> None:
    cov = torch.tensor([[2.0, 1.2, 0.3], [1.2, 1.5, -0.4], [0.3, -0.4, 1.0]], dtype=torch.float64)
    got = ask(answer, cov)
    if not isinstance(got, Tensor) or got.shape != (3,):
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise Wrong(f"应返回各维的方差 [d] = [3]，收到 {shape}。")
    got = as_double(got)
    if close(got, cov.diagonal()):
        raise Wrong("照抄对角线是矩匹配，它使 KL(p‖q) 最小；这里要最小的是另一个方向 KL(q‖p)。")
    if not bool((got > 0).all()):
        raise Wrong("方差应为正数。")
    precision = torch.linalg.inv(cov).diagonal()
    if close(got, precision):
        raise Wrong("你返回的是 Σ⁻¹ 的对角线（精度）；由 −1/v_j + (Σ⁻¹)_jj = 0 解出的 v_j 是它的倒数。")
    if close(got, precision.rsqrt()):
        raise Wrong("你返回的是标准差；这里要方差。")
    # 与公式无关的判据：在最小处，KL(q‖p) 对每个 v_j 的梯度为 0
    v = got.clone().requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    gaussian = torch.distributions.MultivariateNormal
    torch.distributions.kl_divergence(gaussian(zero, torch.diag(v)), gaussian(zero, cov)).backward()
    if float((v.grad * v.detach()).abs().max()) > 1e-5:
        slopes = (v.grad * v.detach()).tolist()
        signs = "、".join("正好" if abs(slope) < 1e-5 else "偏大" if slope > 0 else "偏小" for slope in slopes)
        raise Wrong(f"在你给的 v 处，KL(q‖p) 还能下降：三维依次{signs}。")


@checks("5.4")
def kl_to_a_laplace_prior(answer: object) -> None:
    mu = torch.tensor([0.0, 0.5, -2.0, 3.0], dtype=torch.float64)
    log_var = torch.tensor([0.0, -2.0, 1.0, 0.5], dtype=torch.float64)
    got = ask(answer, mu, log_var)
    if not isinstance(got, Tensor) or got.shape != mu.shape:
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise Wrong(f"应返回与 mu 同形的张量 [4]，收到 {shape}。")
    # 期望用积分算，不用闭式解：x = mu + σ·eps
    eps = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    weight = torch.distributions.Normal(0.0, 1.0).log_prob(eps).exp()
    x = mu[:, None] + (log_var / 2).exp()[:, None] * eps
    log_q = torch.distributions.Normal(mu, (log_var / 2).exp()).log_prob(x.T).T
    log_p = torch.distributions.Laplace(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    ).log_prob(x)  # fmt: skip
    truth = torch.trapezoid(weight * (log_q - log_p), eps)
    mean_abs = torch.trapezoid(weight * x.abs(), eps)
    if close(got, truth - torch.log(torch.tensor(2.0, dtype=torch.float64))):
        raise Wrong("少了 log 2：log p(x) = −log 2 − |x|，拉普拉斯密度前有一个 ½。")
    if close(got, truth + 0.5):
        raise Wrong("多了 ½：E_q[log q] = −½log 2π − log σ − ½，最后的 ½ 漏掉了。")
    if close(got, truth - log_var / 2):
        raise Wrong("log σ = ½·log_var：对数项少了 ½。")
    variance_as_std = torch.distributions.Normal(mu, log_var.exp())
    if close(got, torch.distributions.kl_divergence(variance_as_std, torch.distributions.Laplace(0 * mu, 0 * mu + 1))):
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if close(got, truth - mean_abs + mu.abs()):
        raise Wrong("你用了 |μ| 当 E|x|；|x| 的期望比 |E x| 大，请用题中的公式。")
    if close(got, truth - 2 * mean_abs) or bool((as_double(got) < -1e-6).any()):
        raise Wrong("出现了负的 KL；请检查 −E_q[log p] = log 2 + E_q|x| 的符号。")
    if not close(got, truth):
        raise Wrong("数值与积分不一致；按三步各自核对：E_q|x|、E_q[log q]、−E_q[log p]。")
