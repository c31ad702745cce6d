"""造出另一种机器：让这里的测试看见别处才有的舍入、初值与 GPU。

:func:`install` 把当前进程变成那种机器；:func:`kernel_environment` 给出环境变量，让笔记的内核一启动就变成那样。
"""

from __future__ import annotations

import types
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# ---------------------------------------------------------------- 函数的值错在末位

# IEEE 754 或定义本身规定了每一位的算子；其余的（sqrt、exp、求和、卷积……）在别的机器上可以是相邻的数。
# add、sub 的 alpha 不是 ±1 时，有的指令集用乘加，另算。
PINNED = {
    "abs", "add", "alias", "amax", "amin", "arange", "argmax", "argmin", "argsort", "as_strided", "bitwise_and", "broadcast_tensors",
    "cat", "ceil", "chunk", "clamp", "clamp_max", "clamp_min", "clone", "complex", "constant_pad_nd", "copy", "cummax", "detach",
    "diag", "diag_embed", "diagonal", "div", "empty", "empty_like", "empty_strided", "expand", "eye", "fill", "flip", "floor", "fmod",
    "frexp", "full", "full_like", "gather", "im2col", "index", "index_fill", "index_put", "index_select", "isfinite", "isinf", "isnan",
    "kthvalue", "ldexp", "leaky_relu", "leaky_relu_backward", "lift_fresh", "masked_fill", "masked_select", "max", "maximum",
    "median", "min", "minimum", "mul", "narrow", "neg", "new_empty", "new_full", "new_ones", "new_zeros", "nextafter", "nonzero",
    "ones", "ones_like", "permute", "pin_memory", "rand", "rand_like", "randint", "random", "randperm", "reciprocal", "relu",
    "remainder", "repeat", "reshape", "resize", "roll", "round", "rsub", "scalar_tensor", "scatter", "select", "select_backward",
    "set", "sgn", "sign", "slice", "slice_backward", "sort", "split", "split_with_sizes", "squeeze", "stack", "sub", "t", "threshold",
    "threshold_backward", "to", "to_copy", "reshape_alias", "topk", "transpose", "tril", "tril_indices", "triu", "trunc", "unbind",
    "unfold", "unfold_backward",
    "uniform", "unique", "unsqueeze", "unsafe_view", "view", "view_as_complex", "view_as_real", "where", "zero", "zeros", "zeros_like",
}  # fmt: skip
STRIDE = 5  # 每五个数里错一个，与量到的 AMD 上 float32 的 sqrt 相同


class OneUlp(TorchDispatchMode):
    """没有规定每一位的算子，每五个结果里有一个换成相邻的浮点数。

    错在哪些位置，只取决于算子与张量的大小，所以同样的程序跑两遍仍相同。精确的结果（尾数末尾是一串 0，
    例如整数的和、完全平方数的根）不动：它们与求和的次序、与实现都无关。
    """

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        name = op.overloadpacket.__name__
        base = name.strip("_")
        fused = base in ("add", "sub") and abs(kwargs.get("alpha", args[2] if len(args) > 2 else 1)) != 1
        if op.is_view or (
            not fused and (name in PINNED or base in PINNED or base.removeprefix("foreach_") in PINNED or base.startswith("local_scalar"))
        ):
            return out
        if name.startswith("_fused"):  # 融合的优化器声明梯度也会改写（混合精度要还原它），平时并不改
            args = args[:1]
        written = [arg for arg, spec in zip(args, op._schema.arguments) if spec.alias_info and spec.alias_info.is_write]
        for result in {id(each): each for each in tree_leaves((out, written)) if isinstance(each, Tensor)}.values():
            nudge(result, zlib.crc32(f"{name} {tuple(result.shape)}".encode()))
        return out


