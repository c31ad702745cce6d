"""``python -m vaelab.bench``：通常的做法与本项目的做法，在同一次运行里交错测速，给出比值与起伏。

- ``loop``：训练循环。通常的做法是 eager、float32、NCHW、Adam，图像是内存里的浮点张量，每步取回损失；
  两边结构、批大小相同，训练完同样多的图之后再比测试 ELBO。
- ``data``：数据通路。通常的做法是 DataLoader 逐张用 PIL 解码 JPEG、裁剪、缩放、ToTensor；本项目读解码好的缓存。
- ``endtoend``：从 JPEG 到权重，上面两样连在一起。
- ``allocator``：虚拟机上的缺页，与留住释放的内存省下的时间（Linux）。
- ``epoch``：CelebA 那么大的一轮（CPU 上只走两万张），与内存带宽定下的下限相比。
- ``scale``：速度与内存怎样随批大小、边长、宽度、图片数增长。
- ``speedrun``：到达同样的测试 ELBO 要多久，一级一级的阶梯。

``--record`` 把结果并进 ``vaelab/records/`` 里这台机器的那一份，课程与 README 从那里读。

两边各在自己的进程里，轮到谁谁跑，另一边等着：内存分配器的设置互不影响，机器的快慢对两边一视同仁。
CPU 上只看比值；机器有闲有忙，绝对的快慢只对当时当地有意义。
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from vaelab import train
from vaelab.cli import MODEL_DEFAULTS
from vaelab.data import ImageSet, batches, draw_faces, load, map_pixels, to_float
from vaelab.evaluate import evaluate
from vanilla_vae import VanillaVAE

RECORDS = Path(__file__).parent / "records"
BATCH = 64
FULL = {"latent_dim": 128, "hidden_dims": [32, 64, 128, 256, 512]}  # 公开 VanillaVAE 的大小


# ---------------------------------------------------------------- 一种训练的做法


@dataclass(frozen=True)
class Recipe:
    """一种训练的做法。

    Attributes:
        name: 给人看的名字。
        usual: 真则是通常的循环（eager、float32、NCHW、每步取回损失），假则是 ``vaelab.train`` 的一步。
        keep_memory: 是否留住释放的内存（``train.keep_freed_memory``；本项目的一步总是留住）。
        precision, compile, data_on: 见 ``train.make_plan``；通常的循环不用。
        schedule: 学习率先升后降（``train.learning_rate``），否则固定为 ``lr``。
        lr, kld_weight, batch_size, epochs: 同 ``train.TrainConfig``。
        predicted: 动手之前在纸上写的：这一级比上一级快几倍。
    """

    name: str
    usual: bool = False
    keep_memory: bool = True
    precision: str = "auto"
    compile: str = "off"
    data_on: str = "auto"
    schedule: bool = True
    lr: float = 3e-3
    kld_weight: float | str = 2.5e-4
    batch_size: int = BATCH
    epochs: int = 1
    predicted: float = 1.0


def steps_of(recipe: Recipe, data: ImageSet, model_args: dict, total: int) -> Iterator[float | None]:
    """照 ``recipe`` 训练 ``total`` 步：每走一步交出一次控制，之后每次交出测试 ELBO。"""
    device = train.pick_device()
    if recipe.keep_memory and device.type == "cpu":
        train.keep_freed_memory()
    torch.manual_seed(0)
    model = VanillaVAE(data.train.shape[1], image_size=data.train.shape[2], **model_args)
    step = (_usual_step if recipe.usual else _our_step)(model, recipe, data, device, total)
    for index in range(total):
        step(index)
        yield None
    elbo = evaluate(model, data.test).elbo
    while True:
        yield elbo


def _train_to_the_end(recipe: Recipe, data: ImageSet, model_args: dict, total: int) -> float:
    """照 ``recipe`` 训练 ``total`` 步之后的测试 ELBO。"""
    return float(next(islice(steps_of(recipe, data, model_args, total), total, None)))


def _usual_step(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Callable[[int], None]:
    """通常的一步，就像多数教程里写的那样。"""
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    images = torch.utils.data.TensorDataset(to_float(data.train))
    feed = _forever(lambda: torch.utils.data.DataLoader(images, recipe.batch_size, shuffle=True, drop_last=True))

    def step(index: int) -> None:
        (x,) = next(feed)
        outputs = model(x.to(device))
        if recipe.schedule:
            optimizer.param_groups[0]["lr"] = train.learning_rate(index, total, recipe.lr)
        weight = train.optimal_weight(outputs[0], outputs[1]) if recipe.kld_weight == "optimal" else recipe.kld_weight
        losses = model.loss_function(*outputs, M_N=weight)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        losses["loss"].item()

    return step


def _our_step(model: VanillaVAE, recipe: Recipe, data: ImageSet, device: torch.device, total: int) -> Callable[[int], None]:
    """``vaelab.train`` 的一步。"""
    config = train.TrainConfig(batch_size=recipe.batch_size, lr=recipe.lr, kld_weight=recipe.kld_weight, precision=recipe.precision)
    plan = train.make_plan(data, config, device=device, compile=recipe.compile, data_on=recipe.data_on, total_steps=total)
    optimizer = train.prepare(model, config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "fp16")
    objective = train.prepared_objective(model, config, plan, train.World(), sync_batch_norm=False)
    images, noise = data.train.to(device) if plan.resident else data.train, torch.Generator(device)
    feed = _forever(lambda: train.ahead(batches(images, recipe.batch_size, torch.Generator().manual_seed(0)), data, plan))
    pending: list[Callable] = []

    def step(index: int) -> None:
        eps = torch.randn((recipe.batch_size, model.latent_dim), generator=noise.manual_seed(index), device=device)
        lr = train.learning_rate(index, total, recipe.lr) if recipe.schedule else recipe.lr
        pending.append(train.fetch_later(train.train_step(objective, optimizer, scaler, next(feed), eps, lr)))
        if len(pending) > 1:
            pending.pop(0)()

    return step


def _forever(make: Callable) -> Iterator:
    while True:
        yield from make()


# ---------------------------------------------------------------- 交错测速


def _worker(pipe, make: Callable[..., Iterator], arguments: tuple) -> None:
    steps = make(*arguments)
    while (count := pipe.recv()) is not None:
        _wait_for_device()
        started, value = time.perf_counter(), None
        for _ in range(count):
            value = next(steps)
        _wait_for_device()  # 排着的活算完才停表，也不留给别人的时间
        pipe.send((time.perf_counter() - started, value))


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Contest:
    """几种做法各在自己的进程里，轮流走。``jobs`` 是名字 → (做法, 参数…)，做法给出一个走一步交一次的迭代器。"""

    def __init__(self, jobs: dict[str, tuple]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = {}, []
        for name, (make, *arguments) in jobs.items():
            self.pipes[name], theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, make, tuple(arguments)))
            process.start()
            theirs.close()  # 子进程若死，recv 立即报错而不是一直等
            self.processes.append(process)

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in zip(self.pipes.values(), self.processes):
            try:
                pipe.send(None)
            except OSError:
                pass
            process.join(10)
            process.terminate()

    def go(self, name: str, count: int = 1) -> tuple[float, object]:
        """让 ``name`` 走 ``count`` 步；返回用的秒数与最后一步交出的值。"""
        self.pipes[name].send(count)
        return self.pipes[name].recv()

    def race(self, rounds: int, steps: int, warmup: int) -> dict[str, list[float]]:
        """先各热身，再交错走 ``rounds`` 轮、每轮 ``steps`` 步；返回各方每轮的秒数。"""
        for name in self.pipes:
            self.go(name, warmup)
        seconds: dict[str, list[float]] = {name: [] for name in self.pipes}
        for _ in range(rounds):
            for name in self.pipes:
                seconds[name].append(self.go(name, steps)[0])
        return seconds


def ratio(usual: list[float], ours: list[float]) -> dict[str, float]:
    """逐轮之比（通常 ÷ 本项目）的中位数与两端。"""
    ratios = [a / b for a, b in zip(usual, ours)]
    return {"median": round(statistics.median(ratios), 2), "low": round(min(ratios), 2), "high": round(max(ratios), 2)}


def _say(label: str, numbers: dict) -> None:
    print(f"{label}：{numbers['median']:.2f} 倍（最低 {numbers['low']:.2f}，最高 {numbers['high']:.2f}）", flush=True)


# ---------------------------------------------------------------- 训练循环与数据通路


def _train_on_faces(recipe: Recipe, model_args: dict, count: int, total: int) -> Iterator[float | None]:
    data = load("faces", image_size=64, count=count)
    return steps_of(recipe, data, model_args, total)


def bench_loop(rounds: int, steps: int) -> dict:
    """训练循环的比值，与训练同样多的图之后的测试 ELBO；编译的那一份连编译的时间另列。"""
    warmup = 3
    steps *= _repeat()
    total = warmup + rounds * steps
    recipes = {
        "usual": Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3),
        "ours": Recipe("本项目", schedule=False, lr=1e-3),
        "compiled": Recipe("本项目，编译", schedule=False, lr=1e-3, compile="on"),
    }
    jobs = {name: (_train_on_faces, recipe, FULL, 10_000, total) for name, recipe in recipes.items()}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps, warmup)
        elbo = {name: round(contest.go(name)[1], 1) for name in jobs}
    result = {"batch_size": BATCH, "rounds": rounds, "images": total * BATCH, "elbo": elbo}
    result["ratio"] = ratio(seconds["usual"], seconds["ours"])
    result["compiled_ratio"] = ratio(seconds["usual"], seconds["compiled"])
    _say("训练循环", result["ratio"])
    _say("训练循环，再加编译", result["compiled_ratio"])
    print(f"训练 {total * BATCH} 张之后的测试 ELBO（nat/图）：通常 {elbo['usual']}，本项目 {elbo['ours']}，编译 {elbo['compiled']}", flush=True)
    return result


def _count_pages(recipe: Recipe, steps: int) -> Iterator[dict]:
    """每走 ``steps`` 步交出一次：每步缺页几次，内核态占几成。"""
    import resource

    walk = _train_on_faces(recipe, FULL, 1000, 10**9)
    while True:
        before = resource.getrusage(resource.RUSAGE_SELF)
        for _ in range(steps):
            next(walk)
        after = resource.getrusage(resource.RUSAGE_SELF)
        kernel, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
        yield {"faults_per_step": (after.ru_minflt - before.ru_minflt) // steps, "kernel_share": round(kernel / (kernel + user), 3)}


def bench_allocator(rounds: int, steps: int = 4) -> dict:
    """留住释放的内存：缺页与内核态的时间，Amdahl 定律的预言，与交错量出的比值（glibc 的 Linux）。"""
    usual = Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3)
    jobs = {"usual": (_count_pages, usual, steps), "kept": (_count_pages, replace(usual, keep_memory=True), steps)}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps=1, warmup=1)
        pages = {name: contest.go(name)[1] for name in jobs}
    result = {"batch_size": BATCH, "rounds": rounds, **pages, "ratio": ratio(seconds["usual"], seconds["kept"])}
    result["predicted"] = round(1 / (1 - pages["usual"]["kernel_share"] + pages["kept"]["kernel_share"]), 2)
    print(f"每步缺页 {pages['usual']['faults_per_step']} → {pages['kept']['faults_per_step']}，内核态占 {pages['usual']['kernel_share']:.0%}，预言 {result['predicted']} 倍")
    _say("留住释放的内存", result["ratio"])
    return result


class JpegFolder(torch.utils.data.Dataset):
    """通常的数据集：每次取一张，就解码、裁剪、缩放、转张量一次。"""

    def __init__(self, folder: str) -> None:
        from torchvision import transforms

        self.paths = sorted(Path(folder).glob("*.jpg"))
        steps = [transforms.CenterCrop(148), transforms.Resize(64), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize(0.5, 0.5)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def _jpeg_loader(folder: str) -> torch.utils.data.DataLoader:
    workers = min(4, os.cpu_count() or 1)
    return torch.utils.data.DataLoader(JpegFolder(folder), BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True)


def _usual_data(folder: str) -> Iterator[None]:
    loader = _jpeg_loader(folder)
    while True:
        for _ in loader:
            pass
        yield


REPEAT = 20  # 走一遍太短就量不准：读缓存、在 GPU 上训练，都重复这么多遍


def _our_data(folder: str) -> Iterator[None]:
    images = _cached(folder).train
    while True:
        for _ in range(REPEAT):
            for batch in batches(images, BATCH, torch.Generator().manual_seed(0)):
                to_float(batch)
        yield


def _usual_end_to_end(folder: str) -> Iterator[None]:
    """通常的一轮：DataLoader 从 JPEG 取图，float32 eager 训练，每步取回损失。"""
    device = train.pick_device()
    torch.manual_seed(0)
    model = VanillaVAE(3, **FULL).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = _jpeg_loader(folder)
    while True:
        for x in loader:
            losses = model.loss_function(*model(x.to(device)), M_N=2.5e-4)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            losses["loss"].item()
        yield


def _our_end_to_end(folder: str) -> Iterator[None]:
    data = _cached(folder)
    steps = len(data.train) // BATCH
    walk = steps_of(Recipe("本项目", compile="auto"), data, FULL, total=10**9)
    while True:
        for _ in range(_repeat() * steps):
            next(walk)
        yield


def _repeat() -> int:
    return REPEAT if torch.cuda.is_available() else 1


def _cached(folder: str) -> ImageSet:
    """解码好的缓存；训练用的张数与通常的做法相同。"""
    data = load(folder, image_size=64, cache_dir=f"{folder}-cache", progress=False)
    return replace(data, train=torch.cat([data.train, data.test]), mapped=None)


def _write_jpegs(folder: Path, count: int) -> None:
    """CelebA 大小（178×218）的 JPEG，内容是卡通脸。"""
    from PIL import Image

    folder.mkdir()
    factors = torch.rand(count, 12, generator=torch.Generator().manual_seed(0))
    for index, face in enumerate(draw_faces(factors, 218)[..., 20:198].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(face).save(folder / f"{index:06d}.jpg", quality=95)


def _from_jpegs(label: str, usual: Callable, ours: Callable, repeat: int, rounds: int, count: int = 1000) -> dict:
    """两种做法从同一批 JPEG 出发各走一轮的比值；本项目的一轮里走 ``repeat`` 遍。解码进缓存、编译在计时之外，它们各只做一次。"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _write_jpegs(Path(folder, "jpeg"), count)
        with Contest({"usual": (usual, f"{folder}/jpeg"), "ours": (ours, f"{folder}/jpeg")}) as contest:
            seconds = contest.race(rounds, steps=1, warmup=1)
    result = {"images": count, "rounds": rounds, "ratio": ratio(seconds["usual"], [s / repeat for s in seconds["ours"]])}
    _say(label, result["ratio"])
    return result


