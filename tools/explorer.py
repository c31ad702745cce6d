"""探索器：一页网页，转一转 VAE 的旋钮。这里造它的数据、拼出可以独立打开的文件夹。

用法：
  python tools/explorer.py                       训练默认的模型（两个 CPU 核上一分半钟），写下全部数据与 README 的动图
  python tools/explorer.py --run 运行文件夹      不训练，用已有的运行文件夹
  python tools/explorer.py --pictures            权重不动，只重画帧与动图
  python tools/explorer.py --assemble 文件夹     网页与数据拼成一个文件夹，双击 index.html 就能看

网页在 tools/explorer/，不用打包；由训练得来的数据在 photos/explorer/：

  manifest.json   模型的设置、成绩，各旋钮的 KL 与它最像的因子，几组现成的隐变量，张量在下面两个文件里的位置
  weights.bin     解码器与拟合的先验，float16，一个接一个
  encoder.bin     编码器，到 μ 为止
  spread.bin      编码器里给出 log_var 的一层，网页用不到
  frames.webp     一行一个旋钮，从左到右由 −3 转到 3，其余的停在开头那张脸的位置
  samples.webp    走直线的 13 张，先验的样本、拟合的先验的样本各 16 张，开头的脸

权重先舍入到 float16 再用：帧由 :func:`load` 给出的模型画，网页里算的也是它。
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # 没有安装课程时也找得到 vaelab

from vaelab import plot  # noqa: E402
from vaelab.data import load as load_data  # noqa: E402
from vaelab.evaluate import evaluate  # noqa: E402
from vaelab.faces import FACE_FACTORS, draw_faces  # noqa: E402
from vaelab.images import ImageSet, to_float, to_uint8  # noqa: E402
from vaelab.prior import Mixture, fit_prior  # noqa: E402
from vanilla_vae import VanillaVAE  # noqa: E402

PAGE, DATA, PICTURE = ROOT / "tools/explorer", ROOT / "photos/explorer", ROOT / "photos/explorer.webp"
PARTS = {"weights.bin": ("decoder", "final_layer", "prior"), "encoder.bin": ("encoder", "fc_mu"), "spread.bin": ("fc_var",)}
LABELS = {
    "skin": "肤色", "hair_hue": "发色", "hair_length": "发长", "face_width": "脸宽", "eye_gap": "眼距", "eye_size": "眼睛",
    "gaze": "目光", "brow": "眉毛", "mouth_curve": "嘴角", "mouth_width": "嘴宽", "pose": "转头", "background": "背景",
}  # fmt: skip
START = (0.78, 0.07, 0.62, 0.5, 0.5, 0.6, 0.5, 0.5, 0.72, 0.6, 0.5, 0.56)  # 开头的脸
POSITIONS = [round(-3 + step / 2, 1) for step in range(13)]  # 帧里旋钮的位置
WALK = (7, 94, 0, 62, 14, 69)  # 走直线用的测试图，头两张是开头的起点与终点
BATCH = 16  # 网页上每一种先验画几张
BINS = 20  # 量“一个旋钮有几成随一个因子变”时，因子分几格


# ---------------------------------------------------------------- 造数据


def train(run: Path) -> None:
    """按 ``python vanilla_vae.py`` 的缺省设置训练一遍。"""
    from vaelab import cli

    if cli.main(["train", "--out", str(run)]):
        raise SystemExit("训练没有完成，什么也没有写。")


def export(run: Path, folder: Path = DATA) -> None:
    """由运行文件夹写下权重与 manifest.json：权重舍入到 float16，再编码、拟合先验、量旋钮。"""
    from vaelab.checkpoint import load_checkpoint, load_model, model_args

    model = load_model(run).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    faces = load_data("faces")
    prior = fit_prior(model, faces.train)
    result = evaluate(model, faces.test)
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    tensors |= {f"prior.{name}": getattr(prior, name) for name in ("weights", "means", "factors")}
    chosen = faces.test_factors[list(WALK)]
    with torch.no_grad():
        mu = model.encode(to_float(faces.train))[0]
        (start, *walk) = model.encode(to_float(draw_faces(torch.cat([torch.tensor([START]), chosen]))))[0]
    generator = torch.Generator().manual_seed(0)
    drawn = {"prior": torch.randn(BATCH, model.latent_dim, generator=generator), "fitted": prior.sample(BATCH, generator)}
    measured = {"prior": torch.randn(500, model.latent_dim, generator=generator), "fitted": prior.sample(500, generator)}
    with torch.no_grad():
        measured["rebuilt"] = model.encode(to_float(faces.test[:500]))[0]
        measured = {name: nearest(model.decode(z), faces.train) for name, z in measured.items()}
    manifest = {
        "model": model_args(model),
        "training": {"command": "python vanilla_vae.py", "torch": torch.__version__.split("+")[0], **_settings(load_checkpoint(run))},
        "test": {"elbo": round(result.elbo, 1), "mse": round(result.mse, 5), "kld": round(result.kld, 2), "active": int(result.active_units)},
        "knobs": knobs(mu, faces.train_factors, result.kld_per_dim),
        "factors": [{"name": name, "label": LABELS[name]} for name in FACE_FACTORS],
        "positions": POSITIONS,
        "start": {"factors": list(START), "z": _rounded(start)},
        "faces": [{"factors": _rounded(row), "z": _rounded(z)} for row, z in zip(chosen, walk)],
        "distance": {name: round(value, 4) for name, value in measured.items()},
        "midway": {name: round(value, 4) for name, value in midway(model, faces).items()},
        "samples": {name: [_rounded(row) for row in z] for name, z in drawn.items()},
        "tensors": {},
    }
    for file, prefixes in PARTS.items():
        entries, content = [], b""
        for name, value in tensors.items():
            if name.split(".")[0].removesuffix("_input") in prefixes:
                half = value.detach().numpy().astype("<f2")
                if not np.isfinite(half).all():
                    raise SystemExit(f"{name} 里有 float16 装不下的数，什么也没有写；请换一个模型。")
                entries.append({"name": name, "shape": list(value.shape), "offset": len(content)})
                content += half.tobytes()
        manifest["tensors"][file] = entries
        (folder / file).write_bytes(content)
    lines = json.dumps(manifest, ensure_ascii=False)
    (folder / "manifest.json").write_text(lines + "\n", encoding="utf-8")


def _settings(state: dict) -> dict:
    config = state["config"] if isinstance(state["config"], dict) else vars(state["config"])
    return {name: config[name] for name in ("epochs", "batch_size", "lr", "kld_weight", "seed")}


def _rounded(row: Tensor) -> list[float]:
    return [round(float(value), 4) for value in row]


def knobs(mu: Tensor, factors: Tensor, kld: Tensor) -> list[dict]:
    """各旋钮（隐变量），按 KL 从大到小：编号、KL、活跃与否、散布，它最像哪个因子、有几成。

    “几成”是相关比 η²：按一个因子分成 :data:`BINS` 格，各格平均的方差占 ``mu`` 总方差的比例；不要求单调，色相绕一圈也量得出。
    """
    share = torch.zeros(mu.shape[1], factors.shape[1])
    for k, column in enumerate((factors * BINS).long().clamp(max=BINS - 1).T):
        counts = torch.bincount(column, minlength=BINS).clamp(min=1)
        means = torch.zeros(BINS, mu.shape[1]).index_add_(0, column, mu) / counts[:, None]
        between = (counts[:, None] * (means - mu.mean(0)).square()).sum(0) / len(mu)
        share[:, k] = between / mu.var(0, correction=0)
    rows = []
    for j in kld.argsort(descending=True).tolist():
        best = int(share[j].argmax())
        row = {"latent": j, "kld": round(float(kld[j]), 2), "active": bool(mu[:, j].var() > 0.01), "std": round(float(mu[:, j].std()), 3)}
        rows.append({**row, "factor": FACE_FACTORS[best], "share": round(float(share[j, best]), 2)})
    return rows


@torch.no_grad()
def nearest(images: Tensor, known: Tensor) -> float:
    """[-1, 1] 的浮点图到最近一张训练图（uint8）的 MSE，取平均。"""
    images = images.flatten(1)
    return float(torch.cdist(images, to_float(known).flatten(1)).amin(1).square().mean() / images.shape[1])


@torch.no_grad()
def midway(model: VanillaVAE, faces: ImageSet) -> dict[str, float]:
    """三百对测试脸的半路上，离最近的训练脸有多远：在隐变量里取中点，与把像素平均。"""
    first, second = to_float(faces.test[:300]), to_float(faces.test[300:600])
    middle = model.decode((model.encode(first)[0] + model.encode(second)[0]) / 2)
    return {"latent": nearest(middle, faces.train), "pixels": nearest((first + second) / 2, faces.train)}


# ---------------------------------------------------------------- 用数据


def load(folder: Path = DATA) -> tuple[VanillaVAE, Mixture, dict]:
    """读回 :func:`export` 写下的：模型（eval，float32，权重都是 float16 装得下的）、拟合的先验、manifest。"""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tensors = {}
    for file, entries in manifest["tensors"].items():
        content = (folder / file).read_bytes()
        for each in entries:
            half = np.frombuffer(content, "<f2", math.prod(each["shape"]), each["offset"])
            tensors[each["name"]] = torch.from_numpy(half.astype("float32")).view(each["shape"])
    weights, means, factors = (tensors.pop(f"prior.{name}").double() for name in ("weights", "means", "factors"))
    model = VanillaVAE(**manifest["model"])
    model.load_state_dict(tensors, strict=False)  # 只缺 num_batches_tracked，eval 用不到
    return model.eval(), Mixture(weights / weights.sum(), means, factors @ factors.mT), manifest


def frame_codes(manifest: dict) -> Tensor:
    """``frames.webp`` 里各帧的隐变量，按行：[旋钮数 · 13, L]。"""
    start = torch.tensor(manifest["start"]["z"])
    z = start.repeat(len(manifest["knobs"]), len(manifest["positions"]), 1)
    for row, knob in enumerate(manifest["knobs"]):
        z[row, :, knob["latent"]] = torch.tensor(manifest["positions"])
    return z.flatten(0, 1)


def sample_codes(manifest: dict) -> Tensor:
    """``samples.webp`` 里各帧的隐变量：走直线的 13 张，先验的、拟合的先验的各 16 张，开头的脸。"""
    a, b = (torch.tensor(manifest["faces"][i]["z"]) for i in (0, 1))
    t = torch.linspace(0, 1, len(manifest["positions"]))[:, None]
    return torch.cat(
        [a + t * (b - a), *(torch.tensor(manifest["samples"][name]) for name in ("prior", "fitted")), torch.tensor([manifest["start"]["z"]])]
    )


def decode(model: VanillaVAE, z: Tensor) -> Tensor:
    """[N, L] → uint8 [N, C, H, W]"""
    with torch.no_grad():
        return torch.cat([to_uint8(model.decode(part)) for part in z.split(256)])


def draw_frames(folder: Path = DATA, quality: int = 62) -> None:
    """画 ``frames.webp`` 与 ``samples.webp``。"""
    model, _, manifest = load(folder)
    for file, z in (("frames.webp", frame_codes(manifest)), ("samples.webp", sample_codes(manifest))):
        sheet = plot.tile(decode(model, z), len(POSITIONS), gap=0)
        Image.fromarray(sheet).save(folder / file, quality=quality, method=6)


# ---------------------------------------------------------------- README 的动图

PAPER, CARD, INK, GROOVE, TRUE, LEARNED = "#FAF7F1", "#FFFFFF", "#23201B", "#E9E2D5", "#A8490A", "#0B62A3"
STEPS = 46  # 一圈几帧


def journey() -> Tensor:
    """动图走的路：因子 [STEPS, 12]，首尾相接。两个色相各绕一圈，其余的来回摆，先后错开。"""
    t = torch.arange(STEPS) / STEPS
    factors = torch.tensor(START).repeat(STEPS, 1)
    for i, name in enumerate(FACE_FACTORS):
        if name in ("hair_hue", "background"):
            factors[:, i] = (factors[:, i] + (t if name == "hair_hue" else -t)) % 1
        else:
            laps = 1 + i % 2
            factors[:, i] = 0.5 + 0.44 * torch.sin(2 * math.pi * (laps * t + i * 0.137))
    return factors


def draw_animation(path: Path = PICTURE, quality: int = 35) -> None:
    """``photos/explorer.webp``：转真的旋钮，学到的旋钮跟着转。"""
    model, _, manifest = load()
    factors = journey()
    real = draw_faces(factors)
    with torch.no_grad():
        z = model.encode(to_float(real))[0][:, [knob["latent"] for knob in manifest["knobs"]]]
        rebuilt = model.generate(to_float(real))
    used = sum(knob["kld"] >= 0.1 for knob in manifest["knobs"])
    frames = [_scene(*each, used) for each in zip(real, to_uint8(rebuilt), factors, z)]
    # 隔一帧就有一帧是完整的：慢慢变的底色每步只差几级，只存变化的话，会留下前几帧的残块
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=150, loop=0, quality=quality, method=4, kmin=1, kmax=2)


def _scene(real: Tensor, rebuilt: Tensor, factors: Tensor, z: Tensor, used: int) -> Image.Image:
    """动图的一帧：左边公式画的脸与真的旋钮，右边 VAE 画的脸与用上了的旋钮。先画两倍大，再缩小，边缘就光滑。"""
    width, height, face = 1440, 568, 272
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    sides = (
        (30, "真的旋钮：画脸的公式", TRUE, real, factors * 2 - 1, list(LABELS.values())),
        (width // 2 + 15, "学到的旋钮：VAE", LEARNED, rebuilt, z[:used] / 3, [str(row + 1) for row in range(used)]),
    )
    for left, title, color, pixels, values, names in sides:
        pen.rounded_rectangle((left, 24, left + width // 2 - 45, height - 24), 28, CARD, GROOVE, 3)
        pen.text((left + 30, 40), title, color, _font(32))
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((face, face), Image.Resampling.BICUBIC)
        image.paste(picture, (left + 30, 98))
        pen.rectangle((left + 27, 95, left + 32 + face, 100 + face), outline=color, width=5)
        for place, (value, name) in enumerate(zip(values.tolist(), names)):
            # 脸的右边三列两行，其余的在下面一行六个
            column, row = (place % 3, place // 3) if place < 6 else (place - 6, 2)
            x = left + 385 + 108 * column if row < 2 else left + 78 + 103 * column
            _dial(pen, x, (152, 282, 442)[row], value, color)
            pen.text((x, (152, 282, 442)[row] + 46), name, INK, _font(24), anchor="ma")
    return image.resize((600, 600 * height // width), Image.Resampling.LANCZOS)


def _dial(pen: ImageDraw.ImageDraw, x: float, y: float, value: float, color: str, radius: int = 40) -> None:
    """一个旋钮：``value`` 在 −1 与 1 之间，0 指着正上方，转满是左右各 135 度。"""
    angle = 135 * max(-1.0, min(1.0, value)) - 90  # PIL 的角度从右边起，顺时针
    box = (x - radius, y - radius, x + radius, y + radius)
    pen.arc(box, 135, 405, GROOVE, 10)
    pen.arc(box, min(angle, -90), max(angle, -90), color, 10)
    pen.ellipse((x - 26, y - 26, x + 26, y + 26), PAPER, GROOVE, 2)
    tip = (x + 22 * math.cos(math.radians(angle)), y + 22 * math.sin(math.radians(angle)))
    pen.line((x, y, *tip), color, 6)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import font_manager

    plot.use_chinese_font()
    return ImageFont.truetype(font_manager.findfont("Noto Sans SC"), size)


# ---------------------------------------------------------------- 拼成一个文件夹


def assemble(folder: Path) -> Path:
    """网页与数据拼成一个可以独立打开的文件夹，返回其中的 index.html。

    双击打开（file://）的网页不能用 fetch 取文件，所以要取的每个文件另备一份 ``名字.js``，里面是它的 base64；走 http 时用不到。
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in (PAGE, DATA):
        for path in sorted(source.iterdir()):
            if path.name != "spread.bin":  # 网页只要均值
                shutil.copyfile(path, folder / path.name)
    for name in ("manifest.json", "weights.bin", "encoder.bin"):
        text = base64.b64encode((folder / name).read_bytes()).decode()
        (folder / f"{name}.js").write_text(f'received("{name}", "{text}");\n', encoding="utf-8")
    return folder / "index.html"


# ---------------------------------------------------------------- 命令行


def main(arguments: Sequence[str] | None = None) -> int:
    """命令行；返回退出码。"""
    parser = argparse.ArgumentParser(description="造探索器的数据，或拼出网页的文件夹。")
    parser.add_argument("--run", type=Path, metavar="运行文件夹", help="不训练，用它的 best.pt")
    parser.add_argument("--pictures", action="store_true", help="权重不动，只重画帧与动图")
    parser.add_argument("--assemble", type=Path, metavar="文件夹", help="只拼出网页")
    given = parser.parse_args(arguments)
    if given.assemble:
        print(f"已拼好，打开 {assemble(given.assemble)}")
        return 0
    if not given.pictures:
        DATA.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made:
            if not given.run:
                train(Path(made))
            export(given.run or Path(made))
    draw_frames()
    draw_animation()
    for path in [*sorted(DATA.iterdir()), PICTURE]:
        print(f"{path.name}  {path.stat().st_size:,} 字节")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
