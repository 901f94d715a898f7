import pickle

import torch
from torch import nn

from bitplan.probe.trace import execution_order, traced


class Odd(nn.Module):
    """Runs its layers in another order than it declares them, one twice and one never."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(4, 4)  # a name that nnsight keeps for itself
        self.unused = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.embed = nn.Embedding(10, 4)

    def forward(self, input_ids):
        return self.output(self.output(self.first(self.embed(input_ids))))


class Watch:
    def __init__(self, replace=None) -> None:
        self.inputs, self.outputs, self.replace = {}, {}, replace

    def on_input(self, name, x):
        self.inputs[name] = x
        return self.replace(x) if self.replace and name == "first" else None

    def on_output(self, name, y):
        self.outputs[name] = y


NAMES = ["output", "unused", "first", "embed"]
IDS = torch.tensor([[1, 2, 3]])


def test_the_order_is_that_of_execution():
    assert execution_order(Odd(), NAMES, IDS) == (["embed", "first", "output"], ("output",))


def test_a_watcher_sees_what_runs_and_the_output_comes_back():
    torch.manual_seed(0)
    model, watch = Odd(), Watch()
    with torch.no_grad(), traced(model, NAMES) as tracer:
        output = tracer.run(IDS, watch)
    embedded = model.embed(IDS)
    assert set(watch.inputs) == {"embed", "first", "output"}
    assert torch.equal(watch.inputs["first"], embedded)
    assert torch.equal(watch.inputs["output"], model.first(embedded))
    assert torch.equal(watch.outputs["output"], model.output(model.first(embedded)))
    assert torch.equal(output, model(IDS))
    assert tracer.repeated == ("output",)


def test_what_a_watcher_returns_takes_the_place_of_the_input():
    model = Odd()
    with torch.no_grad(), traced(model, NAMES) as tracer:
        output = tracer.run(IDS, Watch(replace=lambda x: 2 * x))
        expected = model.output(model.output(model.first(2 * model.embed(IDS))))
    assert torch.equal(output, expected)


def test_the_model_can_be_pickled_afterwards():
    model = Odd()
    with torch.no_grad(), traced(model, NAMES) as tracer:
        tracer.run(IDS, Watch())
    clone = pickle.loads(pickle.dumps(model))
    assert torch.equal(clone(IDS), model(IDS))
