"""Weight layout of the stock modules."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.errors import ModelError
from compress.models.layout import is_embedding, is_norm, is_product, out_first, slot_dims, weight_of


@pytest.mark.parametrize("product", [nn.Linear(3, 5), Conv1D(5, 3)])
def test_a_product_is_its_weight_read_as_out_by_in(product):
    states = torch.randn(2, 3)
    assert weight_of(product).shape == (5, 3)
    torch.testing.assert_close(product(states), states @ weight_of(product).T + product.bias)
    assert weight_of(product).data_ptr() == product.weight.data_ptr()
    for side, size in (("out", 5), ("in", 3)):
        assert {getattr(product, name).shape[dim] for name, dim in slot_dims(product, side)} == {size}
    assert [name for name, _ in slot_dims(product, "out")] == ["weight", "bias"]
    assert out_first(product) == isinstance(product, nn.Linear)


def test_sides_of_other_modules():
    assert slot_dims(nn.Linear(3, 5, bias=False), "out") == [("weight", 0)]
    assert slot_dims(nn.Embedding(7, 3), "out") == [("weight", 1)]
    assert slot_dims(nn.LayerNorm(3), "out") == [("weight", 0), ("bias", 0)]
    for module in (nn.Embedding(7, 3), nn.LayerNorm(3)):
        with pytest.raises(ModelError, match="has no 'in' dimension that can be pruned"):
            slot_dims(module, "in")
    with pytest.raises(ModelError, match="Dropout"):
        slot_dims(nn.Dropout(), "out")


def test_kinds_are_distinct():
    kinds = (is_product, is_norm, is_embedding)
    for module, expected in ((nn.Linear(1, 1), 0), (Conv1D(1, 1), 0), (nn.LayerNorm(1), 1), (nn.Embedding(1, 1), 2)):
        assert [kind(module) for kind in kinds] == [index == expected for index in range(3)]
