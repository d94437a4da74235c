"""Algorithm 1 of the second paper, and the choice of its best epoch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from wda.checks import number, whole
from wda.threat import Threat
from wda.training.progress import Progress
from wda.training.records import FineTuned
from wda.training.run import Run, Sample, Settings

__all__ = ["finetune"]


def finetune(
    model: nn.Module,
    train: Sample,
    validation: Sample,
    threat: Threat,
    *,
    variant: str = "whole",
    tau: float = 0.01,
    eta: float = 1.0,
    beta: float = 6.0,
    noise: float = 0.01,
    epochs: int = 20,
    batch_size: int = 512,
    share: float = 0.1,
    penalty: str = "ce",
    momentum: float = 0.0,
    attack: str = "wpgd",
    attack_options: Mapping[str, Any] | None = None,
    test: Sample | None = None,
    seed: int = 0,
    autocast: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    interval: float = 60.0,
    progress: bool | None = None,
) -> FineTuned:
    r"""Train a network further against a :math:`W_p` ball, and keep the best epoch (Algorithm 1 of the second paper).

    Each step takes a batch, moves it by an attack, and goes down the gradient of the mean `objective` there. The attack
    by default, W-PGD-Budget, estimates the sensitivity from a share of the training sample, updates
    :math:`\Upsilon\leftarrow\Upsilon+\eta(\hat\Upsilon-\Upsilon)`, which is :math:`\hat\Upsilon` at first, and moves
    the batch by W-PGD within `batch_budget`, on ReDLR with the labels y, where eq. 5.2 has a prediction. Any other
    attack moves each batch within the radius of the threat, as if it were the whole sample. With order infinity this is
    TRADES (Zhang et al. 2019), but for the attack's loss and, beside its authors' code, the penalty.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a copy is trained, on the model's device. The attack sees it in evaluation mode. For the steps
        "whole" puts it in training mode; "last" leaves it in evaluation mode, so that all that is below the last layer
        is one and the same function.
    train, validation : (Tensor, Tensor)
        x and y, as for `wda.attack`. Each epoch goes through the training sample once, in an order of its own.
    threat : Threat
        With the second paper, ``Threat("Linf", "8/255", order=2)``. With eps = 0 nothing moves.
    variant : {"last", "whole"}
        See `disturb`.
    tau : float
        The learning rate.
    eta : float
        In (0, 1].
    beta : float
        The factor of the penalty.
    noise : float
        For the variant "whole", see `disturb`.
    epochs, batch_size : int
        The last batch of an epoch may be smaller.
    share : float
        Of the training sample, for the estimate of the sensitivity.
    penalty : {"ce", "kl"}
        See `objective`.
    momentum : float
        0 is the plain gradient descent of the second paper.
    attack : str
        Any of `wda.attacks.available`. "closest" with few steps, for example, moves the samples whose errors are
        nearest, as many as the budget pays for.
    attack_options : mapping, optional
        As for `wda.attack`; see also `strike`. For two classes ``{"loss": "margin"}``, as "redlr" needs three.
    test : (Tensor, Tensor), optional
        Scored after each epoch, and used for nothing else.
    seed : int
    autocast : bool
        Train and attack in bfloat16 where torch does so by itself.
    checkpoint : path, optional
        Where the state of the run is kept, after each epoch and, within one, every `interval` seconds. If it is there
        already, the run goes on from it: more epochs may then be asked for, but nothing else may differ. On the CPU,
        with as many threads, the result is the same bit for bit.
    interval : float
        Seconds; 0 for after each batch.
    progress : bool or None
        As for `wda.attack`: losses, accuracies and the time that is left.

    Returns
    -------
    FineTuned

    Raises
    ------
    ValueError, TypeError
        A bad argument; a model without a last linear layer, for "last"; a training sample with one label only; a
        checkpoint of another run, or a file that is none.
    FloatingPointError
        A loss or logits are NaN or infinite: the message names batch, samples, and the last good checkpoint.

    Examples
    --------
    >>> import wda
    >>> x, y = wda.data.load("digits", "train", n=80)
    >>> model, threat = wda.models.load("digits-mlp"), Threat("Linf", 0.05, order=2)
    >>> tuned = finetune(model, (x[:40], y[:40]), (x[40:], y[40:]), threat, epochs=1, batch_size=20, progress=False)
    >>> tuned.epoch, len(tuned.history[1].budget)
    (1, 2)
    """
    settings = Settings(
        variant=variant,
        tau=tau,
        eta=eta,
        beta=beta,
        noise=noise,
        batch_size=batch_size,
        penalty=penalty,
        attack=attack,
        attack_options={} if attack_options is None else attack_options,
        seed=seed,
        autocast=autocast,
        share=share,
        momentum=momentum,
    )
    epochs = whole("epochs", epochs)
    interval = number("interval", interval, "a number of seconds >= 0", 0, math.inf)
    samples = {"train": train, "validation": validation} | ({} if test is None else {"test": test})
    run = Run(model, samples, threat, settings, checkpoint, interval)
    if run.done > epochs * run.batches:
        done = run.done / run.batches
        raise ValueError(f"epochs={epochs}: the checkpoint has done {done:.3g} already; as many are accepted")
    left = Progress(epochs * run.batches, run.done, progress)
    while run.epoch <= epochs:
        run.train_epoch(epochs, left)
    return run.result()
