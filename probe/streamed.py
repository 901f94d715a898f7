"""A profile of a model that is larger than memory: a block at a time, forward and then backward.

The same statistics and the same estimate as those of the whole model, over the same batches:

    front          embeddings; what each block is handed besides hidden states is kept (blocks.py)
    blocks         each is read, run over all tokens, its tables made, and let go
    tail           final norm and head, with the loss and its gradient
    blocks again   from the last to the first, where sensitivity is asked for: forward from the
                   stored hidden states, backward from the gradient of what it returned

Hidden states and gradients between blocks lie on disk, in the run directory. Memory holds the
weights of one part in float32 (a block; embeddings; head) while its mapped files are read, the
activations of one batch of it, within the bound of inputs.py, and the streaming statistics of its
linears. Every part that is finished is kept (partial.py), so that a profile that was killed goes on
from the part that it was in.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.findings import MASSIVE
from bitplan.formats import Format
from bitplan.probe.blocks import Call, PartedModel
from bitplan.probe.inputs import Inputs, InputWatcher, batch_size, finite_loss, repeated_note
from bitplan.probe.modules import LinearModule
from bitplan.probe.outliers import unread_note
from bitplan.probe.partial import Partial
from bitplan.probe.sensitivity import ROLES, GradientSensitivity, summed_loss
from bitplan.probe.tabulate import Row, Tables
from bitplan.probe.trace import Watcher
from bitplan.progress import track

# Makes the rows of some linears, whose weights are in memory.
Tabulate = Callable[[Sequence[LinearModule], Inputs], Tables]


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """The rows of all tables, in the order of the linears, and what the user should know."""

    tables: Tables
    sensitivity: list[Row] | None
    notes: tuple[str, ...]


def profile_blocks(
    parted: PartedModel,
    items: Sequence[LinearModule],
    ids: Tensor,
    formats: Sequence[Format],
    tabulate: Tabulate,
    partial: Partial,
    *,
    has_loss: bool,
    sensitivity: bool,
) -> Streamed:
    """Run token ids [sequences, tokens] through a model part by part and measure its linears.

    Raises CheckpointError where the loss or a weight is not finite, or where sensitivity needs a
    gradient that ends before the blocks; RunError where the disk cannot hold the hidden states.
    """
    run = _Run(parted, items, ids, formats, tabulate, partial, has_loss, sensitivity and has_loss)
    finished = sum(name in partial for name in run.parts())
    calls = run.front()
    run.idle()
    blocks = range(len(parted.blocks))
    for index in track(blocks, "profiling blocks"):
        run.forward(index, calls)
    run.tail()
    if run.has_gradient:
        for index in track(blocks[::-1], "sensitivity of blocks"):
            run.backward(index, calls)
    tables = [partial.load(name) for name in run.parts()]

    def all_of(key: str) -> list[Any]:
        return [value for table in tables for value in table[key]]

    notes = [*repeated_note(all_of("repeated")), *unread_note(sorted(all_of("unread")))]
    if finished:
        notes.append(f"an interrupted profile was continued: {finished} of its parts were done")
    place = {item.linear.module: index for index, item in enumerate(items)}

    def rows(key: str) -> list[Row]:
        return sorted(all_of(key), key=lambda row: place[row["site"].rpartition(":")[0]])

    return Streamed(
        tables=Tables(
            rows=rows("rows"),
            errors=rows("errors"),
            outliers=sorted(all_of("outliers"), key=lambda row: row["kind"] != MASSIVE),
        ),
        sensitivity=rows("sensitivity") if run.has_gradient else None,
        notes=tuple(notes),
    )


class _Run:
    """One profile: its parts, each of which does its work unless it is finished."""

    def __init__(
        self,
        parted: PartedModel,
        items: Sequence[LinearModule],
        ids: Tensor,
        formats: Sequence[Format],
        tabulate: Tabulate,
        partial: Partial,
        has_loss: bool,
        has_gradient: bool,
    ) -> None:
        self._parted = parted
        self._ids = ids
        self._formats = tuple(formats)
        self._tabulate = tabulate
        self._partial = partial
        self._has_loss = has_loss
        self.has_gradient = has_gradient
        self._device = parted.device
        self._size = batch_size(items, ids.shape[1], self._device)
        self._items: dict[str, list[LinearModule]] = {}
        for item in items:
            name = item.linear.module
            inside = (block for block in parted.blocks if name.startswith(f"{block}."))
            self._items.setdefault(next(inside, name), []).append(item)
        early = [item for item in self._of(parted.front) if item.linear.role in ROLES]
        if has_gradient and early:
            raise CheckpointError(
                f"{early[0].linear.module} runs before the blocks, where no gradient reaches block "
                "by block: pass --no-sensitivity, or --no-stream where the model fits in memory"
            )
        states = ids.numel() * parted.hidden_size * 4
        estimate = self._estimate()
        kept = 2 if estimate is None else len(parted.blocks) + 1 + 2 * estimate.passes
        partial.require(states * kept)

    def parts(self) -> list[str]:
        """Return the names under which the parts' tables are kept, in the order they are made."""
        indices = range(len(self._parted.blocks))
        forward = [f"forward-{index:04}" for index in indices]
        backward = [f"backward-{index:04}" for index in indices[::-1]] * self.has_gradient
        idle = [f"idle-{index:04}" for index in range(len(self._parted.idle))]
        return ["front", *idle, *forward, "tail", *backward]

    def front(self) -> list[list[Call]]:
        """Run what comes before the blocks; return the calls of all blocks, by batch."""
        calls: list[list[Call]] = []
        items = self._of(self._parted.front)
        watcher = self._watcher(items)

        def states() -> Iterator[Tensor]:
            for batch, _ in self._batches(watcher, hooks):
                hidden, called = self._parted.enter(batch)
                calls.append(called)
                yield hidden

        with self._parted.mounted(self._parted.front), _hooked(items, watcher) as hooks:
            if "front" in self._partial:  # its calls are not kept, and are cheap
                for _ in states():
                    pass
            else:
                self._partial.save_states(_hidden(0), states())
                self._save("front", items, watcher, hooks)
        return calls

    def idle(self) -> None:
        """Measure the weights of what text alone does not run."""
        for index, part in enumerate(self._parted.idle):
            if (name := f"idle-{index:04}") not in self._partial:
                items = self._of([part])
                with self._parted.mounted([part]):
                    self._save(name, items, self._watcher(items), _Hooks())

    def forward(self, index: int, calls: list[list[Call]]) -> None:
        """Run a block over all tokens and measure its linears."""
        name, part = f"forward-{index:04}", self._parted.blocks[index]
        if name in self._partial:
            return
        items = self._of([part])
        watcher = self._watcher(items)

        def states() -> Iterator[Tensor]:
            for number, (batch, first) in enumerate(self._batches(watcher, hooks)):
                hidden = self._states(_hidden(index), first, batch)
                # As in the whole model: torch has other kernels where no gradient is wanted.
                with torch.set_grad_enabled(self.has_gradient):
                    hidden.requires_grad_(self.has_gradient)
                    output = self._parted.run_block(index, hidden, calls[number][index])
                yield output.detach()

        with (
            self._parted.mounted([part]),
            _hooked(items, watcher) as hooks,
            watcher.outliers.hooked(self._parted.model),
        ):
            self._partial.save_states(_hidden(index + 1), states())
            self._save(name, items, watcher, hooks)
        if not self.has_gradient:
            self._partial.drop_states(_hidden(index))

    def tail(self) -> None:
        """Run what comes after the blocks: norm, head and loss, and the gradient of the loss."""
        if "tail" in self._partial:
            return
        last = len(self._parted.blocks)
        items = self._of([part for part in self._parted.tail if part not in self._parted.front])
        estimate = self._estimate()
        watcher = self._watcher(items, estimate)
        loss = torch.zeros((), dtype=torch.float64, device=self._device)

        def gradients() -> Iterator[Tensor]:
            for batch, first in self._batches(watcher, hooks):
                hidden = self._states(_hidden(last), first, batch)
                with torch.set_grad_enabled(self.has_gradient):
                    output = self._parted.leave(batch, hidden.requires_grad_(self.has_gradient))
                if estimate is not None:
                    found: list[Tensor] = []
                    for passed in estimate.losses(output.logits, batch, first):
                        loss.add_(passed.detach() * (not found))
                        found.append(_gradient_of(hidden, passed, None))
                    yield torch.stack(found, dim=1)
                elif self._has_loss:
                    loss.add_(summed_loss(output.logits, batch))

        with self._parted.mounted(self._parted.tail), _hooked(items, watcher) as hooks:
            if self.has_gradient:
                self._partial.save_states(_gradient(last), gradients())
            else:
                for _ in gradients():
                    pass
            if self._has_loss:
                finite_loss(loss.item())
            self._save("tail", items, watcher, hooks, estimate)
        if not self.has_gradient:
            self._partial.drop_states(_hidden(last))

    def backward(self, index: int, calls: list[list[Call]]) -> None:
        """Run a block again, and backward from the gradient of what it returned."""
        name, part = f"backward-{index:04}", self._parted.blocks[index]
        if name in self._partial:
            return
        items = self._of([part])
        estimate = self._estimate()
        assert estimate is not None
        watcher = self._watcher(items, estimate, measures=False)

        def gradients() -> Iterator[Tensor]:
            for number, (batch, first) in enumerate(self._batches(watcher, hooks)):
                hidden = self._states(_hidden(index), first, batch).requires_grad_(True)
                with torch.enable_grad():
                    output = self._parted.run_block(index, hidden, calls[number][index])
                after = self._states(_gradient(index + 1), first, batch, estimate.passes)
                found = []
                for number, gradient in enumerate(after.unbind(1)):
                    estimate.start(number)
                    found.append(_gradient_of(hidden, output, gradient))
                yield torch.stack(found, dim=1)

        with self._parted.mounted([part]), _hooked(items, watcher) as hooks:
            self._partial.save_states(_gradient(index), gradients())
            self._partial.save(name, _NOTHING | {"sensitivity": _rows_of(estimate, items)})
        self._partial.drop_states(_hidden(index + 1), _gradient(index + 1))

    # --- what the parts share --------------------------------------------------------------

    def _of(self, parts: Iterable[str]) -> list[LinearModule]:
        return [item for part in parts for item in self._items.get(part, ())]

    def _estimate(self) -> GradientSensitivity | None:
        if not self.has_gradient:
            return None
        sequences, seq_len = self._ids.shape
        return GradientSensitivity(
            self._formats, sequences=sequences, seq_len=seq_len, device=self._device
        )

    def _watcher(
        self,
        items: Sequence[LinearModule],
        estimate: GradientSensitivity | None = None,
        *,
        measures: bool = True,
    ) -> InputWatcher:
        return InputWatcher(self._parted.model, items, self._formats, estimate, measures=measures)

    def _batches(self, watcher: InputWatcher, hooks: "_Hooks") -> Iterator[tuple[Tensor, int]]:
        """Yield each batch of ids with the number of its first sequence."""
        for first in range(0, len(self._ids), self._size):
            batch = self._ids[first : first + self._size].to(self._device)
            watcher.begin(batch, first)
            hooks.seen.clear()
            yield batch, first
            watcher.end()

    def _states(self, name: str, first: int, batch: Tensor, passes: int = 0) -> Tensor:
        """Read what belongs to a batch: [sequences, tokens, hidden], or with passes second."""
        sequences, tokens = batch.shape
        shape = (sequences, *[passes] * (passes > 0), tokens, self._parted.hidden_size)
        return self._partial.load_states(name, first, shape).to(self._device)

    def _save(
        self,
        name: str,
        items: Sequence[LinearModule],
        watcher: InputWatcher,
        hooks: "_Hooks",
        estimate: GradientSensitivity | None = None,
    ) -> None:
        stats = {module: found for module, found in watcher.stats.items() if found.rows}
        inputs = Inputs(
            stats=stats, outliers=watcher.outliers, sensitivity=None, loss=None, notes=()
        )
        found = {
            "sensitivity": _rows_of(estimate, items),
            "repeated": list(hooks.repeated),
            "unread": watcher.outliers.unread,
        }
        self._partial.save(name, _NOTHING | asdict(self._tabulate(items, inputs)) | found)


