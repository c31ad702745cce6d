"""整个一步录成一张 CUDA 图：GPU 不再等 Python 一个一个地启动核函数（11 章第 10 节）。"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from tqdm.auto import tqdm

from vaelab.memory import out_of_memory

WARMUP = 3  # 先照常走这么多步：编译、选算法、分配优化器的状态，都在录之前


class CapturedStep:
    """一步训练，录一次，之后只重放。

    图里记的是一串核函数与它们读写的地址，重放时不经过 Python。所以每步要变的都放在固定的张量里，重放之前改它们的值：
    这一批、学习率；噪声的种子在登记过的发生器里。热身的几步是真的训练，照常走；录的时候什么也没有算，录完接着重放，一步不多一步不少。

    Args:
        step: ``(batch, lr) → 记录``，只用设备上的张量，每次做同样的事；``lr`` 是零维张量。
        graph: 录与重放的工具，见 :class:`CudaGraph`。
        device: 固定的张量放在哪里。
    """

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor], graph: CudaGraph, device: torch.device) -> None:
        self.step, self.graph, self.device = step, graph, device
        self.lr = torch.zeros((), dtype=torch.float32, device=device)
        self.batch: Tensor | None = None
        self.record: Tensor | None = None  # 录好之后，每次重放都写在这里
        self.calls, self.refusal = 0, ""

    def __call__(self, batch: Tensor, lr: float) -> Tensor:
        """走一步，返回这一步的记录（一份拷贝）；``batch`` 每次须同样大小。"""
        if self.batch is None:
            self.batch = torch.empty_like(batch, device=self.device)
        self.batch.copy_(batch, non_blocking=True)
        self.lr.fill_(lr)
        self.calls += 1
        if self.refusal:
            return self._step()
        if self.calls <= WARMUP:
            record = self.graph.warm_up(self._step, watch=self.calls == WARMUP)
            self._give_up(self.graph.waits)
            return record
        if self.record is None:
            try:
                self.record = self.graph.capture(self._step)
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self.graph.recover()
                self._give_up(str(error).splitlines()[0][:120])
                return self._step()
        self.graph.replay()
        return self.record.clone()  # 下一次重放就要覆盖它

    def _step(self) -> Tensor:
        return self.step(self.batch, self.lr)

    def _give_up(self, why: str) -> None:
        if why:
            self.refusal = f"这一步录不成 CUDA 图（{why}），以下照常逐个启动核函数：数不变，慢一些。"
            tqdm.write(self.refusal)


class CudaGraph:
    """录与重放；噪声来自 ``random``，每次重放之前重设它的种子，重放时用的就是新的种子。"""

    def __init__(self, device: torch.device, random: torch.Generator) -> None:
        self.device, self.random, self.waits = device, random, ""
        self.stream, self.graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        self.graph.register_generator_state(random)

    def warm_up(self, work: Callable[[], Tensor], watch: bool) -> Tensor:
        """在录图要用的那条流上走一遍；``watch`` 则记下哪里停下来等 GPU：等，就录不成。"""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        before = torch.cuda.get_sync_debug_mode()
        with torch.cuda.stream(self.stream), warnings.catch_warnings(record=watch) as seen:
            if watch:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
            try:
                result = work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        current.wait_stream(self.stream)
        for warning in seen or ():
            if "synchronizing CUDA operation" in str(warning.message):
                self.waits = f"{Path(warning.filename).name} 第 {warning.lineno} 行要等 GPU 算完，多半是 .item() 或拿张量作 if 的条件"
        return result

    def capture(self, work: Callable[[], Tensor]) -> Tensor:
        """录下 ``work``：核函数只记不算。"""
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):  # 取下一批的线程照常分配锁页内存
            return work()

    def replay(self) -> None:
        """把录下的再算一遍。"""
        self.graph.replay()

    def recover(self) -> None:
        """录到一半失败，发生器还以为自己在录：换上新的状态，之后才能照常抽数。"""
        with suppress(RuntimeError, AttributeError):
            default = torch.cuda.default_generators[self.device.index or 0]
            for generator in (self.random, default):
                seed = generator.initial_seed()
                generator.graphsafe_set_state(torch.Generator(self.device).manual_seed(seed).graphsafe_get_state())


def has_hooks(model: nn.Module) -> bool:
    """有没有挂着钩子：钩子是 Python，重放时不会再叫它。"""
    everywhere = [value for name, value in vars(global_hooks).items() if name.startswith("_global_") and name.endswith("_hooks")]
    own = [value for each in model.modules() for name, value in vars(each).items() if name.endswith("_hooks") and "state_dict" not in name]
    own += [each._backward_hooks for each in model.parameters()] + [each._post_accumulate_grad_hooks for each in model.parameters()]
    return any(bool(value) for value in everywhere + own if isinstance(value, dict))
