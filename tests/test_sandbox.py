"""沙盒：读者的测试无论怎样死，都是一句话；下一个照常。题库：约定、写法不同的对的版本、错的版本各就各位。"""

import os
import sys
import threading
import time
import types
from contextlib import suppress

import psutil
import pytest
import torch

from vaelab import bugs, sandbox
from vaelab.grading import grade
from vaelab.packing import PEEKED
from vaelab.sandbox import Outcome, trial

ONE = [("kl_of_batch", "right", 0)]
QUICK = {"seconds": 0.3, "wall": 60.0}  # 处理器时间要少；钟表时间要宽，机器再忙也轮不到它先到
NO_FORK: list = []  # 没有 fork 的那几个用例共用一个沙盒
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="没有 fork")


def endless(function):
    while True:
        pass


def stubborn(function):
    while True:
        try:
            endless(function)
        except BaseException:
            pass


def sleeps(function):
    time.sleep(1000)


def calls_once(function):
    function(torch.zeros(1, 1), torch.zeros(1, 1))


def leaves(function):
    exit()


def vanishes(function):
    os._exit(0)


def grows(function):
    kept = []
    while True:
        kept.append(torch.ones(10**6))


def devours(function):
    bytearray(10**13)


def asks_too_much(function):
    torch.empty(10**13)


def recurses(function):
    recurses(function)


def crashes(function):
    import ctypes

    ctypes.string_at(0)


def unspeakable(function):
    class Silent(Exception):
        def __str__(self):
            raise ValueError

    raise Silent


FATAL = {
    "死循环": (endless, "算个不停", QUICK),
    "捕获一切的死循环": (stubborn, "算个不停", QUICK),
    "睡着": (sleeps, "在等什么", {"wall": 0.5}),
    "exit()": (leaves, "SystemExit", {}),
    "os._exit": (vanishes, "结束了整个进程", {}),
    "一点一点吃内存": (grows, "内存", {"seconds": 20.0, "wall": 60.0, "memory": 1 << 27}),
    "一口吃内存": (devours, "内存", {}),
    "张量太大": (asks_too_much, "内存", {}),
    "递归": (recurses, "递归太深", {}),
}


@pytest.fixture
def without_fork(monkeypatch):
    monkeypatch.setenv("VAELAB_NO_FORK", "1")
    monkeypatch.setattr(sandbox, "_SERVER", NO_FORK)


@pytest.fixture(scope="module", autouse=True)
def close_the_other():
    yield
    for each in NO_FORK:
        each.close()


@pytest.mark.parametrize(("test", "says", "limits"), FATAL.values(), ids=FATAL)
def test_each_death_is_a_sentence(test, says, limits):
    (outcome,) = trial(test, ONE, **limits)
    assert outcome.status == "broken" and says in outcome.message and outcome.message.endswith("。")
    (after,) = trial(calls_once, ONE)
    assert after == Outcome("quiet", "", 1)


@FORKS
def test_a_crash_is_a_sentence():
    assert "崩溃了" in trial(crashes, ONE, **QUICK)[0].message


@pytest.mark.parametrize("name", ["死循环", "os._exit"])
@pytest.mark.usefixtures("without_fork")
def test_a_system_without_fork_says_the_same(name):
    test, says, limits = FATAL[name]
    (outcome,) = trial(test, ONE, **limits)
    assert outcome.status == "broken" and says in outcome.message
    assert trial(lambda function: None, ONE)[0].status == "quiet"


@FORKS
def test_what_a_test_changes_is_gone_afterwards():
    def vandal(function):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.randn = torch.zeros = None
        print("山" * 10**6)
        os.write(1, b"{}\n" * 1000)
        sys.stdout.close()
        threading.Thread(target=endless, args=(None,)).start()

    def looks(function):
        assert torch.zeros(1).dtype == torch.float32 and torch.is_grad_enabled()
        assert threading.active_count() == 1 and torch.randn(1).numel() == 1
        assert torch.initial_seed() == 0

    assert [each.status for each in trial(vandal, ONE * 2) + trial(looks, ONE * 2)] == ["quiet"] * 4


