"""``python -m vaelab.bench``：通常的做法与本项目的做法，在同一次运行里交错测速，给出比值与起伏。

- ``loop``：训练循环。通常的做法是 eager、float32、NCHW、Adam，图像是内存里的浮点张量，每步取回损失；
  两边结构、批大小、学习率、权重相同；准备的时间另列，说出从多少步起到几倍。
- ``data``：数据通路。通常的做法是 DataLoader 逐张用 PIL 解码 JPEG、裁剪、缩放、ToTensor；本项目读解码好的缓存。
- ``endtoend``：从 JPEG 到权重，上面两样连在一起。
- ``allocator``：虚拟机上的缺页，与留住释放的内存省下的时间（Linux）。
- ``epoch``：CelebA 那么大的一轮（CPU 上只走一万张），与搬运、运算定下的下限相比；两边同样的配方，比测试 ELBO。
- ``scale``：速度与内存怎样随批大小、边长、宽度、图片数增长。
- ``auto``：自动选的做法与通常的循环，几种模型、批大小、步数，准备的时间都算上；哪里反而慢，表里会说。
- ``likelihood``：无损压缩器与十种似然的小 VAE，比特/像素（09 章）；``--root`` 指出 MNIST 在哪里，不写就用画的脸。
- ``speedrun``：到达同样的测试 ELBO 要多久，一级一级的阶梯。

``--record`` 把结果并进 ``vaelab/records/`` 里这台机器的那一份，课程与 README 从那里读。

两边各在自己的进程里，轮到谁谁跑，另一边等着：内存分配器的设置互不影响，机器的快慢对两边一视同仁。
CPU 上只看比值；机器有闲有忙，绝对的快慢只对当时当地有意义。
"""

from __future__ import annotations

import argparse

import torch

from vaelab.bench.allocator import bench_allocator
from vaelab.bench.auto import bench_auto
from vaelab.bench.epoch import bench_epoch
from vaelab.bench.likelihood import bench_likelihood
from vaelab.bench.loop import bench_loop
from vaelab.bench.pipeline import bench_data, bench_endtoend
from vaelab.bench.scale import bench_scale
from vaelab.bench.speedrun import bench_speedrun
from vaelab.records import machine, write_record


def main(argv: list[str] | None = None) -> int:
    """命令行入口。"""
    what = {
        "loop": lambda o: bench_loop(o.rounds, o.steps),
        "data": lambda o: bench_data(o.rounds),
        "endtoend": lambda o: bench_endtoend(o.rounds),
        "allocator": lambda o: bench_allocator(o.rounds),
        "epoch": lambda o: bench_epoch(162_770 if torch.cuda.is_available() else 10_000),
        "scale": lambda o: bench_scale(o.largest, o.folder),
        "auto": lambda o: bench_auto(o.rounds),
        "likelihood": lambda o: bench_likelihood(o.root),
        "speedrun": lambda o: bench_speedrun(o.rounds, o.steps, o.search),
    }
    parser = argparse.ArgumentParser(prog="python -m vaelab.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=[*what, []], metavar="项目", help=f"{'、'.join(what)}（默认前三项）")
    parser.add_argument("--rounds", type=int, default=7, help="交错的轮数（默认 7）")
    parser.add_argument("--steps", type=int, default=15, help="每轮的步数（默认 15）")
    parser.add_argument("--largest", type=int, default=6, help="scale 的图片数到 10 的几次方（默认 6；7 要 31 GB 磁盘）")
    parser.add_argument("--folder", help="scale 的大文件放在哪里（默认系统的临时文件夹）")
    parser.add_argument("--root", help="likelihood 用的 MNIST 所在的文件夹（torchvision 的布局）；不写就用 32×32 的灰度脸")
    parser.add_argument(
        "--search",
        action="store_true",
        help="speedrun 连与快慢无关的一半（搜索、定长度、各颗种子）也重做，要二十来分钟；不写就沿用这台机器的记录，只重新量时间",
    )
    parser.add_argument("--record", action="store_true", help="并进 vaelab/records/ 里这台机器的记录")
    options = parser.parse_args(argv)
    print(f"{machine()}，torch {torch.__version__}，{torch.get_num_threads()} 线程", flush=True)
    for name in options.what or list(what)[:3]:
        section = what[name](options)
        if options.record:
            print(f"记在 {write_record({name: section}).name}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
