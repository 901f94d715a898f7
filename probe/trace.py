"""Forward passes under nnsight: every watched linear's input and output, as they are computed.

The one module that imports nnsight. A `Tracer` wraps a model for a `with` block and leaves it as it
was: nnsight's controllers come off again, so that the model can be exported and pickled. Reads in a
trace must follow the order of execution, which one pass with plain hooks finds out.

`run` shows tensors to a watcher in this process. `edit` is written so that nnsight could run its
block elsewhere: it uses envoys and values, what it makes is created and saved inside it, and only
a summary comes back. Tested: the block ships and runs under `remote="local"`, nnsight's dry run.
Not tested: a server.
"""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Watcher(Protocol):
    """What a trace calls, in the order of execution."""

    def on_input(self, name: str, x: Tensor) -> Tensor | None:
        """See a module's input; return a tensor to put in its place, or None."""

    def on_output(self, name: str, y: Tensor) -> None:
        """See a module's output."""


class Edit(Protocol):
    """What a trace puts in place of a linear's input and output. Holds no state, no module."""

    def on_input(self, parent: nn.Module, x: Tensor) -> Tensor:
        """Return what the linear, a child of `parent`, must read in place of `x`."""

    def on_output(self, module: nn.Module, parent: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return what must follow in place of `y`, which the linear `module` computed from `x`."""


# From the head's input and its logits to what is kept of a pass.
Summary = Callable[[Tensor, Tensor], Tensor]


class Tracer:
    """Runs a model while a watcher sees the inputs and outputs of its named modules.

    `repeated` holds the modules that run more than once in a pass: only their first call is seen.
    """

    def __init__(self, wrapped: Any, names: list[str], *, every_pass: bool) -> None:
        self._wrapped = wrapped
        self._names = names
        self._every_pass = every_pass
        # By path, which a submodule called `output` keeps where nnsight renames its attribute.
        self._envoys = {
            path.removeprefix("model."): envoy for path, envoy in wrapped.named_modules()
        }
        self._order: list[str] | None = None
        self.repeated: tuple[str, ...] = ()

    def run(self, ids: Tensor, watcher: Watcher) -> Any:
        """Run token ids [sequences, tokens] through the model and return its output."""
        from nnsight import save

        envoys = [(name, self._envoys[name]) for name in self.order(ids)]
        with self._wrapped.trace(input_ids=ids, **_no_cache(self._wrapped._module)):
            for name, envoy in envoys:
                replacement = watcher.on_input(name, envoy.input)
                if replacement is not None:
                    envoy.input = replacement
                watcher.on_output(name, envoy.output)
            output = save(self._wrapped.output)
        return output

    def edit(self, ids: Tensor, edits: Mapping[str, Edit], summarize: Summary) -> Tensor:
        """Run token ids [sequences, tokens] with linears edited; return the pass's summary.

        The last linear to run must be the head: `summarize` sees its input as the model makes it.
        """
        from nnsight import save

        wrapped, options = self._wrapped, _no_cache(self._wrapped._module)
        steps = [
            (self._envoys[name], self._envoys.get(name.rpartition(".")[0], wrapped), edits[name])
            for name in self.order(ids)
            if name in edits
        ]
        with wrapped.trace(input_ids=ids, **options):
            for envoy, parent, edit in steps:
                hidden = envoy.input
                x = edit.on_input(parent._module, hidden)
                envoy.input = x
                envoy.output = edit.on_output(envoy._module, parent._module, x, envoy.output)
            summary: Tensor = save(summarize(hidden, wrapped.output.logits))
        return summary

    def order(self, ids: Tensor) -> list[str]:
        """Return the named modules that run on these ids, in the order of execution."""
        if self._order is None or self._every_pass:
            self._order, self.repeated = execution_order(self._wrapped._module, self._names, ids)
        return self._order


def _no_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


@contextlib.contextmanager
def traced(model: nn.Module, names: list[str], *, every_pass: bool = False) -> Iterator[Tracer]:
    """Wrap a model for the block. `every_pass`: which modules run depends on the tokens."""
    with _plain_argv():
        import nnsight
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Module .* has a submodule named", UserWarning)
            tracer = Tracer(nnsight.NNsight(model), names, every_pass=every_pass)
        yield tracer
    finally:
        _unwrap(model)


@contextlib.contextmanager
def _plain_argv() -> Iterator[None]:
    """Hide the command line: nnsight takes -v and -d in it for its own when it is imported."""
    argv = sys.argv
    sys.argv = argv[:1]
    try:
        yield
    finally:
        sys.argv = argv


def _unwrap(model: nn.Module) -> None:
    from nnsight.intervention.source import STATE, Controller

    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), Controller):
            del module.__dict__["forward"]
        module.__dict__.pop(STATE, None)


@torch.no_grad()
def execution_order(
    model: nn.Module, names: list[str], ids: Tensor
) -> tuple[list[str], tuple[str, ...]]:
    """Return the named modules in the order of their first calls, and those called again.

    ids: [sequences, tokens]; modules that are not called are in neither.
    """
    calls: Counter[str] = Counter()

    def counter(name: str) -> Callable[..., None]:
        return lambda *_: calls.update((name,))

    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(counter(name)) for name in names]
    try:
        model(input_ids=ids, **_no_cache(model))
    finally:
        for handle in handles:
            handle.remove()
    return list(calls), tuple(name for name, count in calls.items() if count > 1)
