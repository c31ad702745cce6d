"""写文件：写全了才就位；占住一个文件夹：同一时刻只有一个进程往里写；文件的名字怎样给人看。"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import psutil
from filelock import FileLock, Timeout

LOCK = ".lock"
_held: dict[Path, int] = {}  # 这个进程占着的文件夹 → 占它的线程


def _beside(path: Path) -> Path:
    """``path`` 写全之前用的名字：带着进程号，两个进程不会撞上，:func:`hold` 也认得出是谁留下的。"""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """``write(file)`` 写二进制文件：写在旁边、落盘、改名就位；中途死掉，原来的文件不受影响。"""
    temporary = _beside(path)
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
    temporary = _beside(target)
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


@contextmanager
def hold(folder: Path | None) -> Iterator[None]:
    """占住 ``folder``（没有就建），离开时放手；进程死了，系统替它放手。同一线程里可以套着用；None 什么也不做。

    Raises:
        BlockingIOError: 另一个训练正占着它。
        OSError: 建不了，或不能写。
    """
    if folder is None or _held.get(folder.resolve()) == threading.get_ident():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(f"{shown(folder)} 正被另一个训练占着；请用 --out 换一个文件夹，或等它结束。") from None
    except FileExistsError as error:
        raise NotADirectoryError(f"结果文件夹应是文件夹，{shown(folder)} 或它的上级是一个文件；请用 --out 换一个位置。") from error
    except OSError as error:
        raise OSError(
            f"结果文件夹 {shown(folder)} 不能写（{system_reason(error, advice=False)}）；请检查权限与磁盘空间，或用 --out 换一个位置。"
        ) from error
    _held[folder.resolve()] = threading.get_ident()
    for left in folder.glob("*.tmp"):  # 被杀的进程没写完的
        if (owner := left.name.split(".")[-2]).isdigit() and not psutil.pid_exists(int(owner)):
            left.unlink(missing_ok=True)
    try:
        yield
    finally:
        del _held[folder.resolve()]
        lock.release()


def shown(name: str | os.PathLike) -> str:
    """来自文件系统的名字，给人看的样子：换行、控制符、双向控制符、不合法的 UTF-8 都写成转义，不会弄乱屏幕。"""

    def escaped(character: str) -> str:
        if "\udc80" <= character <= "\udcff":  # Python 用它代表不合法的 UTF-8 里的一个字节
            return f"\\x{ord(character) - 0xDC00:02x}"
        return character.encode("unicode_escape").decode()

    # isprintable 把各种空白都算作不可见；全角空格（Zs）在中文文件名里常见，不必转义
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else escaped(c) for c in os.fspath(name))


def program() -> str:
    """读者怎样叫起命令行：安装之后是 ``vae-zh``，在课程的文件夹里是 ``python vanilla_vae.py``。"""
    in_course = (Path(__file__).parents[1] / "pyproject.toml").is_file()
    return "python vanilla_vae.py" if in_course and Path(sys.argv[0]).stem != "vae-zh" else "vae-zh"


def command(*words: object) -> str:
    """可以照抄进这里的终端的一条命令；路径（Path）里的空格、引号、开头的 ``-``、看不见的字符都照顾到。"""
    texts = [f".{os.sep}{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return f"{program()} {subprocess.list2cmdline(texts) if os.name == 'nt' else ' '.join(map(_quoted, texts))}"


def _quoted(text: str) -> str:
    if text.isprintable():
        return shlex.quote(text)
    # 换行、控制符、坏的 UTF-8：写成 bash 与 zsh 认得的 $'…'，屏幕不会乱，抄下来还是原来的名字
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in text) + "'"


def system_reason(error: OSError, advice: bool = True) -> str:
    """系统的错误说成中文：怎么了，``advice`` 则再加怎么办。系统自己的话是英文，随语言环境变。"""
    if error.errno is None:
        return str(error)
    reason = _SYSTEM.get(error.errno, f"系统错误 {errno.errorcode.get(error.errno, error.errno)}")
    return reason if advice else reason.partition("；")[0]


_SYSTEM = {
    errno.ENOENT: "不存在；请检查路径",
    errno.EACCES: "不许这个用户读写；请改权限，或换一个位置",
    errno.EPERM: "不许这样操作；请改权限，或换一个位置",
    errno.EEXIST: "已经存在；请换一个名字",
    errno.EISDIR: "是文件夹，这里要的是文件；请写明文件名",
    errno.ENOTDIR: "的上级不是文件夹；请检查路径",
    errno.ENOSPC: "写不下，磁盘满了；请腾出空间",
    errno.EDQUOT: "写不下，配额用完了；请腾出空间",
    errno.EROFS: "在只读的磁盘上；请换一个位置",
    errno.ENAMETOOLONG: "名字太长；请换一个短的",
    errno.ELOOP: "的符号链接绕成了圈；请检查路径",
    errno.EIO: "读写时磁盘出错；请检查磁盘",
    errno.EMFILE: "打不开，同时打开的文件太多；请用 ulimit -n 放宽",
    errno.EPIPE: "输出的另一头已经关了；请不要中途关掉它",
}
