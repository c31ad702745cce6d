"""交错测速：几种做法各在自己的进程里轮流走，比值与起伏由此而来。"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator

import torch


def _worker(pipe, make: Callable[..., Iterator], arguments: tuple) -> None:
    steps = make(*arguments)
    while (count := pipe.recv()) is not None:
        wait_for_device()
        started, value = time.perf_counter(), None
        for _ in range(count):
            value = next(steps)
        wait_for_device()  # 排着的活算完才停表，也不留给别人的时间
        pipe.send((time.perf_counter() - started, value))


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Contest:
    """几种做法各在自己的进程里，轮流走。``jobs`` 是名字 → (做法, 参数…)，做法给出一个走一步交一次的迭代器。"""

    def __init__(self, jobs: dict[str, tuple]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for name, (make, *arguments) in jobs.items():
            self.pipes[name], theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, make, tuple(arguments)))
            process.start()
            theirs.close()  # 子进程若死，recv 立即报错而不是一直等
            self.processes.append(process)

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes.values(), self.processes):
            try:
                pipe.send(None)
            except OSError:
                pass
            process.join(10)
            process.terminate()

    def go(self, name: str, count: int = 1) -> tuple[float, object]:
        """让 ``name`` 走 ``count`` 步；返回用的秒数与最后一步交出的值。"""
        self.pipes[name].send(count)
        return self.pipes[name].recv()

    def race(self, rounds: int, steps: int, warmup: int) -> dict[str, list[float]]:
        """先各热身，再交错走 ``rounds`` 轮、每轮 ``steps`` 步；返回各方每轮的秒数。"""
        for name in self.pipes:
            self.go(name, warmup)
        seconds: dict[str, list[float]] = {name: [] for name in self.pipes}
        for _ in range(rounds):
            for name in self.pipes:
                seconds[name].append(self.go(name, steps)[0])
        return seconds


def ratio(usual: list[float], ours: list[float]) -> dict[str, float]:
    """逐轮之比（通常 ÷ 本项目）的中位数与两端。"""
    ratios = [a / b for a, b in zip(usual, ours)]
    return {"median": round(statistics.median(ratios), 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)}


def say(label: str, numbers: dict) -> None:
    print(f"{label}：{numbers['median']:.2f} 倍（最低 {numbers['low']:.2f}，最高 {numbers['high']:.2f}）", flush=True)
