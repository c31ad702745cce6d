"""第 12 章“找错”的练习：检查，以及它认得的错答。作答是一列测试，一道题一个，次序与题目相同。"""

import os
import time
from collections.abc import Callable

import torch
from torch.distributions import Normal, kl_divergence

from vaelab.exercises.judging import Unanswered, Wrong, checks, known_wrong, listed, shown
from vaelab.grading import Grade, grade

ROUNDS: dict[str, tuple[str, ...]] = {
    "12.1": ("gaussian_kl", "kl_from_log_std", "kl_of_batch", "full_kl"),
    "12.2": ("log_normal", "flow_log_prob", "learned_prior", "mixture_log_prob", "tempered_draw"),
    "12.3": ("elbo", "iwae", "total_correlation", "fit_ppca", "cyclical_weights"),
    "12.4": ("make_encoder", "iwae_surrogate", "vector_quantize", "free_bits", "beta_loss"),
}


def grades(number: str, answer: object) -> list[Grade]:
    """练习 ``number`` 里每个测试的成绩。

    Raises:
        Wrong: 不是一列函数，或个数不对。
    """
    names = ROUNDS[number]
    tests = listed(answer, f" {len(names)} 个测试函数的一列，依次对应 {'、'.join(names)}", len(names))
    for name, test in zip(names, tests):
        if not callable(test):
            raise Wrong(f"{name} 那一个应是函数，收到 {shown(test)}；交函数本身，不要加括号调用它。")
    return [grade(name, test) for name, test in zip(names, tests)]


def tally(found: list[Grade]) -> str:
    """“抓到 3/5，误报 0/12”。"""
    caught, wrong = sum(each.caught for each in found), sum(len(each.wrong) for each in found)
    alarms, right = sum(each.false_alarms for each in found), sum(len(each.right) for each in found)
    return f"抓到 {caught}/{wrong}，误报 {alarms}/{right}"


def scoreboard(answers: list) -> str:
    """成绩单：各个练习抓到几个、误报几个，一行一个；还没有作答的是 ○。``answers`` 依次是各个练习的作答。"""
    lines = []
    for number, answer in zip(ROUNDS, answers):
        try:
            found = [each for each in grades(number, answer) if not each.unwritten]
            lines.append(f"{number}　{tally(found)}，写了 {len(found)}/{len(ROUNDS[number])} 题" if found else f"{number}　○ 还没有作答")
        except Wrong as error:
            lines.append(f"{number}　✗ {error}")
    return "\n".join(lines)


def _judge(number: str, answer: object) -> None:
    found = grades(number, answer)
    if all(each.unwritten for each in found):
        raise Unanswered
    faults = sorted((each for each in found if each.problem), key=lambda each: each.unwritten)  # 写了的先说
    if faults:
        raise Wrong(f"{tally(found)}。{faults[0].puzzle}：{faults[0].problem}")


@checks("12.1")
def tests_of_divergences(answer: object) -> None:
    """四个测试：KL 与求和。"""
    _judge("12.1", answer)


@checks("12.2")
def tests_of_densities(answer: object) -> None:
    """五个测试：密度与抽样。"""
    _judge("12.2", answer)


@checks("12.3")
def tests_of_bounds(answer: object) -> None:
    """五个测试：界与参考答案。"""
    _judge("12.3", answer)


@checks("12.4")
def tests_of_gradients(answer: object) -> None:
    """五个测试：梯度。"""
    _judge("12.4", answer)


# ---------------------------------------------------------------- 认得的错答：一个测试写错，其余照空着


def _unwritten(function: Callable) -> object:
    return ...


def _round(number: str, name: str, test: object) -> list:
    return [test if each == name else _unwritten for each in ROUNDS[number]]


def _first(number: str, test: object) -> list:
    return _round(number, ROUNDS[number][0], test)


def _always(function: Callable) -> None:
    raise AssertionError("有错")


def _never(function: Callable) -> None:
    pass


def _calls_only(function: Callable) -> None:
    function(*(torch.zeros(2, 3),) * 4)


def _endless(function: Callable) -> None:
    deadline = time.monotonic() + 3600
    while time.monotonic() < deadline:
        pass


def _leaves(function: Callable) -> None:
    raise SystemExit


def _vanishes(function: Callable) -> None:
    os._exit(0)


def _devours(function: Callable) -> None:
    torch.empty(10**12)


def _recurses(function: Callable) -> None:
    _recurses(function)


def _only_at_equality(function: Callable) -> None:
    mu, log_var = torch.randn(5, 3), torch.randn(5, 3)
    assert function(mu, log_var, mu, log_var).abs().max() < 1e-5, "KL(p‖p) 不是 0"


def _unit_std(function: Callable) -> None:
    assert abs(float(function(torch.tensor([[1.0]]), torch.zeros(1, 1))) - 0.5) < 1e-5, "不是 ½"


