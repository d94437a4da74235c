"""A module as a graph of torch functions, or a reason why its forward is more than any such graph says.

torch.fx runs a forward once, on a stand-in for the input. What depends on the input there and is seen by Python alone
(a branch, a number taken out of a tensor, a counter, a random draw) leaves no trace in the graph; so it is looked for
here, and refused by name.
"""

from __future__ import annotations

import copy
import itertools
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from wda.errors import NotPiecewiseAffine
from wda.models import Attention

__all__ = ["copied", "draws", "follow", "trace"]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def copied(model: nn.Module, dtype: torch.dtype | None = torch.float64) -> nn.Module:
    """A copy in evaluation mode, without what DataParallel and torch.compile put around modules.

    Parameters
    ----------
    model : nn.Module
    dtype : torch.dtype or None
        Of the copy; None for that of the model.

    Raises
    ------
    NotPiecewiseAffine
        Names a module of which a copy would not say all.

    Examples
    --------
    >>> type(copied(nn.DataParallel(nn.Linear(2, 2)))).__name__
    'Linear'
    """
    check(model)
    try:
        exact = _unwrapped(copy.deepcopy(_unwrapped(model)))
    except Exception as error:  # locks, tensors that carry a graph: whatever a module holds
        raise NotPiecewiseAffine(f"{type(model).__name__}: it cannot be copied: {error}") from error
    for parent in list(exact.modules()):
        parent._compiled_call_impl = None  # what Module.compile() leaves
        for name, child in parent._modules.items():
            parent._modules[name] = None if child is None else _unwrapped(child)
    exact = exact.to(dtype).eval().requires_grad_(False)
    for name, module in exact.named_modules():
        if module.training:
            raise NotPiecewiseAffine(f"{_layer(module, name)}: it stays in training mode after eval()")
    return exact


def check(model: nn.Module) -> None:
    """Refuse what a copy and a trace would not show: hooks, replaced forwards, scripts, tensors of other types."""
    everywhere = nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        raise NotPiecewiseAffine(f"{type(model).__name__}: there are forward hooks on all modules, which are not read")
    for name, module in model.named_modules():
        layer = _layer(module, name)
        if isinstance(module, torch.jit.ScriptModule):
            raise NotPiecewiseAffine(f"{layer} is a ScriptModule, which is not read: give the module it was made from")
        if module._forward_hooks or module._forward_pre_hooks:
            raise NotPiecewiseAffine(f"{layer} has forward hooks (weight_norm leaves one), which are not read")
        if not (_wraps(module) or _runs_as_its_class(module)):
            raise NotPiecewiseAffine(f"{layer} has another forward than its class, which is not read")
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is None:
            raise NotPiecewiseAffine(f"{layer} has no running statistics: it mixes samples")
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(value) not in (Tensor, nn.Parameter):
            raise NotPiecewiseAffine(f"'{name}' of the model is a {type(value).__name__}: plain tensors are read")
        if not value.isfinite().all():
            raise ValueError(f"model: {name} has NaN or infinite values, finite weights are accepted")


def _layer(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__} '{name}'"


def _runs_as_its_class(module: nn.Module) -> bool:
    """Whether calling a module runs the forward that its class was written with."""
    kind = type(module)
    replaced = "forward" in vars(module) or kind.__call__ is not nn.Module.__call__
    return not replaced and (not kind.__module__.startswith("torch.") or kind.forward.__module__.startswith("torch."))


def _wraps(model: nn.Module) -> bool:
    """Whether this is what DataParallel or torch.compile puts around a module."""
    return type(model) in _PARALLEL or type(model).__module__ == "torch._dynamo.eval_frame"


def _unwrapped(model: nn.Module) -> nn.Module:
    while _wraps(model):
        inner = model.module if type(model) in _PARALLEL else model._orig_mod
        assert isinstance(inner, nn.Module)
        model = inner
    return model


class _Proxy(fx.Proxy):
    """A stand-in that is changed in place where a tensor would be; torch.fx makes another value of h += 1."""

    def _changed(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) is Attention or super().is_leaf_module(m, module_qualified_name)


def trace(root: nn.Module) -> fx.Graph:
    """The graph of a forward that draws no random numbers and leaves the module as it was.

    Raises
    ------
    NotPiecewiseAffine
        It cannot be traced, or does one of the two.

    Examples
    --------
    >>> [step.op for step in trace(nn.Sequential(nn.ReLU())).nodes]
    ['placeholder', 'call_module', 'output']
    """
    name = type(root[0] if isinstance(root, nn.Sequential) and len(root) else root).__name__
    try:
        graph: fx.Graph = _undisturbed(root, lambda: _Tracer().trace(root))
        return graph
    except NotPiecewiseAffine:
        raise
    except Exception as error:
        raise NotPiecewiseAffine(f"{name}: its forward cannot be traced by torch.fx: {error}") from error


