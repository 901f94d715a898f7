"""The linears of a loaded model: every module that multiplies tokens by a matrix, with its role.

A linear is any `nn.Linear` (and whatever subclasses it, such as a fake-quantizing one), any
transformers `Conv1D` (which keeps its matrix transposed), any embedding (a weight site only: its
input is token ids), and any other module that owns a 2-D parameter called `weight` (the routers of
transformers 5). A name that no row of the family table knows gets the role `other`.

A head tied to the embedding is the same tensor under two names and is listed as both.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from bitplan.sites import Linear, describe


@dataclass(frozen=True)
class LinearModule:
    """A linear, the module that computes it, and whether that keeps its matrix transposed."""

    linear: Linear
    module: nn.Module
    transposed: bool = False

    def weight(self) -> Tensor:
        """Return the matrix as [out_features, in_features], a view of the parameter.

        An embedding is [tokens of the vocabulary, hidden].
        """
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.T if self.transposed else weight

    @property
    def has_input(self) -> bool:
        """Whether the module's input can be quantized: not so for embeddings."""
        return not isinstance(self.module, nn.Embedding)


def find_linears(model: nn.Module) -> list[LinearModule]:
    """Return the linears of a model in the order of its module tree, roles filled in."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    found = [
        LinearModule(_bare(name, module), module, _is_transposed(module))
        for name, module in model.named_modules()
        if _has_matrix(module)
    ]
    described = describe(
        [item.linear for item in found],
        family=getattr(text, "model_type", None),
        hidden_size=getattr(text, "hidden_size", None),
    )
    outside = outside_text(model, text) if text is not config else set()
    return [
        replace(item, linear=_corrected(item, linear, item.module in outside))
        for item, linear in zip(found, described, strict=True)
    ]


def _corrected(item: LinearModule, linear: Linear, is_outside: bool) -> Linear:
    """Return the linear with the role that its module tells where its name does not."""
    if not item.has_input:
        # Positions and token types are embeddings too, whatever they are called.
        return replace(linear, role="embed", fused=None)
    if is_outside:
        return replace(linear, role="other", block=None, fused=None)
    return linear


def outside_text(model: Any, text: Any) -> set[nn.Module]:
    """Return the modules of a multimodal model that are not of its language model."""
    inside = {model.get_output_embeddings()}
    for module in model.modules():
        if getattr(module, "config", None) is text:
            inside.update(module.modules())
    return {module for module in model.modules() if module not in inside}


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | nn.Embedding):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2


def _is_transposed(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _bare(name: str, module: nn.Module) -> Linear:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows, columns = reversed(weight.shape) if _is_transposed(module) else weight.shape
    return Linear(name, in_features=int(columns), out_features=int(rows))
