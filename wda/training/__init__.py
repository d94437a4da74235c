"""Distributional adversarial fine-tuning: a trained network is trained further against a Wasserstein ball.

`finetune` with its defaults is the second paper's Algorithm 1: TRADES' objective, with an attack inside that moves each
batch within its share of one budget for the whole sample. What it is made of is public too: `objective` (eq. 5.1),
`batch_budget` (eq. 5.5), `estimate` (the sensitivity from a part of the sample), `strike` (the attack inside) and
`disturb` (how the two variants start).
"""

from wda.training.adversary import batch_budget, estimate, strike
from wda.training.finetune import finetune
from wda.training.objective import objective
from wda.training.records import Epoch, FineTuned, Score, score
from wda.training.replay import permutation
from wda.training.variants import disturb, last_layer

__all__ = [
    "Epoch",
    "FineTuned",
    "Score",
    "batch_budget",
    "disturb",
    "estimate",
    "finetune",
    "last_layer",
    "objective",
    "permutation",
    "score",
    "strike",
]
