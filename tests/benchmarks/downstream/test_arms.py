# SPDX-License-Identifier: Apache-2.0
"""What arms have in common, and what alone differs."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo.collections.asr.parts.utils.pretraining_checks import check_known_keys, check_own_sections

SMALL = ['model.encoder.n_heads=2', 'model.encoder.subsampling_conv_channels=8', 'model.train_ds=null']
SMALL += ['model.validation_ds=null']
STREAMING = (
    'scratch',
    'stock',
    'stock-short',
    'synchronised',
    'layers',
    'next_token',
    'both',
    'both-stock',
    'both-refined',
)


@pytest.fixture(scope='module')
def arms(load):
    return load('arms')


@pytest.fixture(scope='module')
def overrides(load, arms):
    """Return a function that gives the overrides of an arm in a small size."""
    settings = load('settings').Settings(layers=3, width=16, classes=8, pretraining_steps=30)
    masks = {name: {'block_size': 30, 'mask_prob': 0.02} for name in arms.MASKED}
    own = ('model.train_ds.', 'model.preprocessor.normalize=')
    made = lambda name, seed=0: arms.overrides(name, settings, seed, masks)  # noqa: E731
    return lambda name, seed=0: [word for word in made(name, seed) if not word.startswith(own)] + SMALL


def config(load, arms, words):
    with initialize_config_dir(str(load('save_untrained').CONFIGS), version_base=None):
        return compose(arms.CONFIG, overrides=words)


def test_every_streaming_arm_begins_with_the_same_encoder_and_another_seed_with_another(load, arms, overrides):
    build = load('save_untrained').build
    first = build(arms.CONFIG, overrides('synchronised'))
    weights = torch.nn.utils.parameters_to_vector(first.encoder.parameters())
    for name in STREAMING[:1] + STREAMING[2:]:
        model = build(arms.CONFIG, overrides(name))
        assert torch.equal(torch.nn.utils.parameters_to_vector(model.encoder.parameters()), weights), name
        drawn = [model.encoder.draw_att_context_size(step) for step in range(20)]
        assert drawn == [first.encoder.draw_att_context_size(step) for step in range(20)], name
        assert _same(first.quantizer.state_dict(), model.quantizer.state_dict()), name
    other = build(arms.CONFIG, overrides('synchronised', seed=1))
    assert not torch.equal(torch.nn.utils.parameters_to_vector(other.encoder.parameters()), weights)


def test_configs_have_known_keys_only_and_differ_where_the_arms_do(load, arms, overrides):
    plain = OmegaConf.to_container(config(load, arms, overrides('synchronised')))
    differing = {}
    for name in [*arms.ARMS, 'synchronised-refined']:
        cfg = config(load, arms, overrides(name))
        check_known_keys(cfg.model)
        check_own_sections(cfg)
        differing[name] = sorted(_differences(plain, OmegaConf.to_container(cfg)))
    assert differing['stock'] == differing['stock-short'] == ['model.masking.causal']
    assert [name for name, arm in arms.ARMS.items() if arm.ignores_context] == [
        'offline',
        'stock',
        'stock-short',
        'both-stock',
    ]
    assert differing['layers'] == ['curriculum', 'model.encoder.layer_att_context_size']
    assert differing['next_token'] == ['model.masking.block_size', 'model.masking.mask_prob', 'model.objective']
    assert differing['both'] == ['model.objective']
    assert differing['synchronised-refined'] == ['model.quantizer.refine']
    assert set(differing['offline']) >= {
        'model.masking.causal',
        'model.encoder.conv_norm_type',
        'model.loss.decoder_offset',
    }


def _same(first, second):
    """Whether second has all that first has, and the same."""
    return all(torch.equal(weights, second[name]) for name, weights in first.items())


def _differences(one, other, at=''):
    """Yield the keys of nested configs whose values differ, or that one of them lacks."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield at.lstrip('.')
        return
    for key in {*one, *other}:
        yield from _differences(one.get(key), other.get(key), f'{at}.{key}')


def test_layers_and_ceilings_go_from_the_tightest_context_to_the_widest(load, arms):
    made = arms.overrides('layers', load('settings').Settings(), 0, {})
    assert made[-2].endswith('=[[0, [5, 0]], [2, [10, 0]], [4, [20, 0]]]')
    assert made[-1] == '+curriculum={milestones: [[0, [5, 0]], [1000, [10, 0]], [2000, [20, 0]]]}'


@pytest.mark.parametrize('name', ['nonsense', 'scratch-refined', 'both-refined-refined'])
def test_an_unknown_arm_is_refused_with_the_names_that_there_are(arms, name):
    with pytest.raises(ValueError, match=f'--arm is {name!r}; it must be one of scratch, offline, stock'):
        arms.find(name)


def test_arms_are_compared_with_those_that_there_are(arms):
    assert arms.compared(['scratch', 'both', 'both-refined']) == [('scratch', 'both'), ('both', 'both-refined')]


@pytest.mark.parametrize(
    'changed, message',
    [(dict(layers=0), '--layers is 0; it must be above 0'), (dict(smaller_minutes=60.0), '--smaller_minutes is 60.0')],
)
def test_settings_that_cannot_work_are_refused(load, changed, message):
    with pytest.raises(ValueError, match=message):
        load('settings').Settings(**changed)


def test_a_working_folder_of_other_settings_is_refused(load, tmp_path):
    settings = load('settings')
    settings.Settings().claim(tmp_path)
    settings.Settings().claim(tmp_path)
    assert json.loads((tmp_path / 'settings.json').read_text())['layers'] == 5
    with pytest.raises(ValueError, match='settings.json: layers is 5, and 4 elsewhere'):
        settings.Settings(layers=4).claim(tmp_path)
