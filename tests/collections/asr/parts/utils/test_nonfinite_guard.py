# SPDX-License-Identifier: Apache-2.0
"""Whatever the samples are, the weights stay numbers."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from omegaconf import open_dict
from ranks import run_on_two_ranks
from tiny_nest import batches, fit, noise_batch, tiny_model
from torch.utils.data import DataLoader

from nemo.collections.asr.data import training_data_mixin
from nemo.collections.asr.data.ssl_dataset import silent_batch
from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel
from nemo.collections.asr.parts.att_context.synced_collate import SyncedBatch
from nemo.collections.asr.parts.utils import nonfinite_guard
from nemo.collections.asr.parts.utils.nonfinite_guard import invalid_utterances

INVALID = [float('nan'), float('inf'), -float('inf'), 1e30]


def loader(*made):
    return DataLoader(list(made), batch_size=None)


def spoilt(value, seconds=(1.0, 0.6, 0.8), utterance=1, seed=0):
    """A batch of which one utterance has a sample that is none."""
    batch = noise_batch(seconds, seed)
    batch.audio[utterance, 500] = value
    batch.noisy_audio[utterance, 500] = value
    return batch


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_finite(model):
    return all(torch.isfinite(tensor).all() for tensor in model.state_dict().values() if tensor.is_floating_point())


def test_by_default_the_batch_is_an_error_before_anything_is_computed():
    model = tiny_model('model.encoder.conv_norm_type=batch_norm')
    before = state(model)
    with pytest.raises(ValueError, match='utterance 1 of a batch .*model.skip_nan_grad: true'):
        fit(model, loader(spoilt(INVALID[0])), max_steps=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


def test_skipping_drops_utterances_and_steps_without_any_and_counts_both(warnings):
    model = tiny_model('model.skip_nan_grad=true', 'model.encoder.conv_norm_type=batch_norm')
    nothing = spoilt(INVALID[0], seconds=(1.0,), utterance=0)
    run = fit(model, loader(noise_batch(), spoilt(INVALID[0]), nothing, noise_batch(seed=2)), max_steps=4)
    assert is_finite(model) and run.logger.column('skipped_utterances') == [0, 1, 2, 2]
    assert run.logger.column('skipped_steps') == [0, 0, 1, 1]
    assert any('Dropped utterance 1 of a batch' in message for message in warnings)
    with pytest.raises(ValueError, match='utterance 0 of a batch .* no valid utterance'):
        model.eval().on_before_batch_transfer(spoilt(INVALID[0], seconds=(1.0,), utterance=0), 0)


def test_the_rest_of_the_batch_trains_as_if_alone():
    whole, rest = tiny_model('model.skip_nan_grad=true'), tiny_model()
    batch = spoilt(INVALID[0], utterance=2)
    kept = {name: value[:2] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    alone = dataclasses.replace(batch, **kept)
    for model, given in ((whole, batch), (rest, alone)):
        torch.manual_seed(5)
        fit(model, loader(given), max_steps=1)
    assert all(torch.equal(first, second) for first, second in zip(state(whole).values(), state(rest).values()))


def test_what_the_data_loader_left_out_is_counted_and_where_it_left_nothing_the_run_goes_on(monkeypatch):
    model, short = tiny_model(), noise_batch()
    short.skipped = 1
    with open_dict(model.cfg):
        model.cfg.train_ds = {'skip_bad_audio': True}
    run = fit(model, loader(short, silent_batch(2), noise_batch(seed=2)), max_steps=3)
    gradients = run.logger.column('gradient_norm')
    assert gradients[1] == 0 < min(gradients[0], gradients[2]) and is_finite(model)
    assert run.logger.column('skipped_utterances') == [1, 3, 3]
    monkeypatch.setattr(training_data_mixin, 'MAX_SKIPPED_IN_A_ROW', 2)
    with pytest.raises(ValueError, match='the last 2 batches'):
        fit(model, loader(silent_batch(1), silent_batch(1), noise_batch()), max_steps=3)


@pytest.mark.integration
def test_without_a_valid_utterance_on_one_rank_all_ranks_skip_the_step(tmp_path):
    """With other utterances on each; afterwards they have the same weights."""
    first, second = run_on_two_ranks(Path(__file__).with_name('invalid_batch_run.py'), tmp_path)
    assert first['steps'] == second['steps'] == 1
    assert (first['utterances'], second['utterances']) == (0, 2)
    assert first['weights'] == second['weights'] and math.isfinite(first['weights'])


def test_gradients_are_clipped_by_the_norm_that_is_logged():
    norms, gradients = [], []
    for settings in ({}, {'gradient_clip_val': 0.01}):
        model = tiny_model()
        clip = model.configure_gradient_clipping

        def recording(*args, model=model, clip=clip, **kwargs):
            clip(*args, **kwargs)
            gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])

        model.configure_gradient_clipping = recording
        torch.manual_seed(0)
        norms.append(fit(model, batches(1), max_steps=1, **settings).logger.column('gradient_norm')[0])
    whole, clipped = gradients
    assert norms[0] == norms[1] == pytest.approx(torch.nn.utils.get_total_norm(whole).item())
    for one, other in zip(whole, clipped, strict=True):
        torch.testing.assert_close(one * 0.01 / (norms[0] + 1e-6), other)


def with_nan_gradients_at(model, step, value=float('nan')):
    """Let the model's gradients be spoilt in a step, as by a loss that overflows."""
    weight = model.encoder.layers[0].feed_forward1.linear1.weight
    weight.register_hook(lambda gradient: gradient * value if model.trainer.global_step == step else gradient)
    return model


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_step_without_finite_gradients_is_skipped_whole(warnings, value):
    """No weight, no moment, no decay: the next step is that of a run that never met the batch."""
    model = with_nan_gradients_at(tiny_model('model.skip_nan_grad=true'), 1, value)
    seen = []
    model.on_train_batch_end = lambda *args: seen.append(state(model))
    run = fit(model, batches(3), max_steps=3)
    assert is_finite(model)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert not all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert run.logger.column('skipped_steps') == [0, 1, 1]
    assert any('the gradients of step 1 are not all finite' in message for message in warnings)


