"""数据通路快几倍，从 JPEG 到权重快几倍：通常的做法是 DataLoader 逐张解码、裁剪、缩放，本项目读解码好的缓存。"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from vaelab.bench.contest import Contest, ratio, say
from vaelab.bench.recipes import BATCH, FULL, REPEAT, Recipe, repeats, steps_of
from vaelab.data import load
from vaelab.faces import draw_faces
from vaelab.images import ImageSet, batches, to_float
from vaelab.processes import pick_device
from vanilla_vae import VanillaVAE


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


def _our_data(folder: str) -> Iterator[None]:
    images = _cached(folder).train
    while True:
        for _ in range(REPEAT):
            for batch in batches(images, BATCH, torch.Generator().manual_seed(0)):
                to_float(batch)
        yield


def _usual_end_to_end(folder: str) -> Iterator[None]:
    """通常的一轮：DataLoader 从 JPEG 取图，float32 eager 训练，每步取回损失。"""
    device = pick_device()
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
        for _ in range(repeats() * steps):
            next(walk)
        yield


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
    say(label, result["ratio"])
    return result


def bench_data(rounds: int) -> dict:
    """数据通路的比值：同样的 JPEG，通常的做法逐张解码，本项目读缓存。"""
    return _from_jpegs("数据通路", _usual_data, _our_data, REPEAT, rounds)


def bench_endtoend(rounds: int) -> dict:
    """从 JPEG 到权重走一轮的比值。"""
    return _from_jpegs("从 JPEG 到权重", _usual_end_to_end, _our_end_to_end, repeats(), rounds)
