"""说中文的 argparse：参数写错时的每一句话都由这里说，不取标准库的英文，所以不随 Python 的版本变。"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class UsageError(ValueError):
    """命令写得不对：没有这个子命令或选项，缺了值，或值不是所要的那一类。"""


@dataclass(frozen=True)
class Whole:
    """一个参数的类型：从 ``low`` 到 ``high`` 的整数。"""

    low: int = 0
    high: int = 10**9
    kind = "整数"

    def __call__(self, text: str) -> int:
        return int(text)


@dataclass(frozen=True)
class Real:
    """一个参数的类型：从 ``low`` 到 ``high`` 的有限的数。"""

    low: float = -math.inf
    high: float = math.inf
    kind = "数"

    def __call__(self, text: str) -> float:
        return float(text)


def path(text: str) -> str:
    """一个参数的类型：文件或文件夹的路径。"""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError("应为文件或文件夹的路径")
    return text


def quoted(value: object) -> str:
    """收到的值，给人看的写法：控制符、双向控制符、坏的 UTF-8 都转义，太长的截短。"""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:50]}…（共 {len(str(value))} 个字符）"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``；你是不是想写 …``；没有像的就是空的。"""
    known, bare = list(known), word.lower().strip("-").replace("_", "-")
    names = {name.strip("-"): name for name in known}
    close = [name for name in names if bare and name.startswith(bare)]
    close = close or difflib.get_close_matches(bare, names, n=1, cutoff=0.6)
    close = close or [name for name in names if bare.startswith(f"{name}-")]
    return f"；你是不是想写 {' 或 '.join(names[name] for name in close[:4])}" if close else ""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, "用法：" if prefix is None else prefix)  # 子命令的 prog 要的是没有前缀的一行


class Parser(argparse.ArgumentParser):
    """:class:`argparse.ArgumentParser`，但选项不可以缩写（缩写今天能用，添一个选项就有歧义），写错时报 :class:`UsageError`。

    Raises:
        UsageError: 命令写得不对。
        ValueError: 值是对的那一类，但出了 :class:`Whole`、:class:`Real` 的范围。
    """

    def __init__(self, *args, **kwargs):
        self.takes_value: dict[str, bool] = {}  # 选项 → 后面要不要值
        super().__init__(*args, add_help=False, allow_abbrev=False, formatter_class=_Formatter, **kwargs)
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", help="显示这份说明")

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        self.takes_value.update(dict.fromkeys(action.option_strings, action.nargs != 0))
        return action

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        words = list(args or ())
        for word in words:
            name, equals, value = word.partition("=")
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break  # 后面的都不是选项，或是子命令的
            if len(word) < 2 or word[0] != "-" or _is_number(word):
                continue
            if name not in self.takes_value:
                raise self._wrong(f"没有选项 {_shown(name)}{did_you_mean(name, self.takes_value)}")
            if value == "--":  # 3.12 之前的标准库会把它悄悄去掉
                raise self._wrong(f"{name} 后面的值不能是 --")
            if equals and not self.takes_value[name]:
                raise self._wrong(f"{name} 后面不应有值，收到 {quoted(value)}")
        options, extra = super().parse_known_args(words, namespace)
        if extra:
            raise self._wrong(f"多出来一个 {_shown(extra[0])}，不知道它是什么（路径里有空格就要加引号）")
        return options, extra

    def _match_argument(self, action, arg_strings_pattern):
        try:
            return super()._match_argument(action, arg_strings_pattern)
        except argparse.ArgumentError:
            name, count = _name(action), action.nargs if isinstance(action.nargs, int) else 1
            hint = "" if count > 1 or not action.option_strings else f"；值以 - 开头时，请写成 {name}=值"
            raise self._wrong(f"{name} 后面应有 {count} 个值，收到的不够{hint}") from None

    def _get_value(self, action, arg_string):
        if action.type is None:
            return arg_string
        name, kind = _name(action), action.type
        try:
            value = kind(arg_string)
        except argparse.ArgumentTypeError as error:
            raise self._wrong(f"{name} {error}，收到 {quoted(arg_string)}") from None
        except (TypeError, ValueError, OverflowError):
            raise self._wrong(f"{name} 应为{getattr(kind, 'kind', '整数')}，收到 {quoted(arg_string)}") from None
        if isinstance(kind, (Whole, Real)) and not kind.low <= value <= kind.high:  # NaN 也在此列
            raise ValueError(f"{name} 应为 {kind.low} 到 {kind.high} 的{kind.kind}，收到 {quoted(arg_string)}；请改用这个范围里的。")
        return value

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            known = [str(each) for each in action.choices]
            raise self._wrong(f"{_name(action)} 应为 {'、'.join(known)} 之一，收到 {quoted(value)}{did_you_mean(str(value), known)}")

    def _wrong(self, what: str) -> UsageError:
        return UsageError(f"{what}；加 --help 看 {self.prog} 的用法。")

    def error(self, message: str):
        raise self._wrong("命令行写得不对")  # 上面没有拦住的；标准库的话是英文，不转述


def _name(action: argparse.Action) -> str:
    if action.option_strings:
        return action.option_strings[-1]
    return action.metavar if isinstance(action.metavar, str) else action.dest


def _shown(word: str) -> str:
    """不必加引号的原样，其余的转义。"""
    return word if word.isprintable() and " " not in word and len(word) <= 60 else quoted(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