def test_by_default_such_gradients_are_an_error_and_touch_no_weight():
    model = with_nan_gradients_at(tiny_model(), 1)
    seen = []
    model.on_train_batch_end = lambda *args: seen.append(state(model))
    with pytest.raises(FloatingPointError, match='gradients of step 1 .* model.skip_nan_grad: true'):
        fit(model, batches(3), max_steps=3)
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in state(model).items())


def test_a_run_that_skips_for_ever_ends(monkeypatch):
    monkeypatch.setattr(nonfinite_guard, 'MAX_SKIPPED_IN_A_ROW', 3)
    model = tiny_model('model.skip_nan_grad=true')
    model.encoder.layers[0].feed_forward1.linear1.weight.register_hook(lambda gradient: gradient / 0)
    with pytest.raises(FloatingPointError, match='step 2 are not all finite, nor were those of the 2 steps before'):
        fit(model, batches(5), max_steps=5)


@pytest.mark.parametrize('shape', [(0, 16000), (2, 0)])
def test_an_empty_batch_is_named(shape):
    batch = torch.zeros(shape), torch.full(shape[:1], shape[1])
    with pytest.raises(ValueError, match=rf'a batch is empty: item 0 has the shape \[{shape[0]}, {shape[1]}\]'):
        fit(tiny_model(cls=EncDecMaskedTokenPredModel), loader(batch), max_steps=1)


@pytest.mark.parametrize('position', ['pre_conv', 'post_conv'])
def test_silence_and_one_frame_utterances_train(position):
    post = ['model.quantizer.combine_time_steps=1', 'model.loss.decoder_offset=0'] * (position == 'post_conv')
    model = tiny_model(f'model.mask_position={position}', *post)
    silence = noise_batch((1.0, 0.5))
    silence.audio, silence.noisy_audio = silence.audio * 0, silence.noisy_audio * 0
    lengths = [1, 100, 160, 161, 700, 1280, 1281]  # in samples: up to one feature frame, up to one attention frame
    short = [noise_batch((length / 16000,)) for length in lengths] + [noise_batch((1.0, 1 / 16000))]
    run = fit(model, loader(silence, *short), max_steps=1 + len(short))
    assert is_finite(model) and len(run.logger.column('train_loss')) == 1 + len(short)
    assert all(loss >= 0 for loss in run.logger.column('train_loss'))  # False for NaN


def test_what_a_batch_carries_stays(monkeypatch):
    batch = SyncedBatch((torch.zeros(3, 8), torch.tensor([8, 8, 8])))
    batch[0][1, 2], batch.att_context = float('nan'), [4, 0]
    rows = invalid_utterances(batch)
    assert rows.tolist() == [False, True, False]
    selected = nonfinite_guard._select(batch, ~rows)
    assert type(selected) is SyncedBatch and selected.att_context == [4, 0]
    assert selected[0].shape == (2, 8) and selected[1].tolist() == [8, 8]
