"""Where the arms of a seed start from: the checkpoint, or the random weights of a config.

From scratch is the setting of the paper (arXiv 2505.14302): every arm trains from the same draw of
the weights, on the same batches. The config must give the sites that the plan was made for, so that
the plan says what each is trained under, and take the tokens of the checkpoint's tokenizer. Nothing
else of the checkpoint is used.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitplan.errors import CheckpointError
from bitplan.planner.plan import Plan
from bitplan.probe.checkpoint import Checkpoint, load_checkpoint
from bitplan.probe.experts import unfuse_experts
from bitplan.probe.loading import fresh_model, is_causal, quiet, read_config
from bitplan.probe.modules import find_linears
from bitplan.rundir import content_hash
from bitplan.sites import OPERANDS


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the arms of a seed start from; it pickles without weights, which are loaded again."""

    source: str
    identity: str
    """A hash of what the start is made of."""
    is_checkpoint: bool
    trust_remote_code: bool = False
    loaded: nn.Module | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the weights out."""
        return {**self.__dict__, "loaded": None}

    def model(self, seed: int) -> nn.Module:
        """Return the model, on the CPU: not to be changed, as others start from it too."""
        if not self.is_checkpoint:
            return _drawn(self.source, seed)
        return self.loaded or _checkpoint_model(self.source, self.trust_remote_code)


@lru_cache(maxsize=1)
def _checkpoint_model(source: str, trust_remote_code: bool) -> nn.Module:
    return load_checkpoint(source, device="cpu", trust_remote_code=trust_remote_code).model


@lru_cache(maxsize=1)
def _drawn(path: str, seed: int) -> nn.Module:
    config = _config(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = fresh_model(config)
    unfuse_experts(fresh)
    return fresh.eval()


def _config(path: str) -> Any:
    with quiet():
        return read_config(Path(path).expanduser(), path, {})


def from_checkpoint(checkpoint: Checkpoint, *, trust_remote_code: bool) -> Start:
    """Return the checkpoint as the start of every seed."""
    return Start(
        source=checkpoint.source,
        identity=checkpoint.content_hash,
        is_checkpoint=True,
        trust_remote_code=trust_remote_code,
        loaded=checkpoint.model,
    )


def from_scratch(path: str, checkpoint: Checkpoint, plan: Plan) -> Start:
    """Return a config's random weights, drawn anew for each seed, as the start.

    path: a config.json or the directory it is in; nothing is downloaded, no weights are read.
    Raises CheckpointError for a config that is missing, no causal language model, or too small for
    the tokenizer, and PlanError where its model has other sites than the plan.
    """
    place = Path(path).expanduser()
    if not (place if place.suffix == ".json" else place / "config.json").is_file():
        raise CheckpointError(f"--from-scratch {path}: there is no config.json")
    config = _config(path)
    if not is_causal(config):
        raise CheckpointError(f"--from-scratch {path}: {config.model_type} predicts no next token")
    vocabulary, needed = config.get_text_config().vocab_size, len(checkpoint.tokenizer)
    if vocabulary < needed:
        raise CheckpointError(
            f"--from-scratch {path}: a vocabulary of {vocabulary}, and the tokenizer of "
            f"{checkpoint.source} has {needed} tokens: set vocab_size to at least that"
        )

    plan.check_sites(
        str(item.linear.site(operand))
        for item in find_linears(_drawn(path, 0))
        for operand in OPERANDS
        if operand == "weight" or item.has_input
    )
    identity = content_hash({"from_scratch": config.to_dict()})
    return Start(source=path, identity=identity, is_checkpoint=False)
