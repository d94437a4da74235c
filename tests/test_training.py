"""Fine-tuning: the objective's identities, budgets of batches, runs that are killed, and bad input."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import wda
from wda import AdversarialDistribution, Threat
from wda.attacks import sensitivity
from wda.experiment import read_finetune, run_finetune, tuning_table
from wda.norms import norm
from wda.training import (
    FineTuned,
    batch_budget,
    disturb,
    estimate,
    finetune,
    last_layer,
    objective,
    permutation,
    score,
    strike,
)
from wda.training.run import Run

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_variant = pytest.mark.parametrize("variant", ["last", "whole"])
each_seed = pytest.mark.parametrize("seed", [0, 1, 2])

W2 = Threat("Linf", 0.08, order=2)


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Small, with batch normalisation, and with dropout in training mode."""
    torch.manual_seed(seed)
    layers = (nn.Flatten(), nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    return nn.Sequential(*layers).to(dtype).eval()


def labelled(n: int = 48, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Points of (2, 3) in the box; the label is the largest of three sums."""
    x = numbers(n, 2, 3, seed=seed, dtype=dtype)
    return x, x.sum(1).argmax(1)


def tuned(model: nn.Module | None = None, threat: Threat = W2, **options: Any) -> FineTuned:
    """A short run on a small network."""
    how: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 16,
        "tau": 0.05,
        "progress": False,
        "attack_options": {"steps": 4},
    }
    sample = labelled(dtype=next((model or network()).parameters()).dtype)
    return finetune(network() if model is None else model, sample, sample, threat, **how | options)


def resting() -> nn.Module:
    """Without batch statistics, and right about most of the sample."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[1].weight.copy_(2 * torch.eye(3, dtype=torch.float64).repeat(1, 2) + 0.1 * numbers(3, 6))
    return model


def smoothed(model: nn.Sequential) -> nn.Sequential:
    """The same weights, another function."""
    model[3] = nn.Tanh()
    return model


def partly_frozen(model: nn.Sequential) -> nn.Sequential:
    """The same function, of which less is trained."""
    model[1].requires_grad_(False)
    return model


RESTING = resting()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = wda.data.load("digits", "train", n=300)
    return wda.models.load("digits-mlp").double(), x.double(), y


# -- the objective ---------------------------------------------------------------------------------------------------


def trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """TRADES' loss as its authors' public code words it: a mean cross-entropy and a divergence in "batchmean"."""
    divergence = nn.KLDivLoss(reduction="batchmean")
    robust = divergence(functional.log_softmax(model(x_adv), dim=1), functional.softmax(model(x), dim=1))
    return functional.cross_entropy(model(x), y) + beta * robust


@each_dtype
@each_seed
def test_order_infinity_with_kl_is_trades(dtype: torch.dtype, seed: int) -> None:
    model, (x, y) = network(seed, dtype), labelled(seed=seed, dtype=dtype)
    adv = strike(model, x, y, Threat("Linf", 0.1, order="inf"))
    assert float((adv.x_adv - x).abs().max()) == pytest.approx(0.1, rel=1e-5)
    for beta in (0.0, 1.0, 6.0):
        ours = objective(model(x), model(adv.x_adv), y, beta=beta, weight=adv.weight, penalty="kl").mean()
        expected = trades(model, x, adv.x_adv, y, beta)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
        pairs = zip(
            torch.autograd.grad(ours, list(model.parameters())),
            torch.autograd.grad(expected, list(model.parameters())),
            strict=True,
        )
        for own, theirs in pairs:
            torch.testing.assert_close(own, theirs, rtol=1e-6, atol=1e-6)


@each_dtype
@each_seed
def test_the_cross_entropy_in_its_place_is_that_of_two_predictions(dtype: torch.dtype, seed: int) -> None:
    """torch's cross-entropy with probabilities for labels; and its gradient differs by that of the entropy."""
    model, (x, y) = network(seed, dtype), labelled(seed=seed, dtype=dtype)
    moved = strike(model, x, y, Threat("Linf", 0.1, order="inf")).x_adv
    parameters = list(model.parameters())
    clean, away = model(x), model(moved)
    ours = objective(clean, away, y, beta=6.0).mean()
    expected = functional.cross_entropy(clean, y) + 6 * functional.cross_entropy(away, clean.softmax(1))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)

    entropy = torch.distributions.Categorical(logits=clean).entropy().mean()
    other = objective(clean, away, y, beta=6.0, penalty="kl").mean()
    assert (ours - other).item() == pytest.approx(6 * entropy.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, other, 6 * entropy)]
    for with_ce, with_kl, of_entropy in zip(*gradients, strict=True):
        torch.testing.assert_close(with_ce - with_kl, of_entropy, rtol=1e-4, atol=2e-6)
    assert max(float(g.abs().max()) for g in gradients[2]) > 1e-2, "the difference is not small"


