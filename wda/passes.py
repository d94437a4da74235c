"""The one place that calls the model: in batches, counted, checked, with progress shown.

Attacks and distributions never call a model themselves. So every pass is counted, a NaN is contained where it
appears, the model is put back as it came, and no attack has a loop over batches of its own.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from wda.checks import flag, whole
from wda.errors import Untrustworthy
from wda.losses import margin
from wda.norms import bounds

__all__ = ["Counts", "Line", "Model", "Oracle", "batches", "check_labels", "check_sample", "distrust", "warn"]

# A torch.nn.Module, or any other callable that maps inputs (N, ...) to logits (N, K).
Model = Callable[[Tensor], Tensor]
Result = TypeVar("Result")

_log = logging.getLogger("wda")
_SECONDS_BETWEEN_LOG_LINES = 10.0


@dataclass(frozen=True)
class Counts:
    """What a result cost.

    Attributes
    ----------
    forward, backward : float
        Mean passes per sample; one backward pass is one gradient.
    vanished : float
        The share of the gradients that were zero at points still classified correctly: where it is large, the attack
        was blind, not the model robust.
    seconds : float
        By the clock on the wall.
    checks : float
        Forward passes on top of these, mean per sample, that looked whether the model is a function at all: about a
        hundred in a whole call (`wda.inspection.inspected`).
    batch : int or None
        So many rows the model took at a time in the end: fewer than asked for where memory ran out.

    Examples
    --------
    >>> import wda
    >>> x, y = torch.rand(10, 2), torch.zeros(10, dtype=torch.int64)
    >>> adv = wda.attack("fgsm", torch.nn.Linear(2, 3), x, y, wda.Threat("L2", 0.1))
    >>> adv.counts.backward
    1.0
    """

    forward: float = 0.0
    backward: float = 0.0
    vanished: float = 0.0
    seconds: float = 0.0
    batch: int | None = field(default=None, compare=False, repr=False)
    checks: float = field(default=0.0, repr=False)


class Oracle:
    """A model behind counted passes, in batches that fit into memory.

    Used as a context manager it puts the model in evaluation mode and, whatever happens, puts every module back
    in the mode it came in, and every buffer back to what it held. Gradients are taken with respect to inputs only:
    those of the parameters stay as they were. Any number of rows may be passed at once; where memory runs out the
    batches become smaller.

    Logits come back in their own dtype, or in that of the input if it has more digits. A row of them that is NaN or
    infinite comes back as NaN, its gradients as 0. Every comparison of its margin is then false, so no search takes
    such a point for a flip, or for a better one.

    Parameters
    ----------
    model : nn.Module or callable
        Maps ``(N, ...)`` to logits ``(N, K)``.
    batch_size : int
        The model gets at most so many rows at a time.
    autocast : bool
        Take gradients in bfloat16 where torch does so by itself. The logits that come with them have its errors, but
        for points that they misclassify: these are passed once more, so that no flip is one of bfloat16 alone.

    Attributes
    ----------
    forward, backward, vanished, invalid, tied : int
        Since the start: rows passed forward, gradients taken, those of them that were zero at points still classified
        correctly, rows whose logits or gradients were NaN or infinite, and rows whose two largest logits were equal.
    checks : int
        Rows passed forward by `check`, beside those.
    batch_size : int
        Halved whenever memory ran out.

    Examples
    --------
    >>> with Oracle(torch.nn.Linear(2, 3)) as oracle:
    ...     logits = oracle.logits(torch.rand(4, 2))
    >>> logits.shape, oracle.forward
    (torch.Size([4, 3]), 4)
    """

    def __init__(self, model: Model, batch_size: int = 256, autocast: bool = False) -> None:
        if not callable(model):
            raise TypeError(
                f"model={model!r}: a torch.nn.Module, or another callable that maps inputs to logits, is accepted"
            )
        self.model = model
        self.batch_size = whole("batch_size", batch_size)
        self.autocast = flag("autocast", autocast)
        self.forward = 0
        self.backward = 0
        self.vanished = 0
        self.invalid = 0
        self.tied = 0
        self.checks = 0
        self._state: list[_State] = []

    def __enter__(self) -> Oracle:
        if isinstance(self.model, nn.Module):
            self._state = [_State(module) for module in self.model.modules()]
            self.model.eval()
        return self

    def __exit__(self, *_: object) -> None:
        for state in self._state:
            state.restore()

    def to_model(self, x: Tensor) -> Tensor:
        """The rows of `x` on the model's device.

        Examples
        --------
        >>> Oracle(torch.nn.Linear(2, 3)).to_model(torch.rand(4, 2)).device
        device(type='cpu')
        """
        return next((x.to(weight.device) for weight in self._weights()), x)

    def _weights(self) -> Iterator[Tensor]:
        """The model's floating-point parameters and buffers."""
        if isinstance(self.model, nn.Module):
            held = itertools.chain(self.model.parameters(), self.model.buffers())
            yield from (weight for weight in held if weight.is_floating_point())

    def logits(self, x: Tensor) -> Tensor:
        """Logits (N, K), without a graph."""

        def compute(rows: slice) -> tuple[Tensor]:
            with torch.no_grad():
                return (self._call(x[rows]),)

        return self._batched(compute, len(x))[0]

    def check(self, x: Tensor) -> Tensor:
        """Logits (N, K) that tell about the model and not about an attack: their passes count apart, in `checks`.

        Examples
        --------
        >>> oracle = Oracle(torch.nn.Linear(2, 3))
        >>> _ = oracle.check(torch.rand(4, 2))
        >>> oracle.checks, oracle.forward
        (4, 0)
        """
        forward, invalid, tied = self.forward, self.invalid, self.tied
        logits = torch.cat([self.logits(self.to_model(part)) for part in x.split(self.batch_size)])
        self.checks += self.forward - forward
        self.forward, self.invalid, self.tied = forward, invalid, tied
        return logits

    def precision(self, logits: Tensor) -> float:
        """The unit of rounding of what the model computes: that of the coarsest dtype in sight.

        That may be the dtype of its weights, of the logits, or one that all logits happen to fit in, as those of a
        network in bfloat16 do whose logits are then made float32. On a GPU single precision may be TensorFloat-32.

        Examples
        --------
        >>> oracle = Oracle(torch.nn.Linear(2, 3))
        >>> logits = oracle.logits(torch.rand(4, 2))
        >>> oracle.precision(logits) == 2**-23, oracle.precision(logits.bfloat16().float()) == 2**-7
        (True, True)
        """
        dtypes = {logits.dtype, *(weight.dtype for weight in self._weights())}
        for coarse in (torch.float16, torch.bfloat16):
            if torch.equal(logits.to(coarse).to(logits.dtype).nan_to_num(), logits.nan_to_num()):
                dtypes.add(coarse)
        units = [2.0**-10 if dtype == torch.float32 and logits.is_cuda else torch.finfo(dtype).eps for dtype in dtypes]
        return max(units)

    def gradient(self, x: Tensor, y: Tensor, loss: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and the gradient of each sample's loss, (N, ...): one forward and one backward pass.

        What a loss takes after logits and labels, such as a target for each sample, is `given`, tensors of N rows.

        Examples
        --------
        >>> from wda.losses import ce
        >>> oracle = Oracle(torch.nn.Linear(2, 3))
        >>> logits, gradient = oracle.gradient(torch.rand(4, 2), torch.zeros(4, dtype=torch.int64), ce)
        >>> gradient.shape, oracle.backward
        (torch.Size([4, 2]), 4)
        """

        def compute(rows: slice) -> tuple[Tensor, ...]:
            point = x[rows].detach().requires_grad_()
            with torch.enable_grad():
                logits = self._search(point)
                total = loss(logits, y[rows], *(values[rows] for values in given)).sum()
            logits = self._verified(logits.detach(), point, y[rows])
            return logits, self._gradient(total, point, margin(logits, y[rows]) < 0)

        return self._batched(compute, len(x))  # type: ignore[return-value]

    def margin_gradients(self, x: Tensor, y: Tensor, rivals: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, K) and the gradients of z_j - z_y for the rivals j (N, m), as (N, m, ...).

        One forward pass, and one backward pass per rival.

        Examples
        --------
        >>> oracle, y = Oracle(torch.nn.Linear(2, 3)), torch.zeros(4, dtype=torch.int64)
        >>> logits, gradients = oracle.margin_gradients(torch.rand(4, 2), y, torch.tensor([[1, 2]] * 4))
        >>> gradients.shape, oracle.backward
        (torch.Size([4, 2, 2]), 8)
        """

        def compute(rows: slice) -> tuple[Tensor, ...]:
            logits, parts = self.rival_gradients(x[rows], y[rows], rivals[rows], rivals.shape[1])
            return logits, torch.cat([gradients for _, gradients in parts], dim=1)

        return self._batched(compute, len(x))  # type: ignore[return-value]

    def rival_gradients(
        self, x: Tensor, y: Tensor, rivals: Tensor, together: int
    ) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """What `margin_gradients` gives, the gradients of a few rivals at a time: with a thousand memory ends early.

        All rows are passed at once. The parts are computed as they are asked for, and each is a slice of the rivals
        and their gradients (N, at most `together`, ...).

        Examples
        --------
        >>> oracle, y = Oracle(torch.nn.Linear(2, 4)), torch.zeros(4, dtype=torch.int64)
        >>> logits, parts = oracle.rival_gradients(torch.rand(4, 2), y, torch.tensor([[1, 2, 3]] * 4), together=2)
        >>> [(some, gradients.shape) for some, gradients in parts]
        [(slice(0, 2, None), torch.Size([4, 2, 2])), (slice(2, 3, None), torch.Size([4, 1, 2]))]
        """
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._search(point)
            gaps = (logits.gather(1, rivals) - logits.gather(1, y[:, None])).sum(0).unbind()
        logits = self._verified(logits.detach(), point, y)
        last, correct = len(gaps) - 1, margin(logits, y) < 0

        def parts() -> Iterator[tuple[slice, Tensor]]:
            for first in range(0, len(gaps), together):
                some = range(len(gaps))[first : first + together]
                gradients = [self._gradient(gaps[j], point, correct, retain_graph=j < last) for j in some]
                yield slice(some.start, some.stop), torch.stack(gradients, dim=1)

        return logits, parts()

    def classes(self, x: Tensor) -> int:
        """K, read off one sample.

        Examples
        --------
        >>> Oracle(torch.nn.Linear(2, 3)).classes(torch.rand(4, 2))
        3
        """
        return self.logits(x[:1]).shape[1]

    def counts(self, n: int, seconds: float) -> Counts:
        """The passes so far, as means over `n` samples.

        Examples
        --------
        >>> oracle = Oracle(torch.nn.Linear(2, 3))
        >>> _ = oracle.logits(torch.rand(4, 2))
        >>> oracle.counts(4, seconds=0.5)
        Counts(forward=1.0, backward=0.0, vanished=0.0, seconds=0.5)
        """
        vanished = self.vanished / self.backward if self.backward else 0.0
        return Counts(self.forward / n, self.backward / n, vanished, seconds, self.batch_size, self.checks / n)

    def in_batches(self, work: Callable[[slice], Result], rows: slice) -> list[Result]:
        """What `work` gives for batches that cover the rows from `rows.start` to `rows.stop`.

        Where memory runs out it is given half as many rows, from there on.

        Examples
        --------
        >>> Oracle(torch.nn.Linear(2, 3), batch_size=2).in_batches(lambda rows: (rows.start, rows.stop), slice(5, 10))
        [(5, 7), (7, 9), (9, 10)]
        """
        results: list[Result] = []
        first = rows.start
        while first < rows.stop:
            size = min(self.batch_size, rows.stop - first)
            try:
                results.append(work(slice(first, first + size)))
                first += size
            except RuntimeError as error:
                if not _is_out_of_memory(error) or size == 1:
                    raise
                self.batch_size = size // 2
                _log.info("out of memory: batches of %d rows from here on", self.batch_size)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return results

    def _batched(self, compute: Callable[[slice], tuple[Tensor, ...]], n: int) -> tuple[Tensor, ...]:
        """What `compute` gives for batches that cover n rows, put together."""
        parts = self.in_batches(compute, slice(0, n)) if n else [compute(slice(0, 0))]
        return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def _search(self, x: Tensor) -> Tensor:
        """Logits of a pass that a gradient follows."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self._call(x)

    def _verified(self, logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The logits, taken again in full precision where bfloat16 misclassifies."""
        doubtful = (margin(logits, y) >= 0).nonzero()[:, 0]
        if not self.autocast or not len(doubtful):
            return logits
        with torch.no_grad():
            return logits.index_copy(0, doubtful, self._call(x[doubtful]))

    def _call(self, x: Tensor) -> Tensor:
        try:
            logits = self.model(x.clone())  # a model may change its input in place
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise
            raise self._explained(error, x) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                "the logits of a sample depend on the others in its batch, and model(x) takes no sample alone: batch "
                f"normalisation with the statistics of the batch{named(normalisers(self.model))}; use running "
                "statistics, and evaluation mode"
            ) from error
        self.forward += len(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != len(x) or logits.shape[1] < 2:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model(x) is {shape} for {len(x)} samples: logits of shape ({len(x)}, K) with K >= 2 are accepted"
            )
        logits = logits.to(torch.promote_types(logits.dtype, x.dtype))  # never to fewer digits: these may tie
        invalid = ~logits.isfinite().all(1)
        if invalid.any():
            self.invalid += int(invalid.sum())
            logits = logits.masked_fill(invalid[:, None], torch.nan)
        first, second = logits.topk(2, dim=1).values.unbind(1)
        self.tied += int((first == second).sum())
        return logits

    def _explained(self, error: RuntimeError, x: Tensor) -> Exception:
        """What it means that the model failed at x."""
        dtypes = dict.fromkeys(weight.dtype for weight in self._weights())
        if dtypes and x.dtype not in dtypes and "type" in str(error):
            told = ", ".join(map(str, dtypes))
            return TypeError(
                f"x has dtype {x.dtype}, the model {told}, and model(x) failed: convert one of them, for example "
                f"x.to({next(iter(dtypes))}): {error}"
            )
        if x.requires_grad and "requires grad" in str(error):  # as NumPy's arrays are asked for
            return ValueError(_NO_GRADIENT)
        return RuntimeError(f"model(x) failed on x of shape {tuple(x.shape)}; images are (N, C, H, W): {error}")

    def _gradient(self, total: Tensor, x: Tensor, correct: Tensor, retain_graph: bool = False) -> Tensor:
        self.backward += len(x)
        if not total.requires_grad:
            raise ValueError(_NO_GRADIENT)
        try:
            (g,) = torch.autograd.grad(total, x, retain_graph=retain_graph, allow_unused=True)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise
            if "checkpoint" in str(error):
                raise ValueError(
                    "model(x) uses reentrant gradient checkpointing, which gives no gradient of inputs alone: "
                    "torch.utils.checkpoint with use_reentrant=False is accepted, or none at all"
                ) from error
            raise RuntimeError(f"the gradient of model(x) failed on x of shape {tuple(x.shape)}: {error}") from error
        if g is None:  # the logits depend on parameters, and on no input
            g = torch.zeros_like(x)
        invalid = ~g.isfinite().flatten(1).all(1)
        if invalid.any():
            self.invalid += int(invalid.sum())
            g = g.masked_fill(invalid.view(-1, *[1] * (g.ndim - 1)), 0)
        self.vanished += int(((g.flatten(1) == 0).all(1) & correct).sum())
        return g


