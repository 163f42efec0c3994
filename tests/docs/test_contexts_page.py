# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.att_context import PRESETS
from nemo.collections.asr.parts.att_context.synced_collate import ContextDraw

PAGE = (Path(__file__).resolve().parents[2] / 'docs/contexts.md').read_text()


def snippets(language):
    return re.findall(rf'```{language}\n(.*?)```', PAGE, flags=re.DOTALL)


def first_of(samples):
    return samples[0]


@pytest.mark.unit
@pytest.mark.parametrize('position', ['pre_conv', 'post_conv'])
def test_every_snippet_runs(position):
    model = tiny_model(
        'model.encoder.att_context_size=[[80,0],[160,0],[240,0],[320,0],[-1,0]]',
        f'model.mask_position={position}',
        'model.quantizer.combine_time_steps=' + ('8' if position == 'pre_conv' else '1'),
    )
    batch = noise_batch()
    names = {
        'model': model,
        'audio': batch.audio,
        'lengths': batch.audio_len,
        'dataset': [noise_batch(seed=seed) for seed in range(4)],
        'base_collate_fn': first_of,
    }
    assert len(snippets('python')) == 7
    for snippet in snippets('python'):
        exec(snippet, names)
        assert model.encoder.att_context_size == [80, 0]  # each leaves the model as it was
    assert isinstance(names['encoded'], torch.Tensor)
    for entry in (
        'set_att_context_size',
        'using_att_context_size',
        'set_dynamic_context',
        'sync_masking_to_attention',
        'DynamicContextModel',
        'EnhancedDynamicContextModel',
        'create_synced_context_collate',
    ):
        assert any(entry in snippet for snippet in snippets('python'))


@pytest.mark.unit
def test_the_config_is_one():
    (config,) = snippets('yaml')
    ContextDraw.parse(**OmegaConf.create(config).model.train_ds.synced_contexts)


@pytest.mark.unit
def test_the_presets_are_these():
    rows = re.findall(r'^\| `(\w+)` \| `\[(-?\d+), (\d+)\]`', PAGE, flags=re.MULTILINE)
    assert {name: (int(left), int(right)) for name, left, right in rows} == PRESETS
