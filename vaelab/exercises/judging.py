"""检查练习所用的工具：登记检查与它认得的错答，调用作答，说出错在哪里。"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Checker = Callable[[object], None]
CHECKS: dict[str, Checker] = {}
KNOWN_WRONG: dict[str, tuple[tuple[str, object], ...]] = {}


class Unanswered(Exception):
    """练习还没有作答。"""


class Wrong(Exception):
    """作答有误；信息说明错在哪里。"""


def checks(number: str) -> Callable[[Checker], Checker]:
    """登记练习 ``number``（如 ``"5.1"``）的检查：接收作答，有误时抛出 :class:`Wrong`。"""

    def register(function: Checker) -> Checker:
        CHECKS[number] = function
        return function

    return register


def known_wrong(number: str, *mistakes: tuple[str, object]) -> None:
    """登记检查认得的错答，每个是（诊断里的一段话，错答）。测试把它们都交一遍：每条诊断都要有错答走到。"""
    KNOWN_WRONG[number] = mistakes


def checker(number: str) -> Checker:
    """练习 ``number`` 的检查。"""
    import_module(f"vaelab.exercises.ch{int(number.split('.')[0]):02}")
    return CHECKS[number]


def all_checks() -> dict[str, Checker]:
    """全部章节的检查，按题号。"""
    for path in sorted(Path(__file__).parent.glob("ch*.py")):
        import_module(f"vaelab.exercises.{path.stem}")
    return CHECKS


def ask(answer: object, *args: object) -> object:
    """以 ``args`` 调用作答的函数并返回结果；没有作答（None 或 ...）抛 Unanswered，运行出错抛 Wrong。"""
    if not callable(answer):
        raise Wrong(f"这里应交一个函数，收到 {shown(answer)}。")
    try:
        result = answer(*args)
    except NotImplementedError as error:
        raise Unanswered from error
    except Exception as error:  # 读者的代码可能抛出任何异常，都转成一句话
        raise Wrong(f"你的代码运行时出错：{type(error).__name__}：{error}") from error
    if result is None or result is ...:
        raise Unanswered
    return result


def number(value: object, what: str = "一个数", *, infinite: bool = False) -> float:
    """``value`` 当作一个数；不是数、不是有限的（``infinite`` 允许无穷）就抛 Wrong，说明应交 ``what``。"""
    try:
        if isinstance(value, (str, bytes)):  # float("3") 也行，可那不是一个数
            raise TypeError
        result = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Wrong(f"应交{what}，收到 {shown(value)}。") from error
    if math.isnan(result) or (math.isinf(result) and not infinite):
        raise Wrong(f"应交{what}，收到 {result:g}：它不是有限的数；先看看哪一步除以了零，或对负数取了对数。")
    return result


def numbers(answer: object, count: int, what: str) -> list[float]:
    """``answer`` 当作 ``count`` 个有限的数；不是就抛 Wrong，说明应交 ``what``。"""
    return [number(value, what) for value in listed(answer, what, count)]


def shown(value: object) -> str:
    """作答写在诊断里的样子：张量说类型与形状，太长的截短。"""
    text = f"形状 {list(value.shape)} 的张量" if isinstance(value, Tensor) else " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:60] + "…"


def as_double(value: object) -> Tensor:
    """数或张量 → CPU 上不带梯度的 float64 张量。"""
    if isinstance(value, Tensor):
        return value.detach().cpu().to(torch.float64)  # 先搬后转：MPS 没有 float64
    if isinstance(value, (list, tuple)) and any(isinstance(each, Tensor) and each.requires_grad for each in value):
        value = [each.detach() if isinstance(each, Tensor) else each for each in value]  # 一列带梯度的，as_tensor 会警告
    return torch.as_tensor(value, dtype=torch.float64)


def close(got: object, truth: Tensor, atol: float = 1e-5) -> bool:
    """``got`` 与 ``truth`` 同形且逐元素相近。"""
    got = as_double(got)
    return got.shape == truth.shape and bool(((got - truth).abs() <= atol * (1 + truth.abs())).all())


def whole(value: object, what: str, least: float = -math.inf) -> int:
    """``value`` 当作一个不小于 ``least`` 的整数，7.0 也算；不是就抛 Wrong，说明应交 ``what``。"""
    result = number(value, what)
    # 大得离谱的数也不收：拿它去建层、分配内存，检查自己会倒下
    if isinstance(value, bool) or not result.is_integer() or not least <= result <= 1e9:
        raise Wrong(f"应交{what}，收到 {shown(value)}。")
    return int(result)


def listed(answer: object, what: str, count: int | None = None) -> list:
    """``answer`` 当作一列（``count`` 个）东西，元组、张量、数组也算；不是就抛 Wrong，说明应交 ``what``。"""
    # 零维的张量变成一个数，没有长度
    items = answer.tolist() if isinstance(answer, (Tensor, np.ndarray)) else answer
    if not isinstance(items, (list, tuple)) or count not in (None, len(items)):
        raise Wrong(f"应交{what}，收到 {shown(answer)}。")
    return list(items)


def finite(value: object, what: str) -> Tensor:
    """``value`` 当作没有 NaN 与无穷的张量，给出 float64 的一份；不是就抛 Wrong，说明应交 ``what``。"""
    try:
        with warnings.catch_warnings():  # 一列张量、复数，torch 都另有话说，读者不必看见
            warnings.simplefilter("ignore")
            result = as_double(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Wrong(f"应交{what}，收到 {shown(value)}。") from error
    if not torch.isfinite(result).all():
        raise Wrong(f"应交{what}，收到的里面有 NaN 或无穷；先看看哪一步除以了零，或对负数取了对数。")
    return result


def tensor(value: object, shape: tuple[int, ...], what: str, advice: str = "先看看哪一步除以了零，或对负数取了对数") -> Tensor:
    """``value`` 当作形状 ``shape`` 的张量，转成 float64；不是张量、形状不对或有 NaN 与无穷就抛 Wrong，说明应返回 ``what``。"""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        value = torch.from_numpy(value.astype(np.float64, order="C"))
    if not isinstance(value, Tensor) or value.shape != shape:
        raise Wrong(f"应返回{what}，收到 {list(value.shape) if isinstance(value, Tensor) else shown(value)}。")
    if not bool(value.isfinite().all()):
        raise Wrong(f"出现了 NaN 或无穷：{advice}。")
    return as_double(value)
