# SPDX-License-Identifier: Apache-2.0
"""Layers' contexts in runs with sharded weights."""

from pathlib import Path

import pytest
import torch
from ranks import run_on_two_ranks

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel


@pytest.mark.integration
def test_a_hierarchical_run_writes_a_checkpoint_and_a_file_and_goes_on(tmp_path):
    found = run_on_two_ranks(Path(__file__).with_name('sharded_hierarchy.py'), tmp_path)
    contexts = found[0]['contexts']
    assert [rank['step'] for rank in found] == [4, 4] and len(contexts) == 4
    assert not [
        name for name in torch.load(tmp_path / 'two.ckpt', weights_only=False)['state_dict'] if 'context' in name
    ]
    restored = EncDecDenoiseMaskedTokenPredModel.restore_from(str(tmp_path / 'trained.nemo'), map_location='cpu')
    assert [context.as_list() for context in restored.encoder.layer_att_contexts()] == contexts
