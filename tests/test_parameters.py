"""Planned = built: each published model, on the meta device, has the planner's tensors and its total to the integer."""

import pytest
import torch

from fewfire.families import published
from fewfire.model.build import build_model
from fewfire.plan.count import count
from fewfire.plan.shapes import model_tensors


@pytest.mark.parametrize("name", published.names())
def test_planned_parameters_are_the_built_ones(name):
    config = published.load(name)
    with torch.device("meta"):
        model = build_model(config)
    built = {key: tuple(values.shape) for key, values in model.state_dict().items()}
    assert built == {spec.name: tuple(spec.shape) for spec in model_tensors(config)}
    parameters = sum(values.numel() for values in model.parameters())
    buffers = sum(values.numel() for key, values in model.named_buffers() if key.endswith("select_bias"))
    assert parameters + buffers == count(config).total
    assert len(list(model.named_buffers())) == sum(key.endswith("select_bias") for key in built)
