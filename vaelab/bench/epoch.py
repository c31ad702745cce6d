"""CelebA 那么大的一轮（CPU 上只走两万张），与内存带宽定下的下限相比。"""

from __future__ import annotations

import time

import torch

from vaelab.bench.contest import wait_for_device
from vaelab.bench.recipes import BATCH, FULL, Recipe, train_to_the_end
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.plan import make_plan
from vaelab.processes import pick_device
from vaelab.train import train
from vanilla_vae import VanillaVAE

TRAFFIC = 16.0e6  # 公开大小的模型，float32，每张图每步经过内存的字节：每个算子读写各一遍，见 11 章第 2 节


def bench_epoch(count: int) -> dict:
    """编译之后用 ``vaelab.train.train`` 走两轮，取第二轮的速度，与“时间全花在按带宽搬 TRAFFIC”的下限相比；
    再让通常的循环看同样多的图，比测试 ELBO。"""
    data = load("faces", image_size=64, count=count * 10 // 9 + 10, progress=False)
    device = pick_device()
    batch = 256 if device.type == "cuda" else BATCH  # 批 64 时 GPU 多半在等发射
    config = TrainConfig(epochs=2, batch_size=batch, kld_weight="optimal")
    torch.manual_seed(0)
    model = VanillaVAE(3, **FULL)
    plan = make_plan(data, config, compile="on")
    print(plan.why(), flush=True)
    last = train(model, data, config, compile="on", progress=False)[-1]
    usual = Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3)
    total = 2 * len(data.train) // BATCH
    elbo = {"usual": round(train_to_the_end(usual, data, FULL, total), 1), "ours": round(last["test_elbo"], 1)}
    speed = last["images_per_s"]
    floor = _copy_bandwidth(device) / (TRAFFIC if plan.precision == "fp32" else TRAFFIC / 2)  # 图/秒
    result = {"images": len(data.train), "batch_size": batch, "images_per_s": speed, "seconds": round(len(data.train) / speed, 3)}
    result |= {"fraction_of_floor": round(speed / floor, 3), "elbo": elbo}
    print(f"一轮 {len(data.train)} 张，达到内存带宽下限的 {result['fraction_of_floor']:.0%}；两轮之后的测试 ELBO：", end="")
    print(f"通常 {elbo['usual']}，本项目 {elbo['ours']}", flush=True)
    return result


def _copy_bandwidth(device: torch.device) -> float:
    """大块拷贝的速度，字节/秒，读与写都算。"""
    size = 2**31 if device.type == "cuda" else 2**28  # 太小，量到的是发射与等待
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        wait_for_device()
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best
