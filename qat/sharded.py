"""What FSDP2 changes: parameters come in shards, and are whole only while their block runs.

Accelerate shards the model (`accelerate launch --use_fsdp --fsdp_version 2`). Weights are gathered
in float32 and cast by autocast where they are multiplied, as everywhere else: gathered in bf16 they
would be rounded twice, once before they are fake-quantized.
"""

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from bitplan.errors import TrainingError
from bitplan.probe.modules import find_linears
from bitplan.qat.quantizers import INPUT_FACTOR, WEIGHT_FACTOR


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether the models that it prepares are sharded."""
    return bool(accelerator.is_fsdp2)


def check_launch(accelerator: Accelerator) -> None:
    """Raise TrainingError for a way to spread a training that is none of DDP and FSDP2."""
    kind = accelerator.distributed_type
    wrong = kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if wrong or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise TrainingError(
            f"launched for {kind.value}, which verify does not support: launch it with "
            "--multi_gpu, or with --use_fsdp --fsdp_version 2"
        )


def check_shardable(model: nn.Module) -> None:
    """Raise TrainingError for a mixture of experts.

    FSDP2 reduces the gradients that a process has, and an expert without tokens has none.
    """
    if any(item.linear.expert is not None for item in find_linears(model)):
        raise TrainingError(
            "a mixture of experts cannot be trained in shards, as processes choose other experts: "
            "launch it with --multi_gpu, without --use_fsdp"
        )


def gather_in_float32(accelerator: Accelerator) -> None:
    """Make FSDP2 gather weights as they are, whatever the precision of training."""
    if is_sharding(accelerator):
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def follow_shards(model: nn.Module) -> None:
    """Let quantizers use the factors that FSDP2 has gathered, and keep no gathered weight."""
    for module in model.modules():
        if hasattr(module, "quantize_input"):
            module.register_forward_pre_hook(_follow)
            module.register_forward_hook(_forget)


def _follow(module: nn.Module, args: Any) -> None:
    for quantizer, name in _quantizers(module):
        quantizer.factor = module._parameters.get(name)
        step = getattr(quantizer, "step", None)
        if isinstance(step, Tensor):
            quantizer.step = step.to(args[0].device)


def _forget(module: nn.Module, args: Any, output: Any) -> None:
    for quantizer, name in _quantizers(module):
        if name == WEIGHT_FACTOR:
            quantizer._slot = None


def _quantizers(module: nn.Module) -> list[tuple[Any, str]]:
    pairs = [
        (getattr(module, "quantize_input", None), INPUT_FACTOR),
        (getattr(module, "quantize_weight", None), WEIGHT_FACTOR),
    ]
    return [(quantizer, name) for quantizer, name in pairs if quantizer is not None]