def nudge(values: Tensor, where: int) -> None:
    """就地把 ``values`` 的五分之一换成相邻的 float32 或 float64；从第 ``where`` 个开始，一半往上、一半往下。"""
    if values.dtype not in (torch.float32, torch.float64) or not values.numel() or values.layout != torch.strided:
        return
    if not values.is_contiguous() and not values.is_contiguous(memory_format=torch.channels_last):
        return  # 只在内存里连着的张量上做，够多了
    with torch.no_grad():
        flat = values.detach().as_strided((values.numel(),), (1,), values.storage_offset())
        picked = flat[where % min(STRIDE, len(flat)) :: STRIDE]
        bits, zeros = (torch.int32, 0x3FF) if values.dtype == torch.float32 else (torch.int64, 0x3FFFFFF)
        inexact = picked.view(bits) & zeros != 0 if picked.is_contiguous() else picked.contiguous().view(bits) & zeros != 0
        target = torch.tensor(float("inf") if where // STRIDE % 2 else float("-inf"), dtype=values.dtype)
        picked.copy_(torch.where(inexact & picked.isfinite(), torch.nextafter(picked, target), picked))


def one_ulp() -> None:
    OneUlp().__enter__()


# ---------------------------------------------------------------- 初始的权重错在末位


def noisy_weights() -> None:
    """每一层的初始权重，五个里有一个换成相邻的数。"""
    for kind in (nn.Linear, nn.modules.conv._ConvNd):
        usual = kind.reset_parameters

        def reset(self: nn.Module, usual: Callable = usual) -> None:
            usual(self)
            for index, parameter in enumerate(self.parameters(recurse=False)):
                nudge(parameter, index)

        kind.reset_parameters = reset


def without_onednn() -> None:
    torch.backends.mkldnn.set_flags(False)


# ---------------------------------------------------------------- 假装有一块 GPU


class _OnCpu(torch.overrides.TorchFunctionMode):
    """凡是写着 cuda 的设备都换成 cpu：走的是 GPU 的那条路，算的是 CPU。"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "pin_memory":
            return args[0]
        if name == "is_pinned":
            return False
        if function is torch.device:  # 名字照旧，只有张量留在 CPU 上
            return function(*args, **(kwargs or {}))
        return function(*map(on_cpu, args), **{key: on_cpu(value) for key, value in (kwargs or {}).items()})


def on_cpu(value: object) -> object:
    if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")):
        return "cpu"
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value


class _Done:
    """事件或流：该做的都已经做完，没有什么要等。"""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def record(self, *_: object) -> None:
        pass

    wait = wait_stream = synchronize = record


class RecordingGraph(TorchDispatchMode):
    """录下来再照放：录的时候好像什么也没有算，照放时用录的那一刻的张量与数，结果写回原来的张量。"""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.generators: list = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __enter__(self):
        self.drawn = [each.get_state() for each in self.generators]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for generator, state in zip(self.generators, self.drawn):
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in self.before.values():
                tensor.copy_(value)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default:  # 要等它算完才有的数
            raise RuntimeError("operation not permitted when stream is capturing")
        for argument, value in zip(op._schema.arguments, args):
            running = argument.name.startswith("running_")  # native_batch_norm 改写它们，签名里却没有说
            if running or (argument.alias_info is not None and argument.alias_info.is_write):
                for each in tree_leaves(value):
                    if isinstance(each, Tensor):
                        self.before.setdefault(id(each), (each, each.detach().clone()))
        out = op(*args, **(kwargs or {}))
        self.tape.append((op, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for op, args, kwargs, out in self.tape:
            given = {id(each) for each in tree_leaves((args, kwargs))}
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, Tensor) and not op.is_view and id(old) not in given:
                    old.copy_(new)


def fake_gpu(name: str = "Tesla T4", capability: tuple[int, int] = (7, 5)) -> None:
    """假装有一块 GPU，缺省是 T4：Colab 上最常见，没有 bf16。

    ``torch.cuda`` 说它在，张量却都留在 CPU 上；所以能查走的是哪条路、要的是不是它做得到的，查不了它算得对不对。
    """
    cuda = torch.cuda
    native = capability >= (8, 0)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": name, "get_device_capability": capability,
        "mem_get_info": (15 * 10**9, 16 * 10**9), "memory_allocated": 0, "max_memory_allocated": 0, "set_device": None,
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "manual_seed": None, "manual_seed_all": None,
        "is_current_stream_capturing": False, "memory_reserved": 0, "get_sync_debug_mode": 0, "set_sync_debug_mode": None,
    }  # fmt: skip
    for each, answer in answers.items():
        setattr(cuda, each, lambda *_, answer=answer, **__: answer)
    cuda.is_bf16_supported = lambda including_emulation=True: native or including_emulation
    cuda.get_device_properties = lambda *_: types.SimpleNamespace(name=name, major=capability[0], minor=capability[1], total_memory=16 * 10**9)
    cuda.current_stream = cuda.default_stream = _Done
    cuda.Stream = cuda.Event = _Done
    cuda.stream = lambda *_: nullcontext()
    cuda.CUDAGraph, cuda.graph = RecordingGraph, lambda graph, **_: graph
    for check in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        if hasattr(torch.optim.Optimizer, check):  # 各版本名字不同；它要问真的驱动
            setattr(torch.optim.Optimizer, check, lambda self: None)
    generator, autocast, scaler = torch.Generator, torch.autocast, torch.amp.GradScaler

    class Generator(generator):
        def __new__(cls, device: object = "cpu") -> torch.Generator:
            return generator.__new__(generator, on_cpu(device))  # 不是本类的实例，所以 __init__ 不会再来一遍

    class Autocast(autocast):
        """没有的精度照样报错，别的在 CPU 上照做。"""

        def __init__(self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **rest: object) -> None:
            if device_type == "cuda" and dtype == torch.bfloat16 and enabled and not native:
                raise RuntimeError(f"假的 {name} 没有 bf16")
            super().__init__(str(on_cpu(device_type)), dtype, enabled, **rest)

    torch.Generator, torch.autocast, torch.amp.autocast = Generator, Autocast, Autocast
    torch.amp.GradScaler = lambda device="cuda", **rest: scaler(on_cpu(device), **rest)
    _OnCpu().__enter__()


KINDS: dict[str, Callable[[], None]] = {
    "one-ulp": one_ulp,
    "noisy-weights": noisy_weights,
    "no-onednn": without_onednn,
    "t4": fake_gpu,
    "h100": lambda: fake_gpu("NVIDIA H100", (9, 0)),
}


def install(kind: str) -> None:
    """把这个进程变成 ``kind``，见 ``KINDS``。"""
    KINDS[kind]()


def kernel_environment(kind: str, folder: Path) -> dict[str, str]:
    """环境变量：由此启动的 Jupyter 内核，在第一格之前就变成 ``kind``；``folder`` 里会写下 IPython 的启动文件。"""
    startup = folder / "profile_default" / "startup"
    startup.mkdir(parents=True, exist_ok=True)
    find = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    lines = f"{find}import other_machine\nother_machine.install({kind!r})\ndel sys.path[0], other_machine, sys\n"
    (startup / "00-other-machine.py").write_text(lines, encoding="utf-8")
    return {"IPYTHONDIR": str(folder), "KINETO_LOG_LEVEL": "99"}