def _bitwise(function: Callable) -> None:
    mu, log_std = torch.linspace(-2, 2, 15).view(5, 3), torch.linspace(-1, 1, 15).view(5, 3)
    truth = kl_divergence(Normal(mu, log_std.exp()), Normal(0.0, 1.0)).sum(1)
    assert torch.equal(function(mu, log_std), truth), "不是逐位相同"


def _swallows(function: Callable) -> None:
    try:
        assert function(torch.ones(2, 3), torch.ones(2, 3)).max() < 0
    except BaseException:
        pass


def _doubled(function: Callable) -> None:
    mu, log_var = torch.randn(4, 3), torch.randn(4, 3)
    once, twice = function(mu, log_var), function(mu.repeat(2, 1), log_var.repeat(2, 1))
    assert torch.allclose(once, twice, atol=1e-5), "复制一批，值变了"


def _square_batch(function: Callable) -> None:
    assert function(torch.zeros(3, 3), torch.eye(3).expand(3, 3, 3)).abs().max() < 1e-5, "N(0, I) 与自己的 KL 不是 0"


def _one_dimension(function: Callable) -> None:
    x = torch.linspace(-8, 8, 801)[:, None]
    assert abs(float(torch.trapezoid(function(x, 0 * x, 0 * x).exp(), x[:, 0])) - 1) < 1e-3, "积分不是 1"


def _opposite_scales(function: Callable) -> None:
    axis = torch.linspace(-12, 12, 241)
    total = function(torch.cartesian_prod(axis, axis), torch.zeros(2), torch.tensor([0.3, -0.3])).exp().sum() * 0.1**2
    assert abs(float(total) - 1) < 1e-3, "积分不是 1"


def _one_draw(function: Callable) -> None:
    draw, _ = function(torch.zeros(2), torch.tensor([0.5, -0.5]))
    torch.manual_seed(1)
    got = draw(3)
    torch.manual_seed(1)
    assert torch.allclose(got, torch.randn(3, 2) * torch.tensor([0.25, -0.25]).exp()), "与我抽的不同"


def _integral_only(function: Callable) -> None:
    axis = torch.linspace(-8, 8, 161)
    z = torch.cartesian_prod(axis, axis)
    means = torch.tensor([[-2.0, -2.0], [2.0, 2.0]])
    total = function(z, means, torch.zeros(2, 2)).exp().sum() * 0.1**2
    assert abs(float(total) - 1) < 1e-3, "积分不是 1"


def _unit_temperature(function: Callable) -> None:
    z = function(torch.zeros(2), torch.zeros(2), 1.0, 10_000)
    assert abs(float(z.std()) - 1) < 0.05, "标准差不是 1"


def _tight_bound(function: Callable) -> None:
    weight = torch.tensor([[1.0], [1.0]])  # q 是真后验，界就是 log p(x) = −2.7205；可题目许可抽样的误差
    got = function(torch.ones(1, 2), torch.full((1, 1), 2 / 3), torch.tensor([[-1.0986123]]), weight, 1.0, 10)
    assert torch.allclose(got, torch.tensor([-2.7205188]), atol=1e-5), "不是 −2.72"


def _prior_as_q(function: Callable) -> None:
    x, weight = torch.randn(4, 3), torch.randn(3, 2)
    exact = torch.distributions.MultivariateNormal(torch.zeros(3), weight @ weight.T + torch.eye(3)).log_prob(x)
    got = function(x, torch.zeros(4, 2), torch.zeros(4, 2), weight, 1.0, 1000)
    assert (got <= exact).all(), "界高过了 log p(x)"


def _one_sample(function: Callable) -> None:
    log_w = torch.randn(1, 4)
    assert torch.allclose(function(log_w), log_w[0]), "K = 1 时不是 log w"


def _one_total(function: Callable) -> None:
    z = torch.randn(5, 3)
    assert abs(float(function(z, torch.zeros(1, 3), torch.zeros(1, 3)))) < 1e-4, "一个后验时不是 0"


def _same_weight(function: Callable) -> None:
    x = torch.randn(200, 4) @ torch.randn(4, 4)
    values, vectors = torch.linalg.eigh(x.T.cov(correction=0))
    weight, _ = function(x, 2)
    assert torch.allclose(weight, vectors[:, 2:] * (values[2:] - values[:2].mean()).sqrt(), atol=1e-3), "weight 与我的不同"


def _starts_at_zero(function: Callable) -> None:
    assert float(function(4, 6, 2)[0]) == 0, "第一步不是 0"


def _gradient_somewhere(function: Callable) -> None:
    encoder = function(4, 2, 8)
    sum(each.sum() for each in encoder(torch.randn(3, 4))).backward()
    assert next(encoder.parameters()).grad is not None, "第一层没有梯度"


