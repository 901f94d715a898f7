"""What ModelOpt's auto_quantize and AutoRound's AutoScheme choose for alternatives.py.

    PEERS/bin/python benchmarks/alternatives_peers.py DIR

DIR/request.json and the checkpoint DIR/checkpoint come from `alternatives.py ask`; the answer is
DIR/peers.json. PEERS is an environment with nvidia-modelopt and auto-round, which bitplan itself
does without: so this script imports nothing of bitplan.

Both peers choose a scheme for a linear as a whole, and both budgets count weights alone: 8-bit
inputs are free to them. So that a choice of theirs costs what it is allowed, their menu is W4A4 and
W8A8, and a budget becomes the average of weight bits that costs as much. Weights are
integers in groups as in bitplan; inputs have a scale per token, the closest that ModelOpt runs on a
CPU (AutoRound takes groups there too). Leaving a layer at 16 bits costs 16 times W4A4 and is not on
the menu. Of ModelOpt the scores of W4A4 and W4A8 are kept as well, for a choice that prices inputs.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = {4: "W4A4", 8: "W8A8"}

Choice = dict[str, str]


def cost(choice: Choice, macs: dict[str, int]) -> float:
    """Return bit operations over those of W4A4 everywhere."""
    times = {"W4A4": 1, "W8A8": 4}
    return sum(times[choice[m]] * n for m, n in macs.items()) / sum(macs.values())


def weight_bits(limit: float) -> float:
    """Return the average weight bits of W4A4 and W8A8 at that cost: W8A8 costs four times W4A4."""
    return 4 + 4 * (limit - 1) / 3


def load(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "checkpoint", dtype=torch.float32)


def auto_quantize(
    place: Path, request: dict[str, Any], menu: list[tuple[int, int]]
) -> tuple[dict[str, Any], Callable[[float], dict[str, float]]]:
    """Return ModelOpt's search state over (weight, input) bits, and its constraint for a budget."""
    import modelopt.torch.quantization as mtq

    def config(weight_bits: int, input_bits: int) -> dict[str, Any]:
        weight = {"num_bits": weight_bits, "block_sizes": {-1: request["group_size"]}}
        token = {"num_bits": input_bits, "block_sizes": {-1: None, "type": "dynamic"}}
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": weight},
                {"quantizer_name": "*input_quantizer", "cfg": token},
            ],
            "algorithm": "max",
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
        constraints=effective(8.0),
        module_search_spaces=[
            {
                "module_name_patterns": planned,
                "quantization_formats": [config(*bits) for bits in menu],
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
    return state, effective


def modelopt(place: Path, request: dict[str, Any]) -> dict[str, Choice]:
    """Return auto_quantize's choice (gradient scores) for each budget."""
    from modelopt.torch.quantization.algorithms import get_auto_quantize_config

    state, effective = auto_quantize(place, request, [(4, 4), (8, 8)])

    def solve(bits: float) -> Choice:
        found = get_auto_quantize_config(state, effective(bits))["quant_cfg"]
        weights = {
            entry["quantizer_name"].removesuffix(".weight_quantizer"): entry["cfg"]["num_bits"]
            for entry in found
            if entry["quantizer_name"].endswith(".weight_quantizer")
        }
        return {name: SCHEMES[weights[name]] for name in request["macs"]}

    return {name: solve(weight_bits(limit)) for name, limit in request["budgets"].items()}


def modelopt_gains(place: Path, request: dict[str, Any]) -> dict[str, float]:
    """Return by how much 8-bit inputs lower the score of each linear's group, by linear."""
    state, _ = auto_quantize(place, request, [(4, 4), (4, 8)])
    gains = {}
    for group in state["candidate_stats"].values():
        low, high = group["scores"]
        gains |= dict.fromkeys(group["module_names"], low - high)
    return {name: gains[name] for name in request["macs"]}


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
                bits=bits,
                group_size=size,
                sym=True,
                data_type="int",
                act_bits=bits,
                act_group_size=size,
                act_sym=True,
                act_data_type="int",
                act_dynamic=True,
            )
            for bits in SCHEMES
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
    choices = ({n: SCHEMES[layers[n]["bits"]] for n in names} for layers in found.values())
    return dict(zip(request["budgets"], choices, strict=True))


PEERS = {"ModelOpt": (modelopt, "nvidia-modelopt"), "AutoRound": (autoround, "auto-round")}


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
            "W8A8": {
                budget: [module for module, scheme in choice.items() if scheme == "W8A8"]
                for budget, choice in found.items()
            },
        }
        if name == "ModelOpt":
            answer[name]["input_gain"] = modelopt_gains(place, request)
        target.write_text(json.dumps(answer, indent=1) + "\n")
        print(name, answer[name]["cost"])


if __name__ == "__main__":  # AutoScheme starts processes that import this file
    main()
