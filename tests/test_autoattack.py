"""AutoAttack's attacks: what the package itself finds, what is known exactly, and what it leaves to its caller."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pyautoattack.autoattack
import pyautoattack.autopgd_base
import pyautoattack.fab_tf
import pyautoattack.square
import pytest
import torch
from torch import Tensor, nn

import wda
from wda import Threat, attack, distances
from wda.errors import Untrustworthy
from wda.losses import margin
from wda.norms import dual, norm

NORMS = ("Linf", "L2", "L1")
BOX = (-4.0, 6.0)
QUERIES = 50
STEPS = 10
each_norm = pytest.mark.parametrize("name", NORMS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
METHODS = ["apgd-ce", "apgd-dlr", "autoattack", "fab"]
each_method = pytest.mark.parametrize("method", METHODS)
each_apgd = pytest.mark.parametrize("method", ["apgd-ce", "apgd-dlr"])


def shorten(patch: pytest.MonkeyPatch, attack_class: type, **new: int) -> None:
    """Other defaults for an attack of the package."""
    parameters = inspect.signature(attack_class).parameters.values()
    defaults = (new.get(p.name, p.default) for p in parameters if p.default is not p.empty)
    patch.setattr(attack_class.__init__, "__defaults__", tuple(defaults))


@pytest.fixture(autouse=True)
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """5000 would be most of the time of an ensemble."""
    shorten(monkeypatch, pyautoattack.square.SquareAttack, n_queries=QUERIES)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the members of an ensemble, the package's own as well; where not their strength matters."""
    shorten(monkeypatch, pyautoattack.autopgd_base.APGDAttack, n_iter=STEPS)
    shorten(monkeypatch, pyautoattack.autopgd_base.APGDAttack_targeted, n_iter=STEPS)
    shorten(monkeypatch, pyautoattack.fab_tf.FABAttack_TF, n_iter=STEPS)
    for name in ("APGDAttack", "APGDAttack_targeted", "FABAttack_PT"):
        original = getattr(pyautoattack.autoattack, name)

        def short(*args: object, original: type = original, **settings: object) -> object:
            return original(*args, **{**settings, "n_iter": STEPS})

        monkeypatch.setattr(pyautoattack.autoattack, name, short)


def point_wise(name: str, eps: float, box: tuple[float, float] = (0.0, 1.0)) -> Threat:
    return Threat(name, eps, order=math.inf, box=box)


