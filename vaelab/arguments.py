"""命令行认得的参数，与它们的说明。"""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from dataclasses import fields
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import torch

from vaelab import choose
from vaelab.config import DATA_DEFAULTS, MAX_COUNT, MAX_SEED, MODEL_DEFAULTS, PRECISIONS, TrainConfig
from vaelab.data import NAMES
from vaelab.files import program
from vaelab.memory import model_memory, require_memory
from vaelab.parser import Parser, Real, UsageError, Whole, path, quoted
from vaelab.plan import PLACES, SWITCHES
from vaelab.processes import pick_device

SAMPLE_FORMATS = ("grid", "png", "npz")
PRIORS = ("standard", "fitted")
EXPORT_FORMATS = ("safetensors", "onnx")
SEED = Whole(high=MAX_SEED)
MAX_LEVELS = 16  # 每一级边长减半，边长至多 2**16
EXAMPLES = """例子：
  {program}                                       画一万张卡通脸，训练，画出结果
  {program} train --data mnist --download --image-size 32
  {program} train --data ~/Pictures --image-size 64 --epochs 50
  {program} train --resume --epochs 40            接着最近一次训练，直到 40 轮
  {program} sample runs/faces --num 100
  {program} interpolate runs/faces --first 3 --second 8
  {program} evaluate runs/faces --importance-samples 64
  torchrun --nproc_per_node 4 {module} train --batch-size 256    四个进程一起训练，批大小是四份之和
每个子命令都有自己的 --help。"""


def _widths(text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split(",")]
    except ValueError:
        widths = []
    if not 1 <= len(widths) <= MAX_LEVELS or max(widths) > MAX_COUNT:
        raise argparse.ArgumentTypeError(f"应为逗号隔开的整数，至多 {MAX_LEVELS} 个，各不超过 {MAX_COUNT}，如 32,64,128")
    return widths


def _kld_weight(text: str) -> float | str:
    try:
        return text if text == "optimal" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError("应为一个数或 optimal") from None


