"""What ModelOpt's auto_quantize and AutoRound's AutoScheme choose for alternatives.py.

    PEERS/bin/python benchmarks/alternatives_peers.py DIR [NAME ...]

DIR/request.json and the checkpoint DIR/checkpoint come from `alternatives.py ask`; the answer is
DIR/peers.json. PEERS is an environment with nvidia-modelopt and auto-round, which bitplan itself
does without: so this script imports nothing of bitplan.

Both peers choose a scheme for a linear as a whole, and both budgets count weights: 8-bit inputs are
free to them. So that a choice costs what it is allowed, there are two ways to ask:

    ModelOpt, AutoRound      the menu is W4A4 and W8A8, the weight bits are those that cost as much
    ModelOpt, inputs priced  ModelOpt lets a recipe state its bits: W4A4, W4A8 and W8A8 state their
                             bit operations, and its solver minimizes its scores at that cost

Weights are integers in groups as in bitplan; inputs have a scale per token, the closest that
ModelOpt runs on a CPU (AutoRound takes groups there too). Leaving a layer at 16 bits costs 16 times
W4A4 and is not on the menu.
"""

import json
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Choice = dict[str, str]
# Bit operations over those of W4A4.
COST = {"W4A4": 1, "W4A8": 2, "W8A8": 4}
BITS = {"W4A4": (4, 4), "W4A8": (4, 8), "W8A8": (8, 8)}


def cost(choice: Choice, macs: dict[str, int]) -> float:
    """Return bit operations over those of W4A4 everywhere."""
    return sum(COST[choice[m]] * n for m, n in macs.items()) / sum(macs.values())


def weight_bits(limit: float) -> float:
    """Return the average weight bits of W4A4 and W8A8 at that cost: W8A8 costs four times W4A4."""
    return 4 + 4 * (limit - 1) / 3


def load(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "checkpoint", dtype=torch.float32)


def auto_quantize(
    place: Path, request: dict[str, Any], stated_bits: dict[str, float], limits: dict[str, float]
) -> dict[str, Choice]:
    """Return ModelOpt's choice for each budget, by gradient scores.

    `stated_bits` is the menu, with what each scheme counts in the average; `limits` are averages.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.algorithms import get_auto_quantize_config

    def config(scheme: str) -> dict[str, Any]:
        weight, token = BITS[scheme]
        groups = {"num_bits": weight, "block_sizes": {-1: request["group_size"]}}
        tokens = {"num_bits": token, "block_sizes": {-1: None, "type": "dynamic"}}
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": groups},
                {"quantizer_name": "*input_quantizer", "cfg": tokens},
            ],
            "algorithm": "max",
            "effective_bits": stated_bits[scheme],
        }

    model = load(place)
    batches = [torch.tensor([ids]) for ids in request["ids"]]
    planned = sorted(request["macs"])
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    # Layers outside the search count at 16 bits in the average all the same.
    size = {n: m.weight.numel() for n, m in linears.items()}
    inside = sum(size[name] for name in planned)
    others = sum(size.values()) - inside

    def effective(bits: float) -> dict[str, float]:
        return {"effective_bits": (bits * inside + 16 * others) / (inside + others)}

    _, state = mtq.auto_quantize(
        model,
        constraints=effective(max(stated_bits.values())),
        module_search_spaces=[
            {
                "module_name_patterns": planned,
                "quantization_formats": [config(scheme) for scheme in stated_bits],
                "allow_no_quant": False,
            }
        ],
        fixed_quantization_config={
            "quant_cfg": [{"quantizer_name": "*", "enable": False}],
            "algorithm": "max",
        },
        data_loader=[{"input_ids": ids, "labels": ids} for ids in batches],
        forward_step=lambda model, batch: model(**batch),
        loss_func=lambda output, batch: output.loss,
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
    )

    def solve(bits: float) -> Choice:
        found = get_auto_quantize_config(state, effective(bits))["quant_cfg"]
        bits_of = {
            entry["quantizer_name"]: entry["cfg"]["num_bits"] for entry in found if entry.get("cfg")
        }
        scheme = {bits: name for name, bits in BITS.items()}
        return {
            name: scheme[bits_of[f"{name}.weight_quantizer"], bits_of[f"{name}.input_quantizer"]]
            for name in request["macs"]
        }

    return {name: solve(limit) for name, limit in limits.items()}


def modelopt(place: Path, request: dict[str, Any]) -> dict[str, Choice]:
    """Return auto_quantize's choice with its own accounting."""
    limits = {name: weight_bits(limit) for name, limit in request["budgets"].items()}
    return auto_quantize(place, request, {"W4A4": 4.0, "W8A8": 8.0}, limits)


