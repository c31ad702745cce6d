"""vanilla_vae.py 与课程笔记共用的类型别名。

这里的 ``Tensor`` 就是 ``torch.Tensor`` 本身。流传的写法 ``Tensor = TypeVar('torch.tensor')``
会经 ``import *`` 盖住真正的类型，标注从此什么也不表示。
"""

from collections.abc import Sequence

from torch import Generator, Tensor

__all__ = ["Generator", "LossDict", "Sequence", "Tensor"]

LossDict = dict[str, Tensor]
"""损失的各项，每项是零维张量：``loss``、``Reconstruction_Loss``、``KLD``。"""
