"""核对：每个公式之后的 :func:`compare` 与 :func:`holds`，以及练习的结论 :func:`exercise`；各题的检查在 ``vaelab/exercises/``。"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from vaelab.exercises.judging import Unanswered, Wrong, as_double, checker


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
        AssertionError: 形状不同、是空的、有非有限的数（标准误差也算），或相差超过所允许的。
    """
    a, b = as_double(ours), as_double(reference)
    if a.shape != b.shape:
        raise AssertionError(f"✗ {name}：形状不同，左边 {list(a.shape)}，右边 {list(b.shape)}。")
    if not a.numel():
        raise AssertionError(f"✗ {name}：两边都是空的，什么也没有比；看看循环是不是一次也没有走。")
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AssertionError(f"✗ {name}：出现了 NaN 或无穷，比较没有意义；先找出它从哪一步来。")
    error = None if stderr is None else as_double(stderr)
    if error is not None and not (torch.isfinite(error).all() and (error >= 0).all()):
        raise AssertionError(f"✗ {name}：标准误差应是不小于 0 的有限数，收到 {error.flatten().tolist()[:3]}；多取几个样本再估。")
    if atol is None and rtol is None:
        atol, rtol = 1e-6, 1e-5
    allowed = (atol or 0) + (rtol or 0) * b.abs() if error is None else 4 * error + 0 * b
    difference = (a - b).abs()
    if not bool((difference <= allowed).all()):
        worst = int((difference - allowed).flatten().argmax())
        raise AssertionError(
            f"✗ {name}：最不合处左边 {a.flatten()[worst]:.6g}，右边 {b.flatten()[worst]:.6g}，"
            f"相差 {difference.flatten()[worst]:.3g}，允许 {allowed.flatten()[worst]:.3g}。"
        )
    print(f"✓ {name}")


def holds(name: str, conditions: object) -> None:
    """核对一个结论：``conditions`` 是一个真假，或许多个（列表、生成器、布尔张量）；全真则打印 ``✓ name``。

    Raises:
        AssertionError: 有一个不成立，或一个也没有：循环一次也不走，就什么也没有核对。
        TypeError: 说法与条件写反了：字符串里的每个字都算真，不拦住就什么都能通过。
    """
    if not isinstance(name, str) or isinstance(conditions, str):
        raise TypeError(f"holds 应先写说法、后写条件，收到 {type(name).__name__} 与 {type(conditions).__name__}；请对调。")
    if isinstance(conditions, torch.Tensor):
        conditions = conditions.flatten().tolist()
    found = [bool(each) for each in conditions] if isinstance(conditions, Iterable) else [bool(conditions)]
    if not found:
        raise AssertionError(f"✗ {name}：一个也没有核对；看看循环是不是一次也没有走。")
    if not all(found):
        place = f"{len(found)} 处里有 {found.count(False)} 处不成立，第一处是第 {found.index(False) + 1} 处" if len(found) > 1 else "不成立"
        raise AssertionError(f"✗ {name}：{place}。")
    print(f"✓ {name}")


@dataclass(frozen=True)
class Verdict:
    """一次检查的结论：``status`` 是 ``pass``、``wrong``、``unanswered`` 之一，``message`` 是给读者的一句话。"""

    status: str
    message: str


def verdict(number: str, answer: object) -> Verdict:
    """检查练习 ``number`` 的作答（函数或数值）。"""
    if answer is None or answer is ...:
        return Verdict("unanswered", f"○ 练习 {number} 还没有作答；可以先往下读，回头再来。")
    try:
        checker(number)(answer)
    except Unanswered:
        return Verdict("unanswered", f"○ 练习 {number} 还没有作答；可以先往下读，回头再来。")
    except Wrong as error:
        return Verdict("wrong", f"✗ 练习 {number}：{error}")
    except Exception as error:  # 检查没有料到的作答，也不让读者看见深处的回溯
        return Verdict("wrong", f"✗ 练习 {number}：这个作答没法检查（{type(error).__name__}：{error}）；请对照题目要的形状与类型。")
    return Verdict("pass", f"✓ 练习 {number} 通过")


def exercise(number: str, answer: object) -> None:
    """检查作答并打印结论；没有作答或有误都不会中断笔记的运行。"""
    print(verdict(number, answer).message)
