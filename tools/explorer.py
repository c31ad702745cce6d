"""探索器：一页网页，转一转 VAE 的旋钮。这里造它的数据、拼出可以独立打开的文件夹。

用法：
  python tools/explorer.py                       训练默认的模型（两个 CPU 核上一分半钟），写下全部数据与 README 的动图
  python tools/explorer.py --run 运行文件夹      不训练，用已有的运行文件夹
  python tools/explorer.py --pictures            权重不动，只重画帧与动图
  python tools/explorer.py --assemble 文件夹     网页与数据拼成一个文件夹，双击 index.html 就能看

网页在 tools/explorer/，不用打包；由训练得来的数据在 photos/explorer/：

  manifest.json   模型的设置、成绩，各旋钮的 KL 与它最像的因子，几组现成的隐变量，张量在下面两个文件里的位置
  weights.bin     解码器与拟合的先验，float16，一个接一个
  encoder.bin     编码器
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
from vaelab.images import to_float, to_uint8  # noqa: E402
from vaelab.prior import Mixture, fit_prior  # noqa: E402
from vanilla_vae import VanillaVAE  # noqa: E402

PAGE, DATA = ROOT / "tools/explorer", ROOT / "photos/explorer"
PARTS = {"weights.bin": ("decoder", "final_layer", "prior"), "encoder.bin": ("encoder", "fc_mu", "fc_var")}
LABELS = {
    "skin": "肤色", "hair_hue": "发色", "hair_length": "发长", "face_width": "脸宽", "eye_gap": "眼距", "eye_size": "眼睛",
    "gaze": "目光", "brow": "眉毛", "mouth_curve": "嘴角", "mouth_width": "嘴宽", "pose": "转头", "background": "背景",
}  # fmt: skip
START = (0.78, 0.07, 0.62, 0.5, 0.5, 0.6, 0.5, 0.5, 0.72, 0.6, 0.5, 0.56)  # 开头的脸
POSITIONS = [round(-3 + step / 2, 1) for step in range(13)]  # 帧里旋钮的位置
WALK = (7, 48, 27, 69, 14, 62)  # 走直线用的测试图，头两张是开头的起点与终点
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
    manifest = {
        "model": model_args(model),
        "training": {"command": "python vanilla_vae.py", "torch": torch.__version__.split("+")[0], **_settings(load_checkpoint(run))},
        "test": {"elbo": round(result.elbo, 1), "mse": round(result.mse, 5), "kld": round(result.kld, 2), "active": int(result.active_units)},
        "knobs": knobs(mu, faces.train_factors, result.kld_per_dim),
        "factors": [{"name": name, "label": LABELS[name]} for name in FACE_FACTORS],
        "positions": POSITIONS,
        "start": {"factors": list(START), "z": _rounded(start)},
        "faces": [{"factors": _rounded(row), "z": _rounded(z)} for row, z in zip(chosen, walk)],
        "distance": {name: round(nearest(model, z, faces.train), 4) for name, z in measured.items()},
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


def nearest(model: VanillaVAE, z: Tensor, images: Tensor) -> float:
    """由 ``z`` 解码的图到最近一张训练图的 MSE（[-1, 1] 坐标，每个数），取平均。"""
    with torch.no_grad():
        drawn, known = model.decode(z).flatten(1), to_float(images).flatten(1)
        return float(torch.cdist(drawn, known).amin(1).square().mean() / drawn.shape[1])


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
    return torch.cat([a + t * (b - a), *(torch.tensor(manifest["samples"][name]) for name in ("prior", "fitted")), torch.tensor([manifest["start"]["z"]])])


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


def assemble(folder: Path) -> Path:
    """网页与数据拼成一个可以独立打开的文件夹，返回其中的 index.html。

    双击打开（file://）的网页不能用 fetch 取文件，所以要取的每个文件另备一份 ``名字.js``，里面是它的 base64；走 http 时用不到。
    """
    folder.mkdir(parents=True, exist_ok=True)
    for source in (PAGE, DATA):
        for path in sorted(source.iterdir()):
            shutil.copyfile(path, folder / path.name)
    for name in ("manifest.json", *PARTS):
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
    for path in sorted(DATA.iterdir()):
        print(f"{path.name}  {path.stat().st_size:,} 字节")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
