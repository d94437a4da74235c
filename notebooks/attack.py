# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attack a model
#
# This notebook runs attacks on one model within one threat model, writes a record of each, and shows a table and a
# plot. As it stands it needs no network: the data are scikit-learn's digits, the model comes with the package.
#
# To run it on another model, change the parameters, or pass them on the command line:
#
# ```
# wda run notebooks/attack.ipynb -p model digits-cnn -p norm L2 -p eps 0.5
# wda run notebooks/attack.ipynb -p model my_module:my_function -p data my_images.npz -p eps 8/255 -p dtype float32
# ```
#
# `my_function()` returns a `torch.nn.Module` that takes inputs in [0, 1] and gives logits. `my_images.npz` holds the
# arrays `x`, images as floats (N, C, H, W) in [0, 1] or as bytes (N, H, W) or (N, H, W, C), and `y`, N integers. A name
# that is not among the parameters is an error.

# %% tags=["parameters"]
data = "digits"  # "digits", a .npz file with x and y, or a data set under WDA_DATA such as "mnist"
model = "digits-mlp"  # a bundled model, one under WDA_DATA, or "module:function"
norm = "Linf"  # of the ground cost: "Linf", "L2" or "L1"
eps = 0.1  # the radius; a fraction such as "8/255" may be a string
order = 1  # of the Wasserstein distance, from 1 to "inf"; for "inf" set kappas to [1]
attacks = ["fgsm", "pgd", "deepfool", "wda", "wda++", "closest"]  # the cell below lists them all
kappas = [1, 1.5, 2, 3, 4]  # "wda" runs once for each
settings = {}  # options of attacks other than their defaults, such as {"pgd": {"steps": 100}}
n = None  # only the first n samples; None for all
seed = 0
batch_size = 256
dtype = "float64"  # the same on other machines but for rounding; "float32" for large models
device = "cpu"  # or "cuda"
output = "results"  # the folder of the records, made if needed

# %%
import logging
import sys

import wda
from wda import experiment, figures

# attacks that take long say how far they are
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

print("attacks:", *wda.attacks.available())

# %% [markdown]
# "wfgsm" and "wpgd" need an order above 1; "apgd-ce", "apgd-dlr", "fab" and "autoattack" the package of the extra
# `wda[attacks]`. "autoattack" takes thousands of passes per image.
#
# Every attack is audited: its distribution lies in the Wasserstein ball, checked in double precision with no tolerance.
# The record of an attack is written as soon as it is done.

# %%
records = experiment.run(
    data=data,
    model=model,
    norm=norm,
    eps=eps,
    order=order,
    attacks=attacks,
    kappas=kappas,
    settings=settings,
    n=n,
    seed=seed,
    batch_size=batch_size,
    dtype=dtype,
    device=device,
    output=output,
)
results = experiment.frame(records)
print(f"{len(records)} records in {output}")

# %% [markdown]
# Accuracy in per cent on the adversarial distribution. `clean` is the accuracy on the sample itself.

# %% tags=["check-output"] tolerance=2
print(experiment.table(results).round(1).T.to_string())

# %% [markdown]
# What each cost, in passes per sample, and how much of the budget it spent. The interval is Wilson's, at least 95 %.

# %% tags=["check-output"] tolerance=2
print(experiment.costs(results).to_string(index=False))

# %%
if "wda" in attacks:
    figure = figures.accuracy_over_kappa(results)
