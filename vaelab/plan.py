"""怎样跑：设备、精度、编译、数据放哪里；每一项都说得出为什么。"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vaelab.config import TrainConfig
from vaelab.graph import has_hooks
from vaelab.images import ImageSet
from vaelab.processes import current_world, pick_device

SWITCHES = ("auto", "on", "off")
PLACES = ("auto", "device", "host")
COMPILE_STEPS = 10_000  # CPU 上少于这么多步就不编译：两个核上编译要半分钟，每步省 4 到 14 毫秒，2000 到 7000 步才抵得回来
COMPILE_IMAGES = 5_000_000  # GPU 上少于这么多张 64×64 的图就不编译：一张 H200 上要 16 到 19 秒，每张省 4.3 到 4.7 微秒，约 400 万张才抵得回来
COMPILE_SETUP = {"cpu": "半分钟", "cuda": "十几秒"}
HALF_IMAGES = 512  # 不录成图时，一步少于这么多张 64×64 的图就不用半精度：H200 上 autocast 每步多启动 2.4 毫秒，每张省 10 微秒


@dataclass(frozen=True)
class Plan:
    """这一次怎样跑，以及每一项的理由。

    Attributes:
        device: 在哪里算。
        precision: ``fp32``、``bf16`` 或 ``fp16``。
        compile: 是否用 ``torch.compile``。
        cuda_graphs: 是否把整个一步录成一张 CUDA 图重放，见 :mod:`vaelab.graph`。
        resident: 训练集是否整个放在设备上。
        reasons: 各项的理由，依次是设备、精度、编译、录图（只在 CUDA 上）、数据。
    """

    device: torch.device
    precision: str
    compile: bool
    cuda_graphs: bool
    resident: bool
    reasons: tuple[str, ...]

    def why(self) -> str:
        """一行话：这样跑，以及为什么。"""
        return "为什么这样跑：" + "；".join(self.reasons)

    @property
    def ran_on(self) -> dict[str, str | bool]:
        """记在检查点里的：设备、精度、编译与否；续训时 ``auto`` 照旧。"""
        return {"device": self.device.type, "precision": self.precision, "compile": self.compile}

    def on(self, device: torch.device) -> Plan:
        """同样的安排，换成这个进程自己的设备。"""
        return replace(self, device=device)


def make_plan(
    data: ImageSet,
    config: TrainConfig,
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "auto",
    compile: str = "auto",
    cuda_graphs: str = "auto",
    data_on: str = "auto",
    total_steps: int = 0,
    before: dict | None = None,
) -> Plan:
    """按机器与任务的大小决定怎样跑；每一项都可以指定。

    Args:
        data, config: 训练的数据与设置。
        model: 要训练的模型；挂着钩子的录不成 CUDA 图。
        device: ``auto`` 依次选 cuda、mps、cpu。
        compile, cuda_graphs: ``auto``、``on`` 或 ``off``。没有编译器时退回不编译，理由里会说。
        data_on: ``device`` 把训练集整个放到设备上，``host`` 逐批搬运，``auto`` 看放不放得下。
        total_steps: 一共要走多少步；太短的训练抵不回编译的时间，``auto`` 不编译。
        before: 续训时，检查点里记着的 ``ran_on``：在同一种设备上，``auto`` 照旧，不重新选，数才接得上。

    Raises:
        ValueError: 选项不认得，或设备做不到。
    """
    for name, value, known in (("compile", compile, SWITCHES), ("cuda_graphs", cuda_graphs, SWITCHES), ("data_on", data_on, PLACES)):
        if value not in known:
            raise ValueError(f"{name} 应为 {'、'.join(known)} 之一，收到 {value!r}。")
    device = pick_device(device)
    on_cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_cuda else f"{torch.get_num_threads()} 线程" if device.type == "cpu" else ""
    before = before if before and before["device"] == device.type else {}
    use_graphs, why_graphs = _choose_graphs(cuda_graphs, device, model)
    step_images = config.batch_size / current_world().size * data.train[0, 0].numel() / 64**2  # 一步的活，折合几张 64×64
    precision, why_precision = _choose_precision(config.precision, device, before.get("precision"), use_graphs or step_images >= HALF_IMAGES)
    long_enough = total_steps >= COMPILE_STEPS if device.type == "cpu" else total_steps * step_images >= COMPILE_IMAGES
    use_compile, why_compile = _choose_compile(compile, device, total_steps, long_enough, before.get("compile"))
    resident, why_data = _choose_place(data_on, data, device)
    reasons = (f"{device.type}" + f"（{where}）" * bool(where), why_precision, why_compile, *([why_graphs] if on_cuda else []), why_data)
    return Plan(device, precision, use_compile, use_graphs, resident, reasons)


def _choose_graphs(cuda_graphs: str, device: torch.device, model: nn.Module | None) -> tuple[bool, str]:
    lacking = [
        *(["有 CUDA 设备"] if device.type != "cuda" else []),
        *(["只有一个进程"] if current_world().size > 1 else []),
        *(["模型没有挂钩子"] if model is not None and has_hooks(model) else []),
    ]
    if cuda_graphs == "on" and lacking:
        raise ValueError(f"cuda_graphs=on 要{'，也要'.join(lacking)}；请改为 auto，或补上所缺的。")
    if lacking:
        return False, f"逐个启动核函数（录成一张 CUDA 图要{'，也要'.join(lacking)}）"
    if cuda_graphs == "off":
        return False, "逐个启动核函数（你指定的）"
    return True, "整个一步录成一张 CUDA 图（准备不到 0.1 秒）"


def _choose_precision(precision: str, device: torch.device, before: str | None = None, worthwhile: bool = True) -> tuple[str, str]:
    if precision == "auto" and before:
        with suppress(ValueError):  # 换到了没有这种精度的硬件上，就重新选
            _choose_precision(before, device)
            return before, f"{before}（与续训之前相同）"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not native:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"bf16 应有硬件支持，{name} 没有；请改用 --precision fp16、fp32 或 auto。")
        if precision == "auto" and not worthwhile:
            return "fp32", "fp32（一步不录成图，autocast 多出来的启动比省下的多）"
        if precision == "auto" and native:
            return "bf16", "bf16（硬件原生支持）"
        if precision == "auto" and torch.cuda.get_device_capability(device) >= (7, 0):
            return "fp16", "fp16 加损失缩放（有张量核心而没有 bf16）"
    if device.type == "cpu":
        supported = {"bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported(), "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported()}
        if precision == "fp16" and not supported["fp16"]:
            raise ValueError("fp16 应有硬件支持，这个 CPU 没有；请改用 --precision bf16、fp32 或 auto。")
        if precision == "bf16" and not supported["bf16"]:
            return "bf16", "bf16（你指定的；这个 CPU 没有 bf16 指令，由软件模拟，会慢）"
        if precision == "auto" and supported["bf16"]:
            # 有指令不等于更快（要看有没有 AMX 一类的矩阵单元），所以各算一层卷积，量出来再定。
            ratio = bf16_speedup()
            return ("bf16" if ratio > 1.2 else "fp32"), f"{'bf16' if ratio > 1.2 else 'fp32'}（量得一层卷积用 bf16 的速度是 fp32 的 {ratio:.1f} 倍）"
    if precision == "auto":
        return "fp32", "fp32（这个设备上没有更快的精度）"
    return precision, f"{precision}（你指定的）"


def bf16_speedup() -> float:
    """一层有代表性的卷积，前向加反向，bf16 的速度是 float32 的几倍：两边交错着走，各取最快的一次。

    只用一个线程，计这个线程自己的 CPU 时间：机器正忙时量出来也一样，选择才不会时此时彼。
    """
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        works = []
        for dtype in fastest:
            x, weight = (
                torch.ones(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_() for shape in ((32, 64, 16, 16), (128, 64, 3, 3))
            )
            works.append((dtype, x, weight))
        for _ in range(8):
            for dtype, x, weight in works:
                started = time.thread_time()
                F.conv2d(x, weight, stride=2, padding=1).sum().backward()
                fastest[dtype] = min(fastest[dtype], time.thread_time() - started)
    finally:
        torch.set_num_threads(threads)
    return fastest[torch.float32] / fastest[torch.bfloat16]


def _choose_compile(compile: str, device: torch.device, total_steps: int, long_enough: bool = False, before: bool | None = None) -> tuple[bool, str]:
    if compile == "off":
        return False, "不编译（你指定的）"
    why = "你指定的"
    if compile == "auto":
        if device.type not in ("cpu", "cuda"):
            return False, "不编译"
        if before is not None:
            wanted, why = before, "与续训之前相同"
        elif wanted := long_enough:
            why = f"{total_steps} 步，抵得回准备的{COMPILE_SETUP[device.type]}"
        else:
            why = f"只有 {total_steps} 步，抵不回准备的{COMPILE_SETUP[device.type]}"
        if not wanted:
            return False, f"不编译（{why}）"
    if broken := _why_no_compiler(device):
        return False, f"不编译（想编译，这里没有能用的编译器：{broken}）"
    return True, f"编译（{why}）"


def _why_no_compiler(device: torch.device) -> str | None:
    """试编译一个小函数；能用是 None，否则是为什么不能。"""
    try:
        torch.compile(_fused_probe)(torch.ones(8, device=device, dtype=torch.float32))
    except Exception as error:  # 没有编译器、没有 triton……各后端抛出的类型不一
        return str(error).strip().splitlines()[0][:100]
    return None


def _fused_probe(x: Tensor) -> Tensor:
    return torch.relu(2 * x + 1)


def _choose_place(data_on: str, data: ImageSet, device: torch.device) -> tuple[bool, str]:
    size = f"{data.train.numel() / 1e6:.3g} MB"
    at_rest = "在内存里" if data.mapped is None else "在内存映射的文件里"
    if device.type == "cpu":
        return False, f"数据 {size} {at_rest}"
    if data_on == "auto" and device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        data_on = "device" if data.train.numel() < free / 2 else "host"
        return (
            data_on == "device",
            f"数据 {size} {'整个放在显存里' if data_on == 'device' else at_rest + '，逐批搬运'}（显存空着 {free / 1e6:.0f} MB）",
        )
    return data_on == "device", f"数据 {size} {'整个放在设备上' if data_on == 'device' else at_rest + '，逐批搬运'}"
