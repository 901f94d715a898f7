"""A model in parts: its blocks, and what stands before and after them, in memory one at a time.

The model is built without weights, and every parameter becomes a single zero spread over its shape:
it can run, and takes no memory. `mounted` reads the weights of some parts from the checkpoint, as
transformers reads and converts them, and gives them back at the end of its block.

No model's forward is written again here. Its own runs with the blocks' forwards replaced:

    enter       up to the last block: the hidden states that the first block is handed, and for
                each block whatever else it is (masks, positions, rotations; each layer its own)
    run_block   one block on hidden states
    leave       from the hidden states after the last block to the output

That is right where a block is handed tensors that depend on the text's length and ids alone, takes
hidden states and returns them, and nothing after the blocks looks back. A first pass over zeros
asks autograd whether this is so; a model that is made otherwise is refused.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.modules import outside_text

# Reads a model from its checkpoint; the parts that go to `meta` without their weights.
Read = Callable[[Mapping[str, str]], Any]

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
_RUN_ERRORS = (TypeError, AttributeError, ValueError, KeyError, IndexError, RuntimeError)
_POOLED = 4  # tensors of one shape that are looked through for an equal one
_FEW = 8  # tokens of the pass over zeros


@dataclass(frozen=True)
class Call:
    """What a block is handed besides its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Arrived(Exception):
    """The hidden states have passed all blocks: what comes after them is not wanted."""