_NO_GRADIENT = (
    "model(x) carries no gradient, and attacks need one: it detaches its input, runs under torch.no_grad or computes "
    "outside torch, as a random forest does, or the attack was called under torch.inference_mode"
)


class _State:
    """The mode and the buffers of one module, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.training = getattr(module, "training", None)  # a frozen script has none
        buffers = dict(module.named_buffers(recurse=False))
        self.buffers = [(name, held, held.clone()) for name, held in buffers.items() if not is_lazy(held)]

    def restore(self) -> None:
        if self.training is not None:
            self.module.training = self.training
        with torch.no_grad():
            for name, held, value in self.buffers:
                if not torch.equal(held, value):
                    held.copy_(value)
                if not isinstance(self.module, torch.jit.ScriptModule) and getattr(self.module, name) is not held:
                    setattr(self.module, name, held)


def awake(model: Model) -> list[str]:
    """The names of the modules in training mode.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout()).eval()
    >>> _ = model[1].train()
    >>> awake(model)
    ['1']
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return [name or type(module).__name__ for name, module in modules if getattr(module, "training", False)]


def normalisers(model: Model) -> list[str]:
    """The names of the modules that normalise by the statistics of the batch.

    Examples
    --------
    >>> normalisers(torch.nn.Sequential(torch.nn.BatchNorm1d(2, track_running_stats=False)).eval())
    ['0']
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return [
        name or type(module).__name__
        for name, module in modules
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]


def named(names: Sequence[object], most: int = 5) -> str:
    """The first few of the names, in brackets; nothing where there are none.

    Examples
    --------
    >>> named(["bn1", "bn2"]), named([])
    (' (bn1, bn2)', '')
    """
    return f" ({', '.join(map(str, names[:most]))}{', ...' if len(names) > most else ''})" if names else ""


def distrust(message: str) -> None:
    """Warn, at the line that called this package, that a result says little about the model.

    Examples
    --------
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     distrust("the model is random")
    >>> caught[0].category.__name__
    'Untrustworthy'
    """
    warn(message, Untrustworthy)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called this package.

    Examples
    --------
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     warn("this takes long")
    >>> str(caught[0].message)
    'this takes long'
    """
    inside = f"{Path(__file__).parent}{os.sep}", contextlib.__file__
    frame, level = inspect.currentframe(), 1
    while frame and frame.f_back and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether this is torch's error or one that has no type of its own: of the CPU's allocator, cuBLAS or cuDNN."""
    signs = ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in signs)


def check_sample(x: Tensor, y: Tensor, box: tuple[float, float] | None) -> Tensor:
    """Check inputs and labels, and return the labels as int64.

    Raises
    ------
    TypeError
        x is not a floating-point tensor, or y not an integer one.
    ValueError
        The sample is empty, shapes do not match, x has NaN or leaves the box, or a label is negative.

    Examples
    --------
    >>> check_sample(torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.int32), (0.0, 1.0))
    tensor([0, 1])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"x: a floating-point tensor (N, ...) is accepted, not {_kind(x)}")
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"y: an integer tensor (N,) of labels is accepted, not {_kind(y)}")
    if x.ndim < 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(f"x of shape {tuple(x.shape)}, y of shape {tuple(y.shape)}: (N, ...) and (N,) are accepted")
    if x.numel() == 0:
        raise ValueError(f"x of shape {tuple(x.shape)}: at least one sample is needed")
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"x has NaN or infinite values, first in sample {bad}")
    if box is not None:
        low, high = x.double().aminmax()
        least, most = bounds(box, x)
        if low < least or high > most:
            if low >= 0 and 2 < high <= 255:
                advice = "these look like bytes: divide by 255, or store them as uint8"
            else:
                advice = (
                    "scale the inputs (normalisation belongs inside the model), take wda.norms.clamp(x, box), "
                    "or give the threat another box"
                )
            raise ValueError(f"x has values in [{low.item()!r}, {high.item()!r}], outside box={box}: {advice}")
    if int(y.min()) < 0:
        raise ValueError(f"y has the label {int(y.min())}: labels from 0 to K-1 are accepted")
    return y.long()


