"""沙盒里面：:func:`serve` 在一个干净的 Python 里，收一份测试，运行一次，答一句。外面是 ``vaelab/sandbox.py``。

每一次运行是一个新的分身（fork），改掉的全局状态、猴补的 torch、没停的线程都随它消失；没有 fork 的系统就在这个进程里直接运行。
"""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

import numpy as np
import psutil
import torch

from vaelab.packing import PEEKED

TOO_MUCH = "测试要的内存太多，系统没有给；看看哪个张量太大。"
QUIT = "测试结束了整个进程（os._exit 之类）；通过就返回，报错就抛异常。"


@dataclass(frozen=True)
class Outcome:
    """一次运行的结果。

    ``status``：``quiet`` 返回了，没有抱怨；``alarm`` 抛了异常；``unwritten`` 返回 ``...``；``broken`` 没能好好跑完。
    ``message`` 是给人看的一句话；``calls`` 是被测的函数被调用了几次。
    """

    status: str
    message: str = ""
    calls: int = 0


def can_fork() -> bool:
    """这里能不能 fork；``VAELAB_NO_FORK`` 让测试走没有 fork 的那条路。"""
    return hasattr(os, "fork") and not os.environ.get("VAELAB_NO_FORK")


def serve() -> None:
    """说一声 ready；然后收一次，跑一次，答一次，直到没有人问。"""
    from vaelab import bugs

    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for each in (0, 1, 2):  # 测试打印的、读取的，都碰不到这两根管道
        os.dup2(nowhere, each)
    sys.stdin, sys.stdout, sys.stderr = (open(os.devnull, mode, encoding="utf-8") for mode in ("r", "w", "w"))
    torch.set_num_threads(1)

    def say(line: str) -> None:
        sink.write(line.encode() + b"\n")
        sink.flush()

    def answer(outcome: Outcome) -> None:
        say(json.dumps(vars(outcome)))

    say("ready")  # 外面等着这一行

    while len(head := source.read(8)) == 8:
        packed, target, dtype, seconds, wall, memory = pickle.loads(source.read(int.from_bytes(head, "little")))
        torch.set_default_dtype(dtype)
        case = packed, bugs.find(*target), seconds, wall, memory
        answer(_in_a_fork(*case) if can_fork() else _here(*case, answer))
    os._exit(0)  # 测试留下的线程不必等


def _in_a_fork(packed: bytes, function: Callable, seconds: float, wall: float, memory: int) -> Outcome:
    ours, theirs = Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            ours.close()
            _limit(seconds, wall, memory)
            outcome = _run(packed, function)
            if os.getsid(0) == os.getpid():  # 测试自己 fork 出来的不说话
                theirs.send(vars(outcome))
        finally:
            os._exit(0)
    theirs.close()
    try:
        return _watch(pid, ours, seconds, wall, memory)
    finally:
        ours.close()
        for kill, which in ((os.killpg, pid), (os.kill, pid)):  # 它留下的也一起停掉，另立会话的除外
            with suppress(ProcessLookupError, PermissionError):
                kill(which, signal.SIGKILL)
        with suppress(ChildProcessError):  # 已经收过了
            os.waitpid(pid, 0)


def _watch(pid: int, answers: Connection, seconds: float, wall: float, memory: int) -> Outcome:
    """等分身的回答，或它的死讯，或它超过限度。"""
    process, started = psutil.Process(pid), time.monotonic()
    base = process.memory_info().rss
    while True:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if answers.poll(0 if gone else 0.02):
            try:
                return Outcome(**answers.recv())
            except EOFError:  # 什么也没说就走了
                gone, status = (gone, status) if gone else os.waitpid(pid, 0)
        if gone and os.WIFSIGNALED(status):
            if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM):
                return Outcome("broken", excess(os.WTERMSIG(status) == signal.SIGXCPU, 1, 0, memory))
            if os.WTERMSIG(status) == signal.SIGKILL:
                return Outcome("broken", "测试的进程被系统停下了（信号 9），多半是机器的内存不够；看看哪个张量太大。")
            return Outcome("broken", f"测试让 Python 整个崩溃了（信号 {os.WTERMSIG(status)}）；多半是递归太深，或内存写坏了。")
        if gone:
            return Outcome("broken", QUIT)
        try:
            times, rss = process.cpu_times(), process.memory_info().rss
        except psutil.Error:  # 正在走
            continue
        if reason := excess(times.user + times.system - seconds, time.monotonic() - started - wall, rss - base - memory, memory):
            return Outcome("broken", reason)


