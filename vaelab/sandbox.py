"""在另一个进程里运行读者写的测试：死循环、``exit()``、耗尽内存都只是一句话，内核照常活着。

:func:`trial` 把测试送进一个干净的 Python：那里没有用过 GPU、没有别的线程，可以放心 fork，每一次运行用一个新的分身，
改掉的全局状态、猴补的 torch、没停的线程都随它消失。没有 fork 的系统（Windows）就在那个 Python 里直接运行，
出了事整个换一个；内存的限制只靠旁边看着。防的是失手，不是恶意：测试仍能读写文件。
"""

from __future__ import annotations

import atexit
import builtins
import dis
import importlib
import io
import json
import marshal
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe

import psutil
import torch

SECONDS = 5.0  # 一次运行的处理器时间；别的程序再忙也不冤枉它
WALL = 30.0  # 一次运行的钟表时间：睡着的、等着的
MEMORY = 1 << 30  # 一次运行可以多用的内存，字节
CALM = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": ""}


@dataclass(frozen=True)
class Outcome:
    """一次运行的结果。

    ``status``：``quiet`` 返回了，没有抱怨；``alarm`` 抛了异常；``unwritten`` 返回 ``...``；``broken`` 没能好好跑完。
    ``message`` 是给人看的一句话；``calls`` 是被测的函数被调用了几次。
    """

    status: str
    message: str = ""
    calls: int = 0


QUIT = "测试结束了整个进程（os._exit 之类）；通过就返回，报错就抛异常。"


def can_fork() -> bool:
    """这里能不能 fork；``VAELAB_NO_FORK`` 让测试走没有 fork 的那条路。"""
    return hasattr(os, "fork") and not os.environ.get("VAELAB_NO_FORK")


class NotPortable(Exception):
    """测试用到的东西送不进另一个进程；信息说明是什么、怎么办。"""


# ---------------------------------------------------------------- 把笔记里的函数送过去


class _Packer(pickle.Pickler):
    """笔记里定义的函数没有模块可以导入：连代码带它用到的名字一起送。"""

    def reducer_override(self, value: object) -> object:
        if isinstance(value, types.ModuleType):
            return importlib.import_module, (value.__name__,)
        if isinstance(value, types.FunctionType) and not _importable(value):
            space = value.__globals__
            used = {name: space[name] for name in sorted(_names(value.__code__)) if name in space and not _from_ipython(space[name])}
            cells = [each.cell_contents for each in value.__closure__ or ()]
            made = marshal.dumps(value.__code__), value.__name__, len(cells)
            state = used, cells, value.__defaults__, value.__kwdefaults__
            return _empty_function, made, state, None, None, _fill_function
        if isinstance(value, type) and value.__module__ == "__main__":
            raise NotPortable(f"你的测试用到了笔记里定义的类 {value.__name__}，它送不进沙盒；请把它写进测试函数里面。")
        return NotImplemented


def _importable(function: types.FunctionType) -> bool:
    found: object = None if function.__module__ == "__main__" else sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _from_ipython(value: object) -> bool:
    """IPython 放进笔记里的：它的 exit、display。那边用 Python 自己的。"""
    return (getattr(value, "__module__", None) or type(value).__module__).split(".")[0] in ("IPython", "ipykernel")


def _names(code: types.CodeType) -> set[str]:
    """代码里用到的全局的名字，里层的函数也算。"""
    found = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return found.union(*(_names(each) for each in code.co_consts if isinstance(each, types.CodeType)))


def _empty_function(code: bytes, name: str, cells: int) -> types.FunctionType:
    space = {"__builtins__": builtins, "__name__": "__main__"}
    return types.FunctionType(marshal.loads(code), space, name, None, tuple(types.CellType() for _ in range(cells)))


def _fill_function(function: types.FunctionType, state: tuple) -> None:
    used, cells, function.__defaults__, function.__kwdefaults__ = state
    function.__globals__.update(used)
    for cell, value in zip(function.__closure__ or (), cells):
        cell.cell_contents = value


def pack(value: object) -> bytes:
    """``value`` → 字节；函数连同它用到的名字。

    Raises:
        NotPortable: 里面有送不过去的东西。
    """
    buffer = io.BytesIO()
    try:
        _Packer(buffer).dump(value)
    except NotPortable:
        raise
    except Exception as error:  # 打开的文件、锁、生成器……各有各的异常
        what = " ".join(str(error).split())[:80]
        raise NotPortable(f"你的测试用到的东西送不进沙盒（{what}）；请在测试函数里面造它。") from error
    return buffer.getvalue()


# ---------------------------------------------------------------- 这一边


