"""接线（vaelab.stepper）：不论怎样离开，模型都还给调用者；冻结的不训练；与默认的浮点类型无关。"""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from conftest import ROOT
from vaelab import stepper
from vaelab.config import TrainConfig, TrainingError
from vaelab.data import load
from vaelab.plan import make_plan
from vaelab.processes import SyncBatchNorm2d, swap_batch_norm
from vaelab.train import train
from vanilla_vae import VanillaVAE

CONFIG = TrainConfig(epochs=2, batch_size=16, lr=2e-3, kld_weight=1e-3, seed=1, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return load("faces", image_size=16, count=100)


def half_frozen() -> VanillaVAE:
    """编码器冻结了一半：一层的权重，与解码器里一个紧跟着批归一化的偏置。"""
    torch.manual_seed(0)
    model = VanillaVAE(3, 4, [8, 16], image_size=16)
    model.encoder[0][0].weight.requires_grad_(False)
    model.final_layer[0].bias.requires_grad_(False)
    model.encoder[1][1].eval()
    return model


def normally(monkeypatch):
    return nullcontext()


def interrupted(monkeypatch):
    seen, real = [], stepper.train_step
    monkeypatch.setattr(stepper, "train_step", lambda *a: (seen.append(1), len(seen) == 3 and signal.raise_signal(signal.SIGINT), real(*a))[-1])
    return pytest.raises(KeyboardInterrupt)


def interrupted_twice(monkeypatch):
    def step(*_):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stepper, "train_step", step)
    return pytest.raises(KeyboardInterrupt)


def diverging(monkeypatch):
    real = stepper.train_step
    monkeypatch.setattr(stepper, "train_step", lambda *a: real(*a) * torch.nan)
    return pytest.raises(TrainingError, match="不再是有限的数")


def out_of_memory(monkeypatch):
    def step(*_):
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    monkeypatch.setattr(stepper, "train_step", step)
    return pytest.raises(TrainingError, match="内存")


def refused(monkeypatch):
    monkeypatch.setattr(stepper, "available_memory", lambda device: 10_000_000)
    return pytest.raises(ValueError, match="装得进内存")


def failing_while_wired(monkeypatch):
    def objective(*_):
        raise RuntimeError("接线时出错")

    monkeypatch.setattr(stepper, "Objective", objective)
    return pytest.raises(RuntimeError, match="接线时出错")


WAYS_OUT = [normally, interrupted, interrupted_twice, diverging, out_of_memory, refused, failing_while_wired]


@pytest.mark.parametrize("leave", WAYS_OUT, ids=lambda leave: leave.__name__)
def test_the_model_comes_back_as_it_was_given(data, monkeypatch, leave):
    model = half_frozen()
    frozen = model.encoder[0][0].weight.clone()
    given = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = list(model.modules())
    with leave(monkeypatch):
        train(model, data, CONFIG, device="cpu", progress=False)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == given
    assert sum(given.values()) == len(given) - 2
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert not any(module.training for module in model.modules())  # 写在 train 的说明里
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.encoder[0][0].weight, frozen)


def test_a_run_that_cannot_be_kept_or_continued_gives_the_model_back_too(data, tmp_path):
    """写不下检查点，续训被拒绝：都在走第一步之前，也都还原。"""
    blocked, done = tmp_path / "文件", tmp_path / "done"
    blocked.write_text("占着名字", encoding="utf-8")
    train(half_frozen(), data, CONFIG, done, device="cpu", progress=False)
    for out, resume, error in ((blocked, False, NotADirectoryError), (done, True, ValueError)):
        model = half_frozen()
        with pytest.raises(error):
            train(model, data, CONFIG, out, resume=resume, device="cpu", progress=False)
        assert sum(parameter.requires_grad for parameter in model.parameters()) == len(list(model.parameters())) - 2
        assert not model.training


def test_the_model_goes_home(data):
    """离开时搬回它来的设备；这里只有 CPU，就假装它来自 meta。"""
    model = half_frozen()
    with stepper.Stepper(model, data, CONFIG, make_plan(data, CONFIG, device="cpu")) as step:
        step.home = torch.device("meta")
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA")
@pytest.mark.parametrize("data_on", ["device", "host"])
def test_cuda_trains_and_gives_the_model_back_to_the_cpu(data, data_on):
    """显存里的、逐批搬运的数据都走得通；数与 CPU 上的相近，模型回到 CPU。"""
    rows = {}
    for device in ("cpu", "cuda"):
        model = half_frozen()
        rows[device] = train(model, data, CONFIG, device=device, data_on=data_on, progress=False)
        assert model.fc_mu.weight.device.type == "cpu" and not model.encoder[0][0].weight.requires_grad
    assert rows["cuda"][-1]["mse"] == pytest.approx(rows["cpu"][-1]["mse"], rel=0.05)