def excess(cpu: float, clock: float, memory: float, limit: int) -> str:
    if cpu > 0:
        return "测试算个不停，到了时间，被停下了；看看有没有死循环。"
    if clock > 0:
        return "测试到了时间还没有跑完，被停下了；看看有没有死循环，或它在等什么。"
    return f"测试用的内存超过了 {limit / 2**30:.1f} GiB，被停下了；看看哪个张量太大。" if memory > 0 else ""


def _limit(seconds: float, wall: float, memory: int) -> None:
    """分身自己身上的保险：旁边看着的那个若不在了，它也不会一直跑下去。"""
    import faulthandler
    import resource

    faulthandler.disable()
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, int(time.process_time() + seconds) + 2),
        (resource.RLIMIT_AS, psutil.Process().memory_info().vms + memory),
    ):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS 不认 RLIMIT_AS，那里靠旁边看着
            pass
    signal.alarm(int(wall) + 2)


def _here(packed: bytes, function: Callable, seconds: float, wall: float, memory: int, answer: Callable[[Outcome], None]) -> Outcome:
    """没有 fork：就在这里跑，一根线程看着；超过限度，替它答一句，连自己一起停下。"""
    done, process, started = threading.Event(), psutil.Process(), time.monotonic()
    before, base = process.cpu_times(), process.memory_info().rss

    def guard() -> None:
        while not done.wait(0.05):
            times, rss = process.cpu_times(), process.memory_info().rss
            used = times.user + times.system - before.user - before.system
            if reason := excess(used - seconds, time.monotonic() - started - wall, rss - base - memory, memory):
                answer(Outcome("broken", reason))
                os._exit(1)

    threading.Thread(target=guard, daemon=True).start()
    try:
        return _run(packed, function)
    finally:
        done.set()


class _Peeked(BaseException):
    """测试伸手去拿题库。"""


class _Locked(types.ModuleType):
    """锁上的题库：导入得了，什么也拿不出来。"""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _Peeked


@contextmanager
def _locked() -> Iterator[None]:
    """测试运行时，题库是锁着的。"""
    import vaelab

    kept = {name: module for name, module in sys.modules.items() if f"{name}.".startswith("vaelab.bugs.")}
    sys.modules.update({name: _Locked(name) for name in kept})
    vaelab.bugs = sys.modules["vaelab.bugs"]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        sys.modules.update(kept)
        vaelab.bugs = kept["vaelab.bugs"]  # type: ignore[attr-defined]


def _run(packed: bytes, function: Callable) -> Outcome:
    """解开测试，运行一次。"""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    calls = 0

    def target(*args: object, **kwargs: object) -> object:  # 看不出是哪一个版本
        nonlocal calls
        calls += 1
        return function(*args, **kwargs)

    try:
        test = pickle.loads(packed)
        with _locked():
            result = test(target)
    except _Peeked:
        return Outcome("broken", PEEKED, calls)
    except MemoryError:
        return Outcome("broken", TOO_MUCH, calls)
    except RecursionError:
        return Outcome("broken", "测试的递归太深；看看它是不是一直在调用自己。", calls)
    except (SystemExit, KeyboardInterrupt) as error:
        return Outcome("broken", f"测试抛出了 {type(error).__name__}（exit() 之类）；通过就返回，报错就抛异常。", calls)
    except BaseException as error:
        try:
            text = " ".join((str(error).splitlines() or [""])[0].split())
        except BaseException:  # 读者自己的异常，连说出来都会出错
            text = ""
        if isinstance(error, RuntimeError) and "allocate memory" in text:
            return Outcome("broken", TOO_MUCH, calls)
        kind = "" if isinstance(error, AssertionError) else type(error).__name__
        return Outcome("alarm", "：".join(each for each in (kind, text[:60] + "…" * (len(text) > 60)) if each), calls)
    if result is ...:
        return Outcome("unwritten", "", calls)
    if result is not None:
        what = f"{result}" if isinstance(result, bool) else f"一个 {type(result).__name__}"
        return Outcome("broken", f"测试返回了 {what}，返回值不算数；不合约定就抛异常，例如 assert 条件，合就什么也不返回。", calls)
    return Outcome("quiet", "", calls)