class _Server:
    """那个干净的 Python；第一次用到时起，内核结束时随之结束。"""

    def __init__(self) -> None:
        self.owner = os.getpid()
        program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vaelab.sandbox import _serve; _serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(sys.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **CALM},
        )  # fmt: skip

    def ask(self, request: bytes) -> Outcome | None:
        """问一次；那边已经不在了，或没答完就走了，是 None。"""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(len(request).to_bytes(8, "little") + request)
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except OSError:
            reply = b""
        return Outcome(**json.loads(reply)) if reply.endswith(b"\n") else None

    def close(self) -> None:
        if self.owner == os.getpid():  # fork 出来的分身不碰别人的
            self.process.kill()
            self.process.communicate()


_SERVER: list[_Server] = []


def _server() -> _Server:
    if not _SERVER or _SERVER[0].owner != os.getpid() or _SERVER[0].process.poll() is not None:
        _SERVER[:] = [_Server()]
        atexit.register(_SERVER[0].close)
    return _SERVER[0]


def trial(
    test: Callable, targets: Sequence[tuple[str, str, int]], *, seconds: float = SECONDS, wall: float = WALL, memory: int = MEMORY
) -> list[Outcome]:
    """拿 ``test`` 去试每一个被测的函数，一个一个来；返回各次的结果。

    Args:
        test: ``def test_xxx(function)``，抛异常就是报错，返回就是通过。
        targets: 被测的函数在哪里，每个是 ``vaelab.bugs.find`` 的三个参数（题目、``right`` 或 ``wrong``、第几个）。
        seconds, wall, memory: 一次运行至多用多少处理器时间（秒）、钟表时间（秒）、内存（字节）。
    """
    try:
        packed = pack(test)
    except NotPortable as error:
        return [Outcome("broken", str(error))] * len(targets)
    outcomes: list[Outcome] = []
    for target in targets:
        request = pickle.dumps((packed, target, torch.get_default_dtype(), seconds, wall, memory))
        server = _server()
        try:
            outcome = server.ask(request)
        except BaseException:  # 读者按了停止：半截的对话接不上，整个换掉
            server.close()
            raise
        if outcome is None or (outcome.status == "broken" and not can_fork()):
            server.close()  # 它已经走了，或带着测试改坏的东西
        outcome = outcome or Outcome("broken", QUIT)
        outcomes.append(outcome)
    return outcomes


# ---------------------------------------------------------------- 那一边


def _serve() -> None:
    """收一次，跑一次，答一次，直到没有人问。"""
    from vaelab import bugs

    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for each in (0, 1, 2):  # 测试打印的、读取的，都碰不到这两根管道
        os.dup2(nowhere, each)
    sys.stdin, sys.stdout, sys.stderr = (open(os.devnull, mode, encoding="utf-8") for mode in ("r", "w", "w"))
    torch.set_num_threads(1)

    def answer(outcome: Outcome) -> None:
        sink.write(json.dumps(vars(outcome)).encode() + b"\n")
        sink.flush()

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
        for kill, which in ((os.killpg, pid), (os.kill, pid)):  # 它留下的也一起停掉
            try:
                kill(which, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # 已经收过了
            pass


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
                return Outcome("broken", _excess(os.WTERMSIG(status) == signal.SIGXCPU, 1, 0, memory))
            return Outcome("broken", f"测试让 Python 整个崩溃了（信号 {os.WTERMSIG(status)}）；多半是递归太深，或内存写坏了。")
        if gone:
            return Outcome("broken", QUIT)
        try:
            times, rss = process.cpu_times(), process.memory_info().rss
        except psutil.Error:  # 正在走
            continue
        if reason := _excess(times.user + times.system - seconds, time.monotonic() - started - wall, rss - base - memory, memory):
            return Outcome("broken", reason)


def _excess(cpu: float, clock: float, memory: float, limit: int) -> str:
    if cpu > 0:
        return "测试算个不停，到了时间，被停下了；看看有没有死循环。"
    if clock > 0:
        return "测试一直在等，到了时间，被停下了；看看它在等什么。"
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
            if reason := _excess(used - seconds, time.monotonic() - started - wall, rss - base - memory, memory):
                answer(Outcome("broken", reason))
                os._exit(1)

    threading.Thread(target=guard, daemon=True).start()
    try:
        return _run(packed, function)
    finally:
        done.set()


def _run(packed: bytes, function: Callable) -> Outcome:
    """解开测试，运行一次。"""
    torch.manual_seed(0)
    calls = 0

    def target(*args: object, **kwargs: object) -> object:  # 看不出是哪一个版本
        nonlocal calls
        calls += 1
        return function(*args, **kwargs)

    try:
        result = pickle.loads(packed)(target)
    except MemoryError:
        return Outcome("broken", "测试要的内存太多，系统没有给；看看哪个张量太大。", calls)
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
            return Outcome("broken", "测试要的内存太多，系统没有给；看看哪个张量太大。", calls)
        kind = "" if isinstance(error, AssertionError) else type(error).__name__
        return Outcome("alarm", "：".join(each for each in (kind, text[:60] + "…" * (len(text) > 60)) if each), calls)
    return Outcome("unwritten" if result is ... else "quiet", "", calls)