class PartedModel:
    """A model whose weights are in memory only while their part is mounted.

    `blocks` are module names in the order they run; `front` and `tail` the modules with weights
    that run before and after them; `idle` those that text alone does not run. `hidden_size` is the
    length of a hidden state. Raises CheckpointError where it cannot be run block by block.
    """

    def __init__(self, read: Read, source: str, device: torch.device) -> None:
        self._read = read
        self._source = source
        self.device = device
        self.hidden_size = 0
        model = read({"": "meta"})
        self.blocks = _find_blocks(model, source)
        self._outside = [
            name
            for name, module in model.named_modules()
            if (module._parameters or module._buffers)
            and not any(name == block or name.startswith(f"{block}.") for block in self.blocks)
        ]
        self._ties = _ties(
            {name: _parameters(model.get_submodule(name)) for name in self._outside}
            | {name: list(model.get_submodule(name).parameters()) for name in self.blocks}
        )
        light = [name for name in self._outside if not _parameters(model.get_submodule(name))]
        self.model = read(self._devices(light))
        unfuse_experts(self.model)
        _hollow(self.model, device)
        self._forwards = [self.model.get_submodule(name).forward for name in self.blocks]
        self._rests: dict[type, tuple[None, ...] | None] = {}
        self._pool: dict[Any, list[Tensor]] = {}
        self.front, self.tail, self.idle = self._explore()

    # --- weights ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def mounted(self, names: Sequence[str]) -> Iterator[None]:
        """Hold the weights of these parts in memory for the block, in float32 on the device.

        Raises CheckpointError where a weight is NaN or infinite.
        """
        saved = self._mount(names)
        try:
            yield
        finally:
            for tensors, before in reversed(saved):
                tensors.update(before)

    def _mount(self, names: Sequence[str]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Put real weights into the model; return the dictionaries changed, and what they held."""
        real = self._read(self._devices(names))
        found: list[tuple[str, nn.Module]] = []
        for name in names:
            part = real.get_submodule(name)
            if name in self.blocks:
                unfuse_experts(part)
                found += [(f"{name}.{path}".rstrip("."), m) for path, m in part.named_modules()]
            else:
                found.append((name, part))
        for path, module in found:
            module.requires_grad_(False)
            _check_finite(module, path, self._source)
        saved = []
        for path, module in found:
            place = self.model.get_submodule(path)
            for kind in ("_parameters", "_buffers"):
                tensors = getattr(place, kind)
                saved.append((tensors, dict(tensors)))
                tensors.update(getattr(module, kind))
        # Modules refer to each other in circles: the rest of this model would stay for a while.
        for module in real.modules():
            module._parameters.clear()
        return saved

    def _devices(self, names: Iterable[str]) -> dict[str, str]:
        """Return where every part goes: these, and what shares weights with them, to the device."""
        wanted = {tied for name in names for tied in self._ties.get(name, (name,))}
        # transformers reads names as prefixes: all parts are named, so that none stands for others.
        device = str(self.device)
        parts = [*self.blocks, *self._outside]
        return {"": "meta"} | {name: device if name in wanted else "meta" for name in parts}

    # --- runs ------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Return what the first block is handed for ids [sequences, tokens], and all blocks' calls.

        `front` must be mounted.
        """
        calls: list[Call] = []
        first: list[Tensor] = []

        def stub(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                first.append(hidden)
            calls.append(Call(*self._pooled((args, kwargs))))
            if index == len(self.blocks) - 1:
                raise _Arrived
            return self._packed(index, hidden)

        with self._stubbed(stub), contextlib.suppress(_Arrived):
            self._run(ids)
        return first[0], calls

    def run_block(self, index: int, hidden: Tensor, call: Call) -> Tensor:
        """Return the hidden states after a block, which must be mounted."""
        block = self.model.get_submodule(self.blocks[index])
        output = block(hidden, *call.args, **call.kwargs)
        found: Tensor = output if isinstance(output, Tensor) else output[0]
        return found

    def leave(self, ids: Tensor, hidden: Tensor) -> Any:
        """Return the model's output from the hidden states after the last block.

        `tail` must be mounted.
        """

        def stub(index: int, passing: Tensor, *_: Any, **__: Any) -> Any:
            return self._packed(index, hidden if index == len(self.blocks) - 1 else passing)

        with self._stubbed(stub):
            return self._run(ids)

    def _run(self, ids: Tensor) -> Any:
        cached = hasattr(self.model.config.get_text_config(), "use_cache")
        return self.model(input_ids=ids, **({"use_cache": False} if cached else {}))

    @contextlib.contextmanager
    def _stubbed(self, stub: Callable[..., Any]) -> Iterator[None]:
        """Replace what blocks do by `stub(index, hidden, *args, **kwargs)`."""
        blocks = [self.model.get_submodule(name) for name in self.blocks]

        def bound(index: int) -> Callable[..., Any]:
            return lambda *args, **kwargs: stub(index, *args, **kwargs)

        try:
            for index, block in enumerate(blocks):
                block.__dict__["forward"] = bound(index)
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _packed(self, index: int, hidden: Tensor) -> Any:
        """Return hidden states in the form in which such a block returns them."""
        rest = self._rests[type(self.model.get_submodule(self.blocks[index]))]
        return hidden if rest is None else (hidden, *rest)

    def _pooled(self, value: Any) -> Any:
        """Return the value with each tensor replaced by an equal one of an earlier call, if any."""
        if isinstance(value, tuple):
            return tuple(self._pooled(part) for part in value)
        if isinstance(value, dict):
            return {name: self._pooled(part) for name, part in value.items()}
        if not isinstance(value, Tensor):
            return value
        pool = self._pool.setdefault((value.shape, value.dtype), [])
        for known in pool[-_POOLED:]:
            if known is value or torch.equal(known, value):
                return known
        pool.append(value)
        return value

    # --- the pass over zeros ---------------------------------------------------------------

    def _explore(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return which outside parts run before the blocks, after them and never; refuse misfits.

        What depends on embeddings or blocks requires a gradient here; what may be kept must not.
        """
        heavy = [n for n in self._outside if _parameters(self.model.get_submodule(n))]
        blocks_above = {n for n in heavy if any(block.startswith(f"{n}.") for block in self.blocks)}
        front, tail = dict.fromkeys(blocks_above), dict.fromkeys(blocks_above)
        passed = 0

        def ran(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                if 0 < passed < len(self.blocks) and name not in blocks_above:
                    raise self._refusal(f"{name} runs between its blocks")
                (tail if passed else front)[name] = None
                if not passed and isinstance(output, Tensor) and output.is_floating_point():
                    output.requires_grad_(True)

            return hook

        def stub(index: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal passed
            if index != passed:
                raise self._refusal("its blocks do not run once each, one after the other")
            passed += 1
            if not (args and isinstance(args[0], Tensor)):
                raise self._refusal("its blocks are not handed hidden states first")
            for value in (*args[1:], *kwargs.values()):
                self._check_kept(value)
            hidden = args[0].detach()
            if hidden.shape[:-1] != ids.shape:
                raise self._refusal(f"its blocks are handed a {tuple(hidden.shape)} tensor first")
            self.hidden_size = hidden.shape[-1]
            block = self.model.get_submodule(self.blocks[index])
            if type(block) not in self._rests:
                with torch.no_grad():
                    found = self._forwards[index](hidden, *args[1:], **kwargs)
                self._rests[type(block)] = self._rest(found)
            is_last = passed == len(self.blocks)
            return self._packed(index, torch.zeros_like(hidden, requires_grad=not is_last))

        ids = torch.zeros(1, _FEW, dtype=torch.long, device=self.device)
        modules = [(name, self.model.get_submodule(name)) for name in heavy]
        handles = [module.register_forward_hook(ran(name)) for name, module in modules]
        try:
            with self._stubbed(stub), torch.enable_grad():
                output = self._run(ids)
        except CheckpointError:
            raise
        except _RUN_ERRORS as error:
            raise self._refusal(f"{type(error).__name__} in a pass over zeros") from error
        finally:
            for handle in handles:
                handle.remove()
        if passed < len(self.blocks):
            raise self._refusal(f"it runs {passed} of its {len(self.blocks)} blocks")
        if output[0].requires_grad:
            raise self._refusal("what comes after its blocks looks back before the last of them")
        return tuple(front), tuple(tail), tuple(n for n in heavy if n not in {*front, *tail})

    def _rest(self, output: Any) -> tuple[None, ...] | None:
        if isinstance(output, Tensor):
            return None
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (None,) * (len(output) - 1)
        raise self._refusal(f"its blocks return a {type(output).__name__}")

    def _check_kept(self, value: Any) -> None:
        if isinstance(value, tuple):
            for part in value:
                self._check_kept(part)
        elif isinstance(value, Tensor):
            if value.requires_grad:
                raise self._refusal("its blocks are handed more than one tensor that depends on it")
        elif not isinstance(value, _PLAIN):
            raise self._refusal(f"its blocks are handed a {type(value).__name__}")

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._source}: {type(self.model).__name__} cannot be run block by block ({reason}): "
            "profile it whole with --no-stream where it fits in memory, or --weights-only"
        )


def _find_blocks(model: Any, source: str) -> tuple[str, ...]:
    """Return the names of the text model's blocks: the outermost list of as many modules."""
    text = model.config.get_text_config()
    outside = outside_text(model, text) if text is not model.config else set()
    count = getattr(text, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and module not in outside:
            return tuple(f"{name}.{index}" for index in range(len(module)))
    raise CheckpointError(
        f"{source}: {type(model).__name__} has no list of {count} blocks that could be run one by "
        "one: profile it whole with --no-stream where it fits in memory, or --weights-only"
    )


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that a module holds itself."""
    return [p for p in module._parameters.values() if p is not None]


def _ties(parts: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, set[str]]:
    """Return for each part the parts that share a parameter with it, and itself."""
    holders: dict[int, set[str]] = {}
    for name, parameters in parts.items():
        for parameter in parameters:
            holders.setdefault(id(parameter), set()).add(name)
    return {
        name: {name}.union(*(holders[id(p)] for p in parameters))
        for name, parameters in parts.items()
    }


def _hollow(model: nn.Module, device: torch.device) -> None:
    """Spread one zero over the shape of every tensor without a value; shared ones stay shared."""
    known: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in known:
                    zeros = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    # A parameter without a gradient costs one element, whatever its shape.
                    known[id(tensor)] = (
                        nn.Parameter(zeros, requires_grad=False) if is_parameter else zeros
                    )
                    known[-id(tensor)] = tensor  # kept, so that its id is not used again
                tensors[name] = known[id(tensor)]


def _check_finite(module: nn.Module, name: str, source: str) -> None:
    for leaf, parameter in module.named_parameters(recurse=False):
        # Without a mask of the tensor's size: both are NaN where any element is.
        low, high = parameter.detach().flatten().aminmax()
        if not torch.isfinite(high - low):
            bad = int((~torch.isfinite(parameter)).sum())
            raise CheckpointError(
                f"{source}: {name}.{leaf} has {bad} of {parameter.numel()} weights NaN or "
                "infinite: the checkpoint is damaged or its training diverged"
            )