def grandchildren() -> set:
    """沙盒的那个 Python 之外，还有谁。"""
    found = set()
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE and each.ppid() != os.getpid():
                found.add(each)
    return found


@FORKS
def test_children_are_taken_along():
    def leaves_one_behind(function):
        if os.fork() == 0:
            endless(function)

    def speaks_twice(function):
        os.fork()
        raise AssertionError("一次")

    before = grandchildren()
    trial(lambda function: None, ONE)
    assert trial(leaves_one_behind, ONE)[0].status == "quiet"
    assert [each.message for each in trial(speaks_twice, ONE * 2)] == ["一次"] * 2
    deadline = time.monotonic() + 60
    while (strays := grandchildren() - before) and time.monotonic() < deadline:  # 停掉了，不等于已经走了
        time.sleep(0.05)
    assert not strays


def test_the_outside_is_seen_inside():
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:

        def looks(function):
            assert torch.zeros(1).dtype == torch.float64

        assert trial(looks, ONE)[0].status == "quiet"
    finally:
        torch.set_default_dtype(old)


def in_a_notebook(source: str, name: str, **given: object):
    """像笔记里那样定义的函数：没有模块可以导入。"""
    space = {"__name__": "__main__", "torch": torch, **given}
    exec(source, space)
    return space[name]


def test_a_function_from_a_notebook_brings_what_it_uses():
    source = """
import math
from torch.distributions import Normal
scale = torch.tensor(2.0)
def helper(x, *, times=3):
    return [helper(x - 1) if x > 0 else scale * times * math.pi for _ in range(1)][0]
def make(n):
    def test(function):
        assert abs(helper(n) - 6 * math.pi) < 1e-5 and Normal(0, scale).stddev == 2
        return ...
    return test
test = make(2)
"""
    assert trial(in_a_notebook(source, "test"), ONE)[0].status == "unwritten"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("class A: pass\ndef test(f): A()", "类 A"),
        ("def test(f): lock.acquire()", "送不进沙盒"),
        ("def test(f): handle.read()", "送不进沙盒"),
        ("test = (each for each in [1])", "送不进沙盒"),
    ],
)
def test_what_cannot_travel_is_named(source, says):
    with open(os.devnull) as handle:
        (outcome,) = trial(in_a_notebook(source, "test", lock=threading.Lock(), handle=handle), ONE)
    assert outcome.status == "broken" and says in outcome.message


def test_the_exit_of_a_notebook_is_the_exit_of_python():
    quitter = type("ZMQExitAutocall", (), {"__module__": "IPython.core.autocall", "__call__": lambda self: None})()
    (outcome,) = trial(in_a_notebook("def test(f): exit()", "test", exit=quitter), ONE)
    assert outcome.status == "broken" and "SystemExit" in outcome.message


def test_a_name_that_is_missing_is_an_alarm_with_its_name():
    (outcome,) = trial(in_a_notebook("def test(f): return nothing", "test"), ONE)
    assert outcome.status == "alarm" and "nothing" in outcome.message
    assert trial(unspeakable, ONE)[0] == Outcome("alarm", "Silent", 0)


def test_the_version_under_test_does_not_give_itself_away():
    def looks(function):
        assert isinstance(function, types.FunctionType)
        assert function.__name__ == "target" and function.__doc__ is None

    assert {each.status for each in trial(looks, [("elbo", "right", 0), ("elbo", "wrong", 0)])} == {"quiet"}


def test_every_puzzle_has_a_contract_and_several_right_versions():
    for name, puzzle in bugs.PUZZLES.items():
        assert len(puzzle.right) >= 3 and len(puzzle.wrong) == len(puzzle.hints) >= 1
        assert bugs.contract(name).startswith(f"{name}(") and "返回" in bugs.contract(name) or name == "make_encoder"
    for wrong in (("nothing", "right", 0), ("elbo", "left", 0), ("elbo", "right", 9), ("elbo", "wrong", -1)):
        with pytest.raises(ValueError, match="[。]$"):
            bugs.find(*wrong)