@each_seed
@pytest.mark.parametrize("penalty", ["ce", "kl"])
def test_a_share_that_moves_is_a_mixture(seed: int, penalty: str) -> None:
    clean, away, y = numbers(7, 4, seed=seed) * 5, numbers(7, 4, seed=seed + 9) * 5, torch.arange(7) % 4
    share = numbers(7, seed=seed + 5)
    moved, stayed = (objective(clean, points, y, penalty=penalty) for points in (away, clean))
    mixed = objective(clean, away, y, weight=share, penalty=penalty)
    torch.testing.assert_close(mixed, share * moved + (1 - share) * stayed)
    assert (moved > stayed).all(), "Gibbs' inequality"


def test_extreme_logits_have_a_finite_objective_and_gradient() -> None:
    clean = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    away = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    for penalty in ("ce", "kl"):
        value = objective(clean, away, torch.tensor([0]), penalty=penalty).sum()
        assert all(g.isfinite().all() for g in (value, *torch.autograd.grad(value, [clean, away])))


# -- budgets of batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("order", [1.5, 2.0, 4.0, math.inf])
@pytest.mark.parametrize("loss", ["redlr", "ce"])
def test_the_attacks_on_the_batches_together_are_in_the_ball(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, order: float, loss: str
) -> None:
    """With frozen weights and the sensitivity of the whole sample: mean budget^p = eps^p, and the union is audited."""
    model, x, y = digits
    threat = Threat(name, {"Linf": 0.05, "L2": 0.4, "L1": 1.5}[name], order)
    whole = sensitivity(model, x, y, name, order, loss)
    batches = permutation(len(x), seed=0, epoch=1).split(60)
    budgets, points = [], x.clone()
    for rows in batches:
        budgets.append(batch_budget(sensitivity(model, x[rows], y[rows], name, order, loss), whole, threat))
        ball = Threat(name, budgets[-1], order)
        points[rows] = strike(model, x[rows], y[rows], ball, "wpgd", {"loss": loss, "steps": 5}).x_adv
    if math.isinf(order):
        assert budgets == [threat.eps] * 5
    else:
        assert np.mean(np.array(budgets) ** order) == pytest.approx(threat.eps**order, rel=1e-10)
        assert max(budgets) > 1.05 * min(budgets)
    together = AdversarialDistribution.from_points(x, points, y, Threat(name, threat.eps * (1 + 1e-12), order))
    assert together.audit() > (0.05 if name == "L1" else 0.5) * threat.eps, "L1: single pixels soon meet the box"
    assert together.accuracy(model) < 0.97