_NOTHING: dict[str, list[Any]] = {
    key: [] for key in ("rows", "errors", "outliers", "sensitivity", "repeated", "unread")
}


def _gradient_of(hidden: Tensor, output: Tensor, gradient: Tensor | None) -> Tensor:
    """Return the gradient of hidden states through an output, which may be used again."""
    hidden.grad = None
    torch.autograd.backward(output, gradient, retain_graph=True)
    found = hidden.grad
    assert found is not None
    return found


def _rows_of(
    estimate: GradientSensitivity | None, items: Sequence[LinearModule]
) -> list[dict[str, Any]]:
    return [] if estimate is None else list(estimate.rows(items))


def _hidden(index: int) -> str:
    """Name the hidden states that block `index` is handed, or after the last one the tail."""
    return f"hidden-{index:04}"


def _gradient(index: int) -> str:
    """Name the gradient of those hidden states."""
    return f"gradient-{index:04}"


@dataclass
class _Hooks:
    """The linears that ran in this pass, the one that runs, and those that ran again."""

    seen: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    repeated: dict[str, None] = field(default_factory=dict)


@contextlib.contextmanager
def _hooked(items: Sequence[LinearModule], watcher: Watcher) -> Iterator[_Hooks]:
    """Show a watcher the linears' inputs and outputs, in each pass those of the first call."""
    hooks = _Hooks()

    def before(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if name in hooks.seen:
                hooks.repeated[name] = None
                return None
            hooks.seen.add(name)
            hooks.running.add(name)
            x, *rest = args or kwargs.values()
            if (view := watcher.on_input(name, x)) is None:
                return None
            values = (view, *rest)
            return (values, kwargs) if args else ((), dict(zip(kwargs, values, strict=True)))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if name in hooks.running:
                hooks.running.remove(name)
                watcher.on_output(name, output)

        return hook

    handles = []
    for item in items:
        name = item.linear.module
        handles.append(item.module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(item.module.register_forward_hook(after(name)))
    try:
        yield hooks
    finally:
        for handle in handles:
            handle.remove()
