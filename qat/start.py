"""Where the arms of a seed start from: the checkpoint, or the random weights of a config.

From scratch is the setting of the paper (arXiv 2505.14302): every arm trains from the same draw of
the weights, on the same batches. The config must give the sites that the plan was made for, so that
the plan says what each is trained under, and take the tokens of the checkpoint's tokenizer. Nothing
else of the checkpoint is used.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from bitplan.errors import CheckpointError
from bitplan.planner.plan import Plan
from bitplan.probe.checkpoint import Checkpoint
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.loading import fresh_model, is_causal, quiet, read_config
from bitplan.probe.modules import find_linears
from bitplan.rundir import content_hash
from bitplan.sites import OPERANDS


@dataclass(frozen=True)
class Start:
    """From a seed to the model that its arms start from, and a hash of what that is made of."""

    model: Callable[[int], nn.Module]
    identity: str
    source: str


def from_checkpoint(checkpoint: Checkpoint) -> Start:
    """Return the checkpoint as the start of every seed."""
    return Start(lambda seed: checkpoint.model, checkpoint.content_hash, checkpoint.source)


def from_scratch(path: str, checkpoint: Checkpoint, plan: Plan) -> Start:
    """Return a config's random weights, drawn anew for each seed, as the start.

    path: a config.json or the directory it is in; nothing is downloaded, no weights are read.
    Raises CheckpointError for a config that is missing, no causal language model, or too small for
    the tokenizer, and PlanError where its model has other sites than the plan.
    """
    place = Path(path).expanduser()
    if not (place if place.suffix == ".json" else place / "config.json").is_file():
        raise CheckpointError(f"--from-scratch {path}: there is no config.json")
    with quiet():
        config = read_config(place, path, {})
    if not is_causal(config):
        raise CheckpointError(f"--from-scratch {path}: {config.model_type} predicts no next token")
    vocabulary, needed = config.get_text_config().vocab_size, len(checkpoint.tokenizer)
    if vocabulary < needed:
        raise CheckpointError(
            f"--from-scratch {path}: a vocabulary of {vocabulary}, and the tokenizer of "
            f"{checkpoint.source} has {needed} tokens: set vocab_size to at least that"
        )

    def model(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh: nn.Module = fresh_model(config)
        unfuse_experts(fresh)
        return fresh.eval()

    plan.check_sites(
        str(item.linear.site(operand))
        for item in find_linears(model(0))
        for operand in OPERANDS
        if operand == "weight" or item.has_input
    )
    return Start(model, content_hash({"from_scratch": config.to_dict()}), path)
