# SPDX-License-Identifier: Apache-2.0
"""What is divided, and what is refused; whole runs on two ranks are in ``tests/faults/test_rank_runs.py``."""

import pytest
import torch
from tiny_nest import POSITIONS, restored_weights, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


class Axis:
    """One axis of a mesh of ranks."""

    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def on_a_mesh(model, monkeypatch, data_parallel, tensor_parallel=1):
    mesh = {'data_parallel': Axis(data_parallel), 'tensor_parallel': Axis(tensor_parallel)}
    monkeypatch.setattr(type(model), 'device_mesh', mesh, raising=False)
    model.configure_model()


@POSITIONS
@pytest.mark.parametrize('objective', ['masked', 'next_token', 'both'])
def test_every_weight_that_is_trained_is_in_a_unit(position, objective):
    if position and objective != 'masked':
        pytest.skip('next tokens are predicted with masks before the convolutions only')
    model = tiny_model('model.encoder.n_layers=3', f'++model.objective={objective}', *position)
    units = list(model._units_to_shard())
    assert units[:3] == list(model.encoder.layers) and units.index(model.encoder) >= 3
    covered = {id(weight) for unit in units for weight in unit.parameters()}
    assert {id(weight) for weight in model.parameters() if weight.requires_grad} <= covered
    assert len(units) == len({id(unit) for unit in units})


def test_without_such_a_strategy_nothing_is_sharded(tmp_path):
    model = tiny_model()
    model.configure_model()
    assert {type(weight) for weight in model.parameters()} == {torch.nn.Parameter}
    model.save_to(str(tmp_path / 'model.nemo'))
    restored = restored_weights(tmp_path / 'model.nemo')
    assert all(torch.equal(restored[name], weight) for name, weight in model.state_dict().items())


def test_dividing_a_layers_work_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match='tensor_parallel_size is 2; it must be 1'):
        on_a_mesh(tiny_model(), monkeypatch, data_parallel=2, tensor_parallel=2)
    assert isinstance(tiny_model(), EncDecDenoiseMaskedTokenPredModel)
