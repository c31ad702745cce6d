"""12 章的题库：每道题一份约定，几个写法不同的对的版本，一两个错的版本。先别看里面的文件，写完测试再来。

每个错都由真实发表过的教学代码里的错重造；每题开头的注释说出错在哪里、最便宜的测试、出自哪一类代码。
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module

from vaelab.bugs.registry import PUZZLES, Puzzle

for _room in ("divergence", "density", "bound", "gradient"):
    import_module(f"vaelab.bugs.{_room}")

__all__ = ["PUZZLES", "Puzzle", "contract", "find"]


def contract(name: str) -> str:
    """一道题的签名与约定：测试只能靠它，不能靠某个版本碰巧怎样写。"""
    first = _puzzle(name).right[0]
    lines = inspect.cleandoc(first.__doc__ or "").split("\n")
    return "\n".join([f"{name}({', '.join(inspect.signature(first).parameters)})", *("    " + line if line else "" for line in lines)])


def find(name: str, kind: str, index: int) -> Callable:
    """题目 ``name`` 的一个版本：``kind`` 是 ``right`` 或 ``wrong``，``index`` 从 0 数。

    Raises:
        ValueError: 没有这道题、这一种或这一个。
    """
    versions = {"right": _puzzle(name).right, "wrong": _puzzle(name).wrong}
    if kind not in versions or not 0 <= index < len(versions[kind]):
        raise ValueError(f"{name} 有 right {len(versions['right'])} 个、wrong {len(versions['wrong'])} 个，收到 {kind!r} {index!r}；请从 0 数。")
    return versions[kind][index]


def _puzzle(name: str) -> Puzzle:
    if name not in PUZZLES:
        raise ValueError(f"没有叫 {name!r} 的题，有的是 {'、'.join(PUZZLES)}。")
    return PUZZLES[name]
