"""A training in progress: its settings, its state, and how it goes from one batch to the next."""

from __future__ import annotations

import copy
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wda.attacks import kind, options, sensitivity
from wda.checks import choice, flag, number, stored_number, stored_numbers, whole
from wda.files import check_writable, naming
from wda.losses import ce
from wda.passes import Oracle, check_labels, check_sample
from wda.threat import Threat
from wda.training.adversary import batch_budget, estimate, slope_loss, strike, within
from wda.training.checkpoint import digest, restore, store
from wda.training.objective import PENALTIES, objective
from wda.training.progress import Progress
from wda.training.records import Epoch, FineTuned, Score, score
from wda.training.replay import generator, permutation, seed_of, seeded
from wda.training.variants import VARIANTS, disturb

Sample = tuple[Tensor, Tensor]

_log = logging.getLogger("wda")


@dataclass(frozen=True)
class Settings:
    """What decides the result, but for model, data, threat and the number of epochs."""

    variant: str
    tau: float
    eta: float
    beta: float
    noise: float
    batch_size: int
    penalty: str
    attack: str
    attack_options: Mapping[str, Any]
    seed: int
    autocast: bool
    share: float = 0.1
    momentum: float = 0.0

    def __post_init__(self) -> None:
        most = sys.float_info.max
        choice("variant", self.variant, VARIANTS)
        choice("penalty", self.penalty, PENALTIES)
        kind(self.attack)
        if not isinstance(self.attack_options, Mapping):
            raise TypeError(f"attack_options={self.attack_options!r}: a mapping from names to values is accepted")
        object.__setattr__(self, "attack_options", dict(self.attack_options))
        for name in self.attack_options:
            choice(f"attack_options of {self.attack!r}", name, options(self.attack))
        for name, accepted, least, largest in (
            ("tau", "a finite number > 0", 5e-324, most),
            ("eta", "a number > 0, up to 1,", 5e-324, 1),
            ("beta", "a finite number >= 0", 0, most),
            ("noise", "a finite number >= 0", 0, most),
            ("share", "a number > 0, up to 1,", 5e-324, 1),
            ("momentum", "a number from 0 to 1", 0, 1),
        ):
            object.__setattr__(self, name, number(name, getattr(self, name), accepted, least, largest))
        whole("batch_size", self.batch_size)
        whole("seed", self.seed, 0, 2**63 - 1)
        flag("autocast", self.autocast)