def build_parser() -> Parser:
    name = program().removeprefix("python ")
    examples = EXAMPLES.format(program=program(), module=name if name.endswith(".py") else "-m vanilla_vae")
    parser = Parser(prog=name, description="训练与使用变分自动编码器。不带子命令就是 train。", epilog=examples)
    parser.add_argument("--version", action="version", version=f"{name} {version()}（torch {torch.__version__}）", help="显示版本")
    commands = parser.add_subparsers(title="子命令", dest="command", parser_class=Parser, metavar="子命令")

    # 缺省值一律不写进解析结果（SUPPRESS），这样续训时才知道哪些是你明说的。
    command = commands.add_parser("train", help="训练", description="训练一个 VAE，结果存在 --out 里。", epilog=examples)
    config = {field.name: field.default for field in fields(TrainConfig)}

    def option(name: str, text: str, **kwargs) -> None:
        command.add_argument(name, default=argparse.SUPPRESS, help=text, **kwargs)

    option("--data", f"数据：{'、'.join(NAMES)}，或图片文件夹的路径（默认 faces，按公式画的卡通脸）", type=path, metavar="名字或路径")
    option("--root", "torchvision 数据与 CelebA 所在的文件夹（默认 data）", type=path, metavar="路径")
    option("--download", "没有时允许下载", action="store_true")
    option("--image-size", "图像边长，像素（默认 64）", type=Whole(high=2**16), metavar="N")
    option("--channels", "1 灰度，3 彩色（默认随数据）", type=Whole(), choices=(1, 3))
    option("--count", f"画多少张脸（默认 {DATA_DEFAULTS['count']}）", type=Whole(), metavar="N")
    option("--data-seed", "画脸与划分测试集的种子（默认 0）", type=SEED, metavar="N")
    option("--latent-dim", f"隐变量维数（默认 {MODEL_DEFAULTS['latent_dim']}）", type=Whole(), metavar="N")
    widths = ",".join(map(str, MODEL_DEFAULTS["hidden_dims"]))
    option("--hidden-dims", f"各级通道数（默认 {widths}）", type=_widths, metavar="N,N,…")
    option("--epochs", f"轮数（默认 {config['epochs']}）", type=Whole(), metavar="N")
    option("--steps", "走多少步，代替 --epochs", type=Whole(low=1), metavar="N")
    option("--minutes", "最多训练多少分钟：按这台机器量得的速度定步数", type=Real(low=0.01, high=1e6), metavar="X")
    option("--batch-size", f"批大小（默认 {config['batch_size']}）", type=Whole(), metavar="N")
    option("--lr", f"学习率的最高值（默认 {config['lr']}）", type=Real(), metavar="X")
    kld_text = f"KL 的权重 2σ²/D：一个数，或 optimal，即 σ² = MSE（默认 {config['kld_weight']}）"
    option("--kld-weight", kld_text, type=_kld_weight, metavar="X|optimal")
    option("--flip", "训练时随机左右翻转（默认 auto：自己的图片，平均图左右对称才翻）", choices=SWITCHES)
    option("--seed", "初始权重、次序与噪声的种子（默认 0）", type=SEED, metavar="N")
    option("--precision", "计算精度（默认 auto：这台设备上真的更快才用半精度）", choices=PRECISIONS)
    option("--compile", "用 torch.compile 编译（默认 auto：CPU 与 CUDA 上步数够多才编译）", choices=SWITCHES)
    option("--cuda-graphs", "把整个一步录成一张 CUDA 图（默认 auto：CUDA 上只有一个进程时就录）", choices=SWITCHES)
    option("--data-on", "训练集放在设备上还是逐批搬运（默认 auto：显存放得下就放）", choices=PLACES)
    option("--local-batch-norm", "多进程时批归一化各算各的（默认合起来统计，数与单进程相同）", action="store_true")
    option("--join-timeout", "多进程时等其余进程到齐的秒数（默认 300）", type=Real(low=0.001, high=1e6), metavar="秒")
    option("--out", "结果文件夹（默认 runs/<数据名>，已有就另起一个）", type=path, metavar="路径")
    option("--resume", "从 --out（默认最近一次训练）的检查点接着训练", action="store_true")
    option("--other-data", "续训时坚持用与检查点不同的数据", action="store_true")
    option("--keep", "另外保留最近 N 份更早的检查点（默认 0）", type=Whole(low=0), metavar="N")
    option("--log-every", "每 N 步在 steps.csv 里写一行（默认不写）", type=Whole(low=1), metavar="N")
    option("--tensorboard", "另写 TensorBoard 的日志（要装 tensorboard）", action="store_true")

    def run_command(name: str, text: str) -> Parser:
        command = commands.add_parser(name, help=text, description=f"{text}。")
        command.add_argument("run", type=path, nargs="?", help="训练过的文件夹（默认最近一次训练）", metavar="运行文件夹")
        return command

    command = run_command("sample", "从先验抽样，解码成图")
    command.add_argument("--num", type=Whole(high=10**6), default=64, help="张数（默认 64）", metavar="N")
    command.add_argument("--seed", type=SEED, default=0, help="种子（默认 0）", metavar="N")
    sample_text = "grid 拼成一张图，png 每张一个文件，npz 一个 uint8 数组 [N, H, W, C]（默认 grid）"
    command.add_argument("--format", choices=SAMPLE_FORMATS, default="grid", help=sample_text)
    prior_text = "从 N(0, I) 抽（standard），或从拟合训练图的隐变量得到的混合高斯抽（fitted）（默认 standard）"
    command.add_argument("--prior", choices=PRIORS, default="standard", help=prior_text)
    command = run_command("reconstruct", "重建测试图，或你给的图片")
    command.add_argument("--images", type=path, help="图片文件或文件夹（默认用训练时的测试集）", metavar="路径")
    command.add_argument("--num", type=Whole(high=10**6), default=16, help="张数（默认 16）", metavar="N")
    command = run_command("interpolate", "在两张图的隐变量之间插值")
    command.add_argument("--images", type=path, nargs=2, help="你自己的两张图（默认用测试集里的两张）", metavar=("图1", "图2"))
    command.add_argument("--first", type=Whole(), default=0, help="第一张测试图的编号（默认 0）", metavar="N")
    command.add_argument("--second", type=Whole(), default=1, help="第二张测试图的编号（默认 1）", metavar="N")
    command.add_argument("--steps", type=Whole(high=1000), default=9, help="含两端共几张（默认 9）", metavar="N")
    command = run_command("evaluate", "在测试集上评价")
    samples_text = "再算每张图取 K 个样本的重要性加权下界（默认不算）"
    command.add_argument("--importance-samples", type=Whole(high=10**6), default=0, help=samples_text, metavar="K")
    for name in ("sample", "reconstruct", "interpolate", "evaluate"):
        commands.choices[name].add_argument("--data", type=path, help="训练时的数据（默认照检查点记下的）", metavar="名字或路径")
        commands.choices[name].add_argument("--root", type=path, help="torchvision 数据与 CelebA 所在的文件夹（默认照检查点记下的）", metavar="路径")
    for name in ("train", "sample", "reconstruct", "interpolate", "evaluate"):
        commands.choices[name].add_argument("--device", default="auto", help="cuda、mps、cpu 或 auto（默认）", metavar="设备")
    run_command("info", "一次训练的概况：数据、模型、设置、走到哪里").set_defaults(device="cpu")
    command = run_command("export", "导出模型，给别的程序用")
    command.add_argument("--format", choices=EXPORT_FORMATS, default="safetensors", help="格式（默认 safetensors）")
    command.set_defaults(device="cpu")
    out_help = {"sample": "文件或文件夹", "reconstruct": "文件.png", "interpolate": "文件.png", "export": "文件"}
    for name, metavar in out_help.items():
        commands.choices[name].add_argument("--out", type=path, help="存到哪里（默认在运行文件夹里）", metavar=metavar)
    command = commands.add_parser("cache", help="解码缓存：在哪里，多大；清理", description="解码缓存在哪里、多大；加 --clear 清理。")
    command.add_argument("--clear", action="store_true", help="删掉缓存；与 --older-than 同用，只删久不用的")
    command.add_argument("--older-than", type=Real(low=0, high=1e6), help="只算多少天没有用过的", metavar="天")
    return parser


