"""写文件：写全了才就位；文件的名字怎样给人看。"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable
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


def shown(name: str | os.PathLike) -> str:
    """来自文件系统的名字，给人看的样子：换行、控制符、双向控制符、不合法的 UTF-8 都写成转义，不会弄乱屏幕。"""

    def escaped(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # Python 用它代表不合法的 UTF-8 里的一个字节
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()

    # isprintable 把各种空白都算作不可见；全角空格（Zs）在中文文件名里常见，不必转义
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in os.fspath(name))
