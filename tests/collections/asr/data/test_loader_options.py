# SPDX-License-Identifier: Apache-2.0
"""That the options reach a model's training is tested in ``test_ssl_models_contexts.py`` and ``test_ssl_dataset.py``."""

import pytest
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from nemo.collections.asr.data.loader_options import take_own_options, with_own_options

SYNCED = {'context_options': [[10, 0], [20, 0]], 'seed': 5}


@pytest.mark.parametrize('kind', [dict, OmegaConf.create])
def test_own_options_are_taken_out_of_a_copy(kind):
    section = kind({'batch_size': 2, 'synced_contexts': SYNCED, 'resumable': None, 'augmentor': None})
    rest, own = take_own_options(section)
    assert dict(rest) == {'batch_size': 2, 'resumable': None} and own == {'synced_contexts': SYNCED}
    assert section['synced_contexts'] == SYNCED and 'augmentor' in section
    assert take_own_options(rest) == (rest, {}) and take_own_options(None) == (None, {})


@pytest.mark.parametrize(
    'options, message',
    [
        ({'seed': 5}, 'it must have context_options'),
        ({**SYNCED, 'probs': [1.0]}, 'synced_contexts.probs is not known'),
    ],
)
def test_bad_contexts_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        with_own_options(DataLoader([1, 2]), synced_contexts=options)


def test_contexts_need_a_loader_that_collates():
    with pytest.raises(ValueError, match='synced_contexts needs a torch data loader; list collates nothing'):
        with_own_options([1, 2], synced_contexts=SYNCED)
