r"""AutoAttack's attacks, by their authors' own implementation: the package pyautoattack.

The package runs them on single-precision images in [0, 1]. Here other boxes are mapped there and back, every pass goes
through the `Oracle`, torch's random state is put back, nothing is printed, and what is found is evaluated afresh.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wda import losses, norms
from wda.attacks.search import uniform_start
from wda.checks import choice, flag, whole
from wda.errors import Untrustworthy
from wda.files import naming, read_arrays, write_arrays
from wda.losses import margin
from wda.norms import clamp, project
from wda.passes import Oracle
from wda.threat import Threat

__all__ = ["apgd_ce", "apgd_dlr", "autoattack", "fab"]

Perturb = Callable[[Tensor, Tensor], Tensor]

_log = logging.getLogger("wda")
_SILENT = logging.Logger("pyautoattack", logging.CRITICAL + 1)

# The Square Attack is last in both, so that one sees what it finds and no gradient does.
_MEMBERS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "apgd-t", "fab-t", "square"),
}
# FAB pursues this many classes one by one, and targeted APGD too.
_TARGETS = 9
# A warning where the Square Attack flips more of what the gradients left standing, and more than one sample.
_SQUARE_SHARE = 0.01


def apgd_ce(
    oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, steps: int = 100, restarts: int = 1, seed: int = 0
) -> Tensor:
    """Auto-PGD on the cross-entropy: momentum, and step lengths that halve when progress stalls (Croce & Hein 2020).

    In the 1-norm with sparse steps, and from a ball of three times the radius inwards (Croce & Hein 2021). The start is
    drawn as in `pgd`, sample by sample.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise, with a box; its `eps` is the radius around each sample.
    steps, restarts : int
        A restart attacks the samples that are not yet flipped.
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        A misclassified iterate where there was one, else the iterate of largest loss, or the sample if its margin is
        larger.

    Raises
    ------
    ImportError
        The package is missing.
    ValueError
        The ball has no box, or an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> apgd_ce(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf"), steps=10).shape
    torch.Size([4, 2])
    """
    return _apgd(oracle, x, y, ball, "ce", steps, restarts, seed)


def apgd_dlr(
    oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, *, steps: int = 100, restarts: int = 1, seed: int = 0
) -> Tensor:
    """Auto-PGD on the difference of logits ratio (Croce & Hein 2020): `apgd_ce` with the loss `wda.losses.dlr`.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise, with a box.
    steps, restarts, seed : int
        As for `apgd_ce`.

    Returns
    -------
    Tensor, shape (N, ...)
        As for `apgd_ce`.

    Raises
    ------
    ValueError
        Fewer than three classes, or an error of `apgd_ce`.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> apgd_dlr(Oracle(torch.nn.Linear(2, 3)), x, y, Threat("L2", 0.1, order="inf"), steps=10).shape
    torch.Size([4, 2])
    """
    return _apgd(oracle, x, y, ball, "dlr", steps, restarts, seed)


def _apgd(
    oracle: Oracle, x: Tensor, y: Tensor, ball: Threat, loss: str, steps: int, restarts: int, seed: int
) -> Tensor:
    whole("steps", steps)
    whole("restarts", restarts)
    package, logits = _package(), oracle.logits(x)
    adapter = _Adapter(oracle, x, ball.box, logits.shape[1])
    if loss == "dlr" and logits.shape[1] < 3:
        raise ValueError(f"apgd-dlr needs K >= 3 classes, the model has {logits.shape[1]}: use 'apgd-ce'")
    points, value = x.clone(), margin(logits, y)
    for restart in range(restarts):
        standing = (value < 0).nonzero()[:, 0]
        if not len(standing):
            break
        clean, labels = x[standing], y[standing]
        start, inner = uniform_start(clean, ball, (seed + restart) % 2**64), adapter.inside(clean)
        for factor, length in _stages(ball.norm, steps):
            radius = factor * ball.eps
            attack = package.autopgd_base.APGDAttack(
                adapter, length, ball.norm, eps=adapter.length(radius), loss=loss, is_tf_model=True, logger=_SILENT
            )
            attack.init_hyperparam(inner)
            start = project(start, clean, radius, ball.norm, ball.box)
            with _random_state_kept():
                highest, correct, _, wrong = attack.attack_single_run(inner, labels, x_init=adapter.inside(start))
            start = adapter.outside(highest)
        found = adapter.points(clean, inner, torch.where(_rows(correct, wrong), highest, wrong))
        reached = margin(oracle.logits(found), labels)
        better = reached > value[standing]
        points[standing[better]], value[standing[better]] = found[better], reached[better]
    return points


def _stages(name: str, steps: int) -> list[tuple[float, int]]:
    """Radii, in units of the ball's, and how many steps are taken within each."""
    early = 3 * steps // 10
    if name != "L1" or not early:
        return [(1, steps)]
    return [(3, early), (2, early), (1, steps - 2 * early)]


def autoattack(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    ball: Threat,
    *,
    version: str = "standard",
    state: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Tensor:
    """The ensemble AutoAttack (Croce & Hein 2020): each member attacks what the ones before it left standing.

    "standard" is APGD on the cross-entropy, APGD on the targeted difference of logits ratio, targeted FAB and the
    Square Attack. "plus" has APGD on the untargeted ratio and untargeted FAB besides, and more restarts. Settings and
    random numbers are the package's; only the Square Attack comes last in both versions.

    The targeted ratio needs a fourth logit. With two or three classes targeted APGD ascends the numerator alone, the
    difference of two logits, and with two classes "plus" goes without APGD on the untargeted ratio; a warning says so.
    The Square Attack needs images; what is not (N, C, H, W) with 5 pixels or more each way, it gets as one channel of a
    square, filled up with pixels that do not count.

    The members draw for a batch at a time, so that results depend on the batch size and on the order of the samples.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
        The whole sample.
    y : int64 Tensor, shape (N,)
    ball : Threat
        Point-wise, with a box; its `eps` is the radius around each sample.
    version : {"standard", "plus"}
    state : path, optional
        A file that keeps the points found, after each member; a run that was interrupted goes on from there, and the
        passes it counts are its own. (The package's own state file keeps which samples fell, and not their points.)
    seed : int

    Returns
    -------
    Tensor, shape (N, ...)
        Misclassified points, and the samples themselves where none was found.

    Raises
    ------
    ImportError
        The package is missing.
    ValueError
        The ball has no box, there is no such version, or `state` is of another run.

    Warns
    -----
    Untrustworthy
        The Square Attack, which takes no gradient, flipped more than one sample and more than 1 % of those that all
        gradients left standing: gradients of this model mislead, and a stronger attack probably finds more.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> autoattack(Oracle(torch.nn.Linear(2, 4)), x, y, Threat("L2", 0.0, order="inf")).equal(x)
    True
    """
    members = _MEMBERS[choice("version", version, _MEMBERS)]
    if not isinstance(state, str | os.PathLike | None):
        raise TypeError(f"state={state!r}: a path, or None, is accepted")
    logits = oracle.logits(x)
    classes = logits.shape[1]
    adapter = _Adapter(oracle, x, ball.box, classes)
    if classes < 4:
        members = tuple(name for name in members if name != "apgd-dlr" or classes > 2)
        warnings.warn(
            f"autoattack: with K={classes} classes there is no targeted difference of logits ratio; "
            f"the attacks are {', '.join(members)}, and apgd-t ascends the difference of two logits",
            stacklevel=4,
        )
    points, standing = x.clone(), (margin(logits, y) < 0).nonzero()[:, 0]
    run = _fingerprint(x, y, ball, version, seed)
    done = 0 if state is None else _resume(Path(state), run, ball, len(members), logits, points)

    def flip(perturb: Perturb, candidates: Tensor, batch: slice) -> Tensor:
        rows = candidates[batch]
        inner = adapter.inside(x[rows])
        with _random_state_kept(), torch.no_grad():
            found = adapter.points(x[rows], inner, perturb(inner, y[rows]))
        found = project(found, x[rows], ball.eps, ball.norm, ball.box)
        flipped = margin(oracle.logits(found), y[rows]) >= 0
        points[rows[flipped]] = found[flipped]
        return rows[~flipped]

    if done:
        standing = standing[margin(oracle.logits(points[standing]), y[standing]) < 0]
    for count, name in enumerate(members[done:], done + 1):
        if not len(standing):
            break
        before, member = len(standing), _member(name, version, adapter, ball, seed)
        standing = torch.cat(oracle.in_batches(partial(flip, member, standing), slice(0, before)))
        _log.info("autoattack: %d of %d samples stand after %s", len(standing), len(x), name)
        if name == "square":
            _compare(before - len(standing), before)
        if state is not None:
            about = {"run": np.array(run), "done": np.array(count)}
            write_arrays(state, {**about, "logits": _array(logits), "points": _array(points)})
    return points


def _fingerprint(x: Tensor, y: Tensor, ball: Threat, version: str, seed: int) -> str:
    """What tells one run from another, but for the model, whose logits at the sample are compared."""
    values = _array(x).tobytes() + y.cpu().numpy().tobytes()
    return hashlib.sha256(values + repr((ball, ball.box, version, seed)).encode()).hexdigest()


def _array(values: Tensor) -> np.ndarray:
    """In float64, which holds every dtype exactly, and which NumPy knows."""
    return values.detach().double().cpu().numpy()


def _resume(state: Path, run: str, ball: Threat, members: int, logits: Tensor, points: Tensor) -> int:
    """Put the points of an interrupted run in place, and say how many members are done; 0 if there is no such run."""
    if not os.path.lexists(state):
        return 0
    now, x = _array(logits), points
    with naming(state, "state of autoattack", "state"):
        kept = read_arrays(state, ("run", "logits", "done", "points"))
        # another batch size or device rounds in another way
        before, found = kept["logits"], kept["points"]
        same = str(kept["run"]) == run and before.shape == now.shape and found.shape == x.shape
        same = same and np.allclose(before, now, 1e-3, 1e-3, equal_nan=True)
        if kept["done"].shape or kept["done"].dtype.kind != "i" or not 0 < kept["done"] <= members:
            raise ValueError(f"done={kept['done']!r}: a whole number from 1 to {members} is accepted")
        for name in ("logits", "points"):
            if kept[name].dtype != np.float64:
                raise ValueError(f"{name} is {kept[name].dtype}: float64 is accepted")
    if not same:
        raise ValueError(f"state={str(state)!r} is of another model, sample, ball, version or seed: name another file")
    moved, rounding = torch.from_numpy(found).to(x), x[0].numel() * torch.finfo(x.dtype).eps
    if not bool(((moved == x) | (clamp(moved, ball.box) == moved)).all()) or bool(
        (norms.norm(moved.double() - x.double(), ball.norm) > 1.01 * ball.eps + rounding).any()
    ):
        raise ValueError(f"state={str(state)!r} is damaged: points are outside the ball or the box; remove it")
    points.copy_(moved)
    return int(kept["done"])


def _compare(flipped: int, before: int) -> None:
    """Warn where the Square Attack flipped a sizeable part of what was left standing before it."""
    if flipped > max(1, _SQUARE_SHARE * before):
        warnings.warn(
            f"the Square Attack, which takes no gradient, flipped {flipped} of the {before} samples that every "
            "gradient left standing: the gradients of this model mislead, and its accuracy cannot be trusted",
            Untrustworthy,
            stacklevel=5,
        )


def _member(name: str, version: str, adapter: _Adapter, ball: Threat, seed: int) -> Perturb:
    """One attack of the ensemble, set as in the package's version."""
    apgd = _package().autopgd_base
    sparse = ball.norm == "L1" and version == "standard"
    many = 5 if sparse or version == "plus" else 1
    common: dict[str, Any] = {"norm": ball.norm, "eps": adapter.length(ball.eps), "seed": seed}
    if name == "square":
        return partial(_square, adapter, common)
    if name.startswith("fab"):
        targeted = name == "fab-t"
        attack = _fab(adapter, **common, targeted=targeted, n_restarts=1 if targeted else many)
        attack.n_target_classes = min(_TARGETS, adapter.classes - 1)
    elif name == "apgd-t":
        attack = apgd.APGDAttack_targeted(adapter, **common, use_largereps=sparse, is_tf_model=True, logger=_SILENT)
        attack.n_target_classes = min(5 if sparse else _TARGETS, adapter.classes - 1)
    else:
        attack = apgd.APGDAttack(
            adapter, **common, n_restarts=many, use_largereps=sparse, is_tf_model=True, logger=_SILENT
        )
        attack.loss = name.removeprefix("apgd-")
    perturb: Perturb = attack.perturb
    return perturb


def _square(adapter: _Adapter, settings: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    """The Square Attack, on inputs of any shape."""
    attack = _package().square.SquareAttack(adapter.predict, **settings, resc_schedule=False)
    found: Tensor
    if x.ndim == 4 and min(x.shape[2:]) >= 5:
        found = attack.perturb(x, y)
        return found
    size = x[0].numel()
    side = max(5, math.isqrt(size - 1) + 1)
    attack.predict = lambda images: adapter.predict(images.flatten(1)[:, :size].view(-1, *x.shape[1:]))
    images = torch.nn.functional.pad(x.flatten(1), (0, side * side - size)).view(-1, 1, side, side)
    found = attack.perturb(images, y)
    return found.flatten(1)[:, :size].view_as(x)


def fab(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    norm: str,
    box: tuple[float, float] | None,
    *,
    steps: int = 100,
    targeted: bool = False,
) -> Tensor:
    """The fast adaptive boundary attack (Croce & Hein 2020): the nearest misclassified point it finds.

    Each step projects the iterate and the sample onto the nearest boundary of the model linearised at the iterate,
    within the box, and goes a little beyond a mean of the two; behind the boundary it turns back towards the sample.
    Its overshoot leaves it half a per cent too far even where the boundary is flat. No random numbers are drawn.

    Parameters
    ----------
    oracle : Oracle
    x : Tensor, shape (N, ...)
    y : int64 Tensor, shape (N,)
    norm : {"Linf", "L2", "L1"}
    box : (float, float)
    steps : int
    targeted : bool
        Pursue the (up to) nine classes of largest logit one after the other, at one gradient per step, instead of
        the nearest boundary, at K-1.

    Returns
    -------
    Tensor, shape (N, ...)
        Misclassified points, and the sample itself where it is misclassified or none was found.

    Raises
    ------
    ImportError
        The package is missing.
    ValueError
        The box is None, or an option is out of its range.

    Examples
    --------
    >>> import torch
    >>> x, y = torch.rand(4, 2), torch.zeros(4, dtype=torch.int64)
    >>> fab(Oracle(torch.nn.Linear(2, 3)), x, y, "L2", (0.0, 1.0), steps=10).shape
    torch.Size([4, 2])
    """
    whole("steps", steps)
    flag("targeted", targeted)
    logits = oracle.logits(x)
    adapter = _Adapter(oracle, x, box, logits.shape[1])
    attack = _fab(adapter, norm=norm, n_iter=steps)
    rows = (margin(logits, y) < 0).nonzero()[:, 0]
    if not len(rows):
        return x
    clean, labels, inner = x[rows], y[rows], adapter.inside(x[rows])
    nearest = torch.full(labels.shape, torch.inf, dtype=torch.float64, device=x.device)
    points = x.clone()
    for target in range(min(_TARGETS, adapter.classes - 1) if targeted else 1):
        attack.target_class = target + 2  # counted from the largest logit, which is the label's
        with torch.no_grad():
            found = adapter.points(clean, inner, attack.attack_single_run(inner, labels, is_targeted=targeted))
        distance = norms.norm(found.double() - clean.double(), norm)
        better = (margin(oracle.logits(found), labels) >= 0) & (distance < nearest)
        points[rows[better]], nearest[better] = found[better], distance[better]
    return points


def _fab(adapter: _Adapter, **settings: object) -> Any:
    attack = _package().fab_tf.FABAttack_TF(adapter, **settings)
    attack.get_diff_logits_grads_batch = adapter.gaps  # its own takes the gradient of the label's logit as well
    return attack


class _Adapter:
    """A model in the form in which the package attacks models of other frameworks, behind an oracle.

    It takes single-precision inputs in [0, 1], returns single-precision logits and gradients, and has no graph.
    The names of the methods without an underscore are the package's.
    """

    def __init__(self, oracle: Oracle, x: Tensor, box: tuple[float, float] | None, classes: int) -> None:
        if box is None:
            raise ValueError("box=None: AutoAttack's attacks need a box, a pair (low, high) is accepted")
        self.classes = classes
        self._oracle, self._dtype, self._box = oracle, x.dtype, box
        self._low, self._width = box[0], box[1] - box[0]

    def inside(self, x: Tensor) -> Tensor:
        """The sample in the package's units."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return ((wide - self._low) / self._width).float().clamp(0, 1).contiguous()

    def outside(self, z: Tensor) -> Tensor:
        """Points in the model's units and dtype."""
        z = z.detach().to(torch.promote_types(self._dtype, torch.float32))
        return clamp((self._low + self._width * z).to(self._dtype), self._box)

    def length(self, radius: float) -> float:
        """A length in the package's units."""
        return radius / self._width

    def points(self, x: Tensor, z: Tensor, found: Tensor) -> Tensor:
        """What was found from x = `outside(z)`, in the model's units; coordinates that did not move are those of x."""
        return torch.where(found == z, x, self.outside(found))

    def predict(self, z: Tensor) -> Tensor:
        return _single(self._oracle.logits(self.outside(z)))

    def get_logits_loss_grad_xent(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._ascent(z, y, losses.ce)

    def get_logits_loss_grad_dlr(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._ascent(z, y, losses.dlr)

    def get_logits_loss_grad_target(self, z: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._ascent(z, y, _targeted, target)

    def get_grad_diff_logits_target(self, z: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        gaps, gradients = self._towards(z, y, target[:, None])
        return gaps[:, 0], gradients[:, 0]

    def gaps(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """z_j - z_y for the K-1 other classes j, and their gradients."""
        rivals = torch.arange(self.classes - 1, device=z.device).expand(len(z), -1)
        return self._towards(z, y, rivals + (rivals >= y[:, None]))

    def _towards(self, z: Tensor, y: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        logits, gradients = self._oracle.margin_gradients(self.outside(z), y, rivals)
        logits = _single(logits)
        return logits.gather(1, rivals) - logits.gather(1, y[:, None]), gradients.float() * self._width

    def _ascent(
        self, z: Tensor, y: Tensor, loss: Callable[..., Tensor], *given: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, gradient = self._oracle.gradient(self.outside(z), y, loss, *given)
        value = loss(logits, y, *given)
        # a point without logits is no flip and never the best
        broken = logits.isnan().any(1)
        logits[broken] = torch.nn.functional.one_hot(y[broken], logits.shape[1]).to(logits)
        value[broken] = -torch.inf
        return _single(logits), value.float(), gradient.float() * self._width


def _single(logits: Tensor) -> Tensor:
    """In single precision; of more digits, less the largest of them, so that rounding merges no two of one offset."""
    most = logits.amax(1, keepdim=True) if logits.dtype == torch.float64 else 0
    return (logits - most).float()


def _targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2); its numerator for K < 4."""
    gap = (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]
    if logits.shape[1] < 4:
        return gap
    top = logits.topk(4, dim=1).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return gap / torch.where(spread > 0, spread, 1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One truth value per sample, in a shape that goes with `like`."""
    return values.bool().view(-1, *[1] * (like.ndim - 1))


def _random_state_kept() -> AbstractContextManager[None]:
    """Within it, torch's random state is the package's to seed."""
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ())


def _package() -> Any:
    try:
        import pyautoattack.fab_tf
    except ImportError as error:
        raise ImportError("AutoAttack's attacks need its package: pip install 'wda[attacks]'") from error
    return pyautoattack
