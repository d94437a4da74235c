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
# # A model of your own, from setting up to certificate
#
# Is my network set up right? How accurate is it, at worst, when every image may change a little, or all of them on
# average? And what of that is proved? This notebook answers for one network and one data set. As it stands it needs no
# download: the network is the one in `example_model.py` beside it, a pattern for yours.
#
# ```
# wda run notebooks/own_model.ipynb -p model my_module:my_function -p data my_images.npz -p radii "['2/255', '4/255']"
# wda run notebooks/own_model.ipynb -p model my_module:Net@weights.pt -p data cifar10 -p dtype float32 -p device cuda
# ```
#
# `my_function()` returns a `torch.nn.Module` that takes inputs in [0, 1], with any normalisation inside, and gives
# logits. Modules are found in the current folder, beside this notebook, and on PYTHONPATH. `my_images.npz` holds the
# arrays `x`, images as floats (N, C, H, W) in [0, 1] or as bytes (N, H, W), (N, H, W, C) or (N, C, H, W), and `y`, N
# integers from 0.

# %% tags=["parameters"]
model = "example_model:build"  # "module:function", "module:function@weights.pt", a bundled one, or "robustbench:..."
data = "digits"  # "digits", a .npz file with x and y, or a data set under WDA_DATA such as "cifar10"
norm = "Linf"  # of the ground cost: "Linf", "L2" or "L1"
radii = [0.01, 0.02, 0.05]  # in units of x; fractions such as "8/255" may be strings
orders = [1, 2, "inf"]  # of the Wasserstein distance
attacks = ["pgd", "apgd-ce", "wda"]  # point-wise, to compare with
certify = "linear"  # "interval" is faster, "optimised" tighter, "milp" exact; "none" where there are too many units
n = 100  # only the first n samples, or as many as there are; None for all
seed = 0
batch_size = 256
dtype = "float64"  # the same on other machines but for rounding; "float32" for large models
device = "cpu"  # or "cuda"
output = "results/own-model"  # the folder of all that is kept, made if needed

# %%
import logging
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch

import wda
from wda import experiment
from wda.certificates.radius import METHODS
from wda.checks import choice, whole
from wda.figures import COLOURS

# what takes long says how far it is
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

# what is wrong with the parameters is said before anything runs
choice("certify", certify, ("none", *METHODS))
if n is not None:
    n = min(whole("n", n), wda.data.count(data))
for name, value in (("radii", radii), ("orders", orders)):
    if not isinstance(value, list) or not value:
        raise TypeError(f'{name}={value!r}: a list is accepted, in a shell -p {name} "[1, 2]"')
balls = [wda.Threat(norm, eps, order) for order in orders for eps in radii]
print(*balls, sep="\n")

# %% [markdown]
# ## Is it set up right?
#
# An attack runs on a network that is set up wrongly too, and its numbers look like any others. What is below takes
# some passes on the sample to look for the usual mistakes. Inputs outside [0, 1], labels without a logit, and NaN at
# every sample are errors; the rest is said in words.

# %% tags=["check-output"]
x, y, net, _ = experiment.load_inputs(data, model, n, dtype, device)
size = sum(parameter.numel() for parameter in net.parameters())
print(f"{len(x)} samples of shape {tuple(x.shape[1:])} in [{x.min():g}, {x.max():g}], labels {y.min()} to {y.max()}")
print(f"{size:,} parameters")
for doubt in experiment.doubts(net, x, y, batch_size) or ["nothing speaks against this model and this sample"]:
    print("-", doubt)

# %% [markdown]
# ## How far down do attacks bring it?
#
# First the usual question: every image may move by at most the radius, that is, a ball of order infinity. Accuracy in
# per cent; `clean` is that on the sample. A record of each run is kept.

# %% tags=["check-output"] tolerance=10
about = {"data": data, "model": model, "n": n, "dtype": dtype, "device": device, "seed": seed, "batch_size": batch_size}
records = []
for eps in radii:
    ball = {"norm": norm, "eps": eps, "order": "inf"}
    records += experiment.run(attacks=attacks, kappas=[1], output=output, **ball, **about)
