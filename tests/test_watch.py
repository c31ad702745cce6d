"""一轮末的判断：爆了当轮就停，比不上平均图说一句，像样的一声不响。"""

from dataclasses import replace

import pytest
import torch

from vaelab.checkpoint import load_checkpoint
from vaelab.config import TrainConfig, TrainingError, gentler
from vaelab.data import load
from vaelab.evaluate import evaluate
from vaelab.train import train
from vaelab.watch import PATIENCE, look
from vanilla_vae import VanillaVAE

CONFIG = TrainConfig(epochs=12, batch_size=16, lr=3e-3, precision="fp32")


@pytest.fixture(scope="module")
def data():
    return load("faces", image_size=16, count=200)


def model() -> VanillaVAE:
    torch.manual_seed(0)
    return VanillaVAE(3, 8, [8, 16], 16)


@pytest.mark.parametrize("weight", [4e-4, "optimal", 0.0])
@pytest.mark.parametrize("lr", [30.0, 1e3, 1e5])
def test_an_explosion_is_said_in_its_epoch(data, tmp_path, lr, weight):
    config = replace(CONFIG, lr=lr, kld_weight=weight, epochs=2)
    with pytest.raises(TrainingError, match=rf"第 1 轮末.*爆了.*--lr {gentler(lr):g}".replace("+", r"\+")):
        train(model(), data, config, tmp_path, device="cpu", progress=False)
    saved = load_checkpoint(tmp_path)  # 爆了的一轮没有存
    assert saved["step"] == 0 and saved["history"] == []
    train(model(), data, replace(CONFIG, epochs=1), tmp_path, resume=True, device="cpu", progress=False)


def test_a_run_worse_than_the_mean_image_says_so_and_goes_on(data, capsys):
    rows = train(model(), data, replace(CONFIG, lr=1e-6), device="cpu", progress=True)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("注意：")]
    assert [line[: line.index(" 轮")] for line in said] == ["注意：第 10", f"注意：第 {CONFIG.epochs}"] and len(rows) == CONFIG.epochs
    assert f"{rows[-1]['test_mse']:.4g}" in said[-1]


def test_a_good_run_says_nothing(data, capsys):
    rows = train(model(), data, replace(CONFIG, lr=1e-2), device="cpu", progress=True)
    assert "注意" not in capsys.readouterr().out and rows[0]["test_mse"] > evaluate(model(), data.test).baseline_mse


def test_when_each_is_said(data):
    test = evaluate(model(), data.test)
    good = replace(test, mse=0.5 * test.baseline_mse, kld=10.0, optimal_kld_weight=1e-4)
    bad = replace(good, mse=1.01 * test.baseline_mse)
    config = replace(CONFIG, epochs=10)
    spoken = lambda epoch, before, steps=50: look(bad, config, epoch, steps, before) is not None
    assert [spoken(epoch, bad.mse) for epoch in range(1, 11)] == [epoch in (PATIENCE, 10) for epoch in range(1, 11)]
    assert [spoken(epoch, bad.mse, steps=20) for epoch in range(1, 11)] == [epoch in (5, 10) for epoch in range(1, 11)]  # 满 100 步
    assert spoken(7, good.mse)  # 由好变坏的那一轮
    assert all(look(good, config, epoch, 50) is None for epoch in range(1, 11))
    assert look(bad, replace(config, epochs=1), 1, 50) is not None  # 只有一轮，它就是最后一轮
    for kld in (2.5e5 / 4e-4, float("inf"), float("nan")):
        with pytest.raises(TrainingError, match="爆了"):
            look(replace(good, kld=kld), config, 1, 50)
    assert look(replace(good, kld=2e3 / 4e-4), config, 1, 50) is None