def test_a_grade_counts_catches_and_false_alarms():
    def always(function):
        raise AssertionError("有错")

    def good(function):
        mu = torch.ones(1, 2)
        assert abs(function(mu.repeat(3, 1), torch.zeros(3, 2)) - 1) < 1e-5, "不是 1"

    found = grade("kl_of_batch", good)
    assert (found.caught, found.false_alarms, found.problem) == (2, 0, "")
    assert str(found) == "错的版本 1：报错（不是 1）\n错的版本 2：报错（不是 1）\n对的版本 1：通过\n对的版本 2：通过\n对的版本 3：通过"
    found = grade("kl_of_batch", always)
    assert (found.caught, found.false_alarms) == (0, 3) and "永远报错" in found.problem
    found = grade("kl_of_batch", endless, seconds=0.3)
    assert (found.caught, found.false_alarms) == (0, 3) and "死循环" in found.problem


@pytest.fixture(scope="module")
def peeking() -> dict:
    """伸手去拿题库的几种办法：前三种送不进去，后四种进去了也拿不到。"""
    import vaelab

    sources = [
        "def test(f): find('kl_of_batch', 'right', 0)",
        "def test(f): one()",
        "def test(f): bugs.find",
        "def test(f):\n import vaelab.grading\n vaelab.grading.PUZZLES['elbo']",
        "def test(f):\n from vaelab.bugs import find",
        "def test(f):\n from vaelab.bugs.divergence import kl_of_batch",
        "def test(f): vaelab.bugs.find",
    ]
    given = {"find": bugs.find, "one": bugs.find("kl_of_batch", "right", 1), "bugs": bugs, "vaelab": vaelab}
    return {source: in_a_notebook(source, "test", **given) for source in sources}


def test_the_answers_are_out_of_reach(peeking):
    found = {source: trial(test, ONE)[0].message for source, test in peeking.items()}
    assert found == dict.fromkeys(peeking, PEEKED)
    assert trial(calls_once, ONE)[0].status == "quiet"


@pytest.mark.usefixtures("without_fork")
def test_the_answers_are_out_of_reach_without_fork(peeking):
    """一次运行里把办法都试一遍：说出那句话，就要换一个沙盒。"""
    first, second, third, *others = peeking.values()
    assert {trial(each, ONE)[0].message for each in (first, second, third)} == {PEEKED}

    def tries(function):
        for each in others:
            try:
                each(function)
            except BaseException as error:
                assert type(error).__name__ == "_Peeked", error
            else:
                raise AssertionError("拿到了")

    assert trial(tries, ONE) == [Outcome("quiet")]
    assert trial(calls_once, ONE)[0].status == "quiet"


def test_a_returned_verdict_is_refused():
    for result in ("False", "f", "iter([])", "(each for each in [])"):
        (outcome,) = trial(in_a_notebook(f"def test(f): return {result}", "test"), ONE)
        assert outcome.status == "broken" and "测试返回了" in outcome.message
    assert "返回了 False" in trial(in_a_notebook("def test(f): return False", "test"), ONE)[0].message


def test_a_sandbox_that_does_not_start_says_so(monkeypatch):
    monkeypatch.setattr(sandbox, "_SERVER", [])
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="^沙盒没有起来"):
        patched.setattr(sys, "path", [])
        trial(calls_once, ONE)


def test_an_interrupt_ends_the_conversation(monkeypatch):
    def stop(self, request, patience):
        raise KeyboardInterrupt

    trial(lambda function: None, ONE)
    with monkeypatch.context() as patched:
        patched.setattr(sandbox._Server, "ask", stop)
        with pytest.raises(KeyboardInterrupt):
            trial(lambda function: None, ONE)
    assert trial(lambda function: None, ONE)[0].status == "quiet"


@FORKS
def test_closing_does_not_wait_for_a_daemon(tmp_path):
    """放在最后：它关掉大家共用的沙盒。"""
    flag = tmp_path / "还在"
    flag.touch()
    stays = str(flag)

    def daemon(function):
        if os.fork() == 0:
            os.setsid()
            deadline = time.monotonic() + 120
            while os.path.exists(stays) and time.monotonic() < deadline:
                time.sleep(0.05)
            os._exit(0)

    assert trial(daemon, ONE)[0].status == "quiet"
    started = time.monotonic()
    sandbox._SERVER[0].close()
    flag.unlink()
    assert time.monotonic() - started < 60