def _kind(value: object) -> str:
    """What an argument is that should have been a tensor of another kind."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    if isinstance(value, np.ndarray):
        return "numpy.ndarray; use torch.from_numpy"
    return type(value).__name__


def check_labels(y: Tensor, classes: int) -> None:
    """Raise a `ValueError` if a label is not below the number of classes.

    Examples
    --------
    >>> check_labels(torch.tensor([0, 2]), 3)
    """
    if int(y.max()) >= classes:
        raise ValueError(
            f"y has the label {int(y.max())}, the model has K={classes} classes: labels from 0 to K-1 are accepted"
        )


class Line:
    """A line that says how far some work is.

    Parameters
    ----------
    shown : bool or None
        True for a line on the standard error that is written over, False for none; None for one on a terminal and,
        elsewhere, a line in the log "wda" every ten seconds.

    Examples
    --------
    >>> Line(False).tell("half done")
    """

    def __init__(self, shown: bool | None) -> None:
        self.here = sys.stderr.isatty() if shown is None else shown
        self.logs = shown is None and not self.here
        self.logged = time.monotonic()

    def tell(self, line: str, bar: str = "", last: bool = False, always: bool = False) -> None:
        """Write it, after a bar where it is written over; `last` ends it, `always` logs it before its time."""
        now = time.monotonic()
        if self.here:
            print(f"\r{bar}{line}   ", end="\n" if last else "", file=sys.stderr, flush=True)
        elif self.logs and (always or now - self.logged >= _SECONDS_BETWEEN_LOG_LINES):
            self.logged = now
            _log.info(line)


def batches(n: int, size: int, label: str, progress: bool | None = None) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `n` rows, with progress shown as they are used up.

    Parameters
    ----------
    n, size : int
    label : str
        What is running, for the bar.
    progress : bool or None
        True for a bar, False for none; None for a bar on a terminal and, elsewhere, a line in the log "wda" every
        ten seconds.

    Examples
    --------
    >>> list(batches(5, 2, "counting", progress=False))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    start, shown = time.monotonic(), Line(progress)
    for first in range(0, n, size):
        done = min(first + size, n)
        yield slice(first, done)
        passed, filled = time.monotonic() - start, 24 * done // n
        line = f"{label}: {done}/{n} samples, {passed:.0f} s, {passed * (n - done) / done:.0f} s left"
        shown.tell(line, bar=f"[{'#' * filled}{'.' * (24 - filled)}] ", last=done == n)
