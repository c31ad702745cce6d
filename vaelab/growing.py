"""一格一格长出来的类：01 章用它把 ``VanillaVAE`` 分在几十个单元里写，而每写一段，类都能运行。

把类剪成几段分头运行，各段就不在同一个作用域里：后面的段看不见 ``__init__`` 的局部变量，方法成了全局函数。
所以这里换一个办法：:class:`Growing` 收下一个个函数，把它们的语法树挂到类的语法树上，每收一个就把整个类重新编译一遍。
写到哪里，:meth:`Growing.follows` 就与成品对到哪里；01 章的末尾再不用这个文件，逐句、逐数地比一遍。
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

    def follows(self, reference: type) -> list[bool]:
        """写到这里的每个方法，是否与 ``reference`` 里同名的方法从头起逐句相同：参数、装饰器、语句；注释与文档字符串不算。"""
        theirs = {node.name: node for node in ast.parse(textwrap.dedent(inspect.getsource(reference))).body[0].body if hasattr(node, "args")}
        return [name in theirs and _begins_with(theirs[name], method) for name, method in self.methods.items()]

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


def _begins_with(whole: ast.FunctionDef, part: ast.FunctionDef) -> bool:
    """``whole`` 是否以 ``part`` 开头：语句可以更多，其余处处相同。"""
    body = _statements(part)
    same_head = [ast.dump(head) for head in (whole.args, *whole.decorator_list)] == [ast.dump(head) for head in (part.args, *part.decorator_list)]
    return same_head and _statements(whole)[: len(body)] == body


def _statements(method: ast.FunctionDef) -> list[str]:
    """函数体的每一句，文档字符串除外。"""
    return [ast.dump(each) for each in method.body[ast.get_docstring(method) is not None :]]