def test_from_a_tenth_of_the_sample_the_mean_exceeds_the_budget(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Jensen: the mean of budget^2 is eps^2 E[Upsilon^2 / estimate^2], and 1/t is convex.

    To second order the excess is the squared coefficient of variation of the estimate's square, which is known for
    draws without replacement: that of the squared slopes times (1/n) (N - n)/(N - 1).
    """
    model, x, y = digits
    whole = sensitivity(model, x, y)
    draws = [estimate(model, x, y, W2, 0.1, generator=torch.Generator().manual_seed(seed)) for seed in range(200)]
    squares = np.array(draws) ** 2
    assert squares.mean() == pytest.approx(whole**2, rel=4 * squares.std() / whole**2 / math.sqrt(200))
    excess = np.mean([batch_budget(whole, draw, W2) ** 2 for draw in draws]) / W2.eps**2 - 1

    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(wda.losses.redlr(model(x), y).sum(), x)
    slopes = norm(gradient, "L1") ** 2
    n, N = 30, len(x)
    variation = float(slopes.var(correction=0) / slopes.mean() ** 2) / n * (N - n) / (N - 1)
    assert variation > 0.005
    assert excess == pytest.approx(variation, rel=0.4)
    assert excess > 3 * (1 / squares * whole**2).std() / math.sqrt(200), "more than chance"


def test_full_batch_and_full_sample_are_plain_wpgd(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    whole = estimate(model, x, y, W2, 1.0, generator=torch.Generator().manual_seed(0))
    assert whole == sensitivity(model, x, y)
    budget = batch_budget(sensitivity(model, x, y), whole, W2)
    assert budget == W2.eps
    plain = wda.attack("wpgd", model, x, y, W2, steps=20, step_size=W2.eps / 20, loss="redlr")
    assert torch.equal(strike(model, x, y, W2).x_adv, plain.x_adv)

    tuning = tuned(share=1.0, batch_size=48, eta=1.0, attack_options={})
    assert [epoch.budget for epoch in tuning.history[1:]] == [(pytest.approx(W2.eps, rel=1e-12),)] * 2


def test_a_moving_average_begins_at_the_first_estimate() -> None:
    """At a vanishing learning rate and with the full sample every estimate is the same, whatever eta is."""
    at_rest = tuned(RESTING, tau=1e-300, noise=0.0, share=1.0, eta=0.1)
    values = [value for epoch in at_rest.history[1:] for value in epoch.upsilon]
    assert values == pytest.approx([at_rest.history[0].validation.upsilon] * 6, rel=1e-12)
    for epoch in at_rest.history[1:]:
        assert np.mean(np.array(epoch.budget) ** 2) == pytest.approx(W2.eps**2, rel=1e-10)


def test_eta_weighs_new_estimates_against_old_ones() -> None:
    now, slow = (tuned(RESTING, tau=1e-300, noise=0.0, share=0.25, eta=eta).history for eta in (1.0, 0.1))
    estimates = [value for epoch in now[1:] for value in epoch.upsilon]
    average, expected = estimates[0], []
    for value in estimates:
        average += 0.1 * (value - average)
        expected.append(average)
    assert len(set(estimates)) > 3
    assert [value for epoch in slow[1:] for value in epoch.upsilon] == pytest.approx(expected, rel=1e-12)


def test_a_sample_without_slope_leaves_every_batch_the_whole_budget() -> None:
    assert batch_budget(0.0, 0.0, W2) == W2.eps
    assert batch_budget(0.0, 1.0, W2) == 0


# -- the two variants ------------------------------------------------------------------------------------------------


@each_seed
def test_last_trains_the_last_layer_alone(seed: int) -> None:
    given = network(seed)
    before = weights(given)
    after = weights(tuned(given, variant="last", seed=seed).model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"5.weight", "5.bias"}, "batch statistics must not move either"


def test_last_begins_anew_as_torch_does() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2000))
    first, again, other = (weights(model) for _ in range(3) if disturb(model, torch.rand(1, 64), "last", seed=_ // 2))
    assert same(first, again)
    assert not torch.equal(first["1.weight"], other["1.weight"])
    bound = 1 / math.sqrt(64)  # torch's: uniform within 1 / sqrt(fan in)
    for drawn in first.values():
        assert drawn.abs().max() <= bound
        assert float(drawn.std()) == pytest.approx(bound / math.sqrt(3), rel=0.06)


@each_seed
def test_whole_adds_noise_in_proportion_and_trains_everything(seed: int) -> None:
    given = nn.Sequential(nn.Flatten(), nn.Linear(200, 300), nn.ReLU(), nn.Linear(300, 3)).double()
    before = weights(given)
    assert len(disturb(given, numbers(1, 200), "whole", noise=0.01, seed=seed)) == 4
    for name in ("1.weight", "3.weight"):
        moved = given.state_dict()[name] - before[name]
        assert float(moved.std() / before[name].square().mean().sqrt()) == pytest.approx(0.01, rel=0.1)
    small = network(seed)
    after = weights(tuned(small).model)
    assert not any(torch.equal(old, after[name]) for name, old in weights(small).items())


def test_the_last_layer_is_found_wherever_it_is() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(16, 3), nn.Sequential(nn.Flatten(), nn.Linear(6, 16), nn.ReLU())
            self.never_called = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Wrapped().double()
    assert last_layer(model, numbers(1, 2, 3)) is model.head
    assert last_layer(nn.Sequential(model), numbers(1, 2, 3)) is model.head
    assert not any(module._forward_hooks for module in model.modules())
    cnn = wda.models.load("digits-cnn")
    assert last_layer(cnn, torch.rand(1, 1, 8, 8)) is cnn[-1]


# -- runs ------------------------------------------------------------------------------------------------------------


@each_dtype
@each_variant
def test_the_model_given_is_left_as_it_was(dtype: torch.dtype, variant: str) -> None:
    given = network(dtype=dtype)
    given[2].train()
    before, modes = weights(given), [module.training for module in given.modules()]
    state = torch.random.get_rng_state()
    tuning = tuned(given, variant=variant)
    assert same(weights(given), before)
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own generator was used"
    for model in (given, tuning.model):
        assert [module.training for module in model.modules()] == modes
        assert all(parameter.grad is None for parameter in given.parameters())
    assert next(tuning.model.parameters()).dtype == dtype


@each_variant
def test_a_run_can_be_repeated_whatever_else_draws_numbers(variant: str) -> None:
    first = tuned(variant=variant)
    torch.rand(100)
    again, other = tuned(variant=variant), tuned(variant=variant, seed=1)
    assert same(weights(first.model), weights(again.model))
    assert first.history == again.history
    assert not same(weights(first.model), weights(other.model))


def test_each_epoch_goes_through_the_whole_sample_in_its_own_order() -> None:
    orders = [permutation(50, seed, epoch) for seed, epoch in itertools.product((0, 1), (1, 2))]
    for one, other in itertools.combinations(orders, 2):
        assert not torch.equal(one, other)
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)


@each_seed
def test_the_best_epoch_is_that_of_best_distributional_accuracy_on_the_validation_sample(seed: int) -> None:
    validation, test = labelled(40, seed + 10), labelled(40, seed + 20)
    few = {"steps": 4}
    how: dict[str, Any] = {"tau": 0.3, "batch_size": 16, "epochs": 4, "seed": seed, "progress": False}
    how["attack_options"] = few
    tuning = finetune(network(seed), labelled(), validation, W2, test=test, **how)
    found = [epoch.validation.distributional for epoch in tuning.history[1:]]
    assert tuning.epoch == 1 + found.index(max(found))
    assert score(tuning.model, *validation, W2, options=few) == tuning.history[tuning.epoch].validation
    assert score(tuning.model, *test, W2, options=few) == tuning.history[tuning.epoch].test
    assert score(network(seed), *test, W2, options=few) == tuning.history[0].test
    assert not tuning.model.training
    alone = finetune(network(seed), labelled(), validation, W2, **how)
    assert same(weights(alone.model), weights(tuning.model)), "the test sample had its say"


def test_a_score_is_what_the_attacks_say(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits
    found = score(model, x, y, W2)
    steps: dict[str, Any] = {"steps": 20, "step_size": W2.eps / 20}
    pointwise = wda.attack("wpgd", model, x, y, Threat("Linf", 0.08, "inf"), loss="ce", **steps).accuracy(model)
    assert (found.pointwise, found.upsilon) == (pointwise, sensitivity(model, x, y))
    assert found.distributional == wda.attack("wpgd", model, x, y, W2, **steps).accuracy(model)
    assert found.clean == pytest.approx((model(x).argmax(1) == y).double().mean().item())
    near = score(model, x, y, W2, "closest", {"steps": 5, "restarts": 1})
    assert near.distributional < found.distributional
    assert near.upsilon is None


def test_training_pays() -> None:
    """From random weights the objective falls and the distributional accuracy rises, with either penalty."""
    for penalty in ("ce", "kl"):
        run = tuned(epochs=12, tau=0.3, penalty=penalty, beta=1.0).history
        assert run[-1].loss < 0.9 * run[1].loss
        assert run[-1].clean_loss < run[1].clean_loss
        assert max(epoch.validation.distributional for epoch in run) > run[0].validation.distributional + 0.1


def test_any_attack_can_be_trained_against() -> None:
    for attack, options in (("closest", {"steps": 4, "restarts": 1}), ("pgd", {"steps": 3}), ("wfgsm", {})):
        tuning = tuned(attack=attack, attack_options=options)
        budgets = [value for epoch in tuning.history for value in epoch.budget]
        assert len(budgets) == (6 if attack == "wfgsm" else 0)
    order_one = tuned(threat=Threat("L2", 0.05, order=1), attack="closest", attack_options={"steps": 3, "restarts": 1})
    assert order_one.history[0].validation.upsilon is None


def test_mixed_precision_trains() -> None:
    """On the CPU bfloat16 is slower and no gain, but the same code."""
    half, full = tuned(network(dtype=torch.float32), autocast=True), tuned(network(dtype=torch.float32))
    assert all(tensor.dtype != torch.bfloat16 for tensor in half.model.state_dict().values())
    assert not same(weights(half.model), weights(full.model))
    assert half.history[-1].loss == pytest.approx(full.history[-1].loss, rel=0.1)


def test_progress_says_losses_accuracies_and_time_left(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tuned(progress=True)
    shown = capsys.readouterr().err.split("\r")
    assert len(shown) == 1 + 6
    assert all(" s left" in line and "loss " in line and "clean " in line for line in shown[1:])
    assert [line.split(":")[0] for line in shown if "validation accuracy" in line] == ["epoch 1/2", "epoch 2/2"]
    with caplog.at_level("INFO", "wda"):
        tuned(progress=None)
    assert [record.message.split(":")[0] for record in caplog.records] == ["epoch 1/2", "epoch 2/2"]
    assert capsys.readouterr().err == ""


# -- checkpoints -----------------------------------------------------------------------------------------------------

KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_training import network, tuned
tuned(epochs=4, checkpoint={path!r}, interval=0.0, momentum={momentum}, variant={variant!r}, progress=True)
"""


@pytest.mark.parametrize(("variant", "momentum", "batch"), [("whole", 0.9, (2, 1)), ("last", 0.0, (3, 2))])
def test_a_run_killed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(
    tmp_path: Path, variant: str, momentum: float, batch: tuple[int, int]
) -> None:
    path = tmp_path / "run.pt"
    script = KILLED.format(tests=str(Path(__file__).parent), path=str(path), momentum=momentum, variant=variant)
    epoch, done = batch
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True, bufsize=0)
    assert process.stderr is not None
    shown = ""
    while f"epoch {epoch}/4, batch {done}/3" not in shown:  # written after that batch's checkpoint
        letter = process.stderr.read(1)
        assert letter, shown
        shown += letter
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    state = torch.load(path, weights_only=True)["state"]
    assert (state["epoch"], state["batch"]) >= (epoch, done)
    assert state["epoch"] < 4

    how: dict[str, Any] = {"epochs": 4, "momentum": momentum, "variant": variant}
    resumed = tuned(checkpoint=path, **how)
    straight = tuned(**how)
    assert same(weights(resumed.model), weights(straight.model))
    assert (resumed.epoch, resumed.history) == (straight.epoch, straight.history)
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["run.pt"]
    assert tuned(checkpoint=path, **how).history == straight.history, "a finished run is not run again"


