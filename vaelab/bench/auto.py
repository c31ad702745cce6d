"""``auto`` 会不会比通常的循环慢：几种模型、批大小、步数，准备的时间都算上。

每种做法在全新的进程里量两样：准备（建模型到走完第一步，含量精度、编译、录图）与之后每步的时间，两边交错着走。
走 N 步的总时间是 准备 + (N − 1)·每步，N 从 10 到十万，于是短的、长的训练都看得见，不必真的走十万步。
``auto`` 按步数决定编译不编译，所以编译与不编译的各量一遍，每个 N 用它会选的那一种。
"""

from __future__ import annotations

from dataclasses import replace

from vaelab.bench.recipes import FULL, MEASURED_ON, USUAL, Recipe, measure, times_faster
from vaelab.config import MODEL_DEFAULTS, TrainConfig
from vaelab.data import load
from vaelab.plan import make_plan
from vaelab.processes import pick_device

LENGTHS = (10, 100, 1_000, 10_000, 100_000)
MODELS = {"默认的模型": MODEL_DEFAULTS, "公开的模型": FULL}
BATCHES = {"cpu": (16, 64), "cuda": (64, 512)}


def bench_auto(rounds: int) -> dict:
    """一张表：每种模型、批大小、步数，通常的循环用的时间是 ``auto`` 的几倍；小于 1 就是 ``auto`` 反而慢。"""
    data = load("faces", image_size=64, count=MEASURED_ON)
    rows = []
    print("| 模型 | 批 | " + " | ".join(f"{steps} 步" for steps in LENGTHS) + " |\n|" + "---|" * (len(LENGTHS) + 2), flush=True)
    for model, model_args in MODELS.items():
        for batch_size in BATCHES.get(pick_device().type, BATCHES["cpu"]):
            ours = {kind: Recipe(kind, schedule=False, lr=1e-3, batch_size=batch_size, compile=kind) for kind in ("off", "on")}
            costs = measure({"usual": replace(USUAL, batch_size=batch_size), **ours}, model_args, rounds)
            config = TrainConfig(batch_size=batch_size)
            chosen = ["on" if make_plan(data, config, total_steps=steps).compile else "off" for steps in LENGTHS]
            ratios = [round(times_faster(costs, kind, steps), 2) for steps, kind in zip(LENGTHS, chosen)]
            rows.append({"model": model, "batch_size": batch_size, "costs": costs, "compiled": [kind == "on" for kind in chosen], "ratios": ratios})
            cells = [f"{ratio:.2f}{'，编译' * (kind == 'on')}{'，慢' * (ratio < 1)}" for ratio, kind in zip(ratios, chosen)]
            print(f"| {model} | {batch_size} | " + " | ".join(cells) + " |", flush=True)
    return {"steps": list(LENGTHS), "rounds": rounds, "rows": rows, "worst": min(ratio for row in rows for ratio in row["ratios"])}