def check_early(options: argparse.Namespace) -> None:
    """不必打开任何文件就能拒绝的，在做任何活之前拒绝：合不到一起的参数，没有的设备，写不进的地方，装不下的模型与数据。

    Raises:
        UsageError: 参数不能同时用。
        ValueError: 设备、路径或大小不行；信息说明怎么改。
    """
    given = vars(options)
    if len(both := [f"--{name}" for name in ("epochs", "steps", "minutes") if name in given]) > 1:
        raise UsageError(f"--epochs、--steps 与 --minutes 应只给一个，收到了 {'、'.join(both)}；请只留一个。")
    if "device" in given:
        pick_device(options.device)
    if given.get("out") is not None:
        _require_writable(Path(options.out).expanduser(), folder=options.command == "train" and not given.get("resume"))
    if options.command == "train":
        TrainConfig(**{field.name: given[field.name] for field in fields(TrainConfig) if field.name in given})
        _require_room(given)


def _require_writable(out: Path, folder: bool) -> None:
    if folder and out.exists() and not out.is_dir():
        raise ValueError(f"--out 应为文件夹，{quoted(str(out))} 是一个文件；请换一个名字。")
    place = out if folder else out.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"--out 应在一个文件夹里，{quoted(str(place))} 是一个文件；请换一个位置。")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"--out 应在可以写的文件夹里，{quoted(str(place))} 不许这个用户写；请换一个位置，或改它的权限。")


def _require_room(given: dict) -> None:
    """模型与要画的脸装得进内存。续训时没有写明的取决于检查点，按最小的算，只拦一定装不下的。"""
    source, resume, device = given.get("data", DATA_DEFAULTS["data"]), given.get("resume", False), pick_device(given["device"])
    side = given.get("image_size", choose.image_size(source, device))
    defaults = MODEL_DEFAULTS if resume else choose.model_defaults(source, side)
    model = {"in_channels": given.get("channels") or 3, **{name: given.get(name, default) for name, default in defaults.items()}}
    side = 2 ** len(model["hidden_dims"]) if resume else side
    copies = 4 if device.type == "cpu" else 1  # 参数、梯度、Adam 的两份统计
    what = f"这样的模型（latent_dim {model['latent_dim']}、hidden_dims {','.join(map(str, model['hidden_dims']))}、图像边长 {side}）"
    require_memory(copies * model_memory({**model, "image_size": side}), what, "请减小 --latent-dim、--hidden-dims 或 --image-size")
    if source == "faces" and not resume:
        count = given.get("count", DATA_DEFAULTS["count"])
        require_memory(count * 3 * side**2, f"画 {count} 张边长 {side} 的脸", "请减小 --count 或 --image-size")


def version() -> str:
    """这一份代码的版本：旁边有 pyproject.toml 就照它，否则照安装时记下的。"""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file() and (found := re.search(r'^version = "(.+)"', project.read_text(encoding="utf-8"), re.MULTILINE)):
        return found[1]
    with suppress(PackageNotFoundError):
        return metadata.version("vae-zh")
    return "（未知）"
