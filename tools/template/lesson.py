# %% [markdown]
# # {NN} {TITLE}：一句话说清这一章回答什么
#
# 读完这一章，你能……（一句话的承诺）。
#
# | | |
# |---|---|
# | 先修 | [05 章](05_kl_divergence.ipynb)的高斯 KL |
# | 用时 | 读 30 分钟，全部单元运行不到一分钟 |
# | 难度 | ★★☆☆☆ |
# | 学完你能 | 说出……；推出……；看见……时知道先查什么 |

# %%
# 准备：由 tools/stamp.py 写入

# %%
import inspect

import matplotlib.pyplot as plt
import torch
from torch.distributions import Normal, kl_divergence

from vaelab import plot
from vaelab.check import compare, exercise
from vanilla_vae import VanillaVAE

plot.use_chinese_font()

# %% [markdown]
# ## 问题：一张图，或一个会失败的例子
#
# 先让问题变得真切。**先猜再跑**：两个方差为 1 的高斯，均值从相距 1 拉到相距 2，KL 变成几倍？

# %%
distance = torch.linspace(0, 3, 61, dtype=torch.float64)
kl = 0.5 * distance**2  # [61]，式({N}.1)
figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
axes.plot(distance, kl, color=plot.BLUE)
axes.set(xlabel="两个均值的距离（标准差）", ylabel="KL（nat）", title="距离加倍，KL 是四倍")
assert torch.allclose(kl[40], 4 * kl[20])  # 图上的话也要核对
plt.show()

# %% [markdown]
# ## 1 一个公式
#
# 直觉在先，公式在后，紧跟着一格能失败的核对。**先猜再跑**：去掉下面的 ½，核对会怎样说？
#
# $$\begin{aligned}
# \mathrm{KL}\big(N(a,1)\,\|\,N(b,1)\big)=\tfrac12(a-b)^2
# \end{aligned} \tag{{N}.1}$$

# %%
one = torch.ones(61, dtype=torch.float64)
compare("式({N}.1)：与 torch.distributions 一致", kl, kl_divergence(Normal(distance, one), Normal(0 * one, one)))

# %% [markdown]
# **先猜再跑**：下一处该猜什么，写在这里。
#
# ## 常见错误
#
# - 把……当成……：看见……就查这里。
#
# ## 练习
#
# **{N}.1** 均值相距 4、方差都是 1，KL 是多少？

# %%
answer_{N}_1 = ...
exercise("{N}.1", answer_{N}_1)

# %% [markdown]
# **{N}.2** 写一个函数：由两个均值（方差都是 1）给出 KL。

# %%
def answer_{N}_2(a, b):
    raise NotImplementedError  # 把这一行换成你的代码


exercise("{N}.2", answer_{N}_2)

# %% [markdown]
# ## 小结
#
# - 一句一条，只说核对过的。
#
# ## 回到 `vanilla_vae.py`
#
# 这一章的东西在文件里的样子：

# %%
print(inspect.getsource(VanillaVAE.reparameterize))

# %% [markdown]
# ## 参考文献
#
# - D. P. Kingma, M. Welling. *Auto-Encoding Variational Bayes*. arXiv:1312.6114