def test_outside_with_it_says_so(data):
    step = stepper.Stepper(half_frozen(), data, CONFIG, make_plan(data, CONFIG, device="cpu"))
    for use in (lambda: next(step.feed(0)), lambda: step(data.train[:16], 0, 1e-3)):
        with pytest.raises(RuntimeError, match="Stepper 要用在 with 里"):
            use()
    with step:
        next(step.feed(0))
    with pytest.raises(RuntimeError, match="Stepper 要用在 with 里"):
        next(step.feed(0))


def test_what_is_frozen_is_not_trained_and_the_rest_is(data):
    model, before = half_frozen(), half_frozen()
    train(model, data, CONFIG, device="cpu", progress=False)
    same = {name for (name, a), b in zip(model.named_parameters(), before.parameters()) if torch.equal(a, b)}
    biases = {f"{name}.bias" for name in ("encoder.0.0", "encoder.1.0", "decoder.0.0", "final_layer.0")}  # 紧跟着批归一化，不必训练
    assert same == {"encoder.0.0.weight", *biases}


def test_resuming_needs_the_same_frozen_parameters(data, tmp_path):
    train(half_frozen(), data, CONFIG, tmp_path, device="cpu", progress=False)
    longer = TrainConfig(**{**vars(CONFIG), "epochs": 3})
    free = VanillaVAE(3, 4, [8, 16], image_size=16)
    with pytest.raises(ValueError, match="检查点里训练的参数与这次的不同"):
        train(free, data, longer, tmp_path, device="cpu", resume=True, progress=False)
    other = half_frozen()
    other.encoder[0][0].weight.requires_grad_(True)
    other.fc_mu.weight.requires_grad_(False)  # 一样多，却是别的一层
    with pytest.raises(ValueError, match="检查点里训练的参数与这次的不同"):
        train(other, data, longer, tmp_path, device="cpu", resume=True, progress=False)
    assert len(train(half_frozen(), data, longer, tmp_path, device="cpu", resume=True, progress=False)) == 3


def test_a_model_frozen_altogether_is_refused(data):
    model = half_frozen().requires_grad_(False)
    with pytest.raises(ValueError, match="全部冻结了"):
        train(model, data, CONFIG, device="cpu", progress=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_swapped_batch_norm_goes_back_in_its_place():
    model = half_frozen()
    modules, state = list(model.modules()), model.state_dict()
    swaps = swap_batch_norm(model, SyncBatchNorm2d)
    kinds = {type(module) for module in model.modules()}
    assert SyncBatchNorm2d in kinds and nn.BatchNorm2d not in kinds and len(swaps) == 4
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(state.values(), model.state_dict().values()))
    for module, name, original in swaps:
        setattr(module, name, original)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]


ANY_DTYPE = """
import hashlib, sys, torch
torch.set_default_dtype(getattr(torch, sys.argv[1]))
torch.set_num_threads(1)
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.evaluate import evaluate
from vaelab.train import train
from vanilla_vae import VanillaVAE
data = load("faces", image_size=16, count=60)
grey = load("faces", image_size=8, channels=1, count=20)
torch.manual_seed(0)
model = VanillaVAE(3, 4, [8, 16], image_size=16).float()
weights = torch.Generator().manual_seed(0)
for parameter in model.parameters():
    parameter.data = torch.rand(parameter.shape, generator=weights, dtype=torch.float32) * 0.2 - 0.1
for weight in (1e-3, "optimal"):
    config = TrainConfig(epochs=1, batch_size=16, kld_weight=weight, precision="fp32")
    history = train(model, data, config, device="cpu", progress=False)
assert data.train_factors.dtype == torch.float32
digest = hashlib.sha256()
for value in (data.train, data.test, data.train_factors, grey.train, *model.state_dict().values()):
    digest.update(value.contiguous().numpy().tobytes())
print(digest.hexdigest(), evaluate(model, data.test).elbo, history[-1]["loss"])
"""


def test_data_and_training_do_not_depend_on_the_default_dtype():
    """03–06 章用 torch.set_default_dtype(torch.float64)：数据、训练、评价与 float32 时逐位相同。"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    said = [
        subprocess.run([sys.executable, "-c", ANY_DTYPE, dtype], env=environment, capture_output=True, text=True, check=True).stdout
        for dtype in ("float32", "float64")
    ]
    assert said[0] == said[1]


def test_a_step_needs_only_what_a_reader_can_hold(data):
    """手里的一批图，走一步：记录的四个数，权重真的动了。"""
    model = half_frozen()
    before = model.fc_mu.weight.clone()
    with stepper.Stepper(model, data, CONFIG, make_plan(data, CONFIG, device="cpu")) as step:
        (images, *others) = step.feed(0)
        record = step(images, 0, 1e-2)
        assert len(others) == len(data.train) // 16 - 1 and record.shape == (4,)
        loss, mse, kld, weight = record.tolist()
    assert loss == pytest.approx(mse + weight * kld, rel=1e-6) and weight == pytest.approx(1e-3)
    assert (model.fc_mu.weight - before).abs().max() > 1e-4
