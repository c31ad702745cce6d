"""核对：每个公式之后的 :func:`compare`，以及练习的检查 :func:`exercise`。这里没有练习的答案。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor


def compare(
    name: str,
    ours: object,
    reference: object,
    *,
    atol: float | None = None,
    rtol: float | None = None,
    stderr: object = None,
) -> None:
    """核对两种独立算法得到的数；一致则打印 ``✓ name``，否则抛出 AssertionError 并说明差在哪里。

    打印的只有结论，没有随机器变化的数，所以同一格在 CPU 与 GPU 上输出相同。

    Args:
        name: 核对的是什么，例如 ``闭式解与积分一致``。
        ours, reference: 数或张量，形状须相同。
        atol, rtol: 允许的误差 ``atol + rtol·|reference|``；都不给时取 1e-6 与 1e-5，适合 float32；
            只给一个时另一个为 0，所以收紧一个就真的收紧了。
        stderr: 蒙特卡罗估计的标准误差；给了它，就以 4 倍标准误差为限，不再用 atol 与 rtol。

    Raises:
        AssertionError: 形状不同、有非有限的数，或相差超过所允许的。
    """
    a, b = _as_double(ours), _as_double(reference)
    if a.shape != b.shape:
        raise AssertionError(f"✗ {name}：形状不同，左边 {list(a.shape)}，右边 {list(b.shape)}。")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AssertionError(f"✗ {name}：出现了 NaN 或无穷，比较没有意义；先找出它从哪一步来。")
    if atol is None and rtol is None:
        atol, rtol = 1e-6, 1e-5
    allowed = (atol or 0) + (rtol or 0) * b.abs() if stderr is None else 4 * _as_double(stderr) + 0 * b
    difference = (a - b).abs()
    if not bool((difference <= allowed).all()):
        worst = int((difference - allowed).flatten().argmax())
        raise AssertionError(
            f"✗ {name}：最不合处左边 {a.flatten()[worst]:.6g}，右边 {b.flatten()[worst]:.6g}，"
            f"相差 {difference.flatten()[worst]:.3g}，允许 {allowed.flatten()[worst]:.3g}。"
        )
    print(f"✓ {name}")


def _as_double(value: object) -> Tensor:
    return torch.as_tensor(value).detach().cpu().to(torch.float64)


class Unanswered(Exception):
    """练习还没有作答。"""


class Wrong(Exception):
    """作答有误；信息说明错在哪里。"""


@dataclass(frozen=True)
class Verdict:
    """一次检查的结论：``status`` 是 ``pass``、``wrong``、``unanswered`` 之一，``message`` 是给读者的一句话。"""

    status: str
    message: str


CHECKS: dict[str, Callable[[object], None]] = {}


def checks(number: str) -> Callable:
    """登记练习 ``number``（如 ``"5.1"``）的检查函数：接收作答，有误时抛出 :class:`Wrong`。"""

    def register(function: Callable[[object], None]) -> Callable[[object], None]:
        CHECKS[number] = function
        return function

    return register


def ask(answer: object, *args: object) -> object:
    """以 ``args`` 调用作答的函数并返回结果；没有作答（None 或 ...）抛 Unanswered，运行出错抛 Wrong。"""
    if not callable(answer):
        raise Wrong(f"这里应交一个函数，收到 {answer!r}。")
    try:
        result = answer(*args)
    except NotImplementedError as error:
        raise Unanswered from error
    except Exception as error:  # 读者的代码可能抛出任何异常，都转成一句话
        raise Wrong(f"你的代码运行时出错：{type(error).__name__}：{error}") from error
    if result is None or result is ...:
        raise Unanswered
    return result


def verdict(number: str, answer: object) -> Verdict:
    """检查练习 ``number`` 的作答（函数或数值）。"""
    if answer is None or answer is ...:
        return Verdict("unanswered", f"○ 练习 {number} 还没有作答；可以先往下读，回头再来。")
    try:
        CHECKS[number](answer)
    except Unanswered:
        return Verdict("unanswered", f"○ 练习 {number} 还没有作答；可以先往下读，回头再来。")
    except Wrong as error:
        return Verdict("wrong", f"✗ 练习 {number}：{error}")
    return Verdict("pass", f"✓ 练习 {number} 通过")


def exercise(number: str, answer: object) -> None:
    """检查作答并打印结论；没有作答或有误都不会中断笔记的运行。"""
    print(verdict(number, answer).message)


# ── 第 04 章 ──


@checks("4.1")
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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


# ── 第 05 章 ──


def _close(got: object, truth: Tensor, atol: float = 1e-5) -> bool:
    """``got`` 与 ``truth`` 同形且逐元素相近。"""
    got = _as_double(got)
    return got.shape == truth.shape and bool(((got - truth).abs() <= atol * (1 + truth.abs())).all())


@checks("5.1")
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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
    if _close(got, each.mean(1)):
        raise Wrong("你对 L 取了平均；各维独立时应求和。")
    if _close(got, torch.distributions.kl_divergence(p, q).sum(1)):
        raise Wrong("方向反了：你算的是 KL(p‖q)；出样本的是 q，分母应是 p 的方差。")
    if _close(got, (each + (lv_p - lv_q) / 2).sum(1)):
        raise Wrong("对数项少了 ½：log(σ_p/σ_q) = ½(log_var_p − log_var_q)。")
    if _close(got, -each.sum(1)):
        raise Wrong("符号反了：KL 不会是负的。")
    if _close(got, torch.distributions.kl_divergence(
        torch.distributions.Normal(mu_q, lv_q.exp()), torch.distributions.Normal(mu_p, lv_p.exp())
    ).sum(1)):  # fmt: skip
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if not _close(got, each.sum(1)):
        same = _as_double(ask(answer, mu_q, lv_q, mu_q, lv_q))
        centred = torch.distributions.kl_divergence(torch.distributions.Normal(mu_p, q.stddev), p).sum(1)
        if same.abs().max() > 1e-6:
            clue = "q = p 时你的结果不是 0，先从这里查"
        elif not _close(ask(answer, mu_p, lv_q, mu_p, lv_p), centred):
            clue = "均值相等时也不一致，查对数项的正负号与方差之比谁除以谁"
        else:
            clue = "均值相等时是对的，查均值之差那一项：要平方，再除以 p 的方差"
        raise Wrong(f"数值与 torch.distributions 不一致；{clue}。")


@checks("5.3")
def _(answer: object) -> None:
    cov = torch.tensor([[2.0, 1.2, 0.3], [1.2, 1.5, -0.4], [0.3, -0.4, 1.0]], dtype=torch.float64)
    got = ask(answer, cov)
    if not isinstance(got, Tensor) or got.shape != (3,):
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        raise Wrong(f"应返回各维的方差 [d] = [3]，收到 {shape}。")
    got = _as_double(got)
    if _close(got, cov.diagonal()):
        raise Wrong("照抄对角线是矩匹配，它使 KL(p‖q) 最小；这里要最小的是另一个方向 KL(q‖p)。")
    if not bool((got > 0).all()):
        raise Wrong("方差应为正数。")
    precision = torch.linalg.inv(cov).diagonal()
    if _close(got, precision):
        raise Wrong("你返回的是 Σ⁻¹ 的对角线（精度）；由 −1/v_j + (Σ⁻¹)_jj = 0 解出的 v_j 是它的倒数。")
    if _close(got, precision.rsqrt()):
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
def _(answer: object) -> None:
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
    if _close(got, truth - torch.log(torch.tensor(2.0, dtype=torch.float64))):
        raise Wrong("少了 log 2：log p(x) = −log 2 − |x|，拉普拉斯密度前有一个 ½。")
    if _close(got, truth + 0.5):
        raise Wrong("多了 ½：E_q[log q] = −½log 2π − log σ − ½，最后的 ½ 漏掉了。")
    if _close(got, truth - log_var / 2):
        raise Wrong("log σ = ½·log_var：对数项少了 ½。")
    variance_as_std = torch.distributions.Normal(mu, log_var.exp())
    if _close(got, torch.distributions.kl_divergence(variance_as_std, torch.distributions.Laplace(0 * mu, 0 * mu + 1))):
        raise Wrong("你把 exp(log_var) 当成了标准差；它是方差，标准差是 exp(½·log_var)。")
    if _close(got, truth - mean_abs + mu.abs()):
        raise Wrong("你用了 |μ| 当 E|x|；|x| 的期望比 |E x| 大，请用题中的公式。")
    if _close(got, truth - 2 * mean_abs) or bool((_as_double(got) < -1e-6).any()):
        raise Wrong("出现了负的 KL；请检查 −E_q[log p] = log 2 + E_q|x| 的符号。")
    if not _close(got, truth):
        raise Wrong("数值与积分不一致；按三步各自核对：E_q|x|、E_q[log q]、−E_q[log p]。")


# ── 第 03 章 ──


@checks("3.1")
def _(answer: object) -> None:
    if not isinstance(answer, (tuple, list)) or len(answer) != 2 or not all(type(v) is int for v in answer):
        raise Wrong(f"这里应交两个整数 (padding, output_padding)，收到 {answer!r}。")
    padding, output_padding = answer
    try:
        layer = torch.nn.ConvTranspose2d(1, 1, 4, stride=2, padding=padding, output_padding=output_padding)
        got = [layer(torch.zeros(1, 1, h, h, dtype=layer.weight.dtype)).shape[-1] for h in (3, 8)]
    except Exception as error:
        raise Wrong(
            f"真实的层不接受 padding={padding}、output_padding={output_padding}；"
            "两者都不能为负，output_padding 要小于步长 2，padding 也不能把画布裁光。"
        ) from error
    if got != [6, 16]:
        raise Wrong(
            f"边长 3、8 变成了 {got[0]}、{got[1]}，应为 6、16；核大了 1，画布就大了 1，这一格要在 padding 与 "
            "output_padding 里找回来。"
        )


@checks("3.2")
def _(answer: object) -> None:
    transposed = torch.nn.functional.conv_transpose2d
    generator = torch.Generator().manual_seed(32)
    for height, width, size, stride, padding, extra in (
        (3, 3, 3, 2, 0, 0), (3, 4, 3, 2, 1, 0), (4, 3, 3, 2, 1, 1), (2, 3, 4, 3, 1, 2), (2, 2, 2, 2, 0, 1), (1, 1, 3, 1, 0, 0),
    ):  # fmt: skip
        x = torch.randn(height, width, generator=generator, dtype=torch.float64)
        k = torch.randn(size, size, generator=generator, dtype=torch.float64)
        got = ask(answer, x, k, stride, padding, extra)
        options = {"stride": stride, "padding": padding, "output_padding": extra}
        setting = f"输入 {height}×{width}、核 {size}×{size}、" + "、".join(f"{a}={b}" for a, b in options.items())
        truth = transposed(x[None, None], k[None, None], **options)[0, 0]
        if not isinstance(got, Tensor) or got.dim() != 2:
            raise Wrong("这里应返回二维张量 [H', W']。")
        if got.shape != truth.shape:
            reason = "output_padding 让下边和右边少裁几格" if extra else "画布边长是 (H−1)·stride+K，两边各裁 padding 格"
            raise Wrong(f"{setting}：输出应为 {list(truth.shape)}，收到 {list(got.shape)}；{reason}。")
        got = got.to(torch.float64)
        if torch.allclose(got, truth, atol=1e-6):
            continue
        if torch.allclose(got, transposed(x[None, None], k.flip(0, 1)[None, None], **options)[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：你把核翻转了；翻转属于插零的写法，盖章时核照原样盖。")
        if torch.allclose(got, transposed(x[None, None], k.T[None, None], **options)[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：你把核的行与列弄反了。")
        if stride < size and torch.allclose(got[0, 0], truth[0, 0], atol=1e-6):
            raise Wrong(f"{setting}：形状对了，左上角也对，重叠的地方不对；重叠处应相加（+=），而不是覆盖（=）。")
        raise Wrong(f"{setting}：形状对了，数不对；逐个像素核对章的左上角在画布的第 i·stride 行、第 j·stride 列。")


@checks("3.3")
def _(answer: object) -> None:
    try:
        k = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"这里应交一个 4×4 的张量，收到 {type(answer).__name__}。") from error
    if k.shape != (4, 4):
        raise Wrong(f"核应为 4×4，收到 {list(k.shape)}；由一维的核可以用 torch.outer 得到二维的。")
    functional = torch.nn.functional

    def enlarge(x: Tensor) -> Tensor:
        return functional.conv_transpose2d(x, k[None, None], stride=2, padding=1)[..., 4:-4, 4:-4]

    flat = enlarge(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    if flat.max() - flat.min() > 1e-6:
        raise Wrong("常数图放大后出现了棋盘格：核的四个相位之和不相等，见式(3.9)。")
    if abs(float(flat[0, 0, 0, 0]) - 1) > 1e-6:
        raise Wrong(
            f"常数图 1 放大后变成了 {float(flat[0, 0, 0, 0]):.4g}；步长 2 时每格只收到核的四个相位之一，"
            "所以要归一的是每一相的和，不是整个核的和。"
        )
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(33), dtype=torch.float64)
    truth = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 4:-4, 4:-4]
    nearest = functional.interpolate(x, scale_factor=2, mode="nearest")[..., 4:-4, 4:-4]
    if torch.allclose(enlarge(x), nearest, atol=1e-6):
        raise Wrong("这是最近邻放大：没有棋盘格，但每个输出只看了一个输入；双线性要看两个邻居，权重由距离定。")
    if not torch.allclose(enlarge(x), truth, atol=1e-6):
        raise Wrong(
            "没有棋盘格，但插值的权重不对：输出像素 2i 的中心在 i−¼，它离 i 和 i−1 各多远，权重就反着分；"
            "再想想这两个权重各在核的第几个位置。"
        )


@checks("3.4")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(34)
    x = torch.rand(3, 2, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1
    x_hat = x + 0.3 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    got = ask(answer, x, x_hat)
    try:
        value = float(got)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("这里应返回一个数：一批图像共用一个 σ²。") from error
    if not 0 < value < float("inf"):
        raise Wrong(f"方差应是正数，收到 {value:.4g}。")

    def is_stationary(variance: float) -> bool:
        log_variance = torch.tensor(variance, dtype=torch.float64).log().requires_grad_()
        density = torch.distributions.Normal(x_hat, (0.5 * log_variance).exp())
        density.log_prob(x).mean().backward()
        return abs(float(log_variance.grad)) < 1e-6

    if is_stationary(value):
        return
    if is_stationary(value**2):
        raise Wrong("你给出的是标准差 σ，题目要的是方差 σ²。")
    if is_stationary(value / x.numel()) or is_stationary(value / x[0].numel()):
        raise Wrong("你只求了平方误差的和；D/2·log σ² 对 σ² 的导数带着 D，别忘了除以它。")
    if is_stationary(2 * value) or is_stationary(value / 2):
        raise Wrong("差一个 2 倍：第一项的分母 2σ² 与第二项的 D/2 里各有一个 2，求导后应当约掉。")
    raise Wrong(f"σ² = {value:.4g} 处，−log p 对 σ² 的导数不为零；从式(3.12) 对 σ² 求导，令它为零。")


# ── 第 02 章 ──────────────────────────────────────────────────────────────


@checks("2.1")
def _(answer: object) -> None:
    if isinstance(answer, Tensor):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)) or not all(isinstance(size, Integral) for size in answer):
        raise Wrong(f"应交一个整数列表，如 [64, 32, …]，收到 {answer!r}。")
    halve = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1)
    image, truth = torch.zeros(1, 1, 100, 100), []
    for _ in range(5):
        image = halve(image)
        truth.append(image.shape[-1])
    given = list(answer)
    if given == [100, *truth] or given == [100, *truth[:-1]]:
        raise Wrong("列表从第 1 级的输出写起，不含输入的 100，共五个数。")
    if len(given) != 5:
        raise Wrong(f"五级应有五个数，收到 {len(given)} 个。")
    if given == [100 // 2**level for level in range(1, 6)]:
        raise Wrong("你每级都向下取整了；边长为奇数时，填充的一圈让窗口多停一次，看看 25 的下一级。")
    if given != truth:
        first = next(level for level in range(5) if given[level] != truth[level])
        raise Wrong(f"第 {first + 1} 级的 {given[first]} 不对；把上一级的边长代入尺寸公式再算一次。")


@checks("2.2")
def _(answer: object) -> None:
    for k, d in [(3, 1), (1, 1), (5, 1), (3, 2), (5, 3), (7, 2)]:
        reply = ask(answer, k, d)
        try:
            padding = float(reply)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError) as error:
            raise Wrong(f"k={k}、d={d} 时填充应为不小于 0 的整数，收到 {reply!r}。") from error
        if not padding.is_integer() or padding < 0:
            raise Wrong(f"k={k}、d={d} 时填充应为不小于 0 的整数，收到 {reply!r}。")
        size = torch.nn.functional.conv2d(
            torch.zeros(1, 1, 25, 25), torch.zeros(1, 1, k, k), padding=int(padding), dilation=d
        ).shape[-1]
        if size == 25:
            continue
        if d > 1 and padding == k // 2:
            raise Wrong(f"k={k}、d={d} 时 25 变成了 {size}：你忘了膨胀，窗口盖住的不是 k 格，而是 d(k−1)+1 格。")
        if size > 25 and padding == d * (k - 1):
            raise Wrong(f"k={k}、d={d} 时 25 变成了 {size}：填充是左右各一份，总量要平分到两边。")
        raise Wrong(f"k={k}、d={d} 时你填充 {padding:g}，真的卷积把 25 变成了 {size}，应仍是 25。")


@checks("2.3")
def _(answer: object) -> None:
    def touched(unit: int, layers: list) -> tuple[int, int]:  # 逐级列出用到的每一个单元，不用递推式
        units = {unit}
        for k, s, p, d in reversed(layers):
            units = {s * i + d * u - p for i in units for u in range(k)}
        return min(units), max(units)

    down = (3, 2, 1, 1)
    mixed = [(5, 1, 2, 1), (3, 2, 0, 2), (4, 3, 1, 1)]
    for unit, layers in [(0, [down]), (3, [down]), (0, [down] * 5), (1, [down] * 5), (2, mixed), (5, mixed[::-1])]:
        got, truth = ask(answer, unit, list(layers)), touched(unit, layers)
        where = f"unit={unit}、layers={list(layers)} 时"
        try:
            first, last = (int(end) for end in got)
        except (TypeError, ValueError) as error:
            raise Wrong(f"应返回两个整数 (first, last)，收到 {got!r}。") from error
        if (first, last) == truth:
            continue
        if first >= 0 > truth[0]:
            raise Wrong(f"{where}视野从图外开始，first 应为负数，你给出 {first}；是不是忘了减填充 p，或按边界裁剪了？")
        if (first, last) == touched(unit, [(k, s, 0, d) for k, s, p, d in layers]):
            raise Wrong(f"{where}长度对，位置偏了 {first - truth[0]} 像素：每级的填充把起点往左移 p 个上一级的单元。")
        if (first, last) == touched(unit, layers[::-1]):
            raise Wrong(f"{where}结果像是把各级倒着走了：应从最后一级往图像的方向，一级一级推回去。")
        if last - first != truth[1] - truth[0]:
            raise Wrong(f"{where}视野长 {last - first + 1}，应为 {truth[1] - truth[0] + 1}；窗口的最后一格是 s·i − p + d·(k−1)。")
        raise Wrong(f"{where}长度对，起点 {first} 不对；检查步长与填充。")


@checks("2.4")
def _(answer: object) -> None:
    log_std = torch.tensor([-3.0, -0.5, 0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    q = torch.distributions.Normal(torch.full_like(log_std, 0.7), log_std.exp())
    p = torch.distributions.Normal(torch.zeros_like(log_std), torch.ones_like(log_std))
    (truth,) = torch.autograd.grad(torch.distributions.kl_divergence(q, p).sum(), log_std)
    given = log_std.detach()
    try:
        got = torch.as_tensor(ask(answer, given.clone()), dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("应返回与 log_std 同形的张量。") from error

    def is_like(other: Tensor) -> bool:
        return torch.allclose(got, other, atol=1e-8)

    if got.shape != truth.shape:
        raise Wrong(f"应返回与 log_std 同形的张量 {list(truth.shape)}，收到 {list(got.shape)}。")
    if is_like(truth):
        return
    if is_like(truth / 2):
        raise Wrong("差了一倍：这是对 log σ² 的导数。log σ² = 2t，链式法则还要乘 2。")
    if is_like(truth / given.exp()):
        raise Wrong("这是对 σ 的导数；还要乘 ∂σ/∂t = σ。")
    if is_like(-truth):
        raise Wrong("符号反了：σ 比 1 大时 KL 随 t 增大，导数应为正。")
    if not torch.isclose(got[2], truth[2], atol=1e-8):
        raise Wrong(f"t = 0 时 q 与先验等宽，导数应为 0，你给出 {got[2]:.3g}。")
    worst = int((got - truth).abs().argmax())
    raise Wrong(f"t = {given[worst]:.1f} 时你给出 {got[worst]:.4g}，autograd 给出 {truth[worst]:.4g}。")


# ── 第 06 章 ──


@checks("6.1")
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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
def _(answer: object) -> None:
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


# ── 第 07 章 ──


@checks("7.1")
def _(answer: object) -> None:
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        raise Wrong(f"应交三个数 (总步数, 预热步数, 第 0 步的学习率)，收到 {answer!r}。")
    try:
        total, warmup, first = (float(value) for value in answer)
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交三个数，收到 {answer!r}。") from error
    steps = 5 * len(range(0, 1000 - 47, 48))
    if total == 5 * len(range(0, 1000, 48)):
        raise Wrong("总步数：你把末尾不满的一批也算了；每轮的步数是 1000 // 48。")
    if total * 5 == steps:
        raise Wrong("总步数：这是一轮的步数，还要乘以轮数。")
    if total != steps:
        raise Wrong(f"总步数不是 {total:g}；先算一轮有几批，再乘轮数。")
    if warmup != max(1, steps // 10):
        raise Wrong("预热步数：W = max(1, ⌊T/10⌋)，T 是总步数，不是一轮的步数。")
    if first == 0:
        raise Wrong("第 0 步的学习率不是 0：式(7.4) 的分子是 t + 1，否则第一步白走。")
    if abs(first - 0.004) < 1e-12:
        raise Wrong("第 0 步还在预热，学习率没有升到最高。")
    if abs(first * warmup - 0.004) > 1e-6:
        raise Wrong("第 0 步的学习率：把 t = 0 代入式(7.4) 的上一行。")


@checks("7.2")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(72)
    train = torch.randint(0, 200, (12, 3, 4, 4), generator=generator, dtype=torch.uint8)
    test = torch.randint(30, 256, (5, 3, 4, 4), generator=generator, dtype=torch.uint8)
    got = ask(answer, train, test)
    try:
        got = float(got)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong(f"应返回一个数，收到 {type(got).__name__}。") from error

    def guess(mean: Tensor, scale: float = 127.5) -> float:  # 平移不影响误差，只须除以 127.5
        return float((((test.double() - mean) / scale) ** 2).mean())

    truth = guess(train.double().mean(0))
    mistakes = {
        guess(train.double().mean(0), 1.0): "你在 [0, 255] 的坐标里算了；先用 to_float 换到 [-1, 1]。",
        guess(train.double().mean(0), 255.0): "你在 [0, 1] 的坐标里算了，小了 4 倍；本课程的图像在 [-1, 1]。",
        guess(test.double().mean(0)): "你用了测试集自己的平均图；训练时见不到它，这样的尺子偏严。",
        guess(train.double().mean()): "你只猜了一个颜色；平均图是逐像素的，应对 dim=0 求平均。",
        guess(train.double().mean((0, 2, 3), keepdim=True)[0]): "你每个通道只猜了一个数；平均图是逐像素的，应只对 dim=0 求平均。",
        truth * train[0].numel(): "你对像素求了和；MSE 对像素也取平均。",
    }
    for value, message in mistakes.items():
        if abs(got - value) < 1e-4 * value:
            raise Wrong(message)
    if not abs(got - truth) < 1e-4 * truth:
        raise Wrong(f"在一组小图上应得 {truth:.4f}，你的是 {got:.4f}。")


@checks("7.3")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(73)
    x = torch.randn(10, 3, generator=generator, dtype=torch.float64)
    target = torch.randn(10, generator=generator, dtype=torch.float64)
    data = torch.cat([x, target[:, None]], dim=1)
    exact = 2 * x.T @ (x @ torch.full((3,), 0.5, dtype=torch.float64) - target) / 10
    for sizes in ([5, 5], [4, 3, 3], [7, 2, 1]):
        w = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
        chunks = list(data.split(sizes))
        got = ask(answer, lambda chunk, w=w: (chunk[:, :3] @ w - chunk[:, 3]).square().mean(), chunks, w)
        if not isinstance(got, Tensor) or got.shape != (3,):
            raise Wrong("应返回 w.grad。")
        plain = sum(2 * c[:, :3].T @ (c[:, :3] @ w.detach() - c[:, 3]) / len(c) for c in chunks)
        last = 2 * chunks[-1][:, :3].T @ (chunks[-1][:, :3] @ w.detach() - chunks[-1][:, 3]) / sizes[-1]
        if torch.allclose(got, exact):
            continue
        if torch.allclose(got, plain):
            raise Wrong(f"小批 {sizes}：你把各小批平均损失的梯度直接相加了，偏大；每份要乘一个权重。")
        if torch.allclose(got, plain / len(sizes)):
            raise Wrong(f"小批 {sizes}：除以小批的个数，只在小批一样大时才对；想想每张图的权重应当相同。")
        if any(torch.allclose(got, last * share) for share in (1.0, 1 / len(sizes), sizes[-1] / 10)):
            raise Wrong(f"小批 {sizes}：结果里只有最后一个小批的梯度；中间不要清零。")
        raise Wrong(f"小批 {sizes}：累加出的梯度与整批的不同。")


@checks("7.4")
def _(answer: object) -> None:
    basis, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(74), dtype=torch.float64))
    curvatures = torch.tensor([0.5, 2.0, 8.0], dtype=torch.float64)
    H = basis @ torch.diag(curvatures) @ basis.T
    try:
        got = float(ask(answer, H))  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise Wrong("应返回一个数。") from error

    def growth(lr: float) -> float:  # 每步最坏的放大倍数，由矩阵本身求得
        return float(torch.linalg.matrix_norm(torch.eye(3, dtype=torch.float64) - lr * H, ord=2))

    if not 0 < got < float("inf"):
        raise Wrong(f"界应是正数，收到 {got:.4g}。")
    if abs(got * float(torch.linalg.eigvalsh(H)[0]) - 2) < 1e-6:
        raise Wrong("你用了最小的特征值；先发散的是最陡的方向。")
    if abs(got * float(H.diagonal().max()) - 2) < 1e-6:
        raise Wrong("你用了 H 的对角线；最陡的方向一般不沿坐标轴，要看特征值。")
    if growth(got * 1.001) < 1:
        raise Wrong(f"η = {got:.4g} 收敛，但再大一点也收敛，还没有到界；|1 − ηλ| 到几才发散？")
    if growth(got * 0.999) > 1:
        raise Wrong(f"η = {got:.4g} 已经发散：每步在最陡的方向上放大 {growth(got):.3g} 倍。")


# ── 第 00 章 ──


@checks("0.1")
def _(answer: object) -> None:
    try:
        given = float(answer)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交一个数，收到 {answer!r}。") from error
    pictures = torch.randint(0, 256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(1)).double()
    inside = pictures / 127.5 - 1
    truth = float((pictures[0] - pictures[1]).square().mean() / (inside[0] - inside[1]).square().mean())
    if abs(given - truth) < 0.5:
        return
    if abs(given - truth**0.5) < 0.5:
        raise Wrong("这是长度的倍数；误差是平方，长度的倍数也要平方。")
    if abs(given - 255) < 0.5 or abs(given - 255**2) < 0.5:
        raise Wrong("你把 [-1, 1] 当成了 [0, 1]：它的长度是 2，不是 1。")
    if given > 0 and abs(1 / given - truth) < 0.5:
        raise Wrong("方向反了：题目问的是 [0, 255] 里的误差除以 [-1, 1] 里的误差。")
    raise Wrong(f"同样两张图，换成 [0, 255] 之后误差不是原来的 {given:g} 倍；先算长度变几倍，再想平方变几倍。")


@checks("0.2")
def _(answer: object) -> None:
    from vanilla_vae import VanillaVAE  # 只有这一题要用模型

    model = VanillaVAE(1, 3, [1], image_size=4).double().eval()
    generator = torch.Generator().manual_seed(2)
    # 编码、解码都换成线性的：像素里的平移与隐空间里的平移于是一一对应，答案可以从像素那边得到。
    model.encoder, model.decoder, model.final_layer = torch.nn.Identity(), torch.nn.Identity(), torch.nn.Identity()
    model.fc_mu, model.fc_var = torch.nn.Linear(16, 3, bias=False).double(), torch.nn.Linear(16, 3).double()
    model.decoder_input, model.bottom = torch.nn.Linear(3, 16).double(), 4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    sizes = (2, 5, 3)
    x, with_it, without_it = (torch.rand(n, 1, 4, 4, generator=generator).double() * 2 - 1 for n in sizes)

    def call(strength: float) -> Tensor:
        got = ask(answer, model, x.clone(), with_it.clone(), without_it.clone(), strength)
        if not isinstance(got, Tensor) or got.shape != x.shape:
            came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"应返回与 x 同形的张量 {list(x.shape)}，收到 {came}；每批的 mu 要对批那一维取平均，得到 [L]。")
        return got.detach().double()

    def is_like(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, atol=1e-8)

    got, again = call(0.7), call(0.7)
    if not is_like(got, again):
        raise Wrong("同样的输入调用两次，结果不同：读数应取 mu，不要抽样。")
    direction = with_it.mean(dim=0) - without_it.mean(dim=0)  # [C, H, W]
    truth = model.generate(x + 0.7 * direction)
    if is_like(got, truth):
        return
    if is_like(got, model.generate(x)):
        raise Wrong("图没有变：方向加上去了吗？")
    if is_like(got, model.generate(x - 0.7 * direction)):
        raise Wrong("方向反了：应是有这个特征的平均，减去没有的平均。")
    if is_like(got, model.generate(x + direction)):
        raise Wrong("方向对，长短不对：别忘了乘以 strength。")
    if is_like(got, model.generate(x) + 0.7 * direction) or is_like(got, x + 0.7 * direction):
        raise Wrong("你在像素里做了加法，那会得到重影；应在 mu 上加，再解码。")
    if is_like(got, model.generate(with_it.mean(dim=0) * 0.7 + x)):
        raise Wrong("只加了 with_it 的平均；方向是两个平均之差。")
    raise Wrong("形状对，数不对；依次核对：三次 encode 都取第一个返回值 mu，各批取平均，作差，乘 strength，加到 x 的 mu 上，decode。")


# ── 第 01 章 ──


@checks("1.1")
def _(answer: object) -> None:
    from vanilla_vae import VanillaVAE

    try:
        side, features, shape = answer  # type: ignore[misc]
        side, features, shape = int(side), int(features), [int(n) for n in shape]
    except (TypeError, ValueError) as error:
        raise Wrong(f"这里应交 (边长, 维数, [B, C, H, W])，如 (2, 2048, [4, 3, 64, 64])，收到 {answer!r}。") from error
    model = VanillaVAE(1, 10, [8, 16], image_size=28).eval()
    with torch.no_grad():
        deepest = model.encoder(torch.zeros(5, 1, 28, 28))
        truth = list(model(torch.zeros(5, 1, 28, 28))[0].shape)
    if side == 14:
        raise Wrong("边长 14 只减半了一次；hidden_dims 有两级，每级减半一次。")
    if side != deepest.shape[-1]:
        raise Wrong(f"最深一级的边长不是 {side}：从 28 出发，每一级减半一次。")
    if features in (16, 16 * side):
        raise Wrong(f"fc_mu 的输入不是 {features} 维：拉平要把高和宽都乘进去。")
    if features == 16 * 4:
        raise Wrong("64 = 16·4 是旧写法：把特征图写死成了 2×2。")
    if features != deepest[0].numel():
        raise Wrong(f"fc_mu 的输入不是 {features} 维：它等于末级的通道数乘特征图的高和宽。")
    if len(shape) == 4 and shape[1] == 3:
        raise Wrong("重建的通道数应与输入相同；写死成 3 是错误 3。")
    if shape != truth:
        raise Wrong(f"重建的形状不是 {shape}：它与喂进去的那批图同形。")


@checks("1.2")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(12)
    for channels, side, latent in ((3, 2, 5), (4, 3, 2)):
        weight = torch.randn(channels * side**2, latent, generator=generator, dtype=torch.float64)
        got = ask(answer, weight.clone(), channels, side)
        want = [latent, channels, side, side]
        if not isinstance(got, Tensor) or list(got.shape) != want:
            came = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
            raise Wrong(f"权重应为 [L, C, b, b] = {want}，收到 {came}。")
        z = torch.randn(6, latent, generator=generator, dtype=torch.float64)
        truth = torch.nn.functional.linear(z, weight).reshape(6, channels, side, side)

        def apply(kernel: Tensor) -> Tensor:
            return torch.nn.functional.conv_transpose2d(z[:, :, None, None], kernel.to(torch.float64))

        if torch.allclose(apply(got), truth, atol=1e-9):
            continue
        if torch.equal(got.flatten(), weight.flatten()):
            raise Wrong("形状对了，数没有跟着走：直接 reshape 不会交换坐标轴，L 在 weight 里是最后一维，要先把它换到最前。")
        if torch.allclose(apply(got.mT), truth, atol=1e-9):
            raise Wrong("高和宽颠倒了：式(1.2) 里 u 是行，v 是列，v 变得最快。")
        raise Wrong("形状对了，输出与线性层不同；先把第一维拆成 (c, u, v)，顺序是 c 最慢、v 最快，再把 L 换到最前。")


@checks("1.3")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(13)
    for beta, channels, side, latent in ((0.5, 3, 4, 6), (4.0, 1, 2, 3)):
        D = channels * side**2
        shape = (2, 5, channels, side, side)
        x, recons = torch.rand(shape, generator=generator, dtype=torch.float64)
        mu = torch.randn(5, latent, generator=generator, dtype=torch.float64)
        recons, mu = recons.requires_grad_(), mu.requires_grad_()
        one = torch.ones((), dtype=torch.float64)
        kld = torch.distributions.kl_divergence(torch.distributions.Normal(mu, one), torch.distributions.Normal(0 * one, one))
        other = 0.5 * (recons - x).square().flatten(1).sum(1).mean() + beta * kld.mean()
        pull, push = torch.autograd.grad(other, (recons, mu), retain_graph=True)
        # 两个损失只差一个倍数：重建那边的倍数已定，KL 那边照样缩放，就得到权重
        ours_pull, ours_push = (torch.autograd.grad(part, at)[0] for part, at in (
            ((recons - x).square().mean(), recons), (kld.sum(1).mean(), mu)))  # fmt: skip
        truth = float((push / ours_push).mean() * (ours_pull / pull).mean())
        reply = ask(answer, beta, D, latent)
        try:
            got = float(reply)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong(f"应返回一个数，收到 {reply!r}。") from error

        def off_by(factor: float) -> bool:
            return abs(got - truth * factor) < 1e-6 * abs(truth * factor)

        if off_by(1):
            continue
        if off_by(0.5):
            raise Wrong("差一个 2 倍：对方的平方误差前有 ½，先把整个损失乘 2，再除以 D。")
        if off_by(latent):
            raise Wrong("忘了 L：对方的 KL 对隐变量取平均，我们的是求和，差 L 倍。")
        if off_by(latent**2):
            raise Wrong("L 用反了：平均 = 总和 ÷ L，权重要除以 L，不是乘。")
        if off_by(D) or off_by(D / 2):
            raise Wrong("忘了 D：对方对像素求和，我们的 MSE 对像素取平均，差 D 倍。")
        if off_by(D**2):
            raise Wrong("D 用反了：平方误差之和 = D·MSE，要把整个损失除以 D，KL 那一项也跟着除。")
        raise Wrong(f"β={beta}、D={D}、L={latent} 时 {got:.4g} 不对：让两项各自的倍数相同，即 损失_对方 = 常数 × 损失_我们。")


@checks("1.4")
def _(answer: object) -> None:
    nn, seen = torch.nn, []  # seen 在模型之外：作答若先复制模型，也看得见

    class Toy(nn.Module):
        latent_dim = 3

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2))
            self.layers[3].eval()  # 单独冻结的一层
            self.fails = False

        def decode(self, z: Tensor) -> Tensor:
            seen.append((z.detach().clone(), self.layers[1].training))
            if self.fails:
                raise RuntimeError("解码中途出错")
            return self.layers(z)

    def state(model: Toy) -> tuple:
        return [module.training for module in model.modules()], [value.clone() for value in model.state_dict().values()]

    model = Toy()
    modes, values = state(model)
    samples = ask(answer, model, 5, torch.Generator().manual_seed(14))
    if not isinstance(samples, Tensor) or samples.shape != (5, 2):
        raise Wrong(f"应返回 decode 的结果，第一维是 num_samples = 5，收到 {list(getattr(samples, 'shape', []))}。")
    modes_after, values_after = state(model)
    if samples.requires_grad:
        raise Wrong("样本还带着计算图：用 torch.no_grad()。")
    if any(not torch.equal(a, b) for a, b in zip(values, values_after)):
        raise Wrong("批归一化的运行统计量被改动了：解码时要处于 eval。")
    if not seen:
        raise Wrong("没有调用 decode：样本应由 model.decode 解码得到。")
    if seen[-1][1]:
        raise Wrong("解码时批归一化还在训练状态：样本会取决于同批的其他样本。")
    if modes != modes_after:
        reason = "停在了 eval" if not any(modes_after) else "单独冻结的层也被打开了，要逐个子模块恢复"
        raise Wrong(f"训练状态没有恢复原样：{reason}。")
    again = ask(answer, model, 5, torch.Generator().manual_seed(14))
    if not torch.equal(samples, again):
        raise Wrong("同一颗种子，两次样本不同：随机数没有全部来自 generator。")
    ask(answer, model, 2000, torch.Generator().manual_seed(15))
    z = seen[-1][0]
    if abs(float(z.mean())) > 0.1 or abs(float(z.std()) - 1) > 0.1:
        raise Wrong("z 应来自先验，即标准正态 N(0, I)：用 randn。")
    model.fails = True
    try:
        answer(model, 5, torch.Generator().manual_seed(14))  # type: ignore[operator]
    except RuntimeError:
        pass
    if state(model)[0] != modes:
        raise Wrong("decode 报错时，训练状态没有恢复：恢复要写在 finally 里，或者用 with eval_mode(...)。")


# ── 第 11 章 ──


@checks("11.1")
def _(answer: object) -> None:
    from vanilla_vae import VanillaVAE

    try:
        flops, image, kept, gradient = (float(value) for value in answer)  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise Wrong(f"应交四个数 (运算, 图像, 留下的, 梯度)，收到 {answer!r}。") from error
    with torch.device("meta"):
        before, after = (sum(p.numel() for p in VanillaVAE(3, 128, image_size=size).parameters()) for size in (64, 128))
    if abs(flops - 2) < 1e-6:
        raise Wrong("运算：边长加倍，面积是 4 倍；卷积在每个位置都要算一遍。")
    if abs(flops - 4) > 0.1:
        raise Wrong("运算：由式(7.8)，卷积的运算数与输出的面积成正比；精度不改变运算的次数。")
    if abs(image - 2) < 1e-6 or abs(image - 8) < 1e-6:
        raise Wrong("图像：存的总是 uint8，与训练用什么精度无关；像素数是几倍？")
    if abs(image - 4) > 0.1:
        raise Wrong("图像：一个像素一个通道 1 字节，只看像素数。")
    if abs(kept - 4) < 0.1:
        raise Wrong("留下的：个数是 4 倍，可是每个数从 4 字节变成了 2 字节。")
    if abs(kept - 2) > 0.1:
        raise Wrong("留下的：由式(11.2) 之前的 n_l 看个数是几倍，再乘以每个数的字节之比。")
    if abs(gradient - 1) < 0.05:
        raise Wrong("梯度：卷积的权重与图像大小无关，全连接层的却要接 4 倍的特征，数一数它们占多少。")
    if abs(gradient * 2 - after / before) < 0.05:
        raise Wrong("梯度：autocast 之下权重与梯度仍是 float32，不减半。")
    if abs(gradient - 4) < 0.05:
        raise Wrong("梯度：只有三个全连接层的权重是 4 倍，卷积的不变；要按各占多少来平均。")
    if abs(gradient - after / before) > 0.06:
        raise Wrong(f"梯度：参数从 {before:,} 个变成几个？可以建两个模型数一数。")


@checks("11.2")
def _(answer: object) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for B, c_in, c_out, K, H, each in ((1, 64, 128, 3, 8, 8), (16, 3, 8, 3, 16, 2), (4, 8, 8, 5, 12, 2)):
        layer = torch.nn.Conv2d(c_in, c_out, K, stride=2, padding=K // 2, bias=False)
        x = torch.zeros(B, c_in, H, H)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = layer(x)
        flops, data, weights = counter.get_total_flops(), x.numel() + out.numel(), layer.weight.numel()
        try:
            got = float(ask(answer, B, c_in, c_out, K, H, each))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong("应返回一个数。") from error
        truth = flops / each / (data + weights)
        mistakes = {
            truth / 2: "一次乘加算两次浮点运算，你只算了一次。",
            truth * 4: "步长 2，输出的边长只有 H/2，运算数按输出的面积算。",
            truth * each: "忘了乘以每个数的字节数 each。",
            flops / each / data: "权重也要读一遍；批小、通道多的时候它不能忽略。",
            flops / each / (data + B * weights): "权重一批只读一次，要摊到 B 张图上，不是每张读一次。",
            flops / each / (x.numel() + weights): "输出也要写一遍。",
        }
        if abs(got - truth) < 1e-6 * truth:
            continue
        for value, message in mistakes.items():
            if abs(got - value) < 1e-6 * value:
                raise Wrong(message)
        raise Wrong(f"B={B}、{c_in}→{c_out} 通道、K={K}、H={H}、每个数 {each} 字节：应得 {truth:.4g}，你的是 {got:.4g}。")


@checks("11.3")
def _(answer: object) -> None:
    for share, target in ((0.5, 1.5), (0.9, 5.0), (0.28, 1.2), (0.3, 1.0), (0.5, 2.0), (0.25, 3.0)):
        try:
            got = float(ask(answer, share, target))  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise Wrong("应返回一个数，办不到时返回 math.inf。") from error
        case = f"占 {share:g}、要快到 {target:g} 倍"
        if target * (1 - share) >= 1:  # 其余的部分自己就用完了时间
            if got != float("inf"):
                raise Wrong(f"{case}：这一类完全不花时间也只快 {1 / (1 - share):.3g} 倍，到不了，应返回 math.inf。")
            continue
        if got == float("inf"):
            raise Wrong(f"{case}：办得到，上限是 1/(1 − p) = {1 / (1 - share):.3g} 倍。")
        if got <= 0:
            raise Wrong(f"{case}：加快的倍数应是正数，收到 {got:g}。")
        reached = 1 / (1 - share + share / got)
        if abs(got - target) < 1e-9 and target != 1:
            raise Wrong(f"{case}：只把这一类加快 {target:g} 倍，整体只快 {reached:.3g} 倍；其余的部分没有变快。")
        if abs(reached - target) > 1e-6:
            raise Wrong(f"{case}：你说加快 {got:.4g} 倍；代回式(11.14)，整体快 {reached:.4g} 倍。")


@checks("11.4")
def _(answer: object) -> None:
    generator = torch.Generator().manual_seed(114)
    for sizes in ([6, 6, 6], [2, 5, 13]):
        shards = [torch.randn(n, 3, generator=generator, dtype=torch.float64) * (k + 1) + 2 * k for k, n in enumerate(sizes)]
        counts = torch.tensor(sizes)
        means = torch.stack([shard.mean(0) for shard in shards])
        variances = torch.stack([shard.var(0, correction=0) for shard in shards])
        got = ask(answer, counts, means, variances)
        if not isinstance(got, (tuple, list)) or len(got) != 2 or any(getattr(value, "shape", None) != (3,) for value in got):
            raise Wrong("应返回两个张量 (均值, 方差)，形状各是 [C]。")
        mean, variance = (value.double() for value in got)
        whole = torch.cat(shards)
        true_mean, true_variance = whole.mean(0), whole.var(0, correction=0)
        share = (counts / counts.sum())[:, None].double()
        if torch.allclose(mean, means.mean(0)) and not torch.allclose(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值没有按份的大小加权，小的一份说话太重了。")
        if not torch.allclose(mean, true_mean):
            raise Wrong(f"各份 {sizes}：均值不对；总和除以总数。")
        if torch.allclose(variance, (share * variances).sum(0)):
            raise Wrong(f"各份 {sizes}：只平均了份内的方差，漏了份与份之间的散布 (μ_k − μ)²。")
        if torch.allclose(variance, variances.mean(0) + (means - true_mean).square().mean(0)) and len(set(sizes)) > 1:
            raise Wrong(f"各份 {sizes}：均值加了权，方差的两项也要同样地加权。")
        if torch.allclose(variance, whole.var(0)):
            raise Wrong(f"各份 {sizes}：这是除以 n − 1 的方差；批归一化用的是除以 n 的。")
        if not torch.allclose(variance, true_variance):
            raise Wrong(f"各份 {sizes}：方差不对；先写出 E[(x − μ)²] 在第 k 份里等于什么。")
