"""Forward hooks that torch.compile keeps in its graph.

A hook that runs Python would break the graph at every linear, and one that looks at a Python flag
would compile every state of the flag. So a traced hook leaves one operator in the graph,
`bitplan::observe`, which at run time calls whoever observes the module at that moment, or nobody:
skipping costs a dictionary look-up. Without torch.compile the hook makes that call itself.

    token  the operator returns nothing, so it changes a tensor that keeps it from being dropped or
           reordered; that this tensor is on the CPU also keeps graphs with it out of CUDA graphs
    key    names the module to the operator, as a constant of the graph. A module keeps its keys, so
           a graph traced for one observer serves the next

torch.compile does not notice hooks that come after it compiled, so `observe` makes it start over.
"""

import contextlib
import itertools
import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Observer(Protocol):
    """What is told of the inputs of modules."""

    def see(self, index: int, x: Tensor, traced: bool) -> None:
        """Take note of an input of the module `index`; it is only lent."""


class Observation:
    """Hooks on modules, and the keys under which their inputs are delivered."""

    def __init__(self, modules: Sequence[nn.Module], keys: list[int], token: Tensor) -> None:
        self._modules = list(modules)
        self._keys = keys
        self._token = token
        self._handles: list[Any] = []
        self._hook()

    def stop(self) -> None:
        """Remove the hooks; what they left in compiled graphs does nothing from now on."""
        self._unhook()
        for key in self._keys:
            del _OBSERVERS[key]
        self._modules, self._keys = [], []

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Take the hooks off for as long as the block runs."""
        self._unhook()
        try:
            yield
        finally:
            self._hook()

    def _hook(self) -> None:
        self._handles = [
            module.register_forward_pre_hook(partial(_hook, key, self._token), with_kwargs=True)
            for module, key in zip(self._modules, self._keys, strict=True)
        ]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


_AUTOCAST = ("cpu", "cuda", "mps", "xpu")
_OBSERVERS: dict[int, tuple[weakref.ref[Observer], int]] = {}
_KEYS: weakref.WeakKeyDictionary[nn.Module, list[int]] = weakref.WeakKeyDictionary()
_NEW_KEYS = itertools.count()


def observe(
    modules: Sequence[nn.Module], observer: Observer, *, restart: bool = True
) -> Observation:
    """Call `observer.see` with the first argument of every call of the modules, until `stop`.

    restart: let compiled code start over; not where the hooks are `hidden` whenever it runs.
    """
    if restart and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    token = _token()
    keys = []
    for index, module in enumerate(modules):
        key = _free_key(module)
        _OBSERVERS[key] = (weakref.ref(observer), index)
        keys.append(key)
    return Observation(modules, keys, token)


def _hook(
    key: int, token: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))
    if torch.compiler.is_compiling():
        torch.ops.bitplan.observe(as_multiplied(x).detach(), token, key)
    else:
        _deliver(key, x, traced=False)


def as_multiplied(x: Tensor) -> Tensor:
    """Return an input in the dtype that autocast multiplies it in.

    A compiled graph has this tensor anyway, while one of the original would be kept for us alone.
    """
    return x.to(multiplied_dtype(x))


def multiplied_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that autocast, as it is set now, gives to an operand of a product."""
    kind = x.device.type
    # Asking torch whether a device has autocast would break the graph in torch 2.11.
    if x.dtype == torch.float32 and kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _deliver(key: int, x: Tensor, traced: bool) -> None:
    found = _OBSERVERS.get(key)
    observer = found[0]() if found is not None else None
    if found is not None and observer is not None:
        observer.see(found[1], x, traced)


def _free_key(module: nn.Module) -> int:
    keys = _KEYS.setdefault(module, [])
    free = next((key for key in keys if key not in _OBSERVERS), None)
    if free is None:
        free = next(_NEW_KEYS)
        keys.append(free)
    return free


@cache
def _token() -> Tensor:
    """Define the operator, once; return the tensor that it says it changes."""
    library: Any = torch.library.Library("bitplan", "DEF")  # type: ignore[no-untyped-call]
    library.define("observe(Tensor x, Tensor(a!) token, int key) -> ()")
    library.impl(
        "observe",
        lambda x, token, key: _deliver(key, x, traced=True),
        "CompositeExplicitAutograd",
    )
    torch.library.register_fake("bitplan::observe", lambda x, token, key: None, lib=library)
    _token.library = library  # type: ignore[attr-defined]  # the definition goes with the object
    with torch.inference_mode(False):
        return torch.zeros((), device="cpu")
