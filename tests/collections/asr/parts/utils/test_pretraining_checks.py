# SPDX-License-Identifier: Apache-2.0
"""Every mistake in a config or a manifest ends in one error that names it."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nemo.collections.asr.parts.utils.pretraining_checks import check_pretraining_config

CONFIGS = Path(__file__).parents[5] / 'examples' / 'asr' / 'conf' / 'ssl' / 'nest'
CONFIG_NAMES = sorted(path.stem for path in CONFIGS.glob('*.yaml'))


def entry(path, duration=2.0, **more):
    return {'audio_filepath': str(path), 'duration': duration, **more}


def write(path, entries):
    path.write_text(''.join(json.dumps(each) + '\n' for each in entries), encoding='utf-8')
    return str(path)


@pytest.fixture(scope='session')
def speech(tmp_path_factory):
    """A folder with a manifest of two utterances that are files, which is all that is looked at."""
    folder = tmp_path_factory.mktemp('speech')
    for name in ('a.wav', 'b.wav'):
        (folder / name).touch()
    write(folder / 'train.json', [entry('a.wav'), entry(folder / 'b.wav', 9.5)])
    return folder


@pytest.fixture(scope='session')
def composed(speech):
    """Each shipped config, with manifests; not to be written to."""
    manifest = speech / 'train.json'
    overrides = [f'model.{name}.manifest_filepath={manifest}' for name in ('train_ds', 'validation_ds')]
    with initialize_config_dir(str(CONFIGS.resolve()), version_base=None):
        return {name: compose(name, overrides=overrides) for name in CONFIG_NAMES}


@pytest.fixture
def cfg(composed):
    """A copy of the streaming config, open to new keys."""
    copy = composed['nest_fast-conformer_streaming'].copy()
    OmegaConf.set_struct(copy, False)
    return copy


def assert_error(cfg, *words):
    with pytest.raises(ValueError) as error:
        check_pretraining_config(cfg)
    for word in words:
        assert word in str(error.value)


class TestShippedConfigs:
    @pytest.mark.parametrize('name', CONFIG_NAMES)
    def test_pass(self, composed, name):
        check_pretraining_config(composed[name])

    def test_ask_for_the_manifests(self):
        with initialize_config_dir(str(CONFIGS.resolve()), version_base=None):
            cfg = compose('nest_fast-conformer_streaming')
        assert_error(cfg, 'model.train_ds.manifest_filepath', 'model.validation_ds.manifest_filepath')

    def test_lhotse_data_may_be_of_another_kind_but_must_be_there(self, composed):
        cfg = composed['nest_fast-conformer_streaming_lhotse'].copy()
        cfg.model.train_ds.manifest_filepath = None
        assert_error(cfg, 'model.train_ds.manifest_filepath is None', 'or shar_path, or input_cfg')
        cfg.model.train_ds.input_cfg = [
            {'type': 'nemo', 'manifest_filepath': cfg.model.validation_ds.manifest_filepath}
        ]
        check_pretraining_config(cfg)

    def test_validation_may_be_left_out(self, cfg):
        cfg.model.validation_ds = None
        check_pretraining_config(cfg)


def test_post_conv_needs_both_of_its_settings(cfg):
    cfg.model.mask_position = 'post_conv'
    assert_error(cfg, 'model.quantizer.combine_time_steps is 8', 'mask_position post_conv', 'must be 1')
    cfg.model.quantizer.combine_time_steps = 1
    assert_error(cfg, 'model.loss.decoder_offset is 1', 'mask_position post_conv', 'must be 0')
    del cfg.model.loss.decoder_offset
    check_pretraining_config(cfg)


class TestKeys:
    @pytest.mark.parametrize(
        'key, hint',
        [
            ('model.target_normalise', 'did you mean model.target_normalize?'),
            ('model.encoder.att_context_sizes', 'did you mean model.encoder.att_context_size?'),
            ('model.loss.zzz', 'model.loss takes combine_time_steps, decoder_offset'),
            ('model.train_ds.max_duraton', 'did you mean model.train_ds.max_duration?'),
            ('curiculum', 'did you mean curriculum?'),
            ('curriculum.colour', 'takes end, interpolate, milestones, start, warmup_steps'),
            ('model.train_ds.synced_contexts.context_option', 'model.train_ds.synced_contexts.context_options?'),
            ('model.encoder.layer_att_context_size.anchor', 'model.encoder.layer_att_context_size.anchors?'),
            ('trainer.max_step', 'did you mean trainer.max_steps?'),
            ('exp_manager.checkpoint_callback_params.save_topk', 'exp_manager.checkpoint_callback_params.save_top_k?'),
        ],
    )
    def test_a_misspelt_key_is_answered_with_the_nearest(self, cfg, key, hint):
        OmegaConf.update(cfg, key, 1, force_add=True)
        assert_error(cfg, key, hint)

    def test_a_strategy_may_pass_settings_on(self, cfg):
        strategy = {'_target_': 'lightning.pytorch.strategies.DDPStrategy', 'gradient_as_bucket_view': True}
        OmegaConf.update(cfg, 'trainer.strategy', strategy, force_add=True)
        check_pretraining_config(cfg)

    def test_a_missing_section(self, cfg):
        cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
        del cfg.model.quantizer
        assert_error(cfg, 'no section model.quantizer')
        assert_error(OmegaConf.create({'trainer': {}}), 'no section model')

    @pytest.mark.parametrize(
        ('key', 'value', 'words'),
        [
            ('objective', 'next', ("model.objective is 'next'", 'next_token')),
            ('next_token', {'horizon': 3}, ('model.next_token.horizon', 'model.next_token.horizons')),
            ('preprocessor.normalize', 'per_feature', ('model.preprocessor.normalize is per_feature', 'fixed')),
        ],
    )
    def test_what_an_objective_cannot_be_asked_for(self, cfg, key, value, words):
        cfg.model.objective = 'both'
        OmegaConf.update(cfg, f'model.{key}', value)
        assert_error(cfg, *words)

    @pytest.mark.parametrize('target', ['nemo.collections.asr.modules.ConformerEncodr', 'Encoder'])
    def test_a_target_that_cannot_be_imported(self, cfg, target):
        cfg.model.encoder._target_ = target
        assert_error(cfg, 'model.encoder._target_', target)

    def test_other_keys_of_nemo_and_of_the_user_pass(self, cfg):
        cfg.model.train_ds.update(shuffle_n=2048, bucketing_batch_size=None, tarred_shard_strategy='scatter')
        cfg.model.my_notes = 'mine'
        check_pretraining_config(cfg)
