"""练习的检查：每条诊断都有一个错答走到，说的正是那条；胡乱的作答不会通过，也不会让检查自己出错。"""

import ast
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from vaelab import sandbox
from vaelab.check import Verdict, compare, holds, verdict
from vaelab.exercises import judging
from vaelab.exercises.judging import KNOWN_WRONG, Wrong, all_checks

CHECKS = all_checks()
FILES = sorted(Path(judging.__file__).parent.glob("ch*.py"))
NAN = float("nan")


@functools.cache
def judged(number: str, index: int) -> tuple[Verdict, dict[str, set[int]]]:
    """错答判一次，两个测试共用：结论，与抛出 Wrong 时经过了哪些文件的哪些行。"""
    passed: dict[str, set[int]] = {}

    def watched(answer: object) -> None:
        try:
            check(answer)
        except Wrong as error:
            step = error.__traceback__
            while step is not None:
                passed.setdefault(step.tb_frame.f_code.co_filename, set()).add(step.tb_lineno)
                step = step.tb_next
            raise

    check = CHECKS[number]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(CHECKS, number, watched)
        patched.setattr(sandbox, "SECONDS", 2.0)  # 死循环的那一个不必等满
        return verdict(number, KNOWN_WRONG[number][index][1]), passed


@pytest.mark.parametrize(
    ("number", "says", "index"),
    [(number, says, index) for number, mistakes in KNOWN_WRONG.items() for index, (says, _) in enumerate(mistakes)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_known_mistake_is_named(number, says, index):
    found, _ = judged(number, index)
    assert found.status == "wrong" and says in found.message, found.message


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_diagnosis_is_reached(path):
    """没有错答走得到的诊断，不知道说得对不对，就不该在那里。"""
    raises = {
        node.lineno: ast.unparse(node.exc)[:80]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("Wrong(")
    }
    assert raises
    chapter = str(int(path.stem[2:]))
    reached = {
        line
        for number, mistakes in KNOWN_WRONG.items()
        if number.split(".")[0] == chapter
        for index in range(len(mistakes))
        for line in judged(number, index)[1].get(str(path), ())
    }
    missed = {line: raises[line] for line in raises.keys() - reached}
    assert not missed, "\n".join(f"{path.name}:{line} {text}" for line, text in sorted(missed.items()))


def junk() -> list:
    """不像样的作答：类型不对的，非有限的，常数，返回这些东西的函数。"""
    shapes = [(), (1,), (3,), (5,), (6,), (4, 4), (2, 3), (3, 2, 4, 4), (5, 2), (8, 3, 2, 2)]
    values = ["快", "", b"1", [], {}, object(), True, 1j, NAN, math.inf, -1.0, 0, 10**400, [NAN], ["a"], (None, None)]
    values += [(fill,) * n for n in (2, 3, 4, 5) for fill in (NAN, math.inf, 0, 1, "a", None)]
    values += [torch.full(shape, fill, dtype=torch.float64) for shape in shapes for fill in (NAN, math.inf, 0.0)]
    return values + [lambda *given, value=value: value for value in values] + [lambda: 1, lambda *given: given, lambda first, *rest: first]


@pytest.mark.parametrize("number", CHECKS)
def test_junk_is_refused_in_a_sentence(number):
    for answer in junk():
        found = verdict(number, answer)
        assert found.status != "pass" and "没法检查" not in found.message and len(found.message) < 400, (answer, found.message)


def test_every_exercise_knows_some_mistakes():
    assert KNOWN_WRONG.keys() == CHECKS.keys() and all(KNOWN_WRONG.values())
    names = [check.__name__ for check in CHECKS.values()]
    assert len(set(names)) == len(names) and "_" not in names


@pytest.mark.parametrize(
    ("ours", "reference", "options"),
    [
        (1.0, 1.1, {}),
        (1.0, 1.0, {"stderr": math.inf}),
        (1.0, 5.0, {"stderr": math.inf}),
        (1.0, 1.0, {"stderr": NAN}),
        (1.0, 1.0, {"stderr": -1.0}),
        (NAN, NAN, {}),
        (torch.zeros(0), torch.zeros(0), {}),
        ([], [], {"atol": 1.0}),
        (torch.zeros(2), torch.zeros(1, 2), {}),
        (1.0, 1.5, {"stderr": 0.1}),
    ],
)
def test_compare_refuses_what_it_cannot_compare(ours, reference, options, capsys):
    with pytest.raises(AssertionError, match="✗ 名字："):
        compare("名字", ours, reference, **options)
    assert not capsys.readouterr().out


def test_a_conclusion_holds_only_if_there_is_something_and_all_of_it_is_true(capsys):
    for good in (True, [1 < 2], torch.tensor([[True, True]]), (k < 3 for k in range(3)), np.bool_(True)):
        holds("名字", good)
    assert capsys.readouterr().out == "✓ 名字\n" * 5
    for bad in (False, [], [True, False], torch.tensor([False]), torch.zeros(0, dtype=torch.bool), (k < 0 for k in range(0)), np.bool_(False)):
        with pytest.raises(AssertionError, match="✗ 名字："):
            holds("名字", bad)
    with pytest.raises(TypeError, match="请对调"):
        holds([True], "名字")