def _value_of_the_surrogate(function: Callable) -> None:
    log_w = torch.randn(5, 3)
    assert torch.allclose(function(log_w), log_w.logsumexp(0).sum()), "值不是 logsumexp"


def _encoder_only(function: Callable) -> None:
    z, codebook = torch.tensor([[0.2, 0.1], [0.9, 1.2]], requires_grad=True), torch.eye(2, requires_grad=True)
    function(z, codebook, 0.25)[1].backward()
    nearest = codebook[torch.cdist(z, codebook).argmin(1)]
    assert torch.allclose(z.grad, 0.25 * 2 * (z - nearest).detach() / z.numel(), atol=1e-6), "编码器的梯度不对"


def _value_only(function: Callable) -> None:
    z, codebook = torch.tensor([[0.2, 0.1], [0.9, 1.2]]), torch.eye(2)
    nearest = codebook[torch.cdist(z, codebook).argmin(1)]
    z_q, loss = function(z, codebook, 0.25)
    assert torch.allclose(z_q, nearest) and torch.allclose(loss, 1.25 * (z - nearest).square().mean()), "值不对"


def _unit_weight(function: Callable) -> None:
    assert torch.allclose(function(torch.tensor([0.1, 2.0]), 0.5, 1.0), torch.tensor(2.5)), "不是 2.5"


def _one_loss(function: Callable) -> None:
    got = function(torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2, 4), 3.0)
    assert torch.allclose(got, torch.tensor(7.5)), "不是 7.5"


known_wrong(
    "12.1",
    ("应交 4 个测试函数的一列", [_never] * 3),
    ("应是函数，收到 0.5", [0.5, _never, _never, _never]),
    ("抓到 0/5，误报 3/12。gaussian_kl：对的版本也个个报错（有错）", _first("12.1", _always)),
    ("一次也没有调用被测的函数", _first("12.1", _never)),
    ("KL 在 q = p 处不只是 0", _first("12.1", _calls_only)),
    ("KL 在 q = p 处不只是 0", _first("12.1", _only_at_equality)),
    ("换一个标准差", _round("12.1", "kl_from_log_std", _swallows)),
    ("换一个标准差", _round("12.1", "kl_from_log_std", _unit_std)),
    ("个对的版本被冤枉了（不是逐位相同）", _round("12.1", "kl_from_log_std", _bitwise)),
    ("抓到 1/5，误报 0/12。kl_of_batch：没有抓到第 2 个错的版本", _round("12.1", "kl_of_batch", _doubled)),
    ("B 与 L 是不是一样大", _round("12.1", "full_kl", _square_batch)),
    ("被停下了；看看有没有死循环", _first("12.1", _endless)),
    ("SystemExit", _first("12.1", _leaves)),
    ("结束了整个进程", _first("12.1", _vanishes)),
    ("要的内存太多", _first("12.1", _devours)),
    ("递归太深", _first("12.1", _recurses)),
)

known_wrong(
    "12.2",
    ("一维看不出的，用二维", _round("12.2", "log_normal", _one_dimension)),
    ("缩放互相抵消时看不出", _round("12.2", "flow_log_prob", _opposite_scales)),
    ("个对的版本被冤枉了（与我抽的不同）", _round("12.2", "learned_prior", _one_draw)),
    ("各维取自不同分量的点", _round("12.2", "mixture_log_prob", _integral_only)),
    ("对的版本也个个报错（TypeError", _round("12.2", "tempered_draw", _one_dimension)),
    ("温度为 1 时看不出", _round("12.2", "tempered_draw", _unit_temperature)),
)

known_wrong(
    "12.3",
    ("个对的版本被冤枉了（不是 −2.72）", _round("12.3", "elbo", _tight_bound)),
    ("抓到 1/6，误报 0/15。elbo：没有抓到第 1 个错的版本。", _round("12.3", "elbo", _prior_as_q)),
    ("K = 1 时看不出", _round("12.3", "iwae", _one_sample)),
    ("各维独立时应为 0", _round("12.3", "total_correlation", _one_total)),
    ("个对的版本被冤枉了（weight 与我的不同）", _round("12.3", "fit_ppca", _same_weight)),
    ("后一半是不是 1", _round("12.3", "cyclical_weights", _starts_at_zero)),
)

known_wrong(
    "12.4",
    ("每个参数都有梯度吗", _round("12.4", "make_encoder", _gradient_somewhere)),
    ("个对的版本被冤枉了（值不是 logsumexp）", _round("12.4", "iwae_surrogate", _value_of_the_surrogate)),
    ("看编码器的梯度", _round("12.4", "vector_quantize", _value_only)),
    ("编码器的梯度对了，码本的呢", _round("12.4", "vector_quantize", _encoder_only)),
    ("权重不为 1", _round("12.4", "free_bits", _unit_weight)),
    ("个对的版本被冤枉了（不是 7.5）", _round("12.4", "beta_loss", _one_loss)),
)
