"""给读者写的测试打分：在错的版本上该报错，在几个写法不同的对的版本上都不该报错。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vaelab import sandbox
from vaelab.bugs import PUZZLES
from vaelab.sandbox import Outcome


@dataclass(frozen=True)
class Grade:
    """一个测试的成绩：``wrong``、``right`` 是它在各个版本上的结果；``problem`` 是给读者的一句话，没有毛病就是空的。"""

    puzzle: str
    wrong: tuple[Outcome, ...]
    right: tuple[Outcome, ...]
    problem: str

    @property
    def caught(self) -> int:
        """抓到几个错的版本；在对的版本上也都报错的，不算抓到。"""
        useful = any(each.status == "quiet" for each in self.right)
        return sum(each.status == "alarm" for each in self.wrong) if useful else 0

    @property
    def false_alarms(self) -> int:
        """在几个对的版本上报了错，没跑完的也算。"""
        return sum(each.status in ("alarm", "broken") for each in self.right)

    @property
    def unwritten(self) -> bool:
        """还没有写：返回的是 ``...``。"""
        return all(each.status == "unwritten" for each in self.wrong + self.right)

    def __str__(self) -> str:
        said = {"quiet": "通过", "unwritten": "还没有写"}
        return "\n".join(
            f"{kind}的版本 {index}：" + said.get(each.status, f"报错（{each.message}）" if each.status == "alarm" else each.message)
            for kind, outcomes in (("错", self.wrong), ("对", self.right))
            for index, each in enumerate(outcomes, 1)
        )


def grade(puzzle: str, test: Callable, seconds: float | None = None) -> Grade:
    """拿 ``test`` 去试题目 ``puzzle`` 的每一个版本；没能好好跑完的、还没有写的，后面的就不试了。

    ``seconds`` 是一次运行的处理器时间，秒；不给就是 ``sandbox.SECONDS``。
    """
    own = PUZZLES[puzzle]
    targets = [(puzzle, "right", index) for index in range(len(own.right))] + [(puzzle, "wrong", index) for index in range(len(own.wrong))]
    outcomes: list[Outcome] = []
    for target in targets:
        if outcomes and outcomes[-1].status in ("broken", "unwritten"):  # 死循环不必等五遍
            outcomes.append(outcomes[-1])
        else:
            outcomes += sandbox.trial(test, [target], seconds=sandbox.SECONDS if seconds is None else seconds)
    right, wrong = outcomes[: len(own.right)], outcomes[len(own.right) :]
    return Grade(puzzle, tuple(wrong), tuple(right), _problem(own.hints, wrong, right))


def _problem(hints: Sequence[str], wrong: Sequence[Outcome], right: Sequence[Outcome]) -> str:
    every = [*right, *wrong]
    if broken := [each for each in every if each.status == "broken"]:
        return broken[0].message
    if all(each.status == "unwritten" for each in every):
        return "还没有写。"
    alarms = [index for index, each in enumerate(right) if each.status == "alarm"]
    if len(alarms) == len(right):
        return f"对的版本也个个报错（{right[0].message or '没有说明'}）；永远报错的测试，什么也没有说。"
    if alarms:
        return (
            f"第 {alarms[0] + 1} 个对的版本被冤枉了（{right[alarms[0]].message or '没有说明'}）；"
            "它合乎约定，只是写法不同：看看是不是比了约定之外的东西，或容差太小。"
        )
    if not any(each.calls for each in every):
        return "一次也没有调用被测的函数，所以什么也看不见。"
    missed = [index for index, each in enumerate(wrong) if each.status != "alarm"]
    return f"没有抓到第 {missed[0] + 1} 个错的版本。{hints[missed[0]]}。" if missed else ""
