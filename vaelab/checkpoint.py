"""一次训练留下的东西：进度，检查点，历史，以及怎样从它们接着走。"""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from vaelab.config import LOSSES, TrainConfig, TrainingError, gentler
from vaelab.evaluate import Evaluation
from vaelab.files import copy_atomically, shown, system_reason, write_atomically
from vaelab.processes import pick_device
from vaelab.steplog import StepLog
from vanilla_vae import VanillaVAE

CHECKPOINT = "checkpoint.pt"  # 最后一份，续训从它接着走
BEST = "best.pt"  # 测试 ELBO 最高的一份，同一种格式，使用时默认用它
EARLIER = re.compile(r"checkpoint-(\d+)\.pt")  # 更早的几份，以步数命名
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
        log: StepLog | None = None,
        keep: int = 0,
    ) -> None:
        self.model, self.optimizer, self.scaler, self.config = model, optimizer, scaler, config
        self.ran_on, self.path, self.steps_per_epoch, self.extra, self.digest = ran_on, path, steps_per_epoch, extra, digest
        self.log, self.keep = log or StepLog(None), keep
        self.step, self.saved_step, self.sums = 0, 0, dict.fromkeys(LOSSES, 0.0)
        self.history: list[dict] = []
        self.since = 0  # 这一轮之后用的才是现在的数据；更早的 ELBO 是在别的图上量的，不能相比
        self.last: list[float] | None = None  # 最近取回的一步

    def read(self, pending: tuple[int, float, Callable[[], list[float]]] | None) -> bool:
        """取回一步的结果并累计；``pending`` 是步数、学习率与取回的办法；返回是否有进程要求停下。

        Raises:
            TrainingError: 损失不是有限的数。
        """
        if pending is None:
            return False
        step, lr, fetched = pending[0], pending[1], pending[2]()
        values = self.last = fetched[: len(LOSSES)]
        if math.isfinite(values[0]):
            for name, value in zip(LOSSES, values):
                self.sums[name] += value
            with self._writing():
                self.log.step(step, values[0], values[1], values[2], lr)
            return any(fetched[len(LOSSES) :])
        saved = "" if self.path is None else "上一轮的检查点完好，减小 --lr 后可加 --resume 接着训练；"
        raise TrainingError(
            f"第 {step} 步的损失不再是有限的数（MSE {values[1]:.3g}，KL {values[2]:.3g}）：多半是学习率 "
            f"{self.config.lr:g} 太大；{saved}也可以先试 lr = {gentler(self.config.lr):g}。"
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
        self.log.epoch(self.history[-1])

    def start(self) -> None:
        """从头开始：绝不写进已有检查点的文件夹；从第一步之前起，任何时刻被杀都有可载入的检查点。"""
        if self.path and (self.path / CHECKPOINT).exists():
            raise ValueError(f"{self.path} 里已有检查点；请加 resume=True 接着训练，或把 out 换成另一个文件夹。")
        self.save()

    def save(self) -> None:
        """检查点先写在旁边，写全后改名就位；历史随检查点走，CSV 由它写出。

        这一轮的测试 ELBO 最高时，写下的先叫 ``best.pt``，再硬链接成 ``checkpoint.pt``：只写一次，任何时刻被杀两者都完好，
        中间被杀则续训重走这一轮，得到同样的一份。
        """
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
            "since": self.since,
            "ran_on": self.ran_on,
        }
        if self.scaler.is_enabled():
            state["scaler"] = self.scaler.state_dict()
        is_best = bool(self.history) and self.history[-1]["step"] == self.step and best_row(self.history, self.since) is self.history[-1]
        last = self.path / CHECKPOINT
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            self.log.begin(self.step)
            self.log.flush()
            if self.keep and 0 < self.saved_step < self.step:
                copy_atomically(last, self.path / f"checkpoint-{self.saved_step:05d}.pt")
            write_atomically(self.path / BEST if is_best else last, lambda file: torch.save(state, file))
            if is_best:
                copy_atomically(self.path / BEST, last)
            write_atomically(self.path / HISTORY, lambda file: file.write(_as_csv(self.history).encode("utf-8")))
            for path in earlier_checkpoints(self.path, self.step)[: -self.keep or None] if self.keep else []:
                path.unlink()
        self.saved_step = self.step

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = system_reason(error, advice=False) if isinstance(error, OSError) else str(error)
            raise TrainingError(
                f"第 {self.step} 步的检查点写不进 {shown(self.path or '')}（{reason}）；"
                "请腾出磁盘空间或检查权限，再加 --resume 从上一份完好的检查点接着训练。"
            ) from error

    def _moments(self) -> dict:
        """优化器的状态；学习率若在设备上（录进了 CUDA 图），存的是它的值。"""
        state = self.optimizer.state_dict()
        return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}

    def restore(self, state: dict, other_data: bool = False, source: Path | None = None) -> None:
        """从检查点接着走；模型、数据、批大小、训练哪些参数都须与那时相同。

        ``other_data`` 允许数据不同，从最近走完的一轮接着。``source`` 是检查点的文件，若不是这里的 ``checkpoint.pt``，就先回到它。
        """
        require_resumable(state, model_args(self.model), self.config)
        done = state["step"] / state["steps_per_epoch"]
        changed = state["steps_per_epoch"] != self.steps_per_epoch or None not in (state.get("data"), self.digest) and state["data"] != self.digest
        if changed and not other_data:
            raise ValueError(
                f"续训须用同样的数据，这次的图片与检查点记着的不同（那时每轮 {state['steps_per_epoch']} 步，这次 {self.steps_per_epoch} 步）；"
                "请把原来的图片放回去，或加 --other-data（other_data=True）坚持用这一批，或换一个 --out 从头训练。"
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
            self.step, self.since = int(done) * self.steps_per_epoch, int(done)
        else:
            self.sums, self.since = dict(state["sums"]), state.get("since", 0)
        self.saved_step = self.step
        if self.path is not None:
            with self._writing():
                self.path.mkdir(parents=True, exist_ok=True)
                if source is not None and source.resolve() != (self.path / CHECKPOINT).resolve():
                    self._go_back(source)
                if changed and (best := self.path / BEST).exists():  # 它会让位给新数据上的第一轮
                    copy_atomically(best, self.path / f"checkpoint-{load_checkpoint(best)['step']:05d}.pt")
                self.log.begin(self.step)

    def _go_back(self, source: Path) -> None:
        """让 ``checkpoint.pt`` 成为 ``source``；走得更远的几份改以步数命名，一份也不丢。"""
        assert self.path is not None
        for path in (self.path / CHECKPOINT, self.path / BEST):
            if path.exists() and (step := load_checkpoint(path)["step"]) > self.step:
                copy_atomically(path, self.path / f"checkpoint-{step:05d}.pt")
        copy_atomically(source, self.path / CHECKPOINT)


def require_resumable(state: dict, args: dict, config: TrainConfig, epochs_known: bool = True) -> None:
    """不看数据就知道的：检查点 ``state`` 能不能以构造参数 ``args``、设置 ``config`` 接着训练。

    Raises:
        ValueError: 结构或批大小不同，或（``epochs_known``）要求的轮数已经走完。
    """
    if state["model_args"] != args:
        raise ValueError(
            f"检查点里的模型是 {state['model_args']}，这次给的是 {args}；续训须用同样的结构，请改回原来的参数，或换一个 --out 重新训练。"
        )
    if (old := state["config"]["batch_size"]) != config.batch_size:
        raise ValueError(f"检查点的批大小是 {old}，这次是 {config.batch_size}；续训须用同样的批大小，请改回原来的参数。")
    done = state["step"] / state["steps_per_epoch"]
    if epochs_known and done >= config.epochs:
        raise ValueError(f"这次训练已走完 {done:g} 轮，要求的是 {config.epochs} 轮，没有可续的；请把 --epochs 设为大于 {math.floor(done)} 的数。")


def model_args(model: VanillaVAE) -> dict:
    """重建这个模型所需的构造参数。"""
    return {
        "in_channels": model.in_channels,
        "latent_dim": model.latent_dim,
        "hidden_dims": list(model.hidden_dims),
        "image_size": model.image_size,
    }


def best_row(history: list[dict], since: int = 0) -> dict | None:
    """第 ``since`` 轮之后测试 ELBO 最高的一轮，并列取早的；一轮也没走完就是 None。

    各轮的 ELBO 都取各自最优的 σ²（见 :func:`vaelab.evaluate.evaluate`），所以可以相比。
    """
    rows = [row for row in history if row["epoch"] > since]
    return max(rows, key=lambda row: -math.inf if math.isnan(row["test_elbo"]) else row["test_elbo"], default=None)


def earlier_checkpoints(run: Path, before: float = math.inf) -> list[Path]:
    """运行文件夹里以步数命名的、第 ``before`` 步之前的检查点，由早到晚。"""
    found = {int(match[1]): path for path in run.glob("checkpoint-*.pt") if (match := EARLIER.fullmatch(path.name))}
    return [found[step] for step in sorted(found) if step < before]


def checkpoint_file(path: str | os.PathLike, best: bool = False) -> Path:
    """``path`` 是文件就是它；是运行文件夹，就是里面最后的一份，``best`` 则是测试 ELBO 最高的一份（没有就最后的）。"""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / BEST if best and (path / BEST).is_file() else path / CHECKPOINT


def load_checkpoint(path: str | os.PathLike) -> dict:
    """读检查点（文件，或含 ``checkpoint.pt`` 的文件夹）到 CPU；只收张量与普通的值，不执行其中的代码。

    Raises:
        FileNotFoundError: 没有检查点。
        ValueError: 不完整、含有代码，或不是本项目写下的。
    """
    path = checkpoint_file(path)
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
    except Exception as error:  # 读坏了的文件，torch.load 什么错都可能报
        raise ValueError(f"{path} 不完整或不是检查点；请换一份，或重新训练。") from error
    wanted = {"format", "model_args", "model", "optimizer", "config", "extra", "step", "steps_per_epoch", "history"}
    if not isinstance(state, dict) or not wanted <= state.keys() or state["format"] != Run.FORMAT:
        raise ValueError(f"{path} 不是本项目写下的检查点；若是别处的权重，请自建 VanillaVAE 再 load_state_dict。")
    return state


def load_model(path: str | os.PathLike, device: str | torch.device = "cpu") -> VanillaVAE:
    """由检查点重建模型，置于 eval 模式。

    Args:
        path: 运行文件夹，用其中测试 ELBO 最高的一份（``best.pt``，没有就 ``checkpoint.pt``）；或指明的一个检查点文件。
        device: ``cpu``、``cuda``、``mps`` 或 ``auto``。

    Raises:
        FileNotFoundError, ValueError: 同 :func:`load_checkpoint`；或其中的权重与它写明的结构不符。
    """
    return build_model(load_checkpoint(checkpoint_file(path, best=True)), device)


def build_model(state: dict, device: str | torch.device = "cpu") -> VanillaVAE:
    """由 :func:`load_checkpoint` 的结果重建模型，置于 eval 模式；不动全局的随机状态。"""
    place, weights = pick_device(device), state["model"]
    try:
        with torch.device("meta"):  # 先只看形状：写错的结构不必真的占内存
            model = VanillaVAE(**state["model_args"])
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        if wanted != {name: value.shape for name, value in weights.items()}:
            raise ValueError("权重的名字或形状对不上")
        model = model.to_empty(device="cpu")
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"检查点里的权重与它写明的结构 {state['model_args']} 不符（{error}）；它被改动过，请换一份检查点。") from error
    return model.to(place).eval()


def _as_csv(history: list[dict]) -> str:
    text = io.StringIO()
    if history:
        writer = csv.DictWriter(text, history[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
    return text.getvalue()
