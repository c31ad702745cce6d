"""一格一格长出来的类：01 章用它把 ``VanillaVAE`` 分在几十个单元里写，而每写一段，类都能运行。

``class`` 是一条完整的语句，不能从中间断开，所以这里换一个办法：:class:`Growing` 收下一个个函数，
把它们的语法树挂到类的语法树上，每收一个就把整个类重新编译一遍。拼类只在这一处；
拼出来的与 ``vanilla_vae.py`` 是否相同，由 01 章的末尾逐句、逐数地比。
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable


class Growing:
    """名为 ``name`` 的 ``nn.Module``，从一个方法也没有开始；每接一段，它就以新的样子出现在写那一段的地方。

    那里（笔记的全局名字）须有 ``nn``，即先 ``from torch import nn``。用法::

        vae = Growing("VanillaVAE")

        @vae
        def __init__(self, latent_dim):  # 类里有这样一个方法；再写一次就换掉旧的
            super().__init__()

        @vae.more
        def __init__(self):  # 那个方法接着写，前面的参数与局部变量都在
            self.latent_dim = latent_dim

    Attributes:
        methods: 方法名 → 语法树，正是编译成类的那一份。
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.methods: dict[str, ast.FunctionDef] = {}

    def __call__(self, function: Callable) -> Callable:
        """类里有 ``function`` 这样一个方法。"""
        method = _tree(function)
        self.methods[method.name] = method
        return self._compiled(function)

    def more(self, function: Callable) -> Callable:
        """与 ``function`` 同名的方法接着写；只取函数体，参数表以第一段为准。

        Raises:
            ValueError: 还没有这个方法。
        """
        method = _tree(function)
        if method.name not in self.methods:
            raise ValueError(f"{self.name} 里还没有 {method.name}，无从接着写；请先运行写着它第一段的单元。")
        self.methods[method.name].body += method.body
        return self._compiled(function)

    def _compiled(self, function: Callable) -> Callable:
        """把整个类编译到 ``function`` 所在的命名空间里；原样返回 ``function``，供装饰器用。"""
        module = ast.parse(f"class {self.name}(nn.Module): pass")
        module.body[0].body = list(self.methods.values())
        code = compile(module, f"<{self.name}>", "exec", dont_inherit=True)  # 不带上本文件的 annotations
        exec(code, inspect.unwrap(function).__globals__)
        return function


def _tree(function: Callable) -> ast.FunctionDef:
    """一个函数的语法树；去掉最外面的装饰器（Growing 自己），别的留着。"""
    (method,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    method.decorator_list.pop(0)
    return method
