"""在另一个进程里运行读者写的测试：死循环、``exit()``、耗尽内存都只是一句话，内核照常活着。

:func:`trial` 把测试送进一个干净的 Python：那里没有用过 GPU、没有别的线程，可以放心 fork，每一次运行用一个新的分身（``vaelab/inside.py``）。
没有 fork 的系统（Windows）就在那个 Python 里直接运行，出了事整个换一个；内存的限制只靠旁边看着。防的是失手，不是恶意：测试仍能读写文件。
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from vaelab.inside import QUIT, Outcome, can_fork, excess
from vaelab.packing import NotPortable, pack

SECONDS = 5.0  # 一次运行的处理器时间；别的程序再忙也不冤枉它
WALL = 30.0  # 一次运行的钟表时间：睡着的、等着的
MEMORY = 1 << 30  # 一次运行可以多用的内存，字节
CALM = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONFAULTHANDLER": ""}


class _Server:
    """那个干净的 Python；第一次用到时起，内核结束时随之结束。"""

    def __init__(self) -> None:
        self.owner = os.getpid()
        program = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from vaelab.inside import serve; serve()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps([str(each) for each in sys.path])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **CALM},
        )  # fmt: skip
        assert self.process.stdout
        if self.process.stdout.readline() != b"ready\n":
            self.close()
            raise RuntimeError("沙盒没有起来；在终端里运行 python -c 'import vaelab.grading'，看看原因。")

    def ask(self, request: bytes, patience: float) -> Outcome | None:
        """问一次；那边已经不在了，或没答完就走了，是 None；``patience`` 秒还没有回音，停掉它，也答一句。"""
        assert self.process.stdin and self.process.stdout
        late = threading.Timer(patience, self.process.kill)
        late.daemon = True
        late.start()
        started = time.monotonic()
        try:
            self.process.stdin.write(len(request).to_bytes(8, "little") + request)
            self.process.stdin.flush()
            reply = self.process.stdout.readline()
        except OSError:
            reply = b""
        finally:
            late.cancel()
        if reply.endswith(b"\n"):
            return Outcome(**json.loads(reply))
        return Outcome("broken", excess(0, 1, 0, 0)) if time.monotonic() - started >= patience else None

    def close(self) -> None:
        if self.owner == os.getpid():  # fork 出来的分身不碰别人的
            self.process.kill()
            self.process.wait()
            for each in (self.process.stdin, self.process.stdout):  # 不 communicate()：另立会话的子进程还握着管道，会一直等它
                assert each
                with suppress(OSError):
                    each.close()


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
            outcome = server.ask(request, wall + 10)
        except BaseException:  # 读者按了停止：半截的对话接不上，整个换掉
            server.close()
            raise
        if outcome is None or (outcome.status == "broken" and (not can_fork() or server.process.poll() is not None)):
            server.close()  # 它已经走了，或带着测试改坏的东西
        outcome = outcome or Outcome("broken", QUIT)
        outcomes.append(outcome)
    return outcomes