def follow(root: nn.Module, graph: fx.Graph, batches: Iterable[Tensor]) -> None:
    """Refuse a forward that applies other functions, or other constants, to what depends on the input than its graph.

    It is run twice on each batch, as attacks run it for gradients and as it is run without.

    Examples
    --------
    >>> root = nn.Sequential(nn.ReLU())
    >>> follow(root, trace(root), [torch.zeros(1, 2)])
    """
    plan = fx.Interpreter(fx.GraphModule(root, graph))
    for x in batches:
        planned = _applied(root, plan.run, x, gradients=False)
        for gradients in (False, True):
            calls = _applied(root, root, x, gradients)
            if calls != planned:
                seen = next((a or b)[0] for a, b in itertools.zip_longest(calls, planned) if a != b)
                name = type(root[0]).__name__  # type: ignore[index]
                raise NotPiecewiseAffine(f"{name}: its forward does more than torch.fx sees, first at {seen}")


def _applied(root: nn.Module, run: Callable[[Tensor], Any], x: Tensor, gradients: bool) -> list[tuple[Any, ...]]:
    """The functions that a run applies to what depends on its input, and their other arguments."""
    point = x.clone()
    with torch.set_grad_enabled(gradients), _Recorder(point) as recorder:
        _undisturbed(root, partial(run, point))
    calls: list[tuple[Any, ...]] = recorder.calls
    return calls


class _Recorder(TorchFunctionMode):
    """Notes each torch function that is applied to something that depends on the input, and its other arguments."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.held = {id(x): x}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dependent = any(id(value) in self.held for value in _tensors((args, kwargs)))
        given = _plain((args, kwargs or {}), self.held) if dependent else None  # before the function may change it
        result = func(*args, **(kwargs or {}))
        if dependent:
            of = getattr(getattr(func, "__self__", None), "__name__", "")
            self.calls.append((f"{of}.{func.__name__}" if of else func.__name__, given))
            self.held.update((id(value), value) for value in _tensors(result))
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _plain(value: Any, held: Mapping[int, Tensor], depth: int = 6) -> Any:
    """Something that is equal where the value is the same: of tensors those held count as one, others by content."""
    if isinstance(value, Tensor):
        if id(value) in held:
            return "held"
        if isinstance(value, nn.Parameter):
            return id(value)
        return tuple(value.shape), str(value.dtype), value.detach().cpu().contiguous().view(-1).tolist()
    if isinstance(value, dict):
        return "dict", tuple((str(key), _plain(item, held, depth - 1)) for key, item in value.items())
    if isinstance(value, list | tuple | set) and depth:
        return "sequence", tuple(_plain(item, held, depth - 1) for item in value)
    if isinstance(value, SimpleNamespace) and depth:
        return "names", _plain(vars(value), held, depth - 1)
    return value if isinstance(value, bool | int | float | complex | str | None) else type(value).__name__


def _undisturbed(root: nn.Module, run: Callable[[], Any]) -> Any:
    """What `run` gives, if it draws no random numbers and leaves the module as it was."""
    state, before = _state(root), draws()
    result = run()
    if draws() != before:
        raise NotPiecewiseAffine(f"{type(root[0]).__name__}: its forward draws random numbers")  # type: ignore[index]
    for name, value in _state(root).items():
        if state.get(name) != value:
            raise NotPiecewiseAffine(f"{type(root[0]).__name__}: its forward changes '{name[2:]}'")  # type: ignore[index]
    return result


def _state(root: nn.Module) -> dict[str, Any]:
    """All weights by identity and version, and what modules keep beside them: plain values, and what lists hold."""
    state: dict[str, Any] = {}
    for prefix, module in root.named_modules():
        kept: Iterable[tuple[str, Any]] = vars(module).items()
        for name, value in itertools.chain(kept, module._parameters.items(), module._buffers.items()):
            at = f"{prefix}.{name}" if prefix else f"0.{name}"
            if name.startswith("_tensor_constant"):  # where torch.fx keeps tensors that a forward makes
                continue
            if isinstance(value, Tensor):
                state[at] = (id(value), value._version) if name not in vars(module) else value._version
            elif isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
                raise NotPiecewiseAffine(f"{type(module).__name__}: '{name}' draws random numbers")
            elif name not in _OWN:
                state[at] = _plain(value, {})
    return state


# what torch itself keeps in a module
_OWN = frozenset(vars(nn.Module()))


def draws() -> tuple[Any, ...]:
    """The states of the global random generators of torch, numpy and Python.

    Examples
    --------
    >>> before = draws()
    >>> _ = torch.rand(1)
    >>> draws() == before
    False
    """
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return (
        *(state.numpy().tobytes() for state in states),
        random.getstate(),
        numpy["state"]["key"].tobytes(),
        numpy["state"]["pos"],
        numpy["has_gauss"],
    )
