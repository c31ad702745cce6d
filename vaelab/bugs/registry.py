"""登记 12 章的题：对的版本、错的版本，与没有抓到时给读者的一句提示。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Puzzle:
    """一道题。``right`` 的第一个带着约定（docstring）；``hints`` 与 ``wrong`` 一一对应。"""

    right: list[Callable] = field(default_factory=list)
    wrong: list[Callable] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)


PUZZLES: dict[str, Puzzle] = {}


def right(name: str) -> Callable[[Callable], Callable]:
    """登记 ``name`` 的一个对的版本。"""

    def register(function: Callable) -> Callable:
        PUZZLES.setdefault(name, Puzzle()).right.append(function)
        return function

    return register


def wrong(name: str, hint: str) -> Callable[[Callable], Callable]:
    """登记 ``name`` 的一个错的版本；没有抓到时，``hint`` 告诉读者往哪里看，不说错在哪里。"""

    def register(function: Callable) -> Callable:
        PUZZLES.setdefault(name, Puzzle()).wrong.append(function)
        PUZZLES[name].hints.append(hint)
        return function

    return register
