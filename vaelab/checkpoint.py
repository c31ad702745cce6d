"""一次训练留下的东西：进度，检查点，历史，以及怎样从它们接着走。"""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from vaelab.config import LOSSES, TrainConfig, TrainingError
from vaelab.evaluate import Evaluation
from vaelab.files import write_atomically
from vaelab.processes import pick_device
from vanilla_vae import VanillaVAE

CHECKPOINT = "checkpoint.pt"
HISTORY = "history.csv"


class Run:
    """一次训练的进度：走到第几步、这一轮的累计、历史，以及它们与磁盘之间的来往。"""

    FORMAT = 1
    HOW = ("lr", "fused", "capturable", "foreach")  # 优化器怎样算，随机器而定，不随检查点

    def __init__(
        self,
        model: VanillaVAE,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        config: TrainConfig,
        ran_on: dict[str, str | bool],
        path: Path | None,
        steps_per_epoch: int,
        extra: dict,
        digest: str | None = None,
    ) -> None:
        self.model, self.optimizer, self.scaler, self.config = model, optimizer, scaler, config
        self.ran_on, self.path, self.steps_per_epoch, self.extra, self.digest = ran_on, path, steps_per_epoch, extra, digest
        self.step, self.saved_step, self.sums = 0, 0, dict.fromkeys(LOSSES, 0.0)
        self.history: list[dict] = []
        self.last: list[float] | None = None  # 最近取回的一步

    def read(self, pending: tuple[int, Callable[[], list[float]]] | None) -> bool:
        """取回一步的结果并累计；返回是否有进程要求停下。

        Raises:
            TrainingError: 损失不是有限的数。
        """
        if pending is None:
            return False
        step, fetched = pending[0], pending[1]()
        values = self.last = fetched[: len(LOSSES)]
        if math.isfinite(values[0]):
            for name, value in zip(LOSSES, values):
                self.sums[name] += value
            return any(fetched[len(LOSSES) :])
        saved = "" if self.path is None else "上一轮的检查点完好，减小 --lr 后可加 --resume 接着训练；"
        raise TrainingError(
            f"第 {step} 步的损失不再是有限的数（MSE {values[1]:.3g}，KL {values[2]:.3g}）：多半是学习率 "
            f"{self.config.lr:g} 太大；{saved}也可以先试 lr = {self.config.lr / 4:g}。"
        )

    def finish_epoch(self, test: Evaluation, images_per_s: float, seconds: float) -> None:
        mean = {name: total / self.steps_per_epoch for name, total in self.sums.items()}
        self.sums = dict.fromkeys(LOSSES, 0.0)
        self.history.append(
            {
                "epoch": self.step // self.steps_per_epoch,
                "step": self.step,
                "loss": mean["loss"],
                "mse": mean["Reconstruction_Loss"],
                "kld": mean["KLD"],
                "kld_weight": float(f"{mean['kld_weight']:.6g}"),
                "test_mse": test.mse,
                "test_kld": test.kld,
                "test_elbo": test.elbo,
                "test_bits_per_dim": test.bits_per_dim,
                "images_per_s": round(images_per_s, 1),
                "seconds": round(seconds, 2),
            }
        )

    def start(self) -> None:
        """从头开始：绝不写进已有检查点的文件夹；从第一步之前起，任何时刻被杀都有可载入的检查点。"""
        if self.path and (self.path / CHECKPOINT).exists():
            raise ValueError(f"{self.path} 里已有检查点；请加 resume=True 接着训练，或把 out 换成另一个文件夹。")
        self.save()

    def save(self) -> None:
        """检查点先写在旁边，写全后改名就位；历史随检查点走，CSV 由它写出。"""
        if self.path is None:
            return
        state = {
            "format": self.FORMAT,
            "model_args": model_args(self.model),
            "model": self.model.state_dict(),
            "optimizer": self._moments(),
            "config": asdict(self.config),
            "extra": self.extra,
            "data": self.digest,
            "steps_per_epoch": self.steps_per_epoch,
            "step": self.step,
            "sums": self.sums,
            "history": self.history,
            "ran_on": self.ran_on,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CHECKPOINT, lambda file: torch.save(state, file))
            write_atomically(self.path / HISTORY, lambda file: file.write(_as_csv(self.history).encode("utf-8")))
        except (OSError, RuntimeError) as error:
            raise TrainingError(
                f"第 {self.step} 步的检查点写不进 {self.path}（{error}）；请腾出磁盘空间或检查权限，再加 --resume 从上一份完好的检查点接着训练。"
            ) from error
        self.saved_step = self.step

    def _moments(self) -> dict:
        """优化器的状态；学习率若在设备上（录进了 CUDA 图），存的是它的值。"""
        state = self.optimizer.state_dict()
        return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}

    def restore(self, state: dict, other_data: bool = False) -> None:
        """从检查点接着走；模型、数据、批大小、训练哪些参数都须与那时相同。``other_data`` 允许数据不同，从最近走完的一轮接着。"""
        if state["model_args"] != model_args(self.model):
            raise ValueError(
                f"检查点里的模型是 {state['model_args']}，这次给的是 {model_args(self.model)}；"
                "续训须用同样的结构，请改回原来的参数，或换一个 --out 重新训练。"
            )
        old, done = state["config"], state["step"] / state["steps_per_epoch"]
        if old["batch_size"] != self.config.batch_size:
            raise ValueError(f"检查点的批大小是 {old['batch_size']}，这次是 {self.config.batch_size}；续训须用同样的批大小，请改回原来的参数。")
        changed = state["steps_per_epoch"] != self.steps_per_epoch or None not in (state.get("data"), self.digest) and state["data"] != self.digest
        if changed and not other_data:
            raise ValueError(
                f"续训须用同样的数据，这次的图片与检查点记着的不同（那时每轮 {state['steps_per_epoch']} 步，这次 {self.steps_per_epoch} 步）；"
                "请把原来的图片放回去，或加 --other-data（other_data=True）坚持用这一批，或换一个 --out 从头训练。"
            )
        if done >= self.config.epochs:
            raise ValueError(
                f"这次训练已走完 {done:g} 轮，要求的是 {self.config.epochs} 轮，没有可续的；请把 --epochs 设为大于 {math.floor(done)} 的数。"
            )
        trained = self.optimizer.param_groups[0]["params"]
        moments = state["optimizer"]["state"]  # 走过一步才有，编号就是次序
        same = len(state["optimizer"]["param_groups"][0]["params"]) == len(trained)
        if not same or any(moments[index]["exp_avg"].shape != trained[index].shape for index in moments):
            raise ValueError("检查点里训练的参数与这次的不同；续训须冻结同样的参数，请照原来的样子设 requires_grad。")
        self.model.load_state_dict(state["model"])
        here = [{name: group[name] for name in self.HOW} for group in self.optimizer.param_groups]  # 怎样算，照这台机器
        groups = [{**saved, **mine} for saved, mine in zip(state["optimizer"]["param_groups"], here)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        if "scaler" in state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.history = state["step"], state["history"]
        if changed:
            self.step = int(done) * self.steps_per_epoch
        else:
            self.sums = dict(state["sums"])


def model_args(model: VanillaVAE) -> dict:
    """重建这个模型所需的构造参数。"""
    return {
        "in_channels": model.in_channels,
        "latent_dim": model.latent_dim,
        "hidden_dims": list(model.hidden_dims),
        "image_size": model.image_size,
    }


def load_checkpoint(path: str | os.PathLike) -> dict:
    """读检查点（文件，或含 ``checkpoint.pt`` 的文件夹）到 CPU；只收张量与普通的值，不执行其中的代码。

    Raises:
        FileNotFoundError: 没有检查点。
        ValueError: 不完整、含有代码，或不是本项目写下的。
    """
    path = Path(path)
    path = path / CHECKPOINT if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"没有检查点 {path}；请给出训练过的文件夹，或先用 train 训练一次。")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 不是检查点的文件，错误由下面说清，不必再警告
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80":
            raise ValueError(f"{path} 里除张量外还有可执行的内容，为安全起见不载入；请只用可信的、本项目写下的检查点。") from error
        raise ValueError(f"{path} 不是检查点；请给出由 train 写下的 {CHECKPOINT}。") from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} 不完整或不是检查点；请换一份，或重新训练。") from error
    wanted = {"format", "model_args", "model", "optimizer", "config", "extra", "step", "steps_per_epoch", "history"}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["format"] != Run.FORMAT:
        raise ValueError(f"{path} 不是本项目写下的检查点；若是别处的权重，请自建 VanillaVAE 再 load_state_dict。")
    return state


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> VanillaVAE:
    """由检查点重建模型，置于 eval 模式。参数与错误同 :func:`load_checkpoint`。"""
    state = load_checkpoint(path)
    model = VanillaVAE(**state["model_args"])
    model.load_state_dict(state["model"])
    return model.to(pick_device(device)).eval()


def _as_csv(history: list[dict]) -> str:
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue()