def bench_data(rounds: int) -> dict:
    """数据通路的比值：同样的 JPEG，通常的做法逐张解码，本项目读缓存。"""
    return _from_jpegs("数据通路", _usual_data, _our_data, REPEAT, rounds)


def bench_endtoend(rounds: int) -> dict:
    """从 JPEG 到权重走一轮的比值。"""
    return _from_jpegs("从 JPEG 到权重", _usual_end_to_end, _our_end_to_end, _repeat(), rounds)


# ---------------------------------------------------------------- 一轮，与内存带宽定下的下限

TRAFFIC = 16.0e6  # 公开大小的模型，float32，每张图每步经过内存的字节：每个算子读写各一遍，见 11 章第 2 节


def bench_epoch(count: int) -> dict:
    """编译之后用 ``vaelab.train.train`` 走两轮，取第二轮的速度，与“时间全花在按带宽搬 TRAFFIC”的下限相比；
    再让通常的循环看同样多的图，比测试 ELBO。"""
    data = load("faces", image_size=64, count=count * 10 // 9 + 10, progress=False)
    device = train.pick_device()
    batch = 256 if device.type == "cuda" else BATCH  # 批 64 时 GPU 多半在等发射
    config = train.TrainConfig(epochs=2, batch_size=batch, kld_weight="optimal")
    torch.manual_seed(0)
    model = VanillaVAE(3, **FULL)
    plan = train.make_plan(data, config, compile="on")
    print(plan.why(), flush=True)
    last = train.train(model, data, config, compile="on", progress=False)[-1]
    usual = Recipe("通常", usual=True, keep_memory=False, schedule=False, lr=1e-3)
    total = 2 * len(data.train) // BATCH
    elbo = {"usual": round(_train_to_the_end(usual, data, FULL, total), 1), "ours": round(last["test_elbo"], 1)}
    speed = last["images_per_s"]
    floor = _copy_bandwidth(device) / (TRAFFIC if plan.precision == "fp32" else TRAFFIC / 2)  # 图/秒
    result = {"images": len(data.train), "batch_size": batch, "images_per_s": speed, "seconds": round(len(data.train) / speed, 3)}
    result |= {"fraction_of_floor": round(speed / floor, 3), "elbo": elbo}
    print(f"一轮 {len(data.train)} 张，达到内存带宽下限的 {result['fraction_of_floor']:.0%}；两轮之后的测试 ELBO：通常 {elbo['usual']}，本项目 {elbo['ours']}", flush=True)
    return result


def _copy_bandwidth(device: torch.device) -> float:
    """大块拷贝的速度，字节/秒，读与写都算。"""
    size = 2**31 if device.type == "cuda" else 2**28  # 太小，量到的是发射与等待
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        _wait_for_device()
        best = max(best, 2 * source.numel() / (time.perf_counter() - started))
    return best


# ---------------------------------------------------------------- 怎样随规模增长


def _grow(model_args: dict, image_size: int, batch_size: int) -> Iterator[tuple[float, int]]:
    """先走两步热身，再走几步；交出 (图/秒, 峰值内存字节)。"""
    device = train.pick_device()
    before = _peak_bytes(device)
    data = load("faces", image_size=image_size, count=batch_size + max(2, batch_size // 9) + 1, progress=False)
    steps = 6
    walk = steps_of(Recipe("", batch_size=batch_size), data, model_args, total=2 + steps)
    speed = _images_per_s(walk, steps, batch_size)
    yield speed, _peak_bytes(device) - before


def _images_per_s(walk: Iterator, steps: int, batch_size: int) -> float:
    """先走两步热身，再走 ``steps`` 步，量每秒几张。"""
    for _ in range(2):
        next(walk)
    _wait_for_device()
    started = time.perf_counter()
    for _ in range(steps):
        next(walk)
    _wait_for_device()
    return steps * batch_size / (time.perf_counter() - started)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _grow_images(folder: str, count: int) -> Iterator[tuple[float, int]]:
    """``count`` 张图在一个内存映射的文件里，打乱着训练几十步；内存只计进程自己的，不计系统可随时收回的文件页。"""
    path = Path(folder, f"{count}.npy")
    block = load("faces", image_size=32, count=1112, progress=False).train.numpy()  # 1000 张，重复着写
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count, 3, 32, 32))
    for start in range(0, count, len(block)):
        pixels[start : start + len(block)] = block[: count - start]
    pixels.flush()
    del pixels
    data = ImageSet("many", torch.from_numpy(map_pixels(path)), torch.from_numpy(block[:10].copy()), mapped=(path, path.stat().st_size))
    model_args = {"latent_dim": 16, "hidden_dims": [16, 32, 64]}
    steps = min(150, count // BATCH - 2)
    walk = steps_of(Recipe("", precision="fp32", data_on="host"), data, model_args, total=2 + steps)
    own = _own_bytes()
    speed = _images_per_s(walk, steps, BATCH)
    yield speed, _own_bytes() - own


def _own_bytes() -> int:
    """进程自己的内存，不含内存映射的文件。"""
    memory = psutil.Process().memory_info()
    return memory.rss - getattr(memory, "shared", 0)


def bench_scale(largest: int, folder: str | None = None) -> dict:
    """速度与峰值内存随规模的变化；每一点各在自己的进程里。``largest``：图片数到 10 的几次方。"""
    half = [16, 32, 64, 128, 256]
    axes = {
        "batch_size": [(n, (_grow, FULL, 64, n)) for n in (8, 16, 32, 64, 128, 256)],
        "image_size": [(n, (_grow, FULL, n, 16)) for n in (32, 64, 128, 256)],
        "width": [(k, (_grow, {"latent_dim": 128, "hidden_dims": [k * w // 16 for w in half]}, 64, 32)) for k in (4, 8, 16, 32, 64)],
    }
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as place:
        axes["images"] = [(10**k, (_grow_images, place, 10**k)) for k in range(3, largest + 1)]
        result: dict[str, list] = {}
        for name, points in axes.items():
            result[name] = []
            for x, job in points:
                with Contest({"point": job}) as contest:
                    speed, peak = contest.go("point")[1]
                result[name].append({"x": x, "images_per_s": round(speed, 1), "peak_bytes": int(peak)})
                relative = speed / result[name][0]["images_per_s"]
                print(f"{name} = {x}：速度是第一点的 {relative:.2f} 倍，内存 {peak / 1e6:.0f} MB", flush=True)
    return result


# ---------------------------------------------------------------- 到达同样的质量要多久

SEARCH = [(lr, weight) for lr in (3e-4, 1e-3, 3e-3) for weight in (2.5e-4, 2.5e-5)] + [(3e-3, 2.5e-6), (1e-2, 2.5e-5)]
# 通常的循环：批 64，学习率固定，取搜索里最好的一组。
USUAL = Recipe("通常的循环", usual=True, keep_memory=False, schedule=False, lr=3e-3, kld_weight=2.5e-5, epochs=20)


def ladder(device: str = "cpu") -> list[Recipe]:
    """阶梯：从通常的循环出发，一级多改一样。epochs 是在验证集上够得着目标的轮数，事先定下。

    CPU 上时间随图数走，小批用的图最少；GPU 上这么小的模型时间随步数走（发射，见 11 章第 10 节），大批用的步数最少。
    """
    rungs = [USUAL]

    def add(name: str, predicted: float, **changes: object) -> None:
        rungs.append(replace(rungs[-1], name=name, predicted=predicted, **changes))

    if device == "cuda":
        add("批 128，学习率先升后降，σ² 取最优", 1.5, batch_size=128, schedule=True, lr=1e-2, kld_weight="optimal", epochs=24)
        add("数据在 GPU 上，channels_last，融合的 Adam", 3.0, usual=False, precision="fp32")
        add("自动选的精度", 1.0, precision="auto")
        add("编译，一步录成一张 CUDA 图", 3.0, compile="on")
        return rungs
    add("批 16，学习率先升后降", 2.0, batch_size=16, schedule=True, lr=5e-3, epochs=10)
    add("σ² 取最优", 1.2, kld_weight="optimal", epochs=8)
    add("留住释放的内存", 1.3, keep_memory=True)
    add("channels_last、融合的 Adam", 1.2, usual=False, precision="fp32")
    add("自动选的精度", 1.5, precision="auto")
    return rungs


def _without_test(data: ImageSet) -> ImageSet:
    """训练集再分出十分之一作验证，充当测试集：调参时只看它。"""
    keep = len(data.train) * 9 // 10
    return ImageSet("faces", data.train[:keep], data.train[keep:])


def quality(recipe: Recipe, validate: bool) -> Iterator[float]:
    """照 ``recipe`` 在默认的脸上训练到底；交出测试（或验证）ELBO。与快慢无关，所以只用一个线程，好几个一起跑。"""
    torch.set_num_threads(1)
    data = load("faces", image_size=64, progress=False)
    data = _without_test(data) if validate else data
    total = recipe.epochs * (len(data.train) // recipe.batch_size)
    yield _train_to_the_end(recipe, data, MODEL_DEFAULTS, total)


def qualities(recipes: list[Recipe], validate: bool = False) -> list[float]:
    """各 ``recipe`` 的 :func:`quality`，每个核上同时跑一个；只差在内存分配器上的，算的是同样的数，只跑一次。"""

    def run(recipe: Recipe) -> float:
        with Contest({"run": (quality, recipe, validate)}) as contest:
            return contest.go("run")[1]

    same = [replace(recipe, name="", predicted=1.0, keep_memory=not recipe.usual) for recipe in recipes]
    different = list(dict.fromkeys(same))
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else os.cpu_count()) as pool:
        found = dict(zip(different, pool.map(run, different)))
    return [found[each] for each in same]


def search_usual(epochs: int = 3) -> dict:
    """为通常的循环找学习率与 KL 权重：每一组训练几轮，看验证 ELBO。"""
    tried = qualities([replace(USUAL, lr=lr, kld_weight=weight, epochs=epochs) for lr, weight in SEARCH], validate=True)
    found = [{"lr": lr, "kld_weight": weight, "validation_elbo": round(elbo, 1)} for (lr, weight), elbo in zip(SEARCH, tried)]
    for each in found:
        print(f"通常的循环 lr {each['lr']:g}，权重 {each['kld_weight']:g}，{epochs} 轮：验证 ELBO {each['validation_elbo']}", flush=True)
    return {"epochs": epochs, "tried": found, "best": max(found, key=lambda each: each["validation_elbo"])}


def bench_speedrun(rounds: int, steps: int, search: bool) -> dict:
    """目标是通常的循环 20 轮到达的测试 ELBO；阶梯的每一级先交错测速，再各自训练到底，得出快了几倍。"""
    result: dict = {"search": search_usual()} if search else {}
    rungs = ladder(train.pick_device().type)
    jobs = {recipe.name: (_train_on_faces, recipe, MODEL_DEFAULTS, 10_000, 10**9) for recipe in rungs}
    with Contest(jobs) as contest:
        seconds = contest.race(rounds, steps, warmup=5)
    rows: list[dict] = []
    for recipe, elbo in zip(rungs, qualities(rungs)):
        each = ratio(seconds[USUAL.name], [s * BATCH / recipe.batch_size for s in seconds[recipe.name]])  # 每张图
        images = recipe.epochs * (9000 // recipe.batch_size) * recipe.batch_size
        speedup = each["median"] * (USUAL.epochs * (9000 // BATCH) * BATCH) / images
        row = {"name": recipe.name, "predicted": recipe.predicted, "throughput": each, "images": images}
        row |= {"elbo": round(elbo, 1), "speedup": round(speedup, 2), "recipe": asdict(recipe)}
        rows.append(row)
        print(f"{recipe.name}：每秒图数 {each['median']:.2f} 倍，{images} 张，测试 ELBO {elbo:.1f}，共快 {speedup:.2f} 倍", flush=True)
    target = rows[0]["elbo"]
    missed = [row["name"] for row in rows if row["elbo"] < target]
    print(f"目标 {target:.1f} nat/图：" + (f"没有到达的有 {'、'.join(missed)}" if missed else "每一级都到达了"), flush=True)
    return {**result, "target_elbo": target, "ladder": rows}


# ---------------------------------------------------------------- 记录


def machine() -> dict:
    """这台机器：CPU、核数、内存、GPU。"""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        cpu = found[1].strip() if found else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9), "gpu": gpu}


def records(folder: str | os.PathLike = RECORDS) -> list[dict]:
    """全部记录，从旧到新。每份的键：machine、date、versions，以及测过的各项。"""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return sorted(found, key=lambda each: each["date"])


def write_record(sections: dict, folder: str | os.PathLike = RECORDS) -> Path:
    """把 ``sections`` 并进这台机器的记录，没有测的各项保持原样；返回文件。每一项各有日期与版本。"""
    this = machine()
    name = f"{this['gpu'] or this['cpu']} {this['cores']} cores"
    path = Path(folder) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    today = date.today().isoformat()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "os": platform.system()}
    stamped = {key: {**section, "date": today, "versions": versions} for key, section in sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**old, "machine": this, "date": today, "versions": versions, **stamped}, ensure_ascii=False, indent=1)
    train.write_atomically(path, lambda file: file.write((text + "\n").encode("utf-8")))
    return path


def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    what = {
        "loop": lambda o: bench_loop(o.rounds, o.steps),
        "data": lambda o: bench_data(o.rounds),
        "endtoend": lambda o: bench_endtoend(o.rounds),
        "allocator": lambda o: bench_allocator(o.rounds),
        "epoch": lambda o: bench_epoch(162_770 if torch.cuda.is_available() else 20_000),
        "scale": lambda o: bench_scale(o.largest, o.folder),
        "speedrun": lambda o: bench_speedrun(o.rounds, o.steps, o.search),
    }
    parser = argparse.ArgumentParser(
        prog="python -m vaelab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", choices=[*what, []], metavar="项目", help=f"{'、'.join(what)}（默认前三项）")
    parser.add_argument("--rounds", type=int, default=7, help="交错的轮数（默认 7）")
    parser.add_argument("--steps", type=int, default=15, help="每轮的步数（默认 15）")
    parser.add_argument("--largest", type=int, default=6, help="scale 的图片数到 10 的几次方（默认 6；7 要 31 GB 磁盘）")
    parser.add_argument("--folder", help="scale 的大文件放在哪里（默认系统的临时文件夹）")
    parser.add_argument("--search", action="store_true", help="speedrun 先重做对通常循环的搜索")
    parser.add_argument("--record", action="store_true", help=f"并进 {RECORDS.relative_to(RECORDS.parent.parent)} 里这台机器的记录")
    options = parser.parse_args(argv)
    print(f"{machine()}，torch {torch.__version__}，{torch.get_num_threads()} 线程", flush=True)
    for name in options.what or list(what)[:3]:
        section = what[name](options)
        if options.record:
            print(f"记在 {write_record({name: section}).name}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
