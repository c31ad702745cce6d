"""每一步的记录：``steps.csv``，与装了才写的 TensorBoard。"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vaelab.files import write_atomically

STEPS = "steps.csv"
COLUMNS = ("step", "loss", "mse", "kld", "lr")
TENSORBOARD = "tensorboard"  # 运行文件夹里的子文件夹
TENSORBOARD_EVERY = 10  # 只要 TensorBoard、没有说隔几步时


class StepLog:
    """隔 ``every`` 步记一行；续训时接着写，检查点之后的行先截掉，于是被杀多少次都没有重复与缺口。

    Args:
        path: 运行文件夹；None 则什么也不写。
        every: 每多少步在 ``steps.csv`` 里记一行，0 为不记。
        tensorboard: 是否另写 TensorBoard 的日志。

    Raises:
        TypeError, ValueError: ``every`` 不是非负整数，或没有装 tensorboard。
    """

    def __init__(self, path: Path | None, every: int = 0, tensorboard: bool = False) -> None:
        self.every, self.path = whole_number("log_every", every), path
        self.writer: Any = None
        self.tensorboard, self.begun = tensorboard, False
        if tensorboard:  # 几个进程时都查，一起拒绝
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("要写 TensorBoard 的日志，这里却没有装 tensorboard；请 pip install tensorboard，或去掉 --tensorboard。") from error
            self._new_writer = SummaryWriter

    def begin(self, step: int) -> None:
        """从第 ``step`` 步接着写；此后的行是被杀之前留下的，会再走一遍，先截掉。只有第一次调用起作用。"""
        if self.path is None or self.begun:
            return
        self.begun, file = True, self.path / STEPS
        if self.every or file.exists():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[1:] if step and file.exists() else []
            kept = [
                line for line in lines if line.count(",") == len(COLUMNS) - 1 and line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step
            ]
            write_atomically(file, lambda out: out.write("".join(f"{line}\n" for line in (",".join(COLUMNS), *kept)).encode()))
        if self.tensorboard:
            self.writer = self._new_writer(str(self.path / TENSORBOARD), purge_step=step + 1 if step else None)

    def step(self, step: int, loss: float, mse: float, kld: float, lr: float) -> None:
        """记下第 ``step`` 步（从 1 数）的损失、MSE、KL 与学习率，若轮到它。"""
        if self.path is None:
            return
        values = dict(zip(COLUMNS[1:], (loss, mse, kld, lr)))
        if self.every and step % self.every == 0:
            with open(self.path / STEPS, "a", encoding="utf-8", newline="\n") as file:  # 每次写全一行就关上，别的程序随时可读
                file.write(",".join([str(step), *(f"{value:.7g}" for value in values.values())]) + "\n")
        if self.writer and step % (self.every or TENSORBOARD_EVERY) == 0:
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, step)

    def epoch(self, row: dict) -> None:
        """一轮的测试结果也进 TensorBoard。"""
        if self.writer:
            for name in ("mse", "kld", "elbo", "bits_per_dim"):
                self.writer.add_scalar(f"test/{name}", row[f"test_{name}"], row["step"])

    def flush(self) -> None:
        """落盘。检查点就位之前调用：它记到第几步，这里至少也有那么多。"""
        if self.path is not None and self.every:
            with open(self.path / STEPS, "ab") as file:
                os.fsync(file.fileno())
        if self.writer:
            self.writer.flush()


def whole_number(name: str, value: object) -> int:
    """``value`` 是非负整数就原样返回。"""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} 应为非负整数，收到 {value!r}；请传入如 100 这样的整数，0 是不用它。")
    if value < 0:
        raise ValueError(f"{name} 应为非负整数，收到 {value}；请改为 0（不用它）或更大的整数。")
    return value
