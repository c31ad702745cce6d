"""写文件：写全了才就位。"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """``write(file)`` 写二进制文件：写在旁边、落盘、改名就位；中途死掉，原来的文件不受影响。"""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_atomically(source: Path, target: Path) -> None:
    """``target`` 成为 ``source`` 的一份：能硬链接就不占地方，文件系统做不到就复制；在旁边做好，改名就位。

    ``source`` 此后只可以被换掉（:func:`write_atomically`），不可以就地改写。
    """
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        linked = False
        with suppress(OSError, NotImplementedError):  # exFAT、有的网络盘没有硬链接
            os.link(source, temporary)
            linked = True
        if not linked:
            shutil.copyfile(source, temporary)
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # 两个名字已是同一个文件时，改名什么也不做
