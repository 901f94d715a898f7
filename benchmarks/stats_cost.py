"""What the statistics cost: python benchmarks/stats_cost.py

Prints CPU time on one thread (so that other work on the machine hardly shows): one update of
an input [2048, 1536] with and without two formats, its summary, and a training step of a small
Llama: plain, with a Recorder that is not recording, and with one that records every site.
"""

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bitplan.formats import parse_formats
from bitplan.probe import Recorder, TensorStats

FORMATS = parse_formats(("int4-g128", "int8-g128"))


def cpu_ms(work: Callable[[], object], repeats: int = 10) -> float:
    """Return the smallest CPU time of several runs, after one that does not count."""
    work()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(4, 512, 1536)
    bare = TensorStats(1536, operand="input")
    full = TensorStats(1536, operand="input", formats=FORMATS)
    print(f"update [2048, 1536]               {cpu_ms(lambda: bare.update(x)):8.1f} ms")
    print(f"update [2048, 1536], two formats  {cpu_ms(lambda: full.update(x)):8.1f} ms")
    print(f"summary                           {cpu_ms(full.summary):8.1f} ms")

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(1024, (4, 256))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    print(f"training step, 4 x 256 tokens     {cpu_ms(step):8.1f} ms")
    with Recorder(model, every=10**9, optimizer=optimizer):
        print(f"  with a Recorder, between steps  {cpu_ms(step):8.1f} ms")
    with Recorder(model, optimizer=optimizer):
        print(f"  recording all sites             {cpu_ms(step):8.1f} ms")
    with Recorder(model, formats=FORMATS, optimizer=optimizer):
        print(f"  recording with two formats      {cpu_ms(step):8.1f} ms")


if __name__ == "__main__":
    main()
