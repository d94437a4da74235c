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
# # kappa, step size, run time of a model
#
# Three questions about the attack WDA on one model: how far to search (kappa), how to walk (steps and their size), and
# what it costs beside other attacks. They are those of Figures 3, 5 and 6 of the first paper. As it stands the notebook
# needs no network: the data are scikit-learn's digits, the model comes with the package.
#
# To run it on another model, change the parameters, or pass them on the command line:
#
# ```
# wda run notebooks/ablations.ipynb -p model digits-mlp -p norm L2 -p eps 0.5 -p step_sizes "[None, 0.05, 0.5]"
# wda run notebooks/ablations.ipynb -p model my_module:my_function -p data my_images.npz -p eps 8/255 -p dtype float32
# ```
#
# `my_function()` returns a `torch.nn.Module` that takes inputs in [0, 1] and gives logits. `my_images.npz` holds the
# arrays `x`, images as floats (N, C, H, W) in [0, 1] or as bytes (N, H, W) or (N, H, W, C), and `y`, N integers. A name
# that is not among the parameters is an error.

# %% tags=["parameters"]
data = "digits"  # "digits", a .npz file with x and y, or a data set under WDA_DATA such as "mnist"
model = "digits-cnn-adv"  # a bundled model, one under WDA_DATA, or "module:function"
norm = "Linf"  # of the ground cost: "Linf", "L2" or "L1"
eps = 0.1  # the radius; a fraction such as "8/255" may be a string
kappas = [1, 1.25, 1.5, 2, 2.5, 3, 4]  # how far "wda" searches, as multiples of the radius
steps = [2, 5, 10, 20, 50]  # "wda" runs once for each of them with
step_sizes = [None, 0.005, 0.02, 0.1, 0.5]  # each of these; None for lengths that fall from the radius along a cosine
attacks = ["fgsm", "pgd", "wda", "a3", "closest"]  # whose cost is compared
ns = [25, 50, 100]  # on so many samples
n = 100  # samples for kappa and for the steps, the first ones; None for all
seed = 0
batch_size = 256
dtype = "float64"  # the same on other machines but for rounding; "float32" for large models
device = "cpu"  # or "cuda"
output = "results/ablations"  # the folder of the records, made if needed; what has one already is not run again

# %%
import logging
import sys

from wda import experiment, figures

# attacks that take long say how far they are
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

sweeps = experiment.ablations(
    data=data,
    model=model,
    norm=norm,
    eps=eps,
    kappas=kappas,
    steps=steps,
    step_sizes=step_sizes,
    attacks=attacks,
    ns=ns,
    n=n,
    seed=seed,
    batch_size=batch_size,
    dtype=dtype,
    device=device,
)


def run(name):
    """The results of one of the sweeps, in its order; a record is written as soon as a cell is done."""
    for task in sweeps[name].tasks:
        experiment.run_cell(task.cell, output)
    records, _ = experiment.results(sweeps[name], output)
    return experiment.frame(records)


# %% [markdown]
# ## kappa
#
# In the ball of order 1. "wda" searches each sample's neighbourhood of radius κ·ε and moves a share 1/κ of its mass
# there. Where it flips every sample, the accuracy is clean·(1 − 1/κ), and rises with κ. "closest" spends the same
# budget where it flips the most.

# %%
kappa = run("kappa")

# %% tags=["check-output"] tolerance=10
print(experiment.costs(kappa).to_string(index=False))

# %%
figure = figures.accuracy_over_kappa(kappa)

# %% [markdown]
# ## Step size and convergence
#
# At κ = 1, with one probing step. Step sizes are lengths in the norm above; a walk of T steps of size α can get no
# further than T·α, and where that is less than ε it cannot reach the boundary of its ball. Accuracy in per cent:

# %%
walks = run("steps")
size = ["cosine" if chosen["step_size"] is None else chosen["step_size"] for chosen in walks.options]
walks = walks.assign(steps=walks.options.str["steps"], size=size)

# %% tags=["check-output"] tolerance=10
by_size = walks.pivot(index="size", columns="steps", values="accuracy").loc[walks["size"].unique()]
print((100 * by_size).round(1).to_string())

# %%
figure = figures.accuracy_over_steps(walks)

# %% [markdown]
# ## Run time
#
# In the ball of order infinity, where each sample moves by at most ε, so that all attacks look for the same. First what
# each finds, and what that takes in passes per sample.

# %%
cost = run("cost")
cost = cost.assign(label=cost.attack)
largest = cost[cost.n == max(ns)]

# %% tags=["check-output"] tolerance=10
print(experiment.costs(largest).drop(columns="transport cost").to_string(index=False))

# %% [markdown]
# Seconds depend on the machine, and on what else it does. A call has a cost of its own, whatever the size of the
# sample; the slope of a line through the points has not. It is told where a line fits.

# %%
wide = cost.pivot(index="n", columns="label", values="seconds")[attacks]
print(wide.round(2).to_string())

# %%
figure = figures.seconds_over_samples(cost)
