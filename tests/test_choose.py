"""没有指明的设置：左右分不分得出，模型合不合法，时间够走几轮，翻转翻的是不是图。"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vaelab import choose, cli
from vaelab.checkpoint import load_checkpoint
from vaelab.config import TrainConfig
from vaelab.data import load
from vaelab.faces import faces
from vaelab.images import ImageSet
from vaelab.plan import make_plan
from vaelab.processes import World
from vaelab.stepper import Stepper
from vanilla_vae import VanillaVAE

CPU = torch.device("cpu")


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(st.integers(0, 10**6), st.sampled_from([400, 1000, 2500]))
def test_pictures_without_left_and_right_are_seen_as_such(seed, count):
    assert abs(choose.lopsided(noise(count, seed))) < choose.LOPSIDED


def test_digits_and_a_light_from_one_side_are_lopsided(mnist_root):
    assert choose.lopsided(load("mnist", root=mnist_root, image_size=28).train[:1000]) > 3 * choose.LOPSIDED
    lit = noise(400) // 2 + torch.arange(8, dtype=torch.uint8) * 16  # 右边亮
    assert choose.lopsided(lit) > 3 * choose.LOPSIDED
    assert choose.lopsided(torch.cat([lit, lit.flip(3)])) < choose.LOPSIDED


@pytest.mark.parametrize("images", [noise(1), noise(1).expand(50, -1, -1, -1), torch.zeros(9, 1, 4, 4, dtype=torch.uint8)])
def test_few_or_equal_pictures_give_a_number(images):
    assert np.isfinite(choose.lopsided(images))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
def test_the_default_model_fits_its_size(size):
    with torch.device("meta"):
        model = VanillaVAE(3, image_size=size, **choose.model_defaults("图片", size))
    assert model.bottom == 4


@given(st.integers(2, 10_000))
def test_the_default_batch_leaves_two_steps_an_epoch(count):
    batch = choose.config_defaults("图片", torch.zeros(count, 1, 2, 2, dtype=torch.uint8))["batch_size"]
    assert TrainConfig(batch_size=batch).steps_per_epoch(count) >= (2 if count >= 4 else 1)


def test_time_decides_the_number_of_epochs():
    data = ImageSet("图", noise(320), noise(32))
    config = TrainConfig()
    one = choose.epochs_within(2.0, 0.05, config, data, CPU, World())[0]
    assert one == int(120 / (0.05 * (10 + 0.6)))
    assert choose.epochs_within(4.0, 0.05, config, data, CPU, World())[0] == pytest.approx(2 * one, abs=1)
    assert choose.epochs_within(1e-6, 0.05, config, data, CPU, World())[0] == 1
    epochs, why = choose.epochs_within(None, 1e-6, config, data, CPU, World())
    assert epochs == choose.MOST_EPOCHS and str(choose.MOST_EPOCHS) in why


def test_measuring_the_pace_changes_nothing():
    torch.manual_seed(0)
    model, data = VanillaVAE(3, 4, [4, 8], 16), faces(60, 16, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert 0 < choose.pace(model, data, TrainConfig(batch_size=8, precision="fp32"), CPU, World()) < 60
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_mirrored_training_sees_each_picture_or_its_mirror():
    data = faces(80, 16, 0)
    losses = {}
    for mirror in (False, True):
        torch.manual_seed(0)
        model = VanillaVAE(3, 4, [4, 8], 16)
        config = TrainConfig(batch_size=24, precision="fp32", mirror=mirror)
        with Stepper(model, data, config, make_plan(data, config, device="cpu", compile="off")) as stepper:
            seen = []
            stepper.objective.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].clone()))
            batch = next(iter(stepper.feed(0)))
            losses[mirror] = stepper(batch, 0, 1e-3)[0].item()
        turned = (seen[0] == batch.flip(3)).flatten(1).all(1)
        kept = (seen[0] == batch).flatten(1).all(1)
        assert (turned | kept).all()
        assert kept.all() if not mirror else 4 <= turned.sum() <= 20  # 24 张里翻几张：p = ½，4 与 20 之外的机会不到 0.04%
    assert losses[True] != losses[False]


def test_own_pictures_need_no_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAELAB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "图").mkdir()
    for i, picture in enumerate(noise(40)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((40, 30)).save(tmp_path / "图" / f"{i}.png")
    assert cli.main(["--data", "图", "--minutes", "0.01", "--device", "cpu"]) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    for said in ("没有指明而定下的", "量得每步", "只有 36 张训练图", "拟合的先验"):
        assert said in output
    state = load_checkpoint("runs/图")
    assert state["config"]["kld_weight"] == "optimal" and state["config"]["mirror"]
    assert state["model_args"] == {"in_channels": 3, "latent_dim": 128, "hidden_dims": [32, 64, 128], "image_size": 32}
    assert cli.main(["--data", "图", "--steps", "3", "--flip", "off", "--kld-weight", "0.001", "--latent-dim", "3", "--hidden-dims", "4,8"]) == 0
    config = load_checkpoint("runs/图-2")["config"]
    assert not config["mirror"] and config["kld_weight"] == 0.001 and config["epochs"] == 2 and "--flip" not in capsys.readouterr().out
