"""Forward, backward and clipping of one batch; on a GPU replayed as a CUDA graph.

A training step of a small model is some thousand launches, and launching them takes longer than
running them. So the first steps of an arm run as they are written, the next one is captured, and
the ones after that replay it: the same kernels on the same numbers. With `compiled` the blocks of
the model are compiled for the capture (torch.compile), which leaves a few large kernels of the many
small ones and rounds a little differently; blocks and arms of equal formats share what is compiled.
A step whose activations are recorded runs as it is written, since the recorder's hooks are Python.
The optimizer stays outside, so that a loss that is not finite is met before it reaches the weights.

Not captured: several processes (their all-reduce belongs to the backward pass), CPUs, mixtures of
experts (how many tokens an expert sees decides shapes), models that read values on the host in
their forward pass, which is only known from trying, and passes that do not give, when replayed, the
loss and the gradient norm that they give as written.
"""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from bitplan.probe.modules import find_linears

WARMUP_STEPS = 3
"""Steps before the capture: libraries allocate what they need when they first run."""
ROUNDING = 0.02
"""Relative: between a pass as written in bf16, and the same pass compiled."""
CAUSE_FRAMES = 6
"""Of the stack under what broke a capture, kept in the record."""
COMPILED_CODES = 1024
"""Of a block's forward, at most: each set of formats and sizes is one. torch's limit is 8."""

Pass = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From a batch of token ids to its loss and the gradients' norm, leaving clipped gradients."""


class Step:
    """Runs the forward and backward pass of batches of one shape."""

    def __init__(
        self,
        run: Pass,
        model: nn.Module,
        *,
        capture: bool,
        compiled: bool = False,
        unhooked: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        """Take the pass to run, which adds to the gradients of `model`.

        unhooked: makes a context without the hooks that a captured pass does not need.
        """
        self._run = run
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._steps_left = WARMUP_STEPS
        self._captures = capture and all(i.linear.expert is None for i in find_linears(model))
        self.blocks = find_blocks(model) if compiled else []
        self._unhooked = unhooked
        self.refusal = ""
        """Why the pass could not be captured."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._gradients: list[Tensor | None] = []
        self._batch = self._loss = self._norm = torch.empty(0)

    @property
    def is_captured(self) -> bool:
        """Whether steps are replayed by now."""
        return self._graph is not None

    def __call__(self, batch: Tensor, *, recorded: bool = False) -> tuple[Tensor, Tensor]:
        """Return loss and norm of a batch; `recorded`: hooks have to run."""
        if recorded or not self._captures:
            return self._plain(batch)
        if self._steps_left > 0:
            self._steps_left -= 1
            return self._plain(batch)
        if self._graph is None and not self._capture(batch):
            return self._plain(batch)
        return self._replay(batch)

    def _plain(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        self._forget_gradients()  # those of the graph, too, which it writes anew
        return self._run(batch)

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture(self, batch: Tensor) -> bool:
        """Record the pass without running it; return whether that is possible, and right."""
        self._batch = batch.clone()
        random = torch.cuda.default_generators[batch.device.index]
        seed = random.initial_seed()
        plain = [float(value) for value in self._plain(batch)]
        with self._unhooked(), _compiled(self.blocks):
            if self.blocks:
                # A capture cannot compile. Transformers builds a mask where it sees a capture, and
                # leaves it out elsewhere: what is compiled has to be what will be captured.
                with patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
                    self._plain(self._batch)
            self._forget_gradients()
            graph = torch.cuda.CUDAGraph()
            before = random.clone_state()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._loss, self._norm = self._run(self._batch)
            except RuntimeError as error:
                # A capture that failed leaves the generator waiting for its end.
                random.graphsafe_set_state(before)
                return self._refuse(cause(error))
        self._graph, self._gradients = graph, [p.grad for p in self._parameters]
        torch.cuda.manual_seed(seed)  # dropout as in the plain pass
        replayed = [float(value) for value in self._replay(batch)]
        torch.cuda.manual_seed(seed)
        if not alike(plain, replayed):
            self._graph = None
            return self._refuse(f"loss and gradient norm: {replayed} replayed, {plain} as written")
        return True

    def _refuse(self, why: str) -> bool:
        self._captures, self.refusal = False, why
        return False

    def _replay(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        assert self._graph is not None
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._batch.copy_(batch)
        self._graph.replay()
        return self._loss, self._norm


def cause(error: BaseException) -> str:
    """Return what broke a capture, and the innermost calls that it came from.

    Ending a broken capture fails too, and that is the error that arrives.
    """
    while error.__context__ is not None:
        error = error.__context__
    frames = traceback.extract_tb(error.__traceback__)[-CAUSE_FRAMES:]
    calls = (f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames)
    said, _, _ = str(error).partition("\n")  # further lines are CUDA's advice
    return f"{type(error).__name__}: {said} ({' > '.join(calls)})"


def alike(written: Sequence[float], replayed: Sequence[float]) -> bool:
    """Whether a replayed pass gives a loss and a norm within ROUNDING of those as written.

    What rounds differently stays far below; a gradient that lost a part of itself does not.
    """
    return all(
        math.isclose(a, b, rel_tol=ROUNDING) or not (math.isfinite(a) and math.isfinite(b))
        for a, b in zip(written, replayed, strict=True)
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the linears of a block each, in order."""
    names: dict[str, None] = {}
    for item in find_linears(model):
        if item.linear.block is not None:
            parts = item.linear.module.split(".")
            names[".".join(parts[: parts.index(str(item.linear.block)) + 1])] = None
    return [model.get_submodule(name) for name in names]


@contextlib.contextmanager
def _compiled(blocks: list[nn.Module]) -> Iterator[None]:
    """Let the blocks run compiled; what was compiled stays for other arms."""
    if not blocks:
        yield
        return
    limits = {
        "recompile_limit": COMPILED_CODES,
        "accumulated_recompile_limit": 4 * COMPILED_CODES,
        "fail_on_recompile_limit_hit": True,
    }
    with torch._dynamo.config.patch(limits):
        for block in blocks:
            block.compile(dynamic=False)
        try:
            yield
        finally:
            for block in blocks:
                block._compiled_call_impl = None
