"""导出模型，给别的程序用：safetensors（权重与构造参数），ONNX（编码器与解码器）。导出之后都与原来的模型比对。"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor, nn

from vaelab.checkpoint import model_args
from vaelab.files import write_atomically
from vanilla_vae import VanillaVAE

TOLERANCE = 1e-4  # 与 torch 的差，[-1, 1] 坐标：不到一级灰阶的百分之二


def export_safetensors(model: VanillaVAE, path: Path, about: dict[str, str] | None = None) -> None:
    """权重写成一个 safetensors 文件，元数据里有 ``model_args``（JSON），足够重建模型；写下的逐位与原来相同。

    Args:
        about: 另外写进元数据的文字，例如第几步。

    Raises:
        ValueError: 没有装 safetensors；或读回的与写下的不同，那时什么也不写。
    """
    _require("safetensors")
    from safetensors.torch import load, save

    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    metadata = {"format": "pt", "library": "vaelab", "model_args": json.dumps(model_args(model)), **(about or {})}
    written = save(weights, metadata)
    back = load(written)
    if back.keys() != weights.keys() or not all(torch.equal(back[name], value) for name, value in weights.items()):
        raise ValueError("safetensors 读回的权重与模型的不同，没有写下；多半是权重里有 NaN，请换一份检查点。")
    write_atomically(path, lambda file: file.write(written))


def export_onnx(model: VanillaVAE, encoder: Path, decoder: Path) -> float | None:
    """编码器 x → (mu, log_var) 与解码器 z → image 各写成一个 ONNX 文件，批的大小可变，x 与 image 在 [-1, 1]。

    Returns:
        装了 onnxruntime，是它与 torch 算得的最大的差（绝对值与相对值中小的那个）；没装就是 None。

    Raises:
        ValueError: 没有装 onnx 与 onnxscript；或导出的与 torch 算得不同，那时什么也不写。
    """
    _require("onnx", "onnxscript")
    shape = (model.in_channels, model.image_size, model.image_size)
    parts = (
        (encoder, _Encoder(model), torch.rand(2, *shape) * 2 - 1, ["x"], ["mu", "log_var"]),
        (decoder, _Decoder(model), torch.randn(2, model.latent_dim), ["z"], ["image"]),
    )
    written, worst = [], None
    for path, part, example, inputs, outputs in parts:
        part.eval()
        with _quiet():
            program = torch.onnx.export(
                part, (example,), dynamo=True, verbose=False, input_names=inputs, output_names=outputs,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )  # fmt: skip
        content = program.model_proto.SerializeToString()
        if importlib.util.find_spec("onnxruntime"):
            worst = max(worst or 0.0, *(_difference(content, part, example[:1].expand(size, *example.shape[1:])) for size in (1, 3)))
        written.append((path, content))
    if worst is not None and not worst <= TOLERANCE:
        raise ValueError(f"导出的 ONNX 与 torch 算得的差 {worst:.2g}，大于 {TOLERANCE:g}，没有写下；请换一个版本的 torch 或 onnxscript 再试。")
    for path, content in written:
        write_atomically(path, lambda file: file.write(content))
    return worst


class _Encoder(nn.Module):
    def __init__(self, model: VanillaVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(x))


class _Decoder(nn.Module):
    def __init__(self, model: VanillaVAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.model.decode(z),)


@torch.no_grad()
def _difference(content: bytes, part: nn.Module, example: Tensor) -> float:
    """onnxruntime 与 torch 的最大的差，按 max(1, |值|) 计。"""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    came = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    pairs = zip(part(example), map(torch.from_numpy, came))
    return max(((a - b).abs() / a.abs().clamp_min(1)).max().item() for a, b in pairs)


@contextmanager
def _quiet():
    """torch.onnx 的进度、警告与 onnxscript 的日志都不给读者看；出错仍照常抛出。"""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"导出要用 {'、'.join(packages)}，这里没有装 {'、'.join(missing)}；请 pip install {' '.join(missing)} 再试。")
