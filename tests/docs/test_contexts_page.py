# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tiny_nest import noise_batch, tiny_model

from nemo.collections.asr.parts.att_context import PRESETS, AttContext, AttContextCurriculum, parse_layer_contexts
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler
from nemo.collections.asr.parts.att_context.precedence import context_of_batch
from nemo.collections.asr.parts.att_context.synced_collate import ContextDraw

PAGE = (Path(__file__).resolve().parents[2] / 'docs/contexts.md').read_text()


def snippets(language):
    return re.findall(rf'```{language}\n(.*?)```', PAGE, flags=re.DOTALL)


def first_of(samples):
    return samples[0]


@pytest.mark.parametrize('position', ['pre_conv', 'post_conv'])
def test_every_snippet_runs(position):
    model = tiny_model(
        'model.encoder.att_context_size=[[80,0],[160,0],[240,0],[320,0],[-1,0]]',
        f'model.mask_position={position}',
        *(['model.quantizer.combine_time_steps=1', 'model.loss.decoder_offset=0'] * (position == 'post_conv')),
    )
    batch = noise_batch()
    names = {
        'model': model,
        'audio': batch.audio,
        'lengths': batch.audio_len,
        'dataset': [noise_batch(seed=seed) for seed in range(4)],
        'base_collate_fn': first_of,
    }
    assert len(snippets('python')) == 9
    for snippet in snippets('python'):
        exec(snippet, names)
        assert model.encoder.att_context_size == [80, 0]  # each leaves the model as it was
    assert names['log_probs'].shape[:2] == names['output'].encoded.shape[::2] and not names['masks'].any()
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


def test_the_configs_are_such():
    synced, layered, curriculum, sampled = (OmegaConf.create(config) for config in snippets('yaml'))
    synced, sampled = synced.model, sampled.model
    contexts = parse_layer_contexts(layered.model.encoder.layer_att_context_size, 17, 'layers')
    assert [context.left for context in contexts] == [40] * 6 + [120] * 6 + [320] * 5
    assert AttContextCurriculum(**curriculum.curriculum).schedule.at(60000).left == 160
    path = AttContextCurriculum(start=[40, 0], end=[320, 0], warmup_steps=150000)
    assert path.schedule.at(75000).left == 180
    ContextDraw.parse(**synced.train_ds.synced_contexts)
    ContextSampler.parse(sampled.encoder.att_context_sampler)


def test_the_presets_are_these():
    rows = re.findall(r'^\| `(\w+)` \| `\[(-?\d+), (\d+)\]`', PAGE, flags=re.MULTILINE)
    assert {name: (int(left), int(right)) for name, left, right in rows} == PRESETS


def test_who_wins_is_said_in_the_order_of_the_code():
    """Each of the first four rows wins over those below it, and the fifth narrows whatever wins."""
    rows = re.findall(r'^\| (\d) \| ([^|]+) \|', PAGE, flags=re.MULTILINE)
    assert [number for number, _ in rows] == [str(number) for number in range(1, 9)]
    names = ['set by hand', 'that came with the batch', 'drawn', 'default']
    assert [name for _, name in rows[:4]] == names and 'ceiling' in rows[4][1]
    said = {
        'by_hand': AttContext(1, 0),
        'with_batch': AttContext(2, 0),
        'draw': lambda: AttContext(3, 0),
        'default': AttContext(4, 0),
    }
    for left, argument in enumerate(tuple(said), start=1):
        assert context_of_batch(**said) == AttContext(left, 0)
        assert context_of_batch(**said, ceiling=AttContext(0, 0)) == AttContext(0, 0)
        del said[argument]
