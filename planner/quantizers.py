"""Quantizers: where a site's scales come from in training, `GLOB=NAME` in a plan.

    absmax   the scale covers the range, s = max|x| / 2^(b-1), and is not trained
    lwc      weights: a factor per scale, trained, on the AbsMax scale
    lac      inputs: a factor per group index, trained, the same for all tokens, on the AbsMax scale
    lsq      weights: the step itself is trained, from where it was at the start
    hadamard both operands of a linear: absmax after a rotation that spreads outliers over channels

A format says which numbers there are; a quantizer says how they are laid over the values, which
matters in training alone. Following the paper (arXiv 2505.14302), inputs with 256 elements or more
to a scale are `lac` and all else is `absmax`, unless a plan says otherwise. The arithmetic of each
is in qat/quantizers.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bitplan.errors import PlanError
from bitplan.formats import Format, Operand
from bitplan.planner.pins import Described, matching

ABSMAX, HADAMARD = "absmax", "hadamard"
COARSE = 256
"""Elements to a scale from which on inputs are `lac`: the paper's threshold."""


@dataclass(frozen=True)
class Quantizer:
    """A way to find scales: its name, and the operands it is for."""

    name: str
    operands: tuple[Operand, ...]


QUANTIZERS = {
    quantizer.name: quantizer
    for quantizer in (
        Quantizer(ABSMAX, ("weight", "input")),
        Quantizer("lwc", ("weight",)),
        Quantizer("lac", ("input",)),
        Quantizer("lsq", ("weight",)),
        Quantizer(HADAMARD, ("weight", "input")),
    )
}


def default_quantizer(fmt: Format, operand: Operand, in_features: int) -> str:
    """Return the quantizer of a site that no plan names one for."""
    per_scale = in_features if fmt.group_size is None else min(fmt.group_size, in_features)
    coarse = fmt.kind == "int" and operand == "input" and per_scale >= COARSE
    return "lac" if coarse else ABSMAX


def parse_quantizer(text: str) -> tuple[str, Quantizer]:
    """Return the glob and the quantizer that `GLOB=NAME` spells; raise PlanError otherwise."""
    glob, equals, name = text.rpartition("=")
    if not equals or not glob or name not in QUANTIZERS:
        raise PlanError(
            f"--quantizer {text!r}: write GLOB=NAME, e.g. 'fc2:input=lac', with a name of "
            f"{', '.join(QUANTIZERS)}"
        )
    return glob, QUANTIZERS[name]


def named_quantizers(sites: Iterable[Described], texts: Sequence[str]) -> dict[str, str]:
    """Return the quantizer of each site that `GLOB=NAME` texts name; of two, the later holds.

    A glob takes the sites of the operands that its quantizer is for, so `fc2=lac` means inputs.
    Raises PlanError for a text that names none, or splits what is one tensor.
    """
    found: dict[str, str] = {}
    listed = list(sites)
    for text in texts:
        glob, quantizer = parse_quantizer(text)
        fitting = [site for site in listed if site.operand in quantizer.operands]
        matched = [fitting[i].site for i in matching(glob, fitting, f"--quantizer {text!r}")]
        found |= dict.fromkeys(matched, quantizer.name)
    _check_shared(listed, found)
    _check_rotated(listed, found)
    return found


def _check_shared(sites: Sequence[Described], found: dict[str, str]) -> None:
    """Raise PlanError where linears that read one tensor would quantize it differently."""
    shared: dict[str, dict[str | None, str]] = {}
    for site in sites:
        if site.operand == "input" and site.fused is not None:
            shared.setdefault(site.fused, {})[found.get(site.site)] = site.site
    for names in shared.values():
        if len(names) > 1:
            raise PlanError(
                f"--quantizer splits {' and '.join(names.values())}, which are one tensor: name "
                "all that read it"
            )


def _check_rotated(sites: Sequence[Described], found: Mapping[str, str]) -> None:
    """Raise PlanError where one operand of a linear would be rotated and not the other."""
    listed = {site.site for site in sites}
    for site in sites:
        partner = f"{site.module}:{'input' if site.operand == 'weight' else 'weight'}"
        if HADAMARD == found.get(site.site) != found.get(partner) and partner in listed:
            raise PlanError(
                f"--quantizer rotates {site.site} ({HADAMARD}) and not {partner}: a rotation is of "
                f"both operands, write {site.module}={HADAMARD}"
            )
