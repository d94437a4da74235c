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
# # Table 1 for any models
#
# This notebook runs the attacks of Table 1 of the first paper on the models you name, and sets the paper's numbers
# beside what it finds. As it stands it needs no network: two bundled models, on 100 of scikit-learn's digits, without
# AutoAttack, which takes longer than all the others together. Add "autoattack" to `attacks` for all columns.
#
# A row of the paper is run by the name of its model. Data set, norm and radius follow from it:
#
# ```
# wda fetch cifar10 robustbench:cifar10/Linf/Sehwag2021Proxy_R18
# wda run notebooks/table1.ipynb -p models "['robustbench:cifar10/Linf/Sehwag2021Proxy_R18']" -p n None \
#     -p attacks "['apgd-ce', 'apgd-dlr', 'wda', 'autoattack', 'a3', 'a3++', 'closest']" -p dtype float32 -p device cuda
# wda run notebooks/table1.ipynb -p models "['my_module:my_function@weights.pt']" -p data my_images.npz -p eps 8/255
# ```
#
# Each attack on each model is a cell, with a record of its own. A cell that has a record in the folder `output` is not
# run again, so a run that was stopped goes on where it was when it is started anew. A record is found by the names of
# model and data: where these change and keep their names, choose another folder.
#
# Where a model is missing or broken, or an attack fails on it, the others go on, and the last cell says what is missing
# and why. Only where nothing could be run at all does the notebook end with an error.

# %% tags=["parameters"]
models = ["digits-mlp", "digits-cnn-adv"]  # bundled, under WDA_DATA, "robustbench:...", "module:function@weights.pt"
data = None  # "digits", a .npz file, or a data set under WDA_DATA; None for the one that each model is for
norm = None  # of the ground cost: "Linf", "L2" or "L1"; None for the norm in a RobustBench name, else "Linf"
eps = None  # the radius; None for that of Table 1 for the data set and norm (digits: 0.1 in Linf, 0.5 in L2)
attacks = ["apgd-ce", "apgd-dlr", "wda", "a3", "a3++", "closest"]  # and "autoattack", or any other
kappas = [1, 2]  # "wda" runs once for each
settings = {}  # options of attacks other than their defaults, such as {"wda": {"steps": 50}}
n = 100  # only the first n samples; None for all
seed = 0
batch_size = 256
dtype = "float64"  # the same on other machines but for rounding; "float32" for large models
device = "cpu"  # or "cuda"
output = "results/table1"  # the folder of the records, made if needed

# %%
import logging
import sys

from wda import experiment

# attacks that take long say how far they are
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

# %%
records, failed = experiment.run_table1(
    models,
    data=data,
    norm=norm,
    eps=eps,
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
print(f"records in {output}")

# %% [markdown]
# ## Two threat models
#
# Accuracy in per cent. The header names the ball, because the columns are of two. Under W∞ each image moves by at most
# the radius ε. Under W1 the images move by ε on average: `wda` with κ moves a share 1/κ of each image's mass by at most
# κε, and `closest` spends the budget where it flips the most. At κ = 1 `wda` keeps each image within ε, so that its
# number may be held against either side; at κ = 2 it may not. Compare within a ball.

# %% tags=["check-output"] tolerance=10
table = experiment.table1(results).round(1)
for ball in table.columns.unique(0):
    print(f"{ball}\n{table[ball].to_string()}\n")

# %% [markdown]
# What each cost, in passes per image, with Wilson's interval for the accuracy, at least 95 %.

# %% tags=["check-output"] tolerance=10
print(experiment.costs(results).drop(columns="transport cost").to_string(index=False))

# %% [markdown]
# ## Beside the paper
#
# Published and reproduced, in per cent, and their difference in points. RobustBench evaluates the whole test set, of
# ImageNet 5,000 images. Of fewer images, Wilson's interval says how much a difference can mean.

# %% tags=["check-output"]
rows = experiment.beside_published(results)
run, columns = rows[rows.reproduced.notna()], ["attack", "published", "reproduced", "low", "high", "difference"]
for (model, ball), part in run.groupby(["model", "ball"], sort=False):
    print(f"{model}, {ball}, {part.n.iloc[0]:.0f} images")
    print(part[columns].round(2).to_string(index=False), "\n")
if run.empty:
    print("none of these models is a row of Table 1")

# %% [markdown]
# The rows that were not run here, and what fetches them; then run this notebook with their names as `models`. All
# at once they are the sweep `table1`: `wda sweep table1`, or on a cluster `wda sweep table1 --profile slurm`.

# %% tags=["check-output"]
missing = rows[~rows.model.isin(run.model)].drop_duplicates("model")
print(f"{len(missing)} of {rows.model.nunique()} rows not run here")
for source, part in missing.groupby("data", sort=False):
    print(" \\\n    ".join([f"wda fetch {source}", *part.model]))

# %% [markdown]
# ## What failed

# %% tags=["check-output"]
for failure in failed:
    print(f"{failure.model}: {', '.join(failure.attacks)}\n    {failure.error}")
print(f"{len(failed) or 'nothing'} failed")
