r"""Files for llama.cpp: `--tensor-type-file`, a line `regex=type` per set of tensors.

The tensors of a GGUF file have names of their own. The first pattern that is found in a name
decides, so every pattern matches a whole name and no two match the same one. Linears that the plan
leaves alone are listed as well: what no line names, llama-quantize decides itself.
"""

import re
from collections.abc import Sequence

from bitplan.errors import PlanError
from bitplan.planner.layers import Group, patterns

TYPES, USE = "tensor_types.txt", "use.sh"
PLAIN = "bf16"
# The end of a module's path to the tensor's name in a GGUF file.
TENSORS = {
    r"(?:self_attn|attn|attention)\.q_proj": "attn_q",
    r"(?:self_attn|attn|attention)\.k_proj": "attn_k",
    r"(?:self_attn|attn|attention)\.v_proj": "attn_v",
    r"(?:self_attn|attn|attention)\.(?:o_proj|out_proj|dense)|attn\.c_proj": "attn_output",
    r"self_attn\.qkv_proj|attn\.c_attn|attention\.query_key_value": "attn_qkv",
    r"mlp\.gate_proj": "ffn_gate",
    r"mlp\.(?:up_proj|gate_up_proj|c_fc|dense_h_to_4h)|layers\.\d+\.fc1": "ffn_up",
    r"mlp\.(?:down_proj|c_proj|dense_4h_to_h)|layers\.\d+\.fc2": "ffn_down",
    r"lm_head|embed_out": "output",
    r"embed_tokens|wte|embed_in": "token_embd",
}
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")

_USE = """# Quantize a GGUF file in bf16 with llama.cpp: sh use.sh MODEL-BF16.gguf OUT.gguf
# Tensors that the file does not name get the type at the end; none should be left but norms.
llama-quantize --tensor-type-file "$(dirname "$0")/{types}" "$1" "$2" Q8_0
"""


def llama_cpp(groups: Sequence[Group], plain: Sequence[str], head: str) -> dict[str, str]:
    """Return the file of types and the command that uses it.

    Raises PlanError for a module whose name in a GGUF file is not known.
    """
    of_type = {group.storage: [tensor(name) for name in group.modules] for group in groups}
    of_type[PLAIN] = [tensor(name) for name in plain]
    lines = [
        f"^{pattern}$={kind}" for kind, names in of_type.items() for pattern in patterns(names)
    ]
    return {TYPES: "\n".join(lines) + "\n", USE: head + _USE.format(types=TYPES)}


def tensor(module: str) -> str:
    """Return the name of a module's weight in a GGUF file; raise PlanError for an unknown one."""
    block = _BLOCK.search(module)
    for pattern, name in TENSORS.items():
        if re.search(rf"(?:^|\.)(?:{pattern})$", module):
            return f"blk.{block[1]}.{name}.weight" if block else f"{name}.weight"
    raise PlanError(f"{module}: its name in a GGUF file is not known, so llama.cpp cannot be told")
