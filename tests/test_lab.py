"""08、13 章共用的实验台：不依赖默认的浮点类型，尺子量得准，坏的输入一句中文。"""

import pytest
import torch

from vaelab import lab


def test_nothing_depends_on_the_default_dtype():
    wide, before = lab.make_faces(40, seed=0), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        again = lab.make_faces(40, seed=0)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == torch.float64 for a, b in zip(wide, again))
    assert lab.features(wide[1][:, :8]).dtype == lab.to_factors(lab.to_targets(wide[0])).dtype == torch.float64
    assert torch.equal(lab.to_faces(lab.to_patches(wide[1])), wide[1].float().double())
    assert torch.allclose(lab.to_factors(lab.to_targets(wide[0])), wide[0], atol=1e-9)


def test_the_ruler_knows_faces_from_blends():
    factors, x = lab.make_faces(1500, seed=0)
    _, held = lab.make_faces(200, seed=1)
    read = lab.make_reader(factors, x)
    assert lab.misfit(held, read).mean() < lab.misfit((held[:100] + held[100:]) / 2, read).mean() / 10


def test_the_classifier_sees_a_shift_and_nothing_else():
    z = torch.randn(3, 800, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(lab.accuracy(z[0], z[1]) - 0.5) < 0.1 and lab.accuracy(z[0], z[2] + 2) > 0.9


def test_bad_codes_get_a_sentence():
    z = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dead = z.clone()
    dead[:, 1] = 0
    with pytest.raises(ValueError, match="第 1 维恒为常数"):
        lab.accuracy(dead, dead)
    with pytest.raises(ValueError, match="一样多的样本"):
        lab.accuracy(z, z[:10])
    with pytest.raises(ValueError, match="用 make_faces 造"):
        lab.make_reader(torch.rand(100, 12), torch.rand(100, 300))
