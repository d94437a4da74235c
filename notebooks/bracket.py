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
# # Bracket a model's robust accuracy
#
# How accurate is a model, at worst, over a whole Wasserstein ball around the data? This notebook bounds that from both
# sides, an attack from above and a certificate from below. It writes a record, and shows a table and a plot. As it
# stands it needs no network: the data are scikit-learn's digits, the model comes with the package.
#
# To run it on another model, change the parameters, or pass them on the command line:
#
# ```
# wda run notebooks/bracket.ipynb -p model digits-cnn -p norm L2 -p eps 0.2
# wda run notebooks/bracket.ipynb -p model my_module:my_function -p data my_images.npz -p n 20 -p eps 2/255
# ```
#
# `my_function()` returns a `torch.nn.Module` that takes inputs in [0, 1] and gives logits. `my_images.npz` holds the
# arrays `x`, images as floats (N, C, H, W) in [0, 1] or as bytes (N, H, W) or (N, H, W, C), and `y`, N integers. A name
# that is not among the parameters is an error.
#
# The certificate needs layers through which bounds can be propagated: linear and convolutional ones, batch
# normalisation, average and max pooling, sums, ReLU, sigmoid, GELU, SiLU. With others the attack's side is given all
# the same, and a line says which layer stands in the way of the other. Certificates take time, more than in proportion
# to the number of units: begin with a small `n`.

# %% tags=["parameters"]
data = "digits"  # "digits", a .npz file with x and y, or a data set under WDA_DATA such as "mnist"
model = "digits-mlp"  # a bundled model, one under WDA_DATA, or "module:function"
norm = "Linf"  # of the ground cost: "Linf", "L2" or "L1"
eps = 0.05  # the radius; a fraction such as "8/255" may be a string
order = 1  # of the Wasserstein distance, from 1 to "inf"
method = "auto"  # of the certificate: "auto", "optimised", "linear", "interval", "lipschitz" or "milp"
time_limit = 60  # seconds for each sample, for "milp"
tolerance = 0.01  # how near the search for certified radii comes to the largest it could certify, relatively
confidence = 0.95  # of the interval for the population
n = 100  # only the first n samples, or as many as there are; None for all
seed = 0
batch_size = 256
dtype = "float64"  # of the attack; "float32" for large models. The certificate is in float64 always
device = "cpu"  # or "cuda"
output = "results/bracket"  # the folder of the record, made if needed

# %%
import logging
import sys

from wda import data as samples
from wda import experiment, figures
from wda.checks import whole

# what takes long says how far it is
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")

if n is not None:
    n = min(whole("n", n), samples.count(data))

# %% [markdown]
# Attack and certificate find one number for each sample: a distance at which there is an error, and a radius within
# which there is none. Both spend the budget of the ball in the optimal way.

# %%
found, path = experiment.run_bracket(
    data=data,
    model=model,
    norm=norm,
    eps=eps,
    order=order,
    method=method,
    tolerance=tolerance,
    time_limit=time_limit,
    n=n,
    seed=seed,
    batch_size=batch_size,
    dtype=dtype,
    device=device,
    output=output,
)
attack_time, certificate_time = found.seconds
print(f"{path}: attack {attack_time:.1f} s, certificate {certificate_time:.1f} s")

# %% tags=["check-output"] tolerance=10
print(f"accuracy over {found.threat}: {100 * found.lower:.1f} % to {100 * found.upper:.1f} %")
print(f"{len(found.radius)} samples, {int(found.exact.sum())} distances exact")
if found.why:
    print(f"no certificate: {found.why}")

# %% [markdown]
# The same two lists of numbers serve every radius and every order. In per cent: `certified` and `attacked` are for the
# ball around this sample. `population` is for the ball around the distribution that the sample was drawn from; it holds
# for all balls at once.

# %% tags=["check-output"] tolerance=10
radii = [share * found.threat.eps for share in (0.25, 0.5, 1, 2)]
print(experiment.bracket_table(found, radii, confidence).round(1).to_string())

# %%
figure = figures.bracket_curves({model: found}, 3 * found.threat.eps, confidence=confidence)
