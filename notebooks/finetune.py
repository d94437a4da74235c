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
# # Fine-tune a model against a Wasserstein ball
#
# This notebook trains a network further by the second paper's method: the objective of TRADES with an attack inside
# that has one budget for the whole sample. Then it asks whether the gain is real. The paper measures it with W-PGD, the
# attack that was trained against; here the nearest error of each image is searched as well, and the budget spent on
# these in the optimal way. As it stands it needs no network: the data are scikit-learn's digits, the model comes with
# the package.
#
# To run it on another model or other data, change the parameters, or pass them on the command line:
#
# ```
# wda run notebooks/finetune.ipynb -p model my_module:my_function -p data my_test.npz -p train my_train.npz
# wda run notebooks/finetune.ipynb -p model digits-cnn-adv -p variant last -p tau 0.1
# wda run notebooks/finetune.ipynb -p attack closest -p attack_options "{'steps': 6, 'restarts': 1}"
# ```
#
# The paper's own experiment needs its data, a model of RobustBench and a GPU; `wda fetch` downloads the first two:
#
# ```
# wda fetch cifar10
# wda fetch robustbench:cifar10/Linf/Zhang2019Theoretically
# wda run notebooks/finetune.ipynb -p data cifar10 -p model robustbench:cifar10/Linf/Zhang2019Theoretically \
#     -p delta 8/255 -p epochs 20 -p batch_size 512 -p dtype float32 -p device cuda -p autocast True
# ```
#
# The record and the tuned weights are left in the output folder. Other notebooks take the weights as
# `-p model digits-cnn@results/finetune/NAME.weights.pt`.
#
# A run that was killed goes on where it was: its state is kept in the output folder, after each epoch and, within one,
# every minute.

# %% tags=["parameters"]
data = "digits"  # "digits", or a data set under WDA_DATA that has both splits, such as "mnist" or "cifar10"
train = None  # where data is a path to test images: the path to those to train on
model = "digits-cnn"  # a bundled model, one under WDA_DATA, "robustbench:DATA/THREAT/ID" or "module:function"
norm = "Linf"  # of the ground cost: "Linf", "L2" or "L1"
delta = 0.1  # the radius of the ball; a fraction such as "8/255" may be a string
order = 2  # of the Wasserstein distance, above 1 and up to "inf"
variant = "whole"  # "whole": noise on all weights, and all are trained; "last": a new last layer, trained alone
tau = 0.01  # the learning rate
eta = 1.0  # the share that a new estimate of the sensitivity has in its moving average
beta = 6.0  # the weight of the penalty
noise = 0.01  # for "whole", in units of the root mean square of each tensor of weights
epochs = 4
batch_size = 128
penalty = "ce"  # "ce" as in the paper, or "kl" as in TRADES
attack = "wpgd"  # what is trained against: any attack of wda.attacks.available()
attack_options = {}  # of that attack, such as {"steps": 10}
validation = 0.2  # the share of the training split that is held out, to select the epoch
n_train = None  # only the first of the training split; None for all
n = None  # only the first of the test split; None for all
seed = 0
dtype = "float64"  # the same on other machines but for rounding; "float32" for large models
device = "cpu"  # or "cuda"
autocast = False  # bfloat16 where torch takes it by itself: faster on a GPU
output = "results/finetune"  # the folder of the record and the weights, made if needed

# %%
import logging
import sys

from wda import experiment, figures

# what takes long says how far it is
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

# %%
tuned, record = experiment.run_finetune(
    data=data,
    train=train,
    model=model,
    norm=norm,
    eps=delta,
    order=order,
    variant=variant,
    tau=tau,
    eta=eta,
    beta=beta,
    noise=noise,
    epochs=epochs,
    batch_size=batch_size,
    penalty=penalty,
    attack=attack,
    attack_options=attack_options,
    validation=validation,
    n_train=n_train,
    n=n,
    seed=seed,
    dtype=dtype,
    device=device,
    autocast=autocast,
    output=output,
)

# %% [markdown]
# Accuracies on the test split, in per cent, before fine-tuning and after its best epoch. "W-PGD-20" are the paper's
# measures: the cross-entropy point-wise, ReDLR in the Wasserstein ball. "strongest" is what the optimal budget makes of
# the nearest errors found. A gain under W-PGD-20 that "strongest" does not show is no gain. On another processor the
# column "after" is another one by a few points: sums are rounded otherwise there, and each epoch makes that larger.

# %%
print(experiment.tuning_table(record).round(1).T.to_string())
print(f"\nbest epoch: {tuned.epoch} of {epochs}")

# %% [markdown]
# The course of it, on the test split (solid) and on the validation sample that selects the epoch (dashed, the epoch
# dotted). On the right the sensitivity Υ of the attack's loss, the slope of the worst-case risk at radius 0.

# %%
figure = figures.tuning_curves(record)

# %% [markdown]
# Each batch estimates Υ from a tenth of the training sample and gets its share of the budget by it. With frozen weights
# and the Υ of the whole sample the mean of the shares to the power of the order would be the budget.

# %%
radius, p = record["parameters"]["eps"], float(record["parameters"]["order"])
for epoch in tuned.history[1:]:
    if epoch.budget and radius:
        shares = sorted(own / radius for own in epoch.budget)
        spent = (sum(share**p for share in shares) / len(shares)) ** (1 / p)
        print(
            f"epoch {epoch.epoch}: batches are attacked at {shares[0]:.2f} to {shares[-1]:.2f} times the radius, "
            f"in the mean {spent:.2f}"
        )