def modelopt_priced(place: Path, request: dict[str, Any]) -> dict[str, Choice]:
    """Return auto_quantize's choice where every scheme counts its bit operations."""
    stated = {scheme: 4.0 * times for scheme, times in COST.items()}
    limits = {name: 4.0 * limit for name, limit in request["budgets"].items()}
    return auto_quantize(place, request, stated, limits)


def autoround(place: Path, request: dict[str, Any]) -> dict[str, Choice]:
    """Return AutoScheme's choice for each budget."""
    from auto_round import AutoScheme
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme
    from auto_round.schemes import QuantizationScheme

    text = place / "calibration.json"
    text.write_text(json.dumps([{"text": one} for one in request["texts"]]))
    size, names = request["group_size"], sorted(request["macs"])
    scheme = AutoScheme(
        avg_bits=[weight_bits(limit) for limit in request["budgets"].values()],
        options=[
            QuantizationScheme(
                bits=weight,
                group_size=size,
                sym=True,
                data_type="int",
                act_bits=act,
                act_group_size=size,
                act_sym=True,
                act_data_type="int",
                act_dynamic=True,
            )
            for weight, act in (BITS["W4A4"], BITS["W8A8"])
        ],
        shared_layers=[sorted(group) for group in request["fused"]],
        ignore_scale_zp_bits=True,
        nsamples=len(request["texts"]),
        seqlen=len(request["ids"][0]),
        batch_size=1,
    )
    # What AutoRound(scheme=...).quantize() calls first; the rest would round the weights as well.
    found = GenScheme(
        scheme,
        load(place),
        names,
        {},
        dataset=str(text),
        tokenizer=AutoTokenizer.from_pretrained(place / "checkpoint"),
        device_map="cpu",
        enable_torch_compile=False,
    ).get_layer_config()
    scheme_of = {4: "W4A4", 8: "W8A8"}
    choices = ({n: scheme_of[layers[n]["bits"]] for n in names} for layers in found.values())
    return dict(zip(request["budgets"], choices, strict=True))


PEERS = {
    "ModelOpt": (modelopt, "nvidia-modelopt"),
    "ModelOpt, inputs priced": (modelopt_priced, "nvidia-modelopt"),
    "AutoRound": (autoround, "auto-round"),
}


def main() -> None:
    place = Path(sys.argv[1])
    request = json.loads((place / "request.json").read_text())
    target = place / "peers.json"
    answer = json.loads(target.read_text()) if target.exists() else {}
    for name in sys.argv[2:] or list(PEERS):
        search, package = PEERS[name]
        start = time.process_time()
        found = search(place, request)
        for budget, choice in found.items():
            assert cost(choice, request["macs"]) <= request["budgets"][budget] * (1 + 1e-9), budget
        answer[name] = {
            "version": metadata.version(package),
            "torch": torch.__version__,
            "tokens": sum(map(len, request["ids"])),
            "search_cpu_seconds": round(time.process_time() - start),
            "cost": {budget: cost(choice, request["macs"]) for budget, choice in found.items()},
            "choices": {
                budget: {module: one for module, one in choice.items() if one != "W4A4"}
                for budget, choice in found.items()
            },
        }
        target.write_text(json.dumps(answer, indent=1) + "\n")
        print(name, answer[name]["cost"])


if __name__ == "__main__":  # AutoScheme starts processes that import this file
    main()
