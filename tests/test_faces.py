"""画脸：每个因子都看得见、连续地起作用。处处同样的字节见 test_other_machines.py。"""

import pytest
import torch

from vaelab.data import load
from vaelab.faces import FACE_FACTORS, draw_faces


def test_a_face_depends_on_its_own_factors_only():
    """一次画很多张（分块）与一张张画，结果相同；返回的因子重画出同样的图。"""
    data = load("faces", count=50, image_size=48, seed=1)
    alone = torch.cat([draw_faces(row[None], 48) for row in data.train_factors[:5]])
    assert torch.equal(alone, data.train[:5])
    assert torch.equal(draw_faces(data.test_factors, 48), data.test)
    assert data.factor_names == FACE_FACTORS and data.train_factors.shape == (45, len(FACE_FACTORS))


@pytest.mark.parametrize("name", FACE_FACTORS)
def test_every_factor_shows_and_is_continuous(name):
    column = FACE_FACTORS.index(name)
    factors = torch.full((101, len(FACE_FACTORS)), 0.4)
    factors[:, column] = torch.linspace(0, 1, 101)
    images = draw_faces(factors, 32).int()
    assert (images[0] - images[50]).abs().sum() > 300  # 看得见
    assert (images[1:] - images[:-1]).abs().flatten(1).float().mean(1).max() < 3  # 一小步只变一点点


def test_bad_factors_are_named():
    with pytest.raises(ValueError, match=r"\[N, 12\].*\[2, 3\].*skin"):
        draw_faces(torch.rand(2, 3))
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="0 与 1 之间"):
            draw_faces(torch.full((1, 12), value))
