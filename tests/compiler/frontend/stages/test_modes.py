"""Stages that were captured in training evaluate as their model does, and train as before."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from opweave.compiler.frontend.stages.split import split_model


class Attention(nn.Module):
    """With dropout inside of the product."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        query, key, value = self.wide(x).chunk(3, -1)
        mixed: Tensor = scaled_dot_product_attention(query, key, value, dropout_p=0.3 if self.training else 0.0)
        return x + mixed


class Model(nn.Module):
    """All that differs between training and evaluation; one of its norms is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(4), Attention(), nn.BatchNorm1d(4))
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)
        self.head = nn.Linear(8, 8)
        self.first[4].eval()

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        y: Tensor = self.head(dropout(self.recurrent(self.first(x))[0], 0.2, self.training))
        return y


def test_a_stage_evaluates_as_the_model_does() -> None:
    """The same outputs, nothing drawn, no buffer touched; then the same training as before, also of a copy."""
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(6, 4, 8)
    stages = split_model(model, (x,), ["head"]).modules
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def run(*modules: nn.Module) -> Tensor:
        torch.manual_seed(1)
        value = x
        for module in modules:
            value = module(value)
        return value

    trained = run(model)
    evaluated = model.eval()(x)
    for stage in (*stages, *stages):  # twice is as good as once
        stage.eval()
    assert not torch.equal(evaluated, trained)
    counted = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any(not torch.equal(before[name], buffer) for name, buffer in counted.items())
    torch.testing.assert_close(run(*stages), evaluated)
    torch.testing.assert_close(run(*copy.deepcopy(stages)), evaluated)
    assert all(torch.equal(counted[name], buffer) for name, buffer in model.named_buffers())
    for stage in (*stages, *stages):
        stage.train()
    torch.testing.assert_close(run(*stages), trained)
    assert model.get_buffer("first.2.num_batches_tracked") == 2
    assert model.get_buffer("first.4.num_batches_tracked") == 0
