# %% [markdown]
# # {NN} {TITLE}：练习解答
#
# 先自己做，再看这里。题目在 [{NN} 章](../{FILE})。

# %%
# 准备：由 tools/stamp.py 写入

# %%
from vaelab.check import exercise

# %% [markdown]
# ## 练习 {N}.1
#
# 式({N}.1) 里 $a-b=4$，所以是 $\tfrac12\cdot16=8$。

# %%
solution_{N}_1 = 8.0
exercise("{N}.1", solution_{N}_1)

# %% [markdown]
# 常见的错答是忘了 ½。

# %%
wrong_{N}_1 = 16.0
exercise("{N}.1", wrong_{N}_1)

# %% [markdown]
# ## 练习 {N}.2
#
# 照式({N}.1) 写出来。

# %%
def solution_{N}_2(a, b):
    return 0.5 * (a - b) ** 2


exercise("{N}.2", solution_{N}_2)

# %% [markdown]
# 常见的错答是忘了平方。

# %%
def wrong_{N}_2(a, b):
    return 0.5 * abs(a - b)


exercise("{N}.2", wrong_{N}_2)
