"""One arm and seed as a value: what is trained, on what, and the hash that makes it known again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from bitplan.qat.arms import Formats
from bitplan.qat.recipe import Recipe
from bitplan.rundir import content_hash
from bitplan.sites import Site


@dataclass(frozen=True, kw_only=True)
class Job:
    """One arm and seed: what to train, on what, and the configuration that identifies it."""

    arm: str
    seed: int
    formats: Formats
    quantizers: Mapping[Site, str]
    """The sites whose scales are trained, and by which quantizer."""
    recipe: Recipe
    train: Tensor
    """[steps * batch_size, seq_len] token ids, in the order of training."""
    heldout: Tensor
    """[sequences, seq_len] token ids."""
    accumulate: int = 1
    """Parts of a process's rows that pass through the model one by one before a step."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of checkpoint and text, device: whatever else the numbers depend on."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the result depends on, as a JSON value; the arm's name is no part of it.

        Nor is `accumulate`, as little as the number of processes: both change the rounding alone.
        """
        return {
            "recipe": {**asdict(self.recipe), "betas": list(self.recipe.betas)},
            "seed": self.seed,
            "formats": {str(site): str(fmt) for site, fmt in self.formats.items()},
            "quantizers": {str(site): name for site, name in self.quantizers.items()},
            **self.context,
        }

    @cached_property
    def config_hash(self) -> str:
        """The hash of `config`: jobs that have it in common are one training."""
        return content_hash(self.config)


def rows_at_once(job: Job, accelerator: Accelerator) -> int:
    """Return how many sequences pass through the model of a process at once."""
    parts: int = accelerator.num_processes * job.accumulate
    return -(-job.recipe.batch_size // parts)