def test_every_place_is_a_place_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state after each batch and each epoch, kept aside as it is written, leads to the same end."""
    path, kept = tmp_path / "run.pt", []
    replace = os.replace

    def keep(source: str, target: str) -> None:
        replace(source, target)
        if Path(target) == path:
            kept.append(path.read_bytes())

    monkeypatch.setattr(os, "replace", keep)
    straight = tuned(checkpoint=path, interval=0.0)
    monkeypatch.undo()
    assert len(kept) == 1 + 2 * (3 + 1)
    for state in kept:
        path.write_bytes(state)
        resumed = tuned(checkpoint=path)
        assert same(weights(resumed.model), weights(straight.model))
        assert resumed.history == straight.history


def test_a_finished_run_can_be_made_longer_and_not_shorter(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    tuned(checkpoint=path, epochs=1)
    assert tuned(checkpoint=path, epochs=3).history == tuned(epochs=3).history
    with pytest.raises(ValueError, match="epochs=2: the checkpoint has done 3 already"):
        tuned(checkpoint=path, epochs=2)


def test_what_is_half_done_is_not_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, step = tmp_path / "run.pt", Run._step

    def interrupted(run: Run, rows: Tensor) -> None:
        if (run.epoch, run.batch) == (2, 2):
            raise KeyboardInterrupt
        step(run, rows)

    monkeypatch.setattr(Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tuned(checkpoint=path, interval=0.0)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"epochs=1: the checkpoint has done 1\.67 already"):
        tuned(checkpoint=path, epochs=1)
    assert tuned(checkpoint=path).history == tuned().history


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"model": network(seed=1)}, "another model"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).double()}, "another model"),
        ({"model": smoothed(network())}, "another model"),
        ({"model": partly_frozen(network())}, "another model"),
        ({"tau": 0.5}, r"tau=0.05, this one has 0.5"),
        ({"seed": 3}, "seed=0, this one has 3"),
        ({"threat": Threat("Linf", 0.1, order=2)}, "threat="),
        ({"test": labelled()}, "another test"),
    ],
)
def test_a_checkpoint_of_another_run_is_named(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    path = tmp_path / "run.pt"
    tuned(checkpoint=path, epochs=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=named):
        tuned(**{"checkpoint": path, "epochs": 1, **changed})
    assert path.read_bytes() == before


def test_a_file_that_is_no_checkpoint_is_named_and_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    trap = io.BytesIO()
    torch.save({"format": Trap()}, trap)
    path = tmp_path / "run.pt"
    for content, named in (
        (b"", "empty"),
        (b"no checkpoint", "no file of weights"),
        (trap.getvalue(), "run code"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=named):
            tuned(checkpoint=path)
    torch.save({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of wda\.training"):
        tuned(checkpoint=path)
    assert not (tmp_path / "sprung").exists()


# -- bad input -------------------------------------------------------------------------------------------------------


class Failing(nn.Module):
    """A linear classifier whose logits become NaN when it has been updated so many times."""

    def __init__(self, good: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.good = nn.Linear(6, 3).double(), good
        self.register_buffer("first", self.linear.weight.detach().clone())
        self.register_buffer("updates", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.updates += 0.5  # two passes for each step
        logits = self.linear(x.flatten(1))
        return logits * math.nan if self.updates > self.good else logits


def test_a_nan_is_caught_with_the_batch_and_the_checkpoint_named(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    model = Failing(good=4)
    with pytest.raises(FloatingPointError, match=r"epoch 2, batch 2 of 3: NaN or infinite loss.*samples.*run\.pt"):
        tuned(model, checkpoint=path, interval=0.0)
    state = torch.load(path, weights_only=True)["state"]
    assert (state["epoch"], state["batch"]) == (2, 1), "the last good batch"
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    with pytest.raises(FloatingPointError, match="no checkpoint was asked for"):
        tuned(Failing(good=1))


def test_weights_that_a_step_has_blown_up_are_never_stored(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch \d of 3: NaN or infinite.*tau=1e\+300 may help"):
        tuned(tau=1e300, checkpoint=path, interval=0.0)
    state = torch.load(path, weights_only=True)["state"]
    model = network()
    model.load_state_dict(state["model"])
    assert model(labelled()[0]).isfinite().all()


@pytest.mark.parametrize(("n", "batch_size", "batches"), [(13, 6, 2), (14, 6, 3), (12, 6, 2), (5, 6, 1), (7, 6, 1)])
def test_no_batch_has_one_sample(n: int, batch_size: int, batches: int) -> None:
    x, y = labelled(n)
    run = finetune(network(), (x, y), (x, y), W2, epochs=2, batch_size=batch_size, progress=False)
    assert [len(epoch.budget) for epoch in run.history] == [0, batches, batches]


def test_no_gradients_are_left() -> None:
    with torch.no_grad():
        run = tuned()
    assert all(weights.grad is None for weights in run.model.parameters())


def test_no_radius_moves_nothing() -> None:
    """With KL only the clean loss is left: plain fine-tuning, whatever beta is."""
    still = Threat("Linf", 0.0, order=2)
    runs = [tuned(threat=still, penalty="kl", beta=beta) for beta in (0.0, 6.0)]
    for (name, one), other in zip(weights(runs[0].model).items(), weights(runs[1].model).values(), strict=True):
        torch.testing.assert_close(one, other, msg=name, rtol=0, atol=1e-2)  # but for dropout's two draws
    scored = runs[0].history[0].validation
    assert scored.clean == scored.pointwise == scored.distributional
    assert runs[0].history[1].budget == (0.0,) * 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"variant": "head"}, "variant='head': one of 'last', 'whole'"),
        ({"penalty": "js"}, "penalty='js': one of 'ce', 'kl'"),
        ({"attack": "wpdg"}, "attack='wpdg'"),
        ({"tau": 0.0}, "tau=0.0"),
        ({"tau": math.nan}, "tau=nan"),
        ({"eta": 0.0}, "eta=0.0: a number > 0, up to 1"),
        ({"eta": 1.5}, "eta=1.5"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.1}, "share=1.1"),
        ({"momentum": 2}, "momentum=2"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"interval": -1}, "interval=-1"),
        ({"attack_options": {"steps": 0}}, "steps=0"),
        ({"attack_options": {"stepz": 3}}, "attack_options of 'wpgd'='stepz'"),
        ({"threat": Threat("Linf", 0.1, order=1)}, "order=1"),
    ],
)
def test_bad_options_are_named(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tuned(**changed)


def test_bad_samples_are_named() -> None:
    x, y = labelled()
    model, good = network(), (x, y)
    for train, validation, named in (
        ((x, 0 * y + 2), good, "train: all 48 labels are 2; at least two classes"),
        ((x, y + 1), good, "train: y has the label 3, the model has K=3"),
        (good, (x, y[:-1]), r"validation: x of shape"),
        (good, (2 * x, y), r"validation: x has values in"),
    ):
        with pytest.raises(ValueError, match=named):
            finetune(model, train, validation, W2, epochs=1)
    with pytest.raises(TypeError, match=r"train: x has dtype torch.float32, the model torch.float64"):
        finetune(model, (x.float(), y), good, W2, epochs=1)


def test_a_model_that_cannot_be_trained_so_is_named() -> None:
    without = nn.Sequential(network(), nn.Softmax(1))
    with pytest.raises(ValueError, match=r"variant='last': the logits of Sequential are not the values of .*Linear"):
        tuned(without, variant="last")
    frozen = network().requires_grad_(False)
    with pytest.raises(ValueError, match="has no weight that takes a gradient"):
        tuned(frozen, variant="whole")
    assert tuned(frozen, variant="last").epoch in (1, 2)
    two = nn.Sequential(nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = labelled()
    with pytest.raises(ValueError, match="needs K >= 3 classes"):
        finetune(two, (x, y % 2), (x, y % 2), W2, epochs=1)
    options = {"loss": "margin", "steps": 3}
    assert len(finetune(two, (x, y % 2), (x, y % 2), W2, epochs=1, attack_options=options, progress=False).history) == 2


def test_a_batch_may_be_given_more_than_the_box_is_wide() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned(threat=Threat("Linf", 0.99, order=2))


# -- named models and data -------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"model": "digits-mlp", "n_train": 100, "n": 30, "eps": 0.05, "batch_size": 20, "epochs": 2}


def test_a_record_says_what_was_found(tmp_path: Path) -> None:
    tuning, record = run_finetune(**SMALL, output=tmp_path)
    (path,) = tmp_path.glob("*.json")
    assert read_finetune(path) == json.loads(json.dumps(record))
    assert sorted(file.suffixes[-1] for file in tmp_path.iterdir()) == [".json", ".pt"], "no checkpoint is left"
    x, y = wda.data.load("digits", n=30)
    net = wda.models.load("digits-mlp").double()
    for when in ("before", "after"):
        found = record[when]
        assert found["clean"] == score(net, x.double(), y, Threat("Linf", 0.05, 2)).clean
        far = wda.distances(net, x.double(), y).distance
        recorded = torch.tensor([math.inf if d is None else d for d in found["distance"]], dtype=torch.float64)
        torch.testing.assert_close(recorded, far, rtol=0, atol=1e-8)
        weighed = 100 * float(wda.robust_accuracy(far, 0.05, 2))
        assert tuning_table(record).loc[when, "W_2 strongest"] == pytest.approx(weighed, abs=1e-4)
        net.load_state_dict(torch.load(next(tmp_path.glob("*.weights.pt")), weights_only=True))
    assert same(weights(net), weights(tuning.model))
    assert (record["parameters"]["n_train"], record["parameters"]["n_validation"]) == (100, 20)
    assert record["history"][tuning.epoch]["test"]["clean"] == record["after"]["clean"]


def test_a_recorded_run_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, _ = run_finetune(**SMALL, output=tmp_path / "one")
    with monkeypatch.context() as patch:
        patch.setattr("wda.experiment.tuning.save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_finetune(**SMALL, output=tmp_path / "two")
    assert not list((tmp_path / "two").glob("*.json"))
    again, _ = run_finetune(**SMALL, output=tmp_path / "two")
    assert same(weights(again.model), weights(straight.model))
    with pytest.raises(ValueError, match="both parts need at least one"):
        run_finetune(**{**SMALL, "n_train": 2}, output=tmp_path / "three")


def test_data_of_ones_own_are_two_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        x, y = wda.data.load("digits", split, n=SMALL["n_train"])
        np.savez(tmp_path / f"{split}.npz", x=x.numpy(), y=y.numpy())
    files = {"data": str(tmp_path / "test.npz"), "train": str(tmp_path / "train.npz")}
    of_files, record = run_finetune(**SMALL, **files, output=tmp_path / "files")
    by_name, _ = run_finetune(**SMALL, output=tmp_path / "name")
    assert same(weights(of_files.model), weights(by_name.model))
    assert record["parameters"]["train"] == files["train"]
    with pytest.raises(ValueError, match=r"train=None: .*test\.npz.* is one file, to test on"):
        run_finetune(**SMALL, data=files["data"], output=tmp_path / "leak")
    with pytest.raises(ValueError, match=r"these are the samples of .* to test on"):
        run_finetune(**{**SMALL, "n": 100}, data=files["data"], train=files["data"], output=tmp_path / "leak")


def test_runs_that_differ_in_anything_leave_records_of_their_own(tmp_path: Path) -> None:
    few: dict[str, Any] = {**SMALL, "epochs": 1, "attack_options": {"steps": 1}, "n_train": 40, "n": 5}
    changed: tuple[dict[str, Any], ...] = ({}, {"beta": 1}, {"batch_size": 10}, {"validation": 0.3}, {"penalty": "kl"})
    for settings in changed:
        run_finetune(**{**few, **settings}, output=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.weights.pt"))) == len(changed)
    _, record = run_finetune(**few, output=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == len(changed)
    about = record["parameters"]
    again = {key: about[key] for key in about if key in inspect.signature(run_finetune).parameters}
    straight, _ = run_finetune(**{**few, "output": tmp_path / "one"})
    from_record, _ = run_finetune(**again, output=tmp_path / "two")
    assert same(weights(from_record.model), weights(straight.model))


def test_what_cannot_be_run_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wda.training.finetune", None)
    for changed, named in (
        ({"order": 1}, "order=1: a number > 1, or inf"),
        ({"tau": None}, "tau=None"),
        ({"attack_options": {"stepz": 1}}, "stepz"),
        ({"attack_options": "steps=3"}, "attack_options='steps=3': a mapping"),
        ({"epochs": 0}, "epochs=0"),
        ({"variant": "lst"}, "variant='lst'"),
        ({"attack": "wpdg"}, "attack='wpdg'"),
    ):
        with pytest.raises((ValueError, TypeError), match=named):
            run_finetune(**{**SMALL, **changed}, output=tmp_path)


def test_two_classes_are_judged_by_the_margin(tmp_path: Path) -> None:
    x, y = labelled(60)
    for split, rows in (("train", slice(0, 40)), ("test", slice(40, 60))):
        np.savez(tmp_path / f"{split}.npz", x=x[rows].float().numpy(), y=y[rows].numpy() % 2)
    (tmp_path / "two_classes.py").write_text(
        "import torch\ndef net():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))\n"
    )
    how: dict[str, Any] = {"model": "two_classes:net", "eps": 0.1, "batch_size": 8, "epochs": 1}
    how |= {name: str(tmp_path / f"{split}.npz") for name, split in (("data", "test"), ("train", "train"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        _, record = run_finetune(**how, attack_options={"loss": "margin"}, output=tmp_path)
        net = wda.models.load("two_classes:net").double()
    by_hand = score(net, x[40:].float().double(), y[40:] % 2, Threat("Linf", 0.1, 2), options={"loss": "margin"})
    assert record["before"]["distributional"] == by_hand.distributional


def test_tuned_weights_have_a_name(tmp_path: Path) -> None:
    tuning, _ = run_finetune(**SMALL, dtype="float32", output=tmp_path)
    (path,) = tmp_path.glob("*.weights.pt")
    assert same(weights(wda.models.load(f"digits-mlp@{path}")), weights(tuning.model))
    with pytest.raises(ValueError, match="do not fit"):
        wda.models.load(f"digits-cnn@{path}")
    run_finetune(**{**SMALL, "model": f"digits-mlp@{path}", "epochs": 1}, output=tmp_path / "further")
    (further,) = (tmp_path / "further").glob("*.json")
    assert re.fullmatch(r"digits_digits-mlp-[0-9a-f]{8}_Linf_.*", further.name)


def test_the_network_for_mnist_can_be_fine_tuned(wda_data: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": "mnist", "model": "mnist_trades_smallcnn", "dtype": "float32", "eps": 0.2}
    few = {"attack": "closest", "attack_options": {"steps": 2, "restarts": 1}}
    tuning, record = run_finetune(**how, **few, n_train=40, n=4, batch_size=16, epochs=1, tau=1e-3, output=tmp_path)
    assert record["before"]["clean"] == 1
    table = tuning_table(record)
    assert (table["W_2 strongest"] <= table["W_2 W-PGD-20"]).all()
    given = wda.models.load("mnist_trades_smallcnn").state_dict()
    assert not any(torch.equal(given[name], new) for name, new in weights(tuning.model).items())


# -- what is published -----------------------------------------------------------------------------------------------


def test_the_second_papers_tables_agree_with_each_other() -> None:
    """Table 5 has the best configuration for each network, by W_2 accuracy, and its changes are those from Table 1."""
    pd = pytest.importorskip("pandas")
    folder = Path(wda.__file__).parents[1] / "data" / "published"
    names = ("configurations", "table5_best", "table1_pretrained")
    runs, best, start = (pd.read_csv(folder / f"wdat_{name}.csv").set_index("network") for name in names)
    assert runs.groupby("network").size().to_dict() == dict.fromkeys(set(best.index) - {"Chen and Lee (2024)"}, 8)
    for network, of_network in runs.groupby("network"):
        top = of_network.loc[of_network.w2_adv == of_network.w2_adv.max()].iloc[0]
        assert (top[["clean", "winf_adv", "w2_adv"]] == best.loc[network, ["clean", "winf_adv", "w2_adv"]]).all()
    for ball in ("winf", "w2"):
        change = best[f"{ball}_adv"] - start.loc[best.index, f"{ball}_adv"]
        assert (change - best[f"{ball}_change"]).abs().max() < 0.0101, "rounding: 2.94 is printed as 2.95"


def test_eta_1_does_not_always_outperform_a_moving_average() -> None:
    """Section 8 of the second paper says so; its own tables have it in 11 of 16 pairs, by the W_2 accuracy."""
    pd = pytest.importorskip("pandas")
    runs = pd.read_csv(Path(wda.__file__).parents[1] / "data" / "published" / "wdat_configurations.csv")
    pairs = runs.pivot(index=["network", "variant", "tau"], columns="eta", values="w2_adv")
    assert len(pairs) == 16
    assert int((pairs[1.0] > pairs[0.1]).sum()) == 11