class Run:
    """A training in progress: the model, the optimiser, and where it is."""

    def __init__(
        self,
        model: nn.Module,
        samples: dict[str, Sample],
        threat: Threat,
        settings: Settings,
        checkpoint: str | os.PathLike[str] | None,
        interval: float,
    ) -> None:
        if checkpoint is not None:
            check_writable(Path(checkpoint).parent)
        self.given, self.threat, self.how = model, threat, settings
        self.path, self.interval, self.stored = checkpoint, interval, time.monotonic()
        self.samples = {name: _checked(name, model, x, y, threat) for name, (x, y) in samples.items()}
        self.x, self.y = self.samples["train"]
        if len(labels := self.y.unique()) == 1:
            raise ValueError(f"train: all {len(self.y)} labels are {int(labels)}; at least two classes are accepted")
        # a last batch of one joins the one before it: BatchNorm, for one, cannot train on it
        full, rest = divmod(len(self.x), settings.batch_size)
        self.batches = full + (rest > 1 or full == 0)
        self.passes: dict[str, Any] = {"batch_size": settings.batch_size, "autocast": settings.autocast}

        with Oracle(model) as oracle:
            first = oracle.to_model(self.x[:1])
        self.device = first.device
        self.model = copy.deepcopy(model)
        self.parameters = disturb(self.model, first, settings.variant, noise=settings.noise, seed=settings.seed)
        self.model.train(settings.variant == "whole")
        self.optimiser = torch.optim.SGD(self.parameters, lr=settings.tau, momentum=settings.momentum)
        self.epoch, self.batch = 1, 0
        self.upsilon: float | None = None
        self.sums: list[float] = [0.0, 0.0]
        self.upsilons: list[float] = []
        self.budgets: list[float] = []
        self.history: list[Epoch] = []
        self.best, self.best_epoch = self.model.state_dict(), 0
        self.identity = {} if checkpoint is None else self._identity()
        if not self._resumed():
            self.history.append(Epoch(0, *self._scores(model)))
            self._store()

    @property
    def done(self) -> int:
        """Batches done."""
        return (self.epoch - 1) * self.batches + self.batch

    def train_epoch(self, epochs: int, left: Progress) -> None:
        """What is left of the epoch; then the scores, and the choice of the best."""
        order = permutation(len(self.x), self.how.seed, self.epoch)
        ends = [*range(0, self.batches * self.how.batch_size, self.how.batch_size), len(order)]
        while self.batch < self.batches:
            with torch.enable_grad():
                self._step(order[ends[self.batch] : ends[self.batch + 1]])
            self.batch += 1
            if time.monotonic() - self.stored >= self.interval:
                self._store()
            if self.batch < self.batches:
                left.step(f"epoch {self.epoch}/{epochs}, batch {self.batch}/{self.batches}: {self._losses()}")
        self._finish()
        left.step(f"epoch {self.epoch - 1}/{epochs}: {self._accuracies()}", last=True)

    def result(self) -> FineTuned:
        """The model of the best epoch, in the modes of the one given."""
        self.model.load_state_dict(self.best)
        self.model.zero_grad()
        for module, as_given in zip(self.model.modules(), self.given.modules(), strict=True):
            module.training = as_given.training
        return FineTuned(self.model, self.best_epoch, tuple(self.history))

    def _step(self, rows: Tensor) -> None:
        """One batch: its budget, the attack, a step of gradient descent."""
        how, place = self.how, (self.how.seed, self.epoch, self.batch)
        x, y = self.x[rows].to(self.device), self.y[rows].to(self.device)
        ball = self._ball(x, y)
        seed = seed_of(*place, "attack")
        adv = strike(self.model, x, y, ball, how.attack, how.attack_options, seed=seed, **self.passes)
        with seeded(self.device, *place):
            clean, moved = self._logits(x), self._logits(adv.x_adv)
        weight = adv.weight.to(clean)
        losses = objective(clean, moved, y, beta=how.beta, weight=weight, penalty=how.penalty)
        self._check("loss", losses.detach(), rows)
        gradients = torch.autograd.grad(losses.mean(), self.parameters, allow_unused=True, materialize_grads=True)
        for weights, gradient in zip(self.parameters, gradients, strict=True):
            weights.grad = gradient
        self.optimiser.step()
        with Oracle(self.model, how.batch_size) as oracle:
            self._check("logits after the step", oracle.logits(x).sum(1), rows)
        self.sums[0] += float(losses.detach().sum())
        self.sums[1] += float(ce(clean.detach(), y).sum())

    def _ball(self, x: Tensor, y: Tensor) -> Threat:
        """The ball in which a batch is attacked (eqs. 5.4 and 5.5)."""
        how, threat = self.how, self.threat
        loss = slope_loss(how.attack, how.attack_options)
        if loss is None or math.isinf(threat.order):
            return threat
        options = {"loss": loss, **self.passes}
        draw = generator(how.seed, self.epoch, self.batch, "share")
        now = estimate(self.model, self.x, self.y, threat, how.share, generator=draw, **options)
        self.upsilon = now if self.upsilon is None else self.upsilon + how.eta * (now - self.upsilon)
        own = sensitivity(self.model, x, y, threat.norm, threat.order, **options)
        budget = batch_budget(own, self.upsilon, threat)
        self.upsilons.append(self.upsilon)
        self.budgets.append(budget)
        return within(threat, budget)

    def _logits(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.how.autocast):
            logits: Tensor = self.model(x)
        return logits.to(x.dtype)

    def _check(self, what: str, values: Tensor, rows: Tensor) -> None:
        bad = rows[~values.isfinite().cpu()].sort().values.tolist()
        if not bad:
            return
        named = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        kept = "no checkpoint was asked for" if self.path is None else f"the checkpoint {self.path} is from before it"
        raise FloatingPointError(
            f"epoch {self.epoch}, batch {self.batch + 1} of {self.batches}: NaN or infinite {what}, for the training "
            f"samples {named}; {kept}. A smaller learning rate than tau={self.how.tau!r} may help"
        )

    def _finish(self) -> None:
        """Score the epoch, keep it if it is the best, and begin the next."""
        validation, test = self._scores(self.model)
        loss, clean = (total / len(self.x) for total in self.sums)
        done = Epoch(self.epoch, validation, test, loss, clean, tuple(self.upsilons), tuple(self.budgets))
        if all(validation.distributional > before.validation.distributional for before in self.history[1:]):
            self.best, self.best_epoch = _copied(self.model), self.epoch
        self.history.append(done)
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums, self.upsilons, self.budgets = [0.0, 0.0], [], []
        self._store()

    def _scores(self, model: nn.Module) -> tuple[Score, Score | None]:
        how = self.how

        def of(name: str) -> Score:
            x, y = (part.to(self.device) for part in self.samples[name])
            return score(model, x, y, self.threat, how.attack, how.attack_options, seed=how.seed, **self.passes)

        return of("validation"), of("test") if "test" in self.samples else None

    def _losses(self) -> str:
        seen = min(self.batch * self.how.batch_size, len(self.x))
        loss, clean = (total / seen for total in self.sums)
        return f"loss {loss:.4f}, clean {clean:.4f}"

    def _accuracies(self) -> str:
        last, best = self.history[-1], self.history[self.best_epoch].validation.distributional
        found = last.validation
        return (
            f"loss {last.loss:.4f}, clean {last.clean_loss:.4f}; validation accuracy clean {100 * found.clean:.2f} %, "
            f"point-wise {100 * found.pointwise:.2f} %, {self.threat} {100 * found.distributional:.2f} % "
            f"(best {100 * best:.2f} %, epoch {self.best_epoch})"
        )

    def _identity(self) -> dict[str, Any]:
        layers = (type(module).__qualname__ for module in self.given.modules())
        ours = {id(weights) for weights in self.parameters}
        trained = (name for name, weights in self.model.named_parameters() if id(weights) in ours)
        return {
            "model": " ".join([digest(self.given.state_dict()), *layers, *trained]),
            **{name: digest({"x": x, "y": y}) for name, (x, y) in self.samples.items()},
            "threat": f"{self.threat!r}",
            **asdict(self.how),
        }

    def _store(self) -> None:
        if self.path is None:
            return
        state = {name: getattr(self, name) for name in _PLACE}
        state |= {"model": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        state["history"] = [asdict(epoch) for epoch in self.history]
        store(self.path, self.identity, state)
        self.stored = time.monotonic()

    def _resumed(self) -> bool:
        """Whether there was a checkpoint to go on from."""
        if self.path is None:
            return False
        state = restore(self.path, self.identity)
        if state is None:
            return False
        with naming(self.path, "checkpoint of such a run", "checkpoint"):
            self._check_state(state)
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.history = [_epoch(entry) for entry in state["history"]]
        for name in _PLACE:
            setattr(self, name, state[name])
        _log.info("%s: the run goes on in epoch %d, after %d batches", self.path, self.epoch, self.batch)
        return True

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise an error where a state is none that this run could have been in."""
        if state.keys() != {*_PLACE, "model", "optimiser", "history"}:
            raise ValueError(f"its state holds {', '.join(map(repr, state))}")
        epoch, batch = whole("epoch", state["epoch"]), whole("batch", state["batch"], 0, self.batches)
        stored_numbers("upsilon", [state["upsilon"]], 1, 0, math.inf, missing=True)
        stored_numbers("sums", state["sums"], 2, -sys.float_info.max)
        estimates = slope_loss(self.how.attack, self.how.attack_options) is not None and self.threat.order < math.inf
        for name in ("upsilons", "budgets"):
            stored_numbers(name, state[name], batch if estimates else 0, 0, math.inf)
        if (state["upsilon"] is None) != (not estimates or (epoch, batch) == (1, 0)):
            raise ValueError(f"upsilon={state['upsilon']!r} after {batch} batches of epoch {epoch}")
        if not isinstance(state["history"], list) or len(state["history"]) != epoch:
            raise ValueError(f"history: a list of {epoch} is accepted")
        for place, entry in enumerate(state["history"]):
            self._check_epoch(place, entry, self.batches if estimates and place else 0)
        scores = [entry["validation"]["distributional"] for entry in state["history"][1:]]
        if state["best_epoch"] != (scores.index(max(scores)) + 1 if scores else 0):
            raise ValueError(f"best_epoch={state['best_epoch']!r}, and {scores} are the accuracies that decide")
        own = self.model.state_dict()
        for name in ("model", "best"):
            _check_like(name, state[name], own)
        _check_optimiser(state["optimiser"], self.optimiser)

    def _check_epoch(self, place: int, entry: Mapping[str, Any], batches: int) -> None:
        """Raise an error where what a state says of an epoch cannot be."""
        if entry.keys() != {field.name for field in fields(Epoch)} or entry["epoch"] != place:
            raise ValueError(f"history[{place}] is {entry!r}")
        for name, scored in (("validation", True), ("test", "test" in self.samples)):
            if not scored and entry[name] is None:
                continue
            for measure in ("clean", "pointwise", "distributional"):
                stored_number(f"history[{place}]: {name}: {measure}", entry[name][measure], 0, 1)
            slope = entry[name]["upsilon"]
            stored_numbers(f"history[{place}]: {name}: upsilon", [slope], 1, 0, math.inf, missing=True)
        for name in ("loss", "clean_loss"):
            stored_numbers(f"history[{place}]: {name}", [entry[name]], 1, -sys.float_info.max, missing=not place)
        for name in ("upsilon", "budget"):
            stored_numbers(f"history[{place}]: {name}", entry[name], batches, 0, math.inf)


_PLACE = ("epoch", "batch", "upsilon", "sums", "upsilons", "budgets", "best", "best_epoch")


def _check_like(name: str, held: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise an error where tensors have not the names, shapes and dtypes of the run's own, or are finite no longer."""
    if held.keys() != own.keys():
        raise ValueError(f"{name}: the tensors {', '.join(own)} are accepted")
    for key, tensor in own.items():
        if held[key].shape != tensor.shape or held[key].dtype != tensor.dtype:
            raise ValueError(
                f"{name}: {key} is {tuple(held[key].shape)} {held[key].dtype}: "
                f"{tuple(tensor.shape)} {tensor.dtype} is accepted"
            )
        if not bool((held[key].isfinite() | ~tensor.isfinite().to(held[key].device)).all()):
            raise ValueError(f"{name}: {key} has NaN or infinite values")


def _check_optimiser(held: Mapping[str, Any], optimiser: torch.optim.Optimizer) -> None:
    """Raise an error where the state of an optimiser is of another one, or of other parameters."""
    [mine], parameters = optimiser.state_dict()["param_groups"], optimiser.param_groups[0]["params"]
    [theirs] = held["param_groups"]
    told = theirs.keys() | {"lr", "momentum", "params"}  # other versions of torch have more or fewer
    if differ := [key for key in mine if key in told and theirs[key] != mine[key]]:
        raise ValueError(f"optimiser: {', '.join(differ)} differ")
    if not held["state"].keys() <= set(range(len(parameters))):
        raise ValueError(f"optimiser: {len(parameters)} parameters are trained")
    for place, kept in held["state"].items():
        if kept.keys() != {"momentum_buffer"}:
            raise ValueError(f"optimiser: state {place} holds {', '.join(map(repr, kept))}")
        if kept["momentum_buffer"] is not None:
            _check_like("optimiser", kept, {"momentum_buffer": parameters[place].detach()})


def _checked(name: str, model: nn.Module, x: Tensor, y: Tensor, threat: Threat) -> Sample:
    try:
        y = check_sample(x, y, threat.box)
        with Oracle(model) as oracle:
            check_labels(y, oracle.classes(oracle.to_model(x[:1])))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{name}: {error}") from error
    return x, y


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _epoch(entry: dict[str, Any]) -> Epoch:
    """An epoch from its dictionary."""
    scores = {name: entry[name] and Score(**entry[name]) for name in ("validation", "test")}
    return Epoch(**{**entry, **scores})