results = experiment.frame(records)
print(experiment.table(results).round(1).T.to_string())

# %% [markdown]
# ## And from the other side?
#
# One search for the nearest error of each image, and one for the largest radius within which there is provably none.
# Each gives a number for every image; the two lists serve every ball. Where a layer is in the way of the certificate, a
# line says which, and the attack's side is given alone.

# %%
search = {"seed": seed, "batch_size": batch_size}
if certify == "none":
    found, bracket, why = wda.distances(net, x, y, norm=norm, **search), None, "none was asked for"
else:
    bracket = wda.bracket(net, x, y, balls[0], method=certify, **search)
    found, why = bracket.distances, bracket.why

# %% tags=["check-output"] tolerance=1
if why:
    print(f"no certificate: {why}")
else:
    print(f"certified, at the median: no error within {bracket.radius.median():.2g}")
print(f"found, at the median: an error at {found.distance.median():.2g}")

# %% [markdown]
# In per cent: no distribution in the ball around this sample leaves less than `certified`, and there is one in it that
# leaves `attacked`. The truth is between the two. The ball of order 1 is the largest: there the budget may go where it
# pays. In that of order infinity every image has the same.

# %% tags=["check-output"] tolerance=10
rows = []
for ball in balls:
    row = {"ball": str(ball), "attacked": 100 * float(found.robust_accuracy(ball.eps, ball.order))}
    if not why:
        row["certified"] = 100 * float(bracket.curve(ball.eps, ball.order)[0])
    rows.append(row)
print(pd.DataFrame(rows).set_index("ball").round(1).to_string())

# %%
reach = torch.linspace(0, 2 * max(ball.eps for ball in balls), 201, dtype=torch.float64)
figure, panel = plt.subplots(figsize=(6.4, 4), layout="constrained")
for order, colour, style in zip(dict.fromkeys(ball.order for ball in balls), COLOURS, ("-", "--", "-."), strict=False):
    upper = 100 * found.robust_accuracy(reach, order)
    name = r"\infty" if math.isinf(order) else f"{order:g}"
    panel.plot(reach, upper, style, color=colour, label=f"$W_{{{name}}}$")
    if not why:
        lower = 100 * bracket.curve(reach, order)[0]
        panel.plot(reach, lower, style, color=colour, linewidth=0.8)
        panel.fill_between(reach, lower, upper, color=colour, alpha=0.2, linewidth=0)
panel.set_xlabel(f"radius ε ({norm})")
panel.set_ylabel("accuracy (%)")
panel.set_ylim(0, 101)
legend = panel.legend(title="thick: attacked\nthin: certified" if not why else None)

# %% [markdown]
# ## Can the attack be trusted?
#
# A weak attack makes a model look robust. Two signs of it: one of the attacks above leaves less than the search for
# nearest errors does in the same ball; or for some images that search found no error at all. More `restarts` and
# `steps` (options of "closest") are the remedy, and a second look at how the model is set up.

# %% tags=["check-output"]
nearest = results.eps.map(lambda eps: float(found.robust_accuracy(eps, "inf")))
for better in results[results.accuracy < nearest - 1e-9].itertuples():
    print(f"{better.attack} at {better.eps:g} leaves {100 * better.accuracy:.1f} %, less than the nearest errors do")
print(f"no error was found for {int(found.distance.isinf().sum())} of {len(x)} images")

# %% [markdown]
# ## What is kept
#
# The records of the attacks; the distribution found in the first ball, for `wda.AdversarialDistribution.load`, after
# its audit: its cost is within the budget, in double precision, with no tolerance; and both lists of numbers, for
# `wda.Bracket.load`.

# %%
adv = found.distribution(balls[0])
adv.audit()
adv.save(Path(output) / "distribution.npz")
if bracket is not None:
    bracket.save(Path(output) / "bracket.json", **about, provenance=experiment.provenance(device))
kept = f"{len(records)} records and distribution.npz" + (bracket is not None) * ", and bracket.json"
print(f"{kept}, in {output}")
