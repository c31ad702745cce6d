"""训练的几种做法：通常的循环，与本项目的一步。"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vaelab.bench.contest import Contest
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.evaluate import evaluate
from vaelab.images import ImageSet, batches, to_float
from vaelab.memory import keep_freed_memory
from vaelab.plan import make_plan
from vaelab.processes import pick_device
from vaelab.step import learning_rate, make_optimizer, optimal_weight
from vaelab.stepper import Stepper
from vaelab.transfer import fetch_later
from vanilla_vae import VanillaVAE

BATCH = 64
FULL = {"latent_dim": 128, "hidden_dims": [32, 64, 128, 256, 512]}  # 公开 VanillaVAE 的大小
CHANGES = {  # 从通常的循环到本项目的一步，逐样改的
    "channels_last": "channels_last",
    "fused": "融合的 Adam",
    "inplace": "原地的 LeakyReLU",
    "no_bias": "不算批归一化前的偏置",
    "uint8": "图存 uint8，放在设备上",
    "later": "晚一步取回损失",
}
MEASURED_ON = 600  # 量时间用的图数；画脸的时间算进准备里也不多
REPEAT = 20  # 走一遍太短就量不准：读缓存、在 GPU 上训练，都重复这么多遍


@dataclass(frozen=True)
class Recipe:
    """一种训练的做法。

    Attributes:
        name: 给人看的名字。
        usual: 真则是通常的循环（eager、float32、NCHW、每步取回损失），假则是 ``vaelab.train`` 的一步。
        changes: 通常的循环里改了哪几样，见 ``CHANGES``；本项目的一步就是全都改了。
        keep_memory: 是否留住释放的内存（``keep_freed_memory``；本项目的一步总是留住）。
        precision, compile, cuda_graphs, data_on: 见 ``vaelab.plan.make_plan``；通常的循环不用。
        schedule: 学习率先升后降（``vaelab.step.learning_rate``），否则固定为 ``lr``。
        lr, kld_weight, batch_size, seed: 同 ``vaelab.config.TrainConfig``。
    """

    name: str
    usual: bool = False
    changes: tuple[str, ...] = ()
    keep_memory: bool = True
    precision: str = "auto"
    compile: str = "off"
    cuda_graphs: str = "auto"
    data_on: str = "auto"
    schedule: bool = True
    lr: float = 3e-3
    kld_weight: float | str = 2.5e-4
    batch_size: int = BATCH
    seed: int = 0


USUAL = Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3)  # 通常的循环，用多数教程的学习率


def steps_of(recipe: Recipe, data: ImageSet, model_args: dict, total: int, every: int = 0) -> Iterator[float | None]:
    """照 ``recipe`` 训练 ``total`` 步：每走一步交出一次控制，之后每次交出测试 ELBO。

    ``every`` 不是 0，半路就每走这么多步评价一次，那一步交出测试 ELBO，其余的步交出 None。
    """
    device = pick_device()
    if recipe.keep_memory and device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.seed)
    model = VanillaVAE(data.train.shape[1], image_size=data.train.shape[2], **model_args).to(device)
    for done, _ in enumerate((_usual_steps if recipe.usual else _our_steps)(model, recipe, data, device, total), 1):
        if every and done % every == 0 and done < total:  # 最后一步之后的评价在下面
            yield evaluate(model, data.test).elbo
            model.train()
        else:
            yield None
    elbo = evaluate(model, data.test).elbo
    while True:
        yield elbo


def train_to_the_end(recipe: Recipe, data: ImageSet, model_args: dict, total: int) -> float:
    """照 ``recipe`` 训练 ``total`` 步之后的测试 ELBO。"""
    return float(next(islice(steps_of(recipe, data, model_args, total), total, None)))


def _usual_steps(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Iterator[None]:
    """通常的循环，就像多数教程里写的那样。"""
    changed = set(recipe.changes)
    if unknown := changed - CHANGES.keys():
        raise ValueError(f"changes 应取自 {'、'.join(CHANGES)}，收到 {'、'.join(sorted(unknown))}。")
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = "inplace" in changed
    layout = torch.channels_last if "channels_last" in changed else torch.contiguous_format
    model.to(memory_format=layout).train()
    if "no_bias" in changed:
        make_optimizer(model, recipe.lr)  # 只为冻结那些偏置
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=recipe.lr, fused="fused" in changed)
    pending = None
    for index, x in zip(range(total), _usual_feed(data, recipe, device)):
        outputs = model(x.contiguous(memory_format=layout))
        if recipe.schedule:
            optimizer.param_groups[0]["lr"] = learning_rate(index, total, recipe.lr)
        weight = optimal_weight(outputs[0], outputs[1]) if recipe.kld_weight == "optimal" else recipe.kld_weight
        losses = model.loss_function(*outputs, M_N=weight)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        if "later" in changed:
            if pending:
                pending()
            pending = fetch_later(losses["loss"].detach().clone())
        else:
            losses["loss"].item()
        yield


def _usual_feed(data: ImageSet, recipe: Recipe, device: torch.device) -> Iterator[Tensor]:
    """一批一批的浮点图像，在 ``device`` 上：通常是 DataLoader 由浮点张量拼出再搬；改了 ``uint8`` 则放在设备上，取出再换算。次序相同。"""
    uint8 = "uint8" in recipe.changes
    images = data.train.to(device) if uint8 else torch.utils.data.TensorDataset(to_float(data.train))
    for epoch in count():
        shuffle = torch.Generator().manual_seed(1000 * recipe.seed + epoch)
        if uint8:
            yield from map(to_float, batches(images, recipe.batch_size, shuffle))
        else:
            sampler = torch.utils.data.RandomSampler(images, generator=shuffle)
            for (x,) in torch.utils.data.DataLoader(images, recipe.batch_size, sampler=sampler, drop_last=True):
                yield x.to(device)


def _our_steps(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Iterator[None]:
    """``vaelab.train`` 的循环走的就是这些步，只少了进度、检查点与评价。"""
    config = TrainConfig(batch_size=recipe.batch_size, lr=recipe.lr, kld_weight=recipe.kld_weight, precision=recipe.precision, seed=recipe.seed)
    plan = make_plan(
        data, config, model, device=device, compile=recipe.compile, cuda_graphs=recipe.cuda_graphs, data_on=recipe.data_on, total_steps=total
    )
    with Stepper(model, data, config, plan) as stepper:
        feed, pending = chain.from_iterable(map(stepper.feed, count())), None
        for index, images in zip(range(total), feed):
            record = stepper(images, index, learning_rate(index, total, recipe.lr) if recipe.schedule else recipe.lr)
            if pending:
                pending()  # 看的是上一步，与 vaelab.train 相同
            pending = fetch_later(record)
            yield
        if pending:
            pending()


def train_on_faces(recipe: Recipe, model_args: dict, images: int, total: int) -> Iterator[float | None]:
    data = load("faces", image_size=64, count=images)
    return steps_of(recipe, data, model_args, total)


def measure(recipes: dict[str, Recipe], model_args: dict, rounds: int, steps: int = 8) -> dict[str, Cost]:
    """各种做法的时间：每种在全新的进程里，准备是走完第一步的时间（含画六百张脸），每步的时间交错着量 ``rounds`` 轮。"""
    jobs = {name: (train_on_faces, recipe, model_args, MEASURED_ON, 10**9) for name, recipe in recipes.items()}
    with _cold_compiler(), Contest(jobs) as contest:
        setup = {name: contest.go(name)[0] for name in recipes}
        seconds = contest.race(rounds, steps * repeats(), warmup=8)
    return {name: Cost(setup[name], [each / steps / repeats() for each in seconds[name]]) for name in recipes}


@contextmanager
def _cold_compiler() -> Iterator[None]:
    """编译的时间按第一次算：这里面起的进程不用以前编译好的。"""
    name = "TORCHINDUCTOR_FORCE_DISABLE_CACHES"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


class Cost(NamedTuple):
    """一种做法的时间，秒：准备，与各轮里每一步的时间。"""

    setup: float
    steps: list[float]

    def total(self, steps: int, kth: int | None = None) -> float:
        """走 ``steps`` 步的总时间；每步的时间取第 ``kth`` 轮的，None 则取各轮的中位数。"""
        return self.setup + (steps - 1) * (statistics.median(self.steps) if kth is None else self.steps[kth])

    def steps_to_be(self, times: float, usual: Cost) -> int | None:
        """从多少步起，连准备在内是 ``usual`` 的 ``times`` 倍快；永远到不了就是 None。"""
        gained = statistics.median(usual.steps) - times * statistics.median(self.steps)
        owed = times * self.setup - usual.setup
        return max(1, 1 + math.ceil(owed / gained)) if gained > 0 else None

    def setup_in_steps(self, usual: Cost) -> float:
        """准备的时间抵得 ``usual`` 的几步。"""
        return round(self.setup / statistics.median(usual.steps), 1)


def times_faster(costs: dict[str, Cost], kind: str, steps: int) -> float:
    """走 ``steps`` 步，``usual`` 用的时间是 ``kind`` 的几倍，准备计入。"""
    return costs["usual"].total(steps) / costs[kind].total(steps)


def repeats() -> int:
    """GPU 上一步太短，每轮多走几倍的步数才量得准。"""
    return REPEAT if torch.cuda.is_available() else 1
