# SPDX-License-Identifier: Apache-2.0
"""Reports of the models' training and validation: on several processes, for checkpoints, in TensorBoard."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from ranks import run_on_two_ranks
from tiny_nest import batches, tiny_model, trainer

from nemo.collections.asr.parts.ssl_reports import model_reports
from nemo.utils.exp_manager import exp_manager


@pytest.mark.integration
def test_two_processes_report_what_one_would(tmp_path):
    """With batches of other sizes and lengths on each."""
    script = Path(__file__).with_name('validation_run.py')
    first, second, alone = run_on_two_ranks(script, tmp_path, (0, 1, 'alone'))
    assert first == second and {'val_loss/ctx_20_0', 'test_accuracy/ctx_unlimited_0'} <= set(first)
    assert first == pytest.approx(alone, rel=1e-6) and set(first) == set(alone)


@pytest.mark.integration
def test_the_best_checkpoint_by_val_loss_is_kept_and_restored(tmp_path):
    """As with stock's val_loss: exp_manager monitors the mean over the contexts."""
    model, run = tiny_model('model.optim.lr=30'), trainer(4, logger=False, val_check_interval=1, max_epochs=-1)
    settings = {
        'explicit_log_dir': str(tmp_path),
        'create_tensorboard_logger': False,
        'create_checkpoint_callback': True,
        'checkpoint_callback_params': {
            'monitor': 'val_loss',
            'mode': 'min',
            'save_top_k': 1,
            'always_save_nemo': True,
        },
    }
    exp_manager(run, OmegaConf.create(settings))
    losses = {}
    model.set_trainer(run)
    summary = model.reports.validation.summary

    def recording_summary(*args):
        found = summary(*args)
        losses[run.global_step] = found['val_loss'].item()
        return found

    model.reports.validation.summary = recording_summary
    run.fit(model, train_dataloaders=batches(1, (2.0, 1.0)), val_dataloaders=batches(2, (2.0, 1.5)))
    best = min(losses, key=losses.get)
    kept = run.checkpoint_callback
    assert len(losses) == 4 and kept.best_model_score == pytest.approx(losses[best])
    saved = torch.load(kept.best_model_path, weights_only=False)
    assert saved['global_step'] == best and list((tmp_path / 'checkpoints').glob('*.nemo'))
    restored, again = tiny_model(seed=1), trainer(1)
    restored.load_state_dict(saved['state_dict'])
    restored.set_trainer(again)
    found = again.validate(restored, dataloaders=batches(2, (2.0, 1.5)), verbose=False)[0]
    assert found['val_loss'] == pytest.approx(losses[best], rel=1e-5)


@pytest.mark.integration
def test_without_the_new_keys_nothing_new_is_logged():
    keys = ('validate_contexts', 'validation_masks', 'audit_every_n_batches', 'log_figures')
    model, run = tiny_model(*(f'~model.{key}' for key in keys)), trainer(2, val_check_interval=1)
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(2), val_dataloaders=batches(1, (3.0,)))
    names = set().union(*run.logger.steps.values())
    assert not [name for name in names if name.startswith('audit/') or name.startswith('val_') and 'ctx_' in name]
    assert {'val_loss', 'val_masked_share', 'val_att_context_left', 'masked_share', 'train_loss'} <= names
    assert len(set(run.logger.column('val_loss'))) == 2


@pytest.mark.integration
@pytest.mark.parametrize('contexts', ['all', 'null'])
def test_pictures_go_to_tensorboard(tmp_path, contexts):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tiny_model(f'model.validate_contexts={contexts}')
    run = trainer(2, logger=TensorBoardLogger(tmp_path, name=None, version=''), val_check_interval=1)
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(2), val_dataloaders=batches(1, (3.0, 2.0)))
    events = EventAccumulator(str(tmp_path), size_guidance={'images': 0})
    events.Reload()
    assert sorted(events.Tags()['images']) == ['contexts/attention_windows', 'contexts/masked_spectrogram']
    assert [event.step for event in events.Images('contexts/masked_spectrogram')] == [1, 2]


@pytest.mark.integration
def test_pictures_are_off_where_they_are_not_wanted(tmp_path):
    model, run = tiny_model('model.log_figures=false'), trainer(1, logger=TensorBoardLogger(tmp_path))
    model.set_trainer(run)
    with mock.patch.object(model_reports, 'masked_spectrogram') as draw:
        run.fit(model, train_dataloaders=batches(1), val_dataloaders=batches(1))
    assert not draw.called and run.global_step == 1
