# SPDX-License-Identifier: Apache-2.0
"""What version 0.1 saved still loads and goes on as it did there; ``version_0_1/README.md`` says what the files are."""

import lightning.pytorch as pl
import pytest
import torch
from compatibility.version_0_1 import make
from omegaconf import OmegaConf
from tiny_nest import RecordingLogger

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context import AttContextCurriculum
from nemo.collections.asr.parts.utils.pretraining_checks import check_pretraining_config
from nemo.utils.trainer_utils import resolve_trainer_cfg

FOLDER = make.Path(make.__file__).parent
TOLERANCE = dict(rtol=0, atol=1e-5)


@pytest.fixture(scope='module')
def expected():
    return torch.load(FOLDER / 'expected.pt')


@pytest.fixture(scope='module')
def streams():
    return torch.load(FOLDER / 'stream_state.pt')


@pytest.fixture
def manifest(tmp_path):
    return make.write_utterances(tmp_path)


def layer_contexts(model) -> list:
    return [context.as_list() for context in model.encoder.layer_att_contexts()]


class TestModel:
    @pytest.mark.unit
    def test_keeps_its_contexts(self):
        model = make.restore_model(FOLDER)
        assert layer_contexts(model) == make.LAYER_CONTEXTS
        assert list(map(list, model.encoder.att_context_size_all)) == make.CONTEXTS
        assert list(model.encoder.att_context_size) == make.CONTEXTS[0]

    @pytest.mark.unit
    def test_takes_its_contexts_from_the_weights_alone(self):
        cfg = EncDecDenoiseMaskedTokenPredModel.restore_from(str(FOLDER / 'model.nemo'), return_config=True)
        del cfg.encoder.layer_att_context_size
        model = EncDecDenoiseMaskedTokenPredModel.restore_from(
            str(FOLDER / 'model.nemo'), override_config_path=cfg, map_location='cpu'
        )
        assert layer_contexts(model) == make.LAYER_CONTEXTS

    @pytest.mark.unit
    def test_gives_the_same_outputs(self, expected):
        found = make.offline_outputs(make.restore_model(FOLDER), expected['samples'])
        torch.testing.assert_close(found, expected['outputs'], **TOLERANCE)
        first, second = (outputs['log_probs'] for outputs in found.values())
        assert (first - second).abs().max() > 1e-3  # the contexts do make a difference


class TestCheckpoint:
    @pytest.mark.integration
    def test_goes_on_as_the_run_did(self, expected, manifest):
        """The same utterances, contexts and losses: what the loader, the curriculum and the weights remember."""
        model = make.tiny_model(*make.MODEL, seed=1)  # knows nothing of the layers' contexts
        trainer, record = make.train(model, manifest, ckpt_path=FOLDER / 'checkpoint.ckpt')
        assert trainer.global_step == make.STEPS + make.MORE_STEPS
        assert layer_contexts(model) == make.LAYER_CONTEXTS
        assert {int(state['step']) for state in trainer.optimizers[0].state.values()} == {trainer.global_step}
        assert record['lengths'] == expected['training']['lengths']
        assert record['left_context'] == expected['training']['left_context']
        assert record['loss'] == pytest.approx(expected['training']['loss'], abs=1e-5)


class TestConfig:
    @pytest.mark.integration
    def test_passes_the_checks_builds_and_trains(self, manifest):
        cfg = OmegaConf.load(FOLDER / 'config.yaml')
        cfg.model.train_ds.manifest_filepath = cfg.model.validation_ds.manifest_filepath = str(manifest)
        check_pretraining_config(cfg)
        cfg.trainer.update(max_steps=2, log_every_n_steps=1, enable_progress_bar=False)

        run = pl.Trainer(**resolve_trainer_cfg(cfg.trainer), callbacks=[AttContextCurriculum(**cfg.curriculum)])
        run.logger = RecordingLogger()
        model = EncDecDenoiseMaskedTokenPredModel(cfg.model, trainer=run)
        assert layer_contexts(model) == [[10, 0], [20, 0], [20, 0], [40, 0]]
        run.fit(model)

        assert run.logger.column('att_context_left') == [10.0, 10.0]  # by the curriculum
        validated = {f'val_loss/ctx_{left}_0' for left in (40, 20, 10)}

        assert validated | {'val_loss', 'audit/masked_share', 'codebook/codes_used'} <= set(run.callback_metrics)


class TestStreams:
    @pytest.mark.unit
    @pytest.mark.parametrize('name', make.STREAMS)
    def test_go_on_as_they_did(self, streams, name):
        """What was masked before counts; no more is, for draws may differ between versions."""
        stream = streams['streams'][name]
        model = make.restore_model(FOLDER, stream['squeeze_single'])
        with make.masking_with_probability(model, 0.0):
            found = make.go_on(make.restore_session(model, stream), streams['samples'])
        torch.testing.assert_close(found, stream['output'], **TOLERANCE)

    @pytest.mark.unit
    @pytest.mark.parametrize('name', [name for name, stream in make.STREAMS.items() if stream['apply_mask']])
    def test_can_be_masked_on(self, streams, name):
        stream = streams['streams'][name]
        model = make.restore_model(FOLDER, stream['squeeze_single'])
        torch.manual_seed(0)
        with make.masking_with_probability(model, make.MASK_PROBABILITY):
            found = make.go_on(make.restore_session(model, stream), streams['samples'])
        for count in ('lengths', 'mask_lengths', 'current_frame'):
            assert torch.equal(found[count], stream['output'][count])
        assert 0 < found['masks'].mean() < 1
        assert found['masked_frames'] > stream['output']['masked_frames'] and found['loss'].isfinite()

    @pytest.mark.unit
    def test_had_something_to_remember(self, streams):
        """Or the tests above would show little."""
        outputs = {name: stream['output'] for name, stream in streams['streams'].items()}
        assert outputs['several streams']['lengths'].tolist() == [8, 8, 0]
        for name in ('masked', 'masked, without an axis for codebooks'):
            assert outputs[name]['masked_frames'] == 1  # its prediction came after the state was saved
