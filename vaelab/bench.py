"""``python -m vaelab.bench``：通常的做法与本项目的做法，在同一次运行里交错测速，给出比值与起伏。

- ``loop``：训练循环。通常的做法是 eager、float32、NCHW、Adam，图像是内存里的浮点张量；两边结构、批大小相同，
  训练完同样多的图之后再比测试 ELBO。
- ``data``：数据通路。通常的做法是 DataLoader 逐张用 PIL 解码 JPEG、裁剪、缩放、ToTensor；本项目读解码好的缓存。

两边各在自己的进程里，轮到谁谁跑，另一边等着：内存分配器的设置互不影响，机器的快慢对两边一视同仁。
这里只有比值；机器有闲有忙，绝对的快慢只对当时当地有意义。
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from vaelab import train
from vaelab.data import batches, draw_faces, load, to_float
from vaelab.evaluate import evaluate
from vanilla_vae import VanillaVAE

KLD_WEIGHT = 0.00025
LR = 1e-3


# ---------------------------------------------------------------- 训练循环


def _faces(batch_size: int, steps: int):
    return load("faces", image_size=64, count=min(9_000, batch_size * steps) * 10 // 9 + 2)


def _usual_loop(batch_size: int, steps: int) -> Iterator[float]:
    """通常的循环，就像多数教程里写的那样；每走一步交出一次控制，最后交出测试 ELBO。"""
    data = _faces(batch_size, steps)
    torch.manual_seed(0)
    model = VanillaVAE(3, 128)
    for module in model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.inplace = False
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    dataset = torch.utils.data.TensorDataset(to_float(data.train))
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    done = 0
    while True:
        for (x,) in loader:
            if done == steps:
                yield evaluate(model, data.test).elbo
                return
            losses = model.loss_function(*model(x), M_N=KLD_WEIGHT)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            losses["loss"].item()
            done += 1
            yield 0.0


def _our_loop(batch_size: int, steps: int) -> Iterator[float]:
    """``vaelab.train`` 的一步，同样的结构、批大小、学习率与权重。"""
    data = _faces(batch_size, steps)
    torch.manual_seed(0)
    model = VanillaVAE(3, 128)
    config = train.TrainConfig(batch_size=batch_size, lr=LR, kld_weight=KLD_WEIGHT)
    device = torch.device("cpu")
    use_bf16 = train.pick_precision("auto", device) == "bf16"
    optimizer = train.prepare(model, config, device)
    done = 0
    while True:
        for images in batches(data.train, batch_size, torch.Generator().manual_seed(done)):
            if done == steps:
                yield evaluate(model, data.test).elbo
                return
            train.train_step(model, optimizer, images, config, done, steps, use_bf16)["loss"].item()
            done += 1
            yield 0.0


# ---------------------------------------------------------------- 数据通路


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


def _usual_data(folder: str, batch_size: int, steps: int) -> Iterator[float]:
    workers = min(4, os.cpu_count() or 1)
    dataset = JpegFolder(folder)
    loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, drop_last=True, num_workers=workers)
    for _ in range(steps):
        for _ in loader:
            pass
        yield 0.0
    yield 0.0


def _our_data(folder: str, batch_size: int, steps: int) -> Iterator[float]:
    data = load(folder, image_size=64, cache_dir=f"{folder}-cache", progress=False)
    images = torch.cat([data.train, data.test]) if len(data.test) < batch_size else data.train
    repeat = 20  # 一遍太短，量不准；重复多遍，按张数折算
    for _ in range(steps):
        for _ in range(repeat):
            for batch in batches(images, batch_size, torch.Generator().manual_seed(0)):
                to_float(batch)
        yield 0.0
    yield len(images) // batch_size * batch_size * repeat


def _write_jpegs(folder: Path, count: int) -> None:
    """CelebA 大小（178×218）的 JPEG，内容是卡通脸。"""
    from PIL import Image

    folder.mkdir()
    factors = torch.rand(count, 12, generator=torch.Generator().manual_seed(0))
    for index, face in enumerate(draw_faces(factors, 218)[..., 20:198].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(face).save(folder / f"{index:06d}.jpg", quality=95)


# ---------------------------------------------------------------- 交错测速


def _worker(pipe, make: Callable[..., Iterator[float]], arguments: tuple) -> None:
    steps = make(*arguments)
    while (count := pipe.recv()) is not None:
        started = time.perf_counter()
        value = 0.0
        for _ in range(count):
            value = next(steps)
        pipe.send((time.perf_counter() - started, value))


def interleave(jobs: dict[str, tuple], rounds: int, steps: int, warmup: int) -> tuple[dict, dict]:
    """每一轮里各方依次走 ``steps`` 步；返回各方每轮的秒数，与最后多走一步交出的值。"""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, (make, *arguments) in jobs.items():
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, make, tuple(arguments)), daemon=True)
        process.start()
        theirs.close()  # 子进程若死，recv 立即报错而不是一直等
        processes.append(process)

    def go(name: str, count: int) -> tuple[float, float]:
        pipes[name].send(count)
        return pipes[name].recv()

    for name in jobs:
        go(name, warmup)
    seconds = {name: [] for name in jobs}
    for _ in range(rounds):
        for name in jobs:
            seconds[name].append(go(name, steps)[0])
    values = {name: go(name, 1)[1] for name in jobs}
    for name, process in zip(jobs, processes):
        pipes[name].send(None)
        process.join()
    return seconds, values


def _ratio(label: str, ratios: list[float]) -> str:
    return f"{label}：{statistics.median(ratios):.2f} 倍（{len(ratios)} 轮，最低 {min(ratios):.2f}，最高 {max(ratios):.2f}）"


def bench_loop(batch_size: int, rounds: int, steps: int) -> None:
    """训练循环的比值，与训练同样多的图之后的测试 ELBO。"""
    warmup = 3
    total = warmup + rounds * steps
    jobs = {"usual": (_usual_loop, batch_size, total), "ours": (_our_loop, batch_size, total)}
    seconds, elbo = interleave(jobs, rounds, steps, warmup)
    print(_ratio("训练循环", [a / b for a, b in zip(seconds["usual"], seconds["ours"])]), flush=True)
    print(f"训练 {total * batch_size} 张之后的测试 ELBO：通常 {elbo['usual']:.0f}，本项目 {elbo['ours']:.0f} nat/图")


def bench_data(batch_size: int, rounds: int, count: int = 1000) -> None:
    """数据通路的比值：同样的 JPEG，通常的做法逐张解码，本项目读缓存（解码在计时之外）。"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        pictures = Path(folder, "jpeg")
        _write_jpegs(pictures, count)
        arguments = (str(pictures), batch_size, rounds + 1)
        seconds, images = interleave({"usual": (_usual_data, *arguments), "ours": (_our_data, *arguments)}, rounds, 1, 1)
    usual = count // batch_size * batch_size
    print(_ratio("数据通路", [(images["ours"] / b) / (usual / a) for a, b in zip(seconds["usual"], seconds["ours"])]), flush=True)


def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    parser = argparse.ArgumentParser(prog="python -m vaelab.bench", description="交错测速，给出比值。")
    parser.add_argument("what", nargs="*", choices=["loop", "data", []], help="测哪些（默认全测）")
    parser.add_argument("--batch-size", type=int, default=64, help="批大小（默认 64）")
    parser.add_argument("--rounds", type=int, default=7, help="轮数（默认 7）")
    parser.add_argument("--steps", type=int, default=15, help="训练循环每轮的步数（默认 15）")
    options = parser.parse_args(argv)
    precision = train.pick_precision("auto", torch.device("cpu"))
    print(f"{platform.machine()}，{torch.get_num_threads()} 线程，torch {torch.__version__}，本项目的精度 {precision}", flush=True)
    if not options.what or "loop" in options.what:
        bench_loop(options.batch_size, options.rounds, options.steps)
    if not options.what or "data" in options.what:
        bench_data(options.batch_size, options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