def affine(classes: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """An affine classifier of images (N, 1, 8, 8), some in [0, 1], and its own answers for labels."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).to(dtype)
    x = torch.rand(12, 1, 8, 8, dtype=torch.float64).to(dtype)
    return model, x, model(x).argmax(1).detach()


def exact_distances(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """To the nearest boundary of an affine model, min_j (z_y - z_j) / ||w_j - w_y||, in float64."""
    w, b = (p.detach().double() for p in model[1].parameters())
    z = x.double().flatten(1) @ w.T + b
    slopes = torch.stack([norm(d, dual(name)) for d in (w - w[y][:, None]).transpose(0, 1)], dim=1)
    gaps = z.gather(1, y[:, None]) - z
    return torch.where(slopes > 0, gaps / slopes, math.inf).amin(1)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = wda.data.load("digits", n=24)
    return wda.models.load("digits-mlp"), x, y


RADII = {"Linf": 0.08, "L2": 0.5, "L1": 1.5}  # half of the digits fall


def run(method: str, model: nn.Module, x: Tensor, y: Tensor, name: str = "Linf", **options: object) -> Tensor:
    """The points of any of the attacks, FAB's without a bound."""
    if method == "fab":
        return distances(model, x, y, name, method="fab", **options).x_adv
    return attack(method, model, x, y, point_wise(name, RADII[name]), **options).x_adv


# -- affine models: what can be flipped is known ---------------------------------------------------------------------

CASES = [
    *itertools.product(["apgd-ce"], [2], NORMS, [torch.float32, torch.float64]),
    *itertools.product(["apgd-dlr"], [3], NORMS, [torch.float32, torch.float64]),
    ("autoattack", 2, "L2", torch.float64),
    ("autoattack", 3, "Linf", torch.float32),
    ("autoattack", 5, "Linf", torch.float64),
    ("autoattack", 5, "L1", torch.float32),
]


@pytest.mark.parametrize(("method", "classes", "name", "dtype"), CASES, ids=str)
@pytest.mark.filterwarnings("ignore:autoattack. with K")
def test_what_is_within_the_radius_flips_and_nothing_else(
    method: str, classes: int, name: str, dtype: torch.dtype
) -> None:
    model, x, y = affine(classes, seed=classes, dtype=dtype)
    exact = exact_distances(model, x, y, name)
    eps = float(exact.sort().values[7:9].mean())
    adv = attack(method, model, x, y, point_wise(name, eps, BOX))
    assert adv.audit() <= eps
    flipped = margin(model(adv.x_adv), y) >= 0
    near = exact < (0.95 if name == "L1" else 0.99) * eps  # APGD's sparse steps get stuck shortly before the end
    assert flipped[near].all()
    assert not flipped[exact > eps].any()
    assert 0 < near.sum() < len(x), "nothing to tell apart"


@each_norm
@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.float64), (3, torch.float32), (6, torch.float64)], ids=str)
@pytest.mark.parametrize("targeted", [False, True])
def test_fab_ends_just_behind_the_nearest_boundary(name: str, dtype: torch.dtype, classes: int, targeted: bool) -> None:
    """Its overshoot of 5 % and its way back by 10 % leave it half a per cent behind an affine boundary."""
    model, x, y = affine(classes, dtype=dtype)
    y[::5] = (y[::5] + 1) % classes
    found = distances(model, x, y, name, BOX, method="fab", steps=60, targeted=targeted)
    wrong = margin(model(x), y) >= 0
    assert wrong.any()
    assert (found.distance[wrong] == 0).all()
    ratio = (found.distance / exact_distances(model, x, y, name))[~wrong]
    assert (ratio >= 1).all()
    assert (ratio <= 1.01).all()


# -- the package's own evaluation ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "version"), [("Linf", "standard"), ("L2", "plus"), ("L1", "standard")])
@pytest.mark.usefixtures("few_steps")
def test_the_ensemble_finds_what_the_package_finds(
    digits: tuple[nn.Module, Tensor, Tensor], name: str, version: str
) -> None:
    """Through graphs of torch's own there, through the oracle here; in two batches."""
    model, x, y = digits
    package = pyautoattack.autoattack.AutoAttack(model, norm=name, eps=RADII[name], seed=3, version=version)
    package.square.n_queries = QUERIES
    theirs, _ = package.run_standard_evaluation(x, y, batch_size=15)
    ours = run("autoattack", model, x, y, name, version=version, seed=3, batch_size=15)
    fell = (model(ours).argmax(1) != y).sum()
    assert 1 < fell < len(x) - 1
    assert fell == (model(theirs).argmax(1) != y).sum()
    if version == "standard":  # in the other one the Square Attack has another place
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@each_apgd
@pytest.mark.parametrize("case", ["digits-mlp Linf", "digits-mlp L2", "digits-cnn-adv L1"])
def test_apgd_is_as_strong_as_pgd(method: str, case: str) -> None:
    x, y = wda.data.load("digits", n=100)
    which, name = case.split()
    model = wda.models.load(which)
    threat = point_wise(name, RADII[name])
    left = attack("pgd", model, x, y, threat, steps=100, loss=method.removeprefix("apgd-")).accuracy(model)
    assert attack(method, model, x, y, threat).accuracy(model) <= left + 1 / len(x)
    assert 0 < left < 1


# -- passes, modes, random numbers -----------------------------------------------------------------------------------


