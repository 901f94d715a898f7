"""A plan onto a model: a walk that swaps each planned linear for one that fake-quantizes.

The new module shares the old one's parameters, is a subclass of its class and keeps its name, so
optimizers, checkpoints and the probe see the same model. `restore` is the inverse. Nothing is left
out in silence: a site the model lacks, or a module whose own forward pass the swap would lose, is a
PlanError, and the report names every site. Embeddings and whatever the plan keeps in bf16 are not
touched; a weight tied to an embedding is quantized where it multiplies, not where it is looked up.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.pytorch_utils import Conv1D

from bitplan.errors import PlanError
from bitplan.formats import Format
from bitplan.planner.quantizers import ABSMAX, HADAMARD, QUANTIZERS
from bitplan.probe.modules import LinearModule, find_linears
from bitplan.qat.fused import warn_without_kernel
from bitplan.qat.quantizers import (
    FACTORS,
    INPUT_FACTOR,
    WEIGHT_FACTOR,
    InputQuantizer,
    WeightQuantizer,
    factor_shape,
    first_step,
)
from bitplan.qat.rotation import Rotated, block_size
from bitplan.sites import OPERANDS, Site


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` did with every site."""

    converted: Mapping[Site, Format]
    """Sites that are fake-quantized now."""
    kept: tuple[Site, ...]
    """Sites that the plan leaves in bf16."""
    unplanned: tuple[Site, ...]
    """Sites of the model that the plan does not mention; they stay as they are."""


class FakeQuantizedLinear(nn.Linear):
    """A linear whose input and weight are rounded to their formats in the forward pass."""

    quantize_input: InputQuantizer | Rotated | None = None
    quantize_weight: WeightQuantizer | Rotated | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the rounded operands; [..., in] to [..., out]."""
        return _multiply(input, self.weight, self.bias, self.quantize_input, self.quantize_weight)


class FakeQuantizedConv1D(Conv1D):  # type: ignore[misc]  # transformers has no types
    """GPT-2's linear, weight [in, out], with both operands rounded; groups run along `in`."""

    quantize_input: InputQuantizer | Rotated | None = None
    quantize_weight: WeightQuantizer | Rotated | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return the product of the rounded operands; [..., in] to [..., out]."""
        return _multiply(
            input, self.weight.t(), self.bias, self.quantize_input, self.quantize_weight
        )


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantize_input: InputQuantizer | Rotated | None,
    quantize_weight: WeightQuantizer | Rotated | None,
) -> Tensor:
    if quantize_input is not None:
        x = quantize_input(x)
    if quantize_weight is not None:
        weight = quantize_weight(weight)
    return F.linear(x, weight, bias)


# A class and the one that replaces it, which has the same parameters and attributes.
_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FakeQuantizedLinear,
    Conv1D: FakeQuantizedConv1D,
}
_BACK = {new: old for old, new in _SWAPS.items()}


def convert(
    model: nn.Module, formats: Mapping[Site, Format], quantizers: Mapping[Site, str] | None = None
) -> ConversionReport:
    """Make `model` compute under `formats`, in place; return what became of every site.

    quantizers: the sites whose scales are trained, and by which quantizer; all else is `absmax`.
    Their factors are parameters of the linear, `input_factor` and `weight_factor`. `hadamard` at
    any site of a linear rotates both its operands (rotation.py).

    Raises PlanError, before anything is changed, for a site that the model lacks, a format that
    does not fit its operand or its quantizer, or a module that cannot be swapped.
    """
    found = find_linears(model)
    sites = [
        module.linear.site(operand)
        for module in found
        for operand in OPERANDS
        if operand == "weight" or module.has_input
    ]
    quantized = {site: fmt for site, fmt in formats.items() if fmt.is_quantized}
    trained = {
        site: name
        for site, name in (quantizers or {}).items()
        if site in quantized and name != ABSMAX
    }
    _check(found, sites, formats, quantized)
    _check_quantizers(quantized, trained)
    if any(module.weight().is_cuda for module in found):
        warn_without_kernel()
    rotated = {site.module for site, name in trained.items() if name == HADAMARD}
    _check_rotated(found, rotated)
    restore(model)  # what an earlier plan converted
    found = find_linears(model)
    readers = Counter(
        (module.linear.fused, quantized.get(module.linear.site("input")))
        for module in found
        if module.linear.module not in rotated
    )
    shared: dict[tuple[str, Format], InputQuantizer] = {}
    for module in found:
        linear = module.linear
        input_format = quantized.get(linear.site("input"))
        weight_format = quantized.get(linear.site("weight"))
        if input_format is None and weight_format is None:
            continue
        new = _swapped(module.module, _SWAPS)
        quantize_input: InputQuantizer | Rotated | None = None
        quantize_weight: WeightQuantizer | Rotated | None = None
        if linear.module in rotated:
            quantize_input, quantize_weight = Rotated(input_format), Rotated(weight_format)
            weight_format = input_format = None
        if input_format is not None:
            key = (linear.fused or linear.module, input_format)
            if key not in shared:
                shared[key] = InputQuantizer(
                    input_format,
                    num_readers=readers[linear.fused, input_format] if linear.fused else 1,
                    factor=_factor(module, input_format, trained.get(linear.site("input"))),
                )
            quantize_input = shared[key]
            _own(new, INPUT_FACTOR, quantize_input.factor)
        if weight_format is not None:
            name = trained.get(linear.site("weight"))
            quantize_weight = WeightQuantizer(
                weight_format,
                factor=_factor(module, weight_format, name),
                step=first_step(module.weight(), weight_format) if name == "lsq" else None,
            )
            _own(new, WEIGHT_FACTOR, quantize_weight.factor)
        new.quantize_input = quantize_input  # type: ignore[assignment]  # no module, no tensor
        new.quantize_weight = quantize_weight  # type: ignore[assignment]
        _replace(model, module.module, new)
    return ConversionReport(
        converted=quantized,
        kept=tuple(site for site in sites if site in formats and site not in quantized),
        unplanned=tuple(site for site in sites if site not in formats),
    )


def _factor(module: LinearModule, fmt: Format, quantizer: str | None) -> nn.Parameter | None:
    """Return a trained factor at its start, 1, on the weight's device; None for AbsMax."""
    if quantizer is None:
        return None
    weight = module.weight()
    shape = factor_shape(weight.detach(), fmt, quantizer)
    return nn.Parameter(torch.ones(shape, device=weight.device))


