"""Slopes of networks too large to enumerate: certified upper bounds, and attacks from below."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wda.certificates.gains import halved, homogeneous, product
from wda.certificates.propagation import Bounds, gradient, linear, margins, preactivations, slopes
from wda.checks import whole
from wda.errors import NotPiecewiseAffine
from wda.nets import Net
from wda.norms import dual, dual_maximiser, norm

__all__ = ["lipschitz_upper", "recession_lower", "recession_upper", "steepest_pairs"]

# wider layers behind another activation keep their bounds by intervals: seconds per network rather than minutes
_REFINE = 2048
# a step this small changes nothing that matters
_LEAST_STEP = 1e-12
# after so many steps of the attack only the best fifth of the starts go on
_EARLY = 10


def lipschitz_upper(
    net: Net,
    norm_name: str,
    pairs: Sequence[tuple[int, int]],
    box: tuple[float, float] | None = None,
) -> Tensor:
    r"""Certified upper bounds of the Lipschitz constants of :math:`\theta_j - \theta_k`.

    The least of the product of layer norms (`product`), its refinement around the middle of the slopes (`halved`,
    where the network can be written as explicit matrices) and intervals of the Jacobian (`gradient`). On a box the
    slopes of the activations are bounded by what their pre-activations can reach there. Computed in float64 and
    raised by 1e-9 of itself for rounding.

    Parameters
    ----------
    net : Net
    norm_name : {"Linf", "L2", "L1"}
        Of the input.
    pairs : sequence of (label, rival)
    box : (float, float), optional
        By default all inputs.

    Returns
    -------
    Tensor, shape (pairs,)

    Raises
    ------
    NotPiecewiseAffine
        Names a layer of which no bound is known.
    ValueError
        A pair is not of two different classes, or the box is empty.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> [round(float(lipschitz_upper(net, "Linf", [(0, 1)], box)), 6) for box in (None, (-2.0, -1.0))]
    [2.0, 0.0]
    """
    steep = slopes(net, None if box is None else _reach(net, box))
    bounds = [product(net, norm_name, pairs), gradient(net, norm_name, pairs, steep)]
    if _writable(net):
        # narrower slopes with another middle may give a larger bound
        bounds += [halved(net, norm_name, pairs), halved(net, norm_name, pairs, steep)]
    return torch.stack(bounds).amin(0)


def _reach(net: Net, box: tuple[float, float]) -> list[Bounds]:
    """Bounds of every pre-activation over the box."""
    low, high = box
    if not low <= high:
        raise ValueError(f"box={box}: (low, high) with low <= high is accepted")
    centre = net.like.new_full((1, *net.shape), (low + high) / 2)
    return preactivations(net, centre, (high - low) / 2, "Linf", box, _REFINE)


def _writable(net: Net) -> bool:
    """Whether the network can be written as explicit matrices."""
    try:
        _ = net.dense
    except (NotPiecewiseAffine, ValueError):
        return False
    return True


def recession_upper(net: Net, norm_name: str, pairs: Sequence[tuple[int, int]]) -> Tensor:
    r"""Certified upper bounds of how fast :math:`\theta_j - \theta_k` grows along rays.

    They bound :math:`\max_{\|u\|_r \le 1} \theta^0_j(u) - \theta^0_k(u)` for the recession network :math:`\theta^0`
    (`Net.recession`), by the least of its Lipschitz constants (`lipschitz_upper`; so never above the product of the
    layers' norms), of `homogeneous`, and of backward linear bounds over the unit ball (`linear`).

    Parameters
    ----------
    net : Net
        The network itself, not its recession network.
    norm_name : {"Linf", "L2", "L1"}
    pairs : sequence of (label, rival)

    Returns
    -------
    Tensor, shape (pairs,)
        At least 0, the value at u = 0.

    Raises
    ------
    NotPiecewiseAffine, ValueError
        As `lipschitz_upper` and `Net.recession`.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> round(float(recession_upper(net, "Linf", [(0, 1)])), 6)
    1.0
    """
    limit = net.recession()
    origin = net.like.new_zeros(1, *net.shape)
    bounds = [
        lipschitz_upper(limit, norm_name, pairs),
        linear(limit, margins(net, pairs), origin, 1.0, norm_name, refine=_REFINE)[1][0],
    ]
    if _writable(limit):
        bounds.append(homogeneous(limit, norm_name, pairs))
    return torch.stack(bounds).amin(0).clamp(min=0)


def recession_lower(
    net: Net,
    norm_name: str,
    pairs: Sequence[tuple[int, int]],
    starts: int = 50,
    steps: int = 60,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""How fast :math:`\theta_j - \theta_k` grows along rays, from below: the best direction an attack finds.

    Maximises :math:`f = \theta^0_j - \theta^0_k` over the unit ball. As f is positively homogeneous and linear on
    cones, the steepest direction :math:`\mathcal M_r(\nabla f(u))` of u's cone is the maximiser if it lies in it. So
    each step moves towards it by a fraction that doubles after a success and halves after a failure, and scales the
    result back to the unit sphere. The starts are random directions; after ten steps the best fifth of them go on.

    Parameters
    ----------
    net : Net
        The network itself, not its recession network.
    norm_name : {"Linf", "L2", "L1"}
    pairs : sequence of (label, rival)
    starts, steps : int
    seed : int

    Returns
    -------
    values : Tensor, shape (pairs,)
        At least 0, the value at u = 0; each is the value of f at its direction.
    directions : Tensor, shape (pairs, *net.shape)
        In the unit ball.

    Raises
    ------
    NotPiecewiseAffine, ValueError
        As `Net.recession`.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.ReLU()), shape=(2,))
    >>> value, direction = recession_lower(net, "L2", [(0, 1)])
    >>> float(value), direction.tolist()[0][1] > 0
    (1.0, True)
    """
    starts, steps = whole("starts", starts), whole("steps", steps, 0)
    limit, rows = net.recession(), margins(net, pairs)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(starts, *net.shape, generator=generator, dtype=torch.float64).to(net.like)
    found = [_climb(limit, row, _unit(first, norm_name), norm_name, steps) for row in rows]
    values, directions = zip(*found, strict=True)
    return torch.stack(values), torch.stack(directions)


def steepest_pairs(
    net: Net, norm_name: str, pairs: Sequence[tuple[int, int]], count: int = 10, starts: int = 50, seed: int = 0
) -> list[tuple[int, int]]:
    """The pairs with the steepest gradients of the recession network at random directions: worth attacking first.

    Parameters
    ----------
    net, norm_name, pairs, seed
        As for `recession_lower`.
    count : int
        How many pairs are returned at most.
    starts : int
        How many directions are tried.

    Examples
    --------
    >>> from wda.nets import from_module
    >>> net = from_module(torch.nn.Linear(2, 3))
    >>> len(steepest_pairs(net, "L2", [(0, 1), (0, 2), (1, 2)], count=2))
    2
    """
    limit = net.recession()
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(starts, *net.shape, generator=generator, dtype=torch.float64).to(net.like)
    gradients = margins(limit, pairs) @ limit.jacobian(directions)
    steepness = norm(gradients.flatten(0, 1), dual(norm_name)).view(starts, -1).amax(0)
    return [pairs[int(i)] for i in steepness.topk(min(count, len(pairs))).indices]


def _climb(limit: Net, row: Tensor, u: Tensor, norm_name: str, steps: int) -> tuple[Tensor, Tensor]:
    """The best value of one row of the logits found on the unit sphere, and where; 0 at 0 if none is positive."""

    def value_and_gradient(points: Tensor) -> tuple[Tensor, Tensor]:
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            values = limit(points) @ row
            if not values.requires_grad:  # the logits are bounded: the recession network is 0
                return values, torch.zeros_like(points)
            (slope,) = torch.autograd.grad(values.sum(), points)
        return values.detach(), slope

    value, slope = value_and_gradient(u)
    fraction = torch.ones_like(value)
    for step in range(steps):
        if step == _EARLY:
            best = value.topk(-(-len(u) // 5)).indices
            u, value, slope, fraction = u[best], value[best], slope[best], fraction[best]
        if bool((fraction < _LEAST_STEP).all()):
            break
        part = fraction.view(-1, *[1] * (u.ndim - 1))
        target = dual_maximiser(slope, norm_name)
        trial = _unit(u + part * (target - u), norm_name)
        trial_value, trial_slope = value_and_gradient(trial)
        better = trial_value > value
        u[better], value[better], slope[better] = trial[better], trial_value[better], trial_slope[better]
        fraction = torch.where(better, (2 * fraction).clamp(max=1), fraction / 2)
    at = int(value.argmax())
    if value[at] <= 0:
        return torch.zeros_like(value[at]), torch.zeros_like(u[at])
    return value[at], u[at]


def _unit(u: Tensor, norm_name: str) -> Tensor:
    """Each direction divided by its norm; 0 stays 0."""
    length = norm(u, norm_name).view(-1, *[1] * (u.ndim - 1))
    return u / torch.where(length > 0, length, 1)