class Counting:
    """A model that counts by itself what passes through it, forward and backward."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.forward, self.backward = model, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.forward += len(x)
        if x.requires_grad:
            x.register_hook(self._came_back)
        return self.model(x)

    def _came_back(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


@each_method
@pytest.mark.usefixtures("few_steps")
def test_every_pass_is_counted(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    counting = Counting(model)
    if method == "fab":
        counts = distances(counting, x, y, method="fab", steps=10).counts
    else:
        counts = attack(method, counting, x, y, point_wise("Linf", 0.05)).counts
    assert counting.backward > 0
    passed = (counts.forward + counts.checks) * len(x), counts.backward * len(x)
    assert passed == pytest.approx((counting.forward, counting.backward))


@each_apgd
def test_apgd_takes_one_gradient_per_step(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits
    right = (model(x).argmax(1) == y).sum() / len(x)
    counts = attack(method, model, x, y, point_wise("Linf", 0.0), steps=7).counts
    assert counts.backward == pytest.approx(8 * float(right))  # one more at the start
    again = attack(method, model, x, y, point_wise("Linf", 0.0), steps=7, restarts=3).counts
    assert again.backward == pytest.approx(3 * counts.backward)


@each_method
@pytest.mark.usefixtures("few_steps")
def test_nothing_is_left_behind(
    digits: tuple[nn.Module, Tensor, Tensor], method: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model, x, y = wda.models.load("digits-mlp"), digits[1][:10], digits[2][:10]
    model.train()
    before, state = x.clone(), torch.get_rng_state()
    first = run(method, model, x, y)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(run(method, model, x, y), first), "depends on torch's own random state"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(x, before)
    assert torch.is_grad_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["apgd-ce", "apgd-dlr", "autoattack"])
@pytest.mark.usefixtures("few_steps")
def test_the_seed_decides(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits[0], digits[1][:10], digits[2][:10]
    first, other = run(method, model, x, y, seed=0), run(method, model, x, y, seed=2**64 - 1)
    assert not torch.equal(first, other)
    assert torch.equal(first, run(method, model, x, y, seed=0))


@pytest.mark.parametrize("method", ["apgd-ce", "apgd-dlr", "fab"])
@each_norm
def test_neither_batch_size_nor_order_matters(digits: tuple[nn.Module, Tensor, Tensor], method: str, name: str) -> None:
    model, x, y = wda.models.load("digits-mlp").double(), digits[1].double(), digits[2]
    options = {"steps": 20} if method == "fab" else {"steps": 20, "restarts": 2}
    whole = run(method, model, x, y, name, **options)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(method, model, x, y, name, batch_size=7, **options), whole, rtol=0, atol=1e-5)
    shuffled = run(method, model, x[order], y[order], name, **options)
    torch.testing.assert_close(shuffled, whole[order], rtol=0, atol=1e-5)


@each_apgd
def test_restarts_only_help(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits
    once = margin(model(run(method, model, x, y, steps=5)), y)
    often = margin(model(run(method, model, x, y, steps=5, restarts=4)), y)
    assert (often >= once).all()
    assert (often > once).any()


@each_method
@pytest.mark.usefixtures("few_steps")
def test_another_box_is_the_same_attack(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = wda.models.load("digits-mlp").double(), digits[1][:10].double(), digits[2][:10]
    wide = 8 * x - 2  # powers of two, so that nothing rounds
    shifted = lambda points: model((points + 2) / 8)  # noqa: E731
    if method == "fab":
        inner = distances(model, x, y, method="fab").x_adv
        outer = distances(shifted, wide, y, box=(-2, 6), method="fab").x_adv
    else:
        inner = attack(method, model, x, y, point_wise("Linf", 0.08)).x_adv
        outer = attack(method, shifted, wide, y, point_wise("Linf", 0.64, (-2, 6))).x_adv
    outer = (outer + 2) / 8
    if method.startswith("apgd"):  # the start depends on the sample's values
        assert torch.equal(margin(model(outer), y) >= 0, margin(model(inner), y) >= 0)
        assert norm(outer - x, "Linf") == pytest.approx(norm(inner - x, "Linf"))
    else:
        torch.testing.assert_close(outer, inner, rtol=0, atol=1e-6)


# -- results that cannot be trusted ----------------------------------------------------------------------------------


class Masked(nn.Module):
    """The same decisions behind logits rounded to a grid: every gradient is zero."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return (self.model(x) * 10).round() / 10


