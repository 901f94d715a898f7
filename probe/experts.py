"""Mixture-of-experts: one linear per expert, whatever way the model keeps them.

transformers 5 stores the experts of a block as two 3-D parameters and multiplies them in one fused
call, where no expert has an input that could be hooked. `unfuse_experts` puts a module in the same
place that holds one small MLP per expert, `experts.3.gate_up_proj` and `experts.3.down_proj`. Their
weights are views of the 3-D parameters: no copy, the same values, the same logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from bitplan.errors import CheckpointError


class Expert(nn.Module):
    """The two linears of one expert; the activation between them is that of the fused module.

    `tokens` are the rows of the last call's hidden states that were routed here, [routed].
    """

    tokens: Tensor | None = None

    def __init__(self, up_name: str, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.add_module(up_name, up)
        self.down_proj = down


class Experts(nn.ModuleList):
    """The experts of one block as separate modules, with the signature of the fused one."""

    def __init__(self, fused: Any) -> None:
        self._check(fused)
        name = "gate_up_proj" if fused.has_gate else "up_proj"
        ups = _linears(fused, name)
        downs = _linears(fused, "down_proj")
        super().__init__(Expert(name, up, down) for up, down in zip(ups, downs, strict=True))
        self._up_name = name
        # Only its activation is needed from here on: without its parameters it holds no memory,
        # and in a tuple it is no submodule.
        fused._parameters.clear()
        self._fused = (fused,)

    @staticmethod
    def _check(fused: Any) -> None:
        if getattr(fused, "has_post_expert_norm", False):
            raise CheckpointError(f"unsupported experts: {type(fused).__name__} norms its outputs")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts.

        hidden_states: [tokens, hidden]; top_k_index, top_k_weights: [tokens, top_k].
        """
        (fused,) = self._fused
        out = torch.zeros_like(hidden_states)
        # Experts without a token run too, on no rows: the order of calls is always the same.
        for index, expert in enumerate(self):
            assert isinstance(expert, Expert)
            expert.tokens, slot = torch.where(top_k_index == index)
            up = expert.get_submodule(self._up_name)(hidden_states[expert.tokens])
            hidden = fused._apply_gate(up) if fused.has_gate else fused.act_fn(up)
            down = expert.get_submodule("down_proj")(hidden)
            weighted = down * top_k_weights[expert.tokens, slot, None]
            out = out.index_add(0, expert.tokens, weighted.to(out.dtype))
        return out


def _linears(fused: Any, name: str) -> list[nn.Linear]:
    """Return one linear per expert over views of a 3-D parameter and its bias, if any."""
    weights = getattr(fused, name)
    biases = getattr(fused, f"{name}_bias", None)
    linears = []
    for index in range(weights.shape[0]):
        weight = weights.data[index]
        if fused.is_transposed:
            weight = weight.T
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        if biases is not None:
            linear.bias = nn.Parameter(biases.data[index])
        linears.append(linear)
    return linears


def _is_fused(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "is_transposed")


def unfuse_experts(model: nn.Module) -> int:
    """Replace fused experts in place by separate linears; return how many blocks changed.

    Raises CheckpointError for experts of a kind that has no such form.
    """
    fused = [(name, module) for name, module in model.named_modules() if _is_fused(module)]
    for name, module in fused:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Experts(module))
    return len(fused)
