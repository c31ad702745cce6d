"""一轮走完，看测试集上的数像不像样：爆了就停，比不上一张平均图就说一句。"""

from __future__ import annotations

from vaelab.config import TrainConfig, TrainingError, gentler
from vaelab.evaluate import Evaluation

ABSURD_LOSS = 1e4
"""测试损失 MSE + w·KL 超过它就算爆了：不看 x、永远输出全灰的 0，损失也至多是 1（像素在 [-1, 1]）。

在 60 与 600 张 16×16 的脸上量得，看每一轮末：学习率 3e-4 到 0.03 时从第 3 步起就不超过 0.6，0.1 时有一轮冲到 2e3 又回来了，
1 时到过 2e6，30 到 1e5 时每一轮都在 2.5e5 以上，没有一次回得来。
"""
PATIENCE, PATIENT_STEPS = 3, 100
"""比不上平均图，从第几轮、第几步起才说：头几轮都比不上（默认的学习率下约 50 步超过它）。"""


def look(test: Evaluation, config: TrainConfig, epoch: int, steps_per_epoch: int, before: float | None = None) -> str | None:
    """第 ``epoch`` 轮（从 1 数）末的评价：像样就是 None，比不上平均图就是一句话。

    一句话在走过 ``PATIENCE`` 轮、``PATIENT_STEPS`` 步之后第一次、由好变坏的那一轮与最后一轮说，不是每一轮都说。

    Args:
        test: 这一轮之后在测试集上的评价。
        config: 训练的设置。
        epoch, steps_per_epoch: 走完了几轮，一轮几步。
        before: 上一轮的测试 MSE；没有就是 None。

    Raises:
        TrainingError: 测试损失超过 ``ABSURD_LOSS``，或不是数，已经没有救。
    """
    fixed = 0.0 if config.kld_weight == "optimal" else float(config.kld_weight)
    loss = test.mse + max(fixed, test.optimal_kld_weight) * test.kld  # w 取得很小时也看得出 KL 荒唐
    if not loss <= ABSURD_LOSS:  # NaN 也算
        raise TrainingError(
            f"第 {epoch} 轮末的测试损失是 {loss:.3g}（MSE {test.mse:.3g}，KL {test.kld:.3g}，ELBO {test.elbo:.3g}），"
            f"而全灰的图也不会超过 1，训练已经爆了：多半是学习率 {config.lr:g} 太大，请试 --lr {gentler(config.lr):g}，仍不行就再除以 4；"
            "这一轮没有存进检查点。"
        )
    first = max(PATIENCE, -(-PATIENT_STEPS // steps_per_epoch))
    worsened = epoch > first and (before is None or before <= test.baseline_mse)
    if test.mse <= test.baseline_mse or not (epoch in (first, config.epochs) or worsened):
        return None
    return (
        f"注意：第 {epoch} 轮的测试 MSE {test.mse:.4g} 比只猜平均图的 {test.baseline_mse:.4g} 还大，隐变量还没有帮上忙；"
        f"可以训练得更久，减小 --kld-weight，或把 --lr 减到 {gentler(config.lr):g}。"
    )