@pytest.mark.filterwarnings("ignore:.*of the gradients were zero")
@pytest.mark.usefixtures("few_steps")
def test_a_warning_where_only_the_square_attack_finds_errors(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = Masked(digits[0]), *digits[1:]
    with pytest.warns(Untrustworthy, match="the Square Attack.*flipped") as caught:
        adv = attack("autoattack", model, x, y, point_wise("Linf", 0.2))
    [warning] = [warning for warning in caught if "Square" in str(warning.message)]
    flipped, before = (int(word) for word in str(warning.message).split() if word.isdigit())
    assert flipped > 1
    assert before - flipped == round(len(x) * adv.accuracy(model))
    assert warning.filename == __file__


@pytest.mark.usefixtures("few_steps")
def test_no_warning_where_gradients_find_them_first(digits: tuple[nn.Module, Tensor, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("autoattack", *digits)


# -- few classes, odd shapes, bad models -----------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "dropped"), [(2, True), (3, False)])
@pytest.mark.usefixtures("few_steps")
def test_few_classes_are_named_once(classes: int, dropped: bool) -> None:
    model, x, y = affine(classes)
    with pytest.warns(UserWarning, match=f"K={classes} classes") as caught:
        attack("autoattack", model, x, y, point_wise("Linf", 0.001, BOX), version="plus")
    assert len(caught) == 1
    assert ("apgd-dlr" in str(caught[0].message)) != dropped


@each_norm
@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 4, 4), (1, 7, 5)], ids=str)
@pytest.mark.usefixtures("few_steps")
def test_inputs_need_not_be_square_images(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 5)).double()
    x = torch.rand(8, *shape, dtype=torch.float64)
    y = model(x).argmax(1)
    exact = exact_distances(model, x, y, name)
    eps = float(exact.sort().values[3:5].mean())
    adv = attack("autoattack", model, x, y, point_wise(name, eps, BOX))
    flipped = margin(model(adv.x_adv), y) >= 0
    assert torch.equal(flipped, exact <= eps)


