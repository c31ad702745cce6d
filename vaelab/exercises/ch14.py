"""第 14 章“离散的隐变量：VQ 与 FSQ”的练习：检查，以及它认得的错答。"""

import torch
from torch.distributions import Normal, kl_divergence

from vaelab.exercises.judging import Wrong, ask, checks, known_wrong, number


def _truth(a: float, b: float) -> float:
    one = torch.ones((), dtype=torch.float64)
    return float(kl_divergence(Normal(a * one, one), Normal(b * one, one)))


@checks("14.1")
def kl_at_a_distance_of_four_14(answer: object) -> None:
    value = number(answer)
    if abs(value - 2 * _truth(4, 0)) < 1e-6:
        raise Wrong("忘了 ½：KL 是距离平方的一半。")
    if abs(value - _truth(4, 0)) > 1e-6:
        raise Wrong(f"{value:g} 不对：把距离代入式(14.1)。")


known_wrong("14.1", ("忘了 ½", 16.0), ("代入式", 2.0))


@checks("14.2")
def kl_of_unit_gaussians_14(answer: object) -> None:
    for a, b in ((0.0, 1.0), (3.0, -1.0), (0.5, 0.5)):
        value = number(ask(answer, a, b))
        if abs(value - abs(a - b) / 2) < 1e-6 and abs(a - b) > 1:
            raise Wrong("忘了平方：均值之差以平方进入 KL。")
        if abs(value - _truth(a, b)) > 1e-6:
            raise Wrong(f"a = {a:g}、b = {b:g} 时应得 {_truth(a, b):g}，你给出 {value:g}。")


known_wrong("14.2", ("忘了平方", lambda a, b: 0.5 * abs(a - b)), ("应得", lambda a, b: (a - b) ** 2))
