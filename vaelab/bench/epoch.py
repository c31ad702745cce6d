"""CelebA 那么大的一轮（CPU 上只走一万张），与机器定下的下限相比：搬运与运算里慢的那一样。"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import nn

from vaelab.bench.contest import wait_for_device
from vaelab.bench.recipes import BATCH, FULL, USUAL, train_to_the_end
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.images import ImageSet
from vaelab.plan import Plan, make_plan
from vaelab.processes import pick_device
from vaelab.step import Objective
from vaelab.train import train
from vanilla_vae import VanillaVAE

TRAFFIC = 16.0e6  # 公开大小的模型，float32，每张图每步的字节：每个算子读输入、写输出各一遍，11 章第 2 节核对过
FLOPS = 313e6  # 同上，每张图每步的运算数，11 章第 1 节


def bench_epoch(count: int) -> dict:
    """编译之后用 ``vaelab.train.train`` 走两轮，取第二轮的速度，与下限相比；再让通常的循环照同样的配方看同样多的图，比测试 ELBO。"""
    data = load("faces", image_size=64, count=count * 10 // 9 + 10, progress=False)
    device = pick_device()
    usual = train_to_the_end(USUAL, data, FULL, 2 * len(data.train) // BATCH)
    print(f"通常的循环用它自己的配方（批 {BATCH}、学习率 {USUAL.lr:g} 不变、权重 {USUAL.kld_weight:g}），两轮之后测试 ELBO {usual:.1f}", flush=True)
    rows = [_one(data, device, batch_size) for batch_size in ((256, 512, 1024) if device.type == "cuda" else (BATCH,))]
    return {"images": len(data.train), "usual_elbo": round(usual, 1), "rows": rows}


def _one(data: ImageSet, device: torch.device, batch_size: int) -> dict:
    config = TrainConfig(epochs=2, batch_size=batch_size, kld_weight="optimal")
    torch.manual_seed(0)
    model = VanillaVAE(3, **FULL)
    total = config.epochs * (len(data.train) // batch_size)
    plan = make_plan(data, config, model, compile="on", total_steps=total)
    print(plan.why(), flush=True)
    last = train(model, data, config, compile="on", progress=False)[-1]
    same = replace(USUAL, schedule=True, lr=config.lr, kld_weight=config.kld_weight, batch_size=batch_size)
    elbo = {"usual": round(train_to_the_end(same, data, FULL, total), 1), "ours": round(last["test_elbo"], 1)}
    speed, floor = last["images_per_s"], floor_per_image(plan, model)
    row = {"batch_size": batch_size, "compiled": plan.compile, "precision": plan.precision, "images_per_s": speed}
    row |= {
        "seconds": round(len(data.train) / speed, 3),
        "elbo": elbo,
        "floor_is": floor["is"],
        "fraction_of_floor": round(speed * floor["seconds"], 3),
    }
    row |= {"bandwidth_used": round(speed * floor["moving"], 3), "mfu": round(speed * floor["computing"], 3)}
    print(f"批 {batch_size}：一轮 {len(data.train)} 张，达到下限（{floor['is']}）的 {row['fraction_of_floor']:.0%}，", end="")
    print(
        f"带宽用了 {row['bandwidth_used']:.0%}，运算用了 {row['mfu']:.0%}；同样的配方，测试 ELBO 通常 {elbo['usual']}，本项目 {elbo['ours']}",
        flush=True,
    )
    return row


def floor_per_image(plan: Plan, model: VanillaVAE) -> dict:
    """照 ``plan`` 跑，一张图至少几秒：搬运（按量到的拷贝带宽）与运算（按量到的同精度矩阵乘）里慢的那一样。

    编译时归一化与激活融合成一个内核：各自的 5n 合成一个 5n，所以每个激活少算 5 遍。
    """
    fused = 5 * 4 * _activated(model) if plan.compile else 0
    moving = (TRAFFIC - fused) / (1 if plan.precision == "fp32" else 2) / _copy_bandwidth(plan.device)
    computing = FLOPS / _matmul_peak(plan.device, plan.precision)
    what = ("融合之后的搬运" if plan.compile else "搬运") if moving >= computing else "运算"
    return {"moving": moving, "computing": computing, "seconds": max(moving, computing), "is": what}


def _activated(model: VanillaVAE) -> int:
    """每张图经过激活的数的个数。"""
    counts: list[int] = []
    layers = [layer for layer in model.modules() if isinstance(layer, nn.LeakyReLU)]
    handles = [layer.register_forward_hook(lambda _, __, output: counts.append(output[0].numel())) for layer in layers]
    with torch.no_grad():
        weight = model.fc_mu.weight
        model.eval()(torch.zeros(1, model.in_channels, model.image_size, model.image_size, device=weight.device, dtype=weight.dtype))
    for handle in handles:
        handle.remove()
    return sum(counts)


def _best(work, times: int = 10) -> float:
    fastest = float("inf")
    for _ in range(times):
        wait_for_device()
        started = time.perf_counter()
        work()
        wait_for_device()
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def _copy_bandwidth(device: torch.device) -> float:
    """大块拷贝的速度，字节/秒，读与写都算。"""
    size = 2**31 if device.type == "cuda" else 2**28  # 太小，量到的是启动与等待
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source))


def _matmul_peak(device: torch.device, precision: str) -> float:
    """方阵相乘的速度，FLOP/秒，与训练同一精度。"""
    side = 8192 if device.type == "cuda" else 1024
    square = torch.ones(side, side, dtype=Objective.AUTOCAST.get(precision, torch.float32), device=device)
    return 2 * side**3 / _best(lambda: square @ square)
