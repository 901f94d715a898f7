"""What running block by block saves and costs: peak memory and time against the whole model.

    python benchmarks/streamed_profile.py --folder DIR

Writes a Llama of random bf16 weights under DIR, profiles it with `--no-stream` and with `--stream`,
each as a process of its own, and removes it. Peak memory is the process's resident set, the mapped
files that it reads among it. The tables of both must be the same, byte for byte. Times are those of
`bitplan profile` from start to end, without reports; the result goes to
benchmarks/results/streamed_profile.json.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitplan.rundir import hardware, versions, write_json

RESULT = Path(__file__).parent / "results" / "streamed_profile.json"
VOCABULARY = 16_384
SHARD = "500MB"
IMPORTS = "import bitplan.probe.profile, nnsight, transformers.models.llama.modeling_llama"
PEAK = """
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
FILES = ("profile.parquet", "errors.parquet", "sensitivity.parquet")


def write_checkpoint(directory: Path, asked: argparse.Namespace) -> tuple[int, int]:
    """Write the model and a tokenizer of bytes; return its parameters and those of a block."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=asked.hidden,
        intermediate_size=8 * asked.hidden // 3 // 128 * 128,
        num_hidden_layers=asked.blocks,
        num_attention_heads=asked.hidden // 64,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory, max_shard_size=SHARD)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    return sum(p.numel() for p in model.parameters()), block


def profile(model: Path, run: Path, asked: argparse.Namespace, flag: str) -> dict[str, float]:
    """Run the command; return its wall and CPU seconds and its peak memory."""
    words = ["profile", str(model), "-o", str(run), "--device", "cpu", flag]
    words += ["--tokens", str(asked.tokens), "--seq-len", str(asked.seq_len)]
    code = f"from bitplan.cli import main; main({words!r}, standalone_mode=False)"
    return measured(code)


def measured(code: str) -> dict[str, float]:
    """Run code as a process of its own; return its wall and CPU seconds and its peak memory."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", code + PEAK]
    # The kernel's ru_maxrss of a child begins with the memory of its parent; VmHWM does not.
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(cpu, 1),
        "peak_rss_gb": round(int(text.split()[-2]) * 1024 / 1e9, 2),
    }


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint may lie")
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        model = Path(folder) / "model"
        parameters, block = write_checkpoint(model, asked)
        found: dict[str, Any] = {"imports_alone_gb": measured(IMPORTS)["peak_rss_gb"]}
        for name, flag in (("whole", "--no-stream"), ("streamed", "--stream")):
            found[name] = profile(model, Path(folder) / name, asked, flag)
        same = all(
            (Path(folder) / "whole" / name).read_bytes()
            == (Path(folder) / "streamed" / name).read_bytes()
            for name in FILES
        )
    whole, streamed = found["whole"], found["streamed"]
    result = {
        "parameters": parameters,
        "weights_bf16_gb": round(2 * parameters / 1e9, 2),
        "weights_float32_gb": round(4 * parameters / 1e9, 2),
        "block_float32_gb": round(4 * block / 1e9, 2),
        "blocks": asked.blocks,
        "tokens": asked.tokens,
        "seq_len": asked.seq_len,
        **found,
        "peak_rss_ratio": round(streamed["peak_rss_gb"] / whole["peak_rss_gb"], 2),
        "cpu_ratio": round(streamed["cpu_s"] / whole["cpu_s"], 2),
        "tables_are_equal": same,
        "threads": int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())),
        "load_average": round(os.getloadavg()[2], 1),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "hardware": hardware(),
        "versions": dict(versions()),
    }
    write_json(asked.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
