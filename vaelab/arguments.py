"""命令行认得的参数，与它们的说明。"""

from __future__ import annotations

import argparse
import re
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

from vaelab.config import MODEL_DEFAULTS, PRECISIONS, TrainConfig
from vaelab.data import NAMES
from vaelab.plan import PLACES, SWITCHES

SAMPLE_FORMATS = ("grid", "png", "npz")
PRIORS = ("standard", "fitted")
EXPORT_FORMATS = ("safetensors", "onnx")
EXAMPLES = """例子：
  python vanilla_vae.py                                       画一万张卡通脸，训练，画出结果
  python vanilla_vae.py train --data mnist --download --image-size 32
  python vanilla_vae.py train --data ~/Pictures --image-size 64 --epochs 50
  python vanilla_vae.py train --resume --epochs 40            接着最近一次训练，直到 40 轮
  python vanilla_vae.py sample runs/faces --num 100
  python vanilla_vae.py interpolate runs/faces --first 3 --second 8
  python vanilla_vae.py evaluate runs/faces --importance-samples 64
  torchrun --nproc_per_node 4 vanilla_vae.py train --batch-size 256    四个进程一起训练，批大小是四份之和
每个子命令都有自己的 --help。"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def add_usage(self, usage, actions, groups, prefix=None):
        super().add_usage(usage, actions, groups, "用法：" if prefix is None else prefix)  # 子命令的 prog 要的是没有前缀的一行


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, add_help=False, formatter_class=_Formatter, **kwargs)
        self._positionals.title, self._optionals.title = "位置参数", "选项"
        self.add_argument("-h", "--help", action="help", help="显示这份说明")

    def error(self, message: str):
        raise ValueError(f"命令行参数有误（{message}）；加 --help 看可用的参数。")


def _widths(text: str) -> list[int]:
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"应为逗号隔开的整数，如 32,64,128；收到 {text!r}") from None


def _kld_weight(text: str) -> float | str:
    try:
        return text if text == "optimal" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"应为一个数或 optimal；收到 {text!r}") from None


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vanilla_vae.py", description="训练与使用变分自动编码器。不带子命令就是 train。", epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"vanilla_vae.py {version()}（torch {torch.__version__}）", help="显示版本")
    commands = parser.add_subparsers(title="子命令", dest="command", parser_class=_Parser, metavar="")

    # 缺省值一律不写进解析结果（SUPPRESS），这样续训时才知道哪些是你明说的。
    command = commands.add_parser("train", help="训练", description="训练一个 VAE，结果存在 --out 里。", epilog=EXAMPLES)
    config = {field.name: field.default for field in fields(TrainConfig)}

    def option(name: str, text: str, **kwargs) -> None:
        command.add_argument(name, default=argparse.SUPPRESS, help=text, **kwargs)

    option("--data", f"数据：{'、'.join(NAMES)}，或图片文件夹的路径（默认 faces，按公式画的卡通脸）", metavar="名字或路径")
    option("--root", "torchvision 数据与 CelebA 所在的文件夹（默认 data）", metavar="路径")
    option("--download", "没有时允许下载", action="store_true")
    option("--image-size", "图像边长，像素（默认 64）", type=int, metavar="N")
    option("--channels", "1 灰度，3 彩色（默认随数据）", type=int, choices=(1, 3))
    option("--count", "画多少张脸（默认 10000）", type=int, metavar="N")
    option("--data-seed", "画脸与划分测试集的种子（默认 0）", type=int, metavar="N")
    option("--latent-dim", f"隐变量维数（默认 {MODEL_DEFAULTS['latent_dim']}）", type=int, metavar="N")
    widths = ",".join(map(str, MODEL_DEFAULTS["hidden_dims"]))
    option("--hidden-dims", f"各级通道数（默认 {widths}）", type=_widths, metavar="N,N,…")
    option("--epochs", f"轮数（默认 {config['epochs']}）", type=int, metavar="N")
    option("--steps", "走多少步，代替 --epochs", type=int, metavar="N")
    option("--minutes", "最多训练多少分钟：按这台机器量得的速度定步数", type=float, metavar="X")
    option("--batch-size", f"批大小（默认 {config['batch_size']}）", type=int, metavar="N")
    option("--lr", f"学习率的最高值（默认 {config['lr']}）", type=float, metavar="X")
    kld_text = f"KL 的权重 2σ²/D：一个数，或 optimal，即 σ² = MSE（默认 {config['kld_weight']}）"
    option("--kld-weight", kld_text, type=_kld_weight, metavar="X|optimal")
    option("--seed", "初始权重、次序与噪声的种子（默认 0）", type=int, metavar="N")
    option("--precision", "计算精度（默认 auto：这台设备上真的更快才用半精度）", choices=PRECISIONS)
    option("--compile", "用 torch.compile 编译（默认 auto：CPU 与 CUDA 上步数够多才编译）", choices=SWITCHES)
    option("--cuda-graphs", "把整个一步录成一张 CUDA 图（默认 auto：CUDA 上只有一个进程时就录）", choices=SWITCHES)
    option("--data-on", "训练集放在设备上还是逐批搬运（默认 auto：显存放得下就放）", choices=PLACES)
    option("--local-batch-norm", "多进程时批归一化各算各的（默认合起来统计，数与单进程相同）", action="store_true")
    option("--join-timeout", "多进程时等其余进程到齐的秒数（默认 300）", type=float, metavar="秒")
    option("--out", "结果文件夹（默认 runs/<数据名>，已有就另起一个）", metavar="路径")
    option("--resume", "从 --out（默认最近一次训练）的检查点接着训练", action="store_true")
    option("--other-data", "续训时坚持用与检查点不同的数据", action="store_true")
    option("--keep", "另外保留最近 N 份更早的检查点（默认 0）", type=int, metavar="N")
    option("--log-every", "每 N 步在 steps.csv 里写一行（默认不写）", type=int, metavar="N")
    option("--tensorboard", "另写 TensorBoard 的日志（要装 tensorboard）", action="store_true")

    def run_command(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=f"{text}。")
        command.add_argument("run", nargs="?", help="训练过的文件夹（默认最近一次训练）", metavar="运行文件夹")
        return command

    command = run_command("sample", "从先验抽样，解码成图")
    command.add_argument("--num", type=int, default=64, help="张数（默认 64）", metavar="N")
    command.add_argument("--seed", type=int, default=0, help="种子（默认 0）", metavar="N")
    sample_text = "grid 拼成一张图，png 每张一个文件，npz 一个 uint8 数组 [N, H, W, C]（默认 grid）"
    command.add_argument("--format", choices=SAMPLE_FORMATS, default="grid", help=sample_text)
    prior_text = "从 N(0, I) 抽（standard），或从拟合训练图的隐变量得到的混合高斯抽（fitted）（默认 standard）"
    command.add_argument("--prior", choices=PRIORS, default="standard", help=prior_text)
    command = run_command("reconstruct", "重建测试图，或你给的图片")
    command.add_argument("--images", help="图片文件或文件夹（默认用训练时的测试集）", metavar="路径")
    command.add_argument("--num", type=int, default=16, help="张数（默认 16）", metavar="N")
    command = run_command("interpolate", "在两张图的隐变量之间插值")
    command.add_argument("--images", nargs=2, help="你自己的两张图（默认用测试集里的两张）", metavar=("图1", "图2"))
    command.add_argument("--first", type=int, default=0, help="第一张测试图的编号（默认 0）", metavar="N")
    command.add_argument("--second", type=int, default=1, help="第二张测试图的编号（默认 1）", metavar="N")
    command.add_argument("--steps", type=int, default=9, help="含两端共几张（默认 9）", metavar="N")
    command = run_command("evaluate", "在测试集上评价")
    samples_text = "再算每张图取 K 个样本的重要性加权下界（默认不算）"
    command.add_argument("--importance-samples", type=int, default=0, help=samples_text, metavar="K")
    for name in ("sample", "reconstruct", "interpolate", "evaluate"):
        commands.choices[name].add_argument("--data", help="训练时的数据（默认照检查点记下的）", metavar="名字或路径")
        commands.choices[name].add_argument("--root", help="torchvision 数据与 CelebA 所在的文件夹（默认照检查点记下的）", metavar="路径")
    for name in ("train", "sample", "reconstruct", "interpolate", "evaluate"):
        commands.choices[name].add_argument("--device", default="auto", help="cuda、mps、cpu 或 auto（默认）", metavar="设备")
    run_command("info", "一次训练的概况：数据、模型、设置、走到哪里").set_defaults(device="cpu")
    command = run_command("export", "导出模型，给别的程序用")
    command.add_argument("--format", choices=EXPORT_FORMATS, default="safetensors", help="格式（默认 safetensors）")
    command.set_defaults(device="cpu")
    out_help = {"sample": "文件或文件夹", "reconstruct": "文件.png", "interpolate": "文件.png", "export": "文件"}
    for name, metavar in out_help.items():
        commands.choices[name].add_argument("--out", help="存到哪里（默认在运行文件夹里）", metavar=metavar)
    command = commands.add_parser("cache", help="解码缓存：在哪里，多大；清理", description="解码缓存在哪里、多大；加 --clear 清理。")
    command.add_argument("--clear", action="store_true", help="删掉缓存；与 --older-than 同用，只删久不用的")
    command.add_argument("--older-than", type=float, help="只算多少天没有用过的", metavar="天")
    return parser


def version() -> str:
    """这一份代码的版本：旁边有 pyproject.toml 就照它，否则照安装时记下的。"""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file() and (found := re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)):
        return found[1]
    with suppress(PackageNotFoundError):
        return metadata.version("vae-zh")
    return "（未知）"