@each_method
@pytest.mark.filterwarnings("ignore::wda.errors.Untrustworthy")
@pytest.mark.usefixtures("few_steps")
def test_models_without_gradients_or_logits(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits[0], digits[1][:10], digits[2][:10]

    def constant(points: Tensor) -> Tensor:
        return 0 * points.flatten(1)[:, :1] + nn.functional.one_hot(torch.tensor(int(y[0])), 10)

    assert torch.equal(run(method, constant, x, y), x)

    def sometimes(points: Tensor) -> Tensor:
        return model(points).masked_fill((points.flatten(1)[:, :1] > 0.05), math.nan)

    points = run(method, sometimes, x, y)
    flipped = margin(sometimes(points), y) >= 0
    assert sometimes(points).isfinite().all()
    assert (flipped & (margin(model(x), y) < 0)).any()


@each_method
@pytest.mark.usefixtures("few_steps")
def test_samples_that_leave_nothing_to_do(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits
    wrong = (model(x).argmax(1) + 1) % 10
    assert torch.equal(run(method, model, x, wrong), x)
    if method != "fab":
        assert torch.equal(attack(method, model, x[:5], y[:5], point_wise("L1", 0.0)).x_adv, x[:5])


@each_method
@pytest.mark.usefixtures("few_steps")
def test_one_sample_and_the_same_one_twice(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits
    nearest = distances(model, x, y, "L2", method="fab").distance.argsort()[5:6]  # one that is not hard to flip
    one, twins = (run(method, model, x[rows], y[rows], "L2") for rows in (nearest, nearest.repeat(2)))
    assert margin(model(one), y[nearest]) >= 0
    assert (margin(model(twins), y[nearest.repeat(2)]) >= 0).all()


@each_method
@pytest.mark.usefixtures("few_steps")
def test_everything_falls_within_a_large_radius(digits: tuple[nn.Module, Tensor, Tensor], method: str) -> None:
    model, x, y = digits
    threat = point_wise("Linf", 1.0)
    adv = attack(method, model, x, y, threat)
    assert adv.accuracy(model) == 0


# -- bad arguments ---------------------------------------------------------------------------------------------------


@each_method
def test_a_box_is_needed(method: str) -> None:
    model, x, y = affine(5)
    with pytest.raises(ValueError, match="box=None"):
        attack(method, model, x, y, Threat("L2", 1.0, order=math.inf, box=None))


@pytest.mark.parametrize(
    ("method", "classes", "option", "message"),
    [
        ("apgd-dlr", 2, {}, "K >= 3 classes, the model has 2"),
        ("apgd-ce", 5, {"steps": 0}, "steps=0"),
        ("apgd-dlr", 5, {"restarts": 1.5}, "restarts=1.5"),
        ("autoattack", 5, {"version": "rand"}, "version='rand'.*'standard', 'plus'"),
        ("fab", 5, {"steps": -1}, "steps=-1"),
    ],
)
def test_bad_options_are_named(method: str, classes: int, option: dict[str, object], message: str) -> None:
    model, x, y = affine(classes)
    with pytest.raises(ValueError, match=message):
        attack(method, model, x, y, point_wise("L2", 1.0, BOX), **option)


@each_method
def test_the_extra_is_named_where_the_package_is_missing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = affine(5)
    for module in [name for name in sys.modules if name.split(".")[0] == "pyautoattack"]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"wda\[attacks\]"):
        attack(method, model, x, y, point_wise("L2", 1.0, BOX))


@pytest.mark.usefixtures("few_steps")
def test_an_interrupted_ensemble_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = wda.data.load("digits", n=4)
    model, threat, state = wda.models.load("digits-mlp"), Threat("Linf", 0.1, "inf"), tmp_path / "run.npz"
    whole = wda.attack("autoattack", model, x, y, threat)
    module, begun = sys.modules["wda.attacks.autoattack"], []
    member = module._member

    def killed(name: str, *rest: Any) -> Any:
        begun.append(name)
        if name == "fab-t" and begun.count(name) == 1:
            raise KeyboardInterrupt
        return member(name, *rest)

    monkeypatch.setattr(module, "_member", killed)
    with pytest.raises(KeyboardInterrupt):
        wda.attack("autoattack", model, x, y, threat, state=state)
    resumed = wda.attack("autoattack", model, x, y, threat, state=state)
    assert begun[:3] == ["apgd-ce", "apgd-t", "fab-t"]
    assert "apgd-ce" not in begun[3:]
    torch.testing.assert_close(resumed.x_adv, whole.x_adv)
    assert resumed.counts.backward < whole.counts.backward
    again = wda.attack("autoattack", model, x, y, threat, state=state)
    assert again.counts.backward == 0
    with pytest.raises(ValueError, match="another model, sample, ball"):
        wda.attack("autoattack", model, x, y, threat, state=state, seed=1)
    with pytest.raises(ValueError, match="another model, sample, ball"):
        wda.attack("autoattack", lambda points: model(points).flip(1), x, y, threat, state=state)
    rounded = wda.attack("autoattack", lambda points: model(points) + 1e-6, x, y, threat, state=state)
    assert rounded.counts.backward == 0
    state.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged"):
        wda.attack("autoattack", model, x, y, threat, state=state)