def _own(module: nn.Module, name: str, factor: Tensor | None) -> None:
    if factor is not None:
        assert isinstance(factor, nn.Parameter)
        module.register_parameter(name, factor)


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Round each weight of a converted model once for all passes inside.

    For the micro-batches of one optimizer step. A step of a torch optimizer inside ends what is
    held (fused ones do not move version counters), and so does whatever moves a weight's version
    counter; only writing through `.data` goes unseen.
    """
    held = [q for m in model.modules() if (q := getattr(m, "quantize_weight", None)) is not None]

    def hold(is_held: bool) -> None:
        for quantizer in held:
            quantizer.hold(is_held)

    hook = register_optimizer_step_post_hook(lambda *_: hold(True))
    hold(True)
    try:
        yield
    finally:
        hook.remove()
        hold(False)


def restore(model: nn.Module) -> None:
    """Undo `convert`, in place: plain linears again, with the parameters as they are now."""
    for module in list(model.modules()):
        if type(module) in _BACK:
            _replace(model, module, _swapped(module, _BACK))
            for name in FACTORS:
                module._parameters.pop(name, None)  # the dict is that of the plain linear too


def _check(
    found: list[LinearModule],
    sites: list[Site],
    formats: Mapping[Site, Format],
    quantized: Mapping[Site, Format],
) -> None:
    """Raise PlanError where the formats do not fit the model."""
    known = set(sites)
    if missing := [str(site) for site in formats if site not in known]:
        raise PlanError(
            f"the plan has {len(formats)} sites, {len(missing)} of them are not in the model "
            f"({len(sites)} sites): {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}; "
            "make a plan from this checkpoint's own profile"
        )
    for site, fmt in quantized.items():
        if not fmt.applies_to(site.operand):
            raise PlanError(f"{fmt} at {site}: this format is not one for {site.operand}s")
    for module in found:
        planned = [site for site in map(module.linear.site, OPERANDS) if site in quantized]
        if planned and type(module.module) not in (*_SWAPS, *_BACK):
            raise PlanError(
                f"{planned[0]} is planned as {quantized[planned[0]]}, but "
                f"{type(module.module).__name__} modules cannot be quantized: "
                f"pin it, --pin '{module.linear.module}*=bf16'"
            )


def _check_quantizers(quantized: Mapping[Site, Format], trained: Mapping[Site, str]) -> None:
    """Raise PlanError where a trained quantizer does not fit the operand or the format."""
    for site, name in trained.items():
        if name not in QUANTIZERS or site.operand not in QUANTIZERS[name].operands:
            raise PlanError(f"{name} at {site}: this quantizer is not one for {site.operand}s")
        if name != HADAMARD and quantized[site].kind != "int":
            raise PlanError(
                f"{name} at {site}: it trains the scales of integers, and {quantized[site]} has "
                f"scales of its own; take {ABSMAX}"
            )


def _check_rotated(found: list[LinearModule], rotated: set[str]) -> None:
    """Raise PlanError where a rotation would mix nothing."""
    for module in found:
        width = module.linear.in_features
        if module.linear.module in rotated and block_size(width) == 1:
            raise PlanError(
                f"{HADAMARD} at {module.linear.module}: a rotation mixes powers of two of the "
                f"input's channels, and {width} is odd; take {ABSMAX}"
            )


def _swapped(module: nn.Module, swaps: Mapping[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Return a module of the other class that shares parameters, hooks and attributes."""
    cls = swaps[type(module)]
    new = cls.__new__(cls)
    # Both classes have the same state; sharing it keeps hooks and what transformers attaches.
    new.__dict__ = {
        key: value
        for key, value in module.__dict__.items()
        if key not in ("quantize_input", "quantize_weight")
    }
    return new


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs in the tree: a module may have several names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
