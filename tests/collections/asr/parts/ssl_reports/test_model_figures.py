# SPDX-License-Identifier: Apache-2.0
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_nest import HIERARCHY, POSITIONS, batches, noise_batch, tiny_model, trainer

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.ssl_reports.evaluation import evaluate
from nemo.collections.asr.parts.ssl_reports.model_figures import (
    draw_attention,
    draw_masks,
    draw_utterance,
    seen_utterance,
)

NEXT_TOKEN, BOTH = '+model.objective=next_token', '+model.objective=both'


@POSITIONS
def test_a_masked_utterance(position):
    model, batch = tiny_model(*position).eval(), noise_batch((3.0, 2.0))
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        record = model.encode_batch(batch, partial(model.mask_processor, effective_left_context=20))
        utterance = seen_utterance(model, record, index=1)
    frames = int(record.mask_lengths[1])
    assert utterance.window == Window(AttContext(20, 0)) and utterance.masks.shape == (frames,)
    assert utterance.masks.tolist() == record.masks[1, 0, :frames].tolist()
    assert utterance.features.shape[0] == 80 and 200 <= utterance.features.shape[1] <= 201
    assert utterance.surprise is None and utterance.context == [20, 0]
    assert list(draw_utterance(model, utterance, 'it')) == ['masked_spectrogram']
    lower = draw_masks(model, utterance).axes[1]
    assert 'no visible frame (0)' in [text.get_text() for text in lower.get_legend().get_texts()]


def test_attention_of_a_frame():
    encoder = tiny_model(*HIERARCHY).encoder
    axis = draw_attention(encoder, frame=30, frames=40, frame_seconds=0.08, att_context_size=[6, 0]).axes[0]
    windows = [(patch.get_x(), patch.get_width()) for patch in axis.patches if patch.get_height() < 0.5]
    assert windows == [(26, 5), (26, 5), (24, 7)]
    with pytest.raises(ValueError, match='frame is 40; the utterance has attention frames 0 to 39'):
        draw_attention(encoder, frame=40, frames=40, frame_seconds=0.08)


@POSITIONS
@pytest.mark.parametrize('books', [[], ['model.num_books=2', 'model.squeeze_single=false']], ids=['one', 'two'])
def test_the_surprise_of_an_utterance_is_its_loss_token_by_token(position, books):
    model, batch = tiny_model(NEXT_TOKEN, *position, *books).eval(), noise_batch((3.0, 2.0))
    with torch.no_grad(), model.encoder.using_att_context_size([20, 2]):
        record = model.encode_batch(batch, None)
        for index in range(2):
            decoded = []
            handle = model.next_token_decoders[0].register_forward_hook(lambda *args: decoded.append(args[2].shape))
            surprise = model.objectives.surprise(record, index)
            handle.remove()
            (shape,) = decoded  # of one utterance
            assert shape[:2] == (1, min(record.encoded.shape[2], record.tokens.shape[1] - model.objectives.offset()))
            ahead, tokens = model.objectives.offset(), int(record.token_lengths[index])
            frames = min(int(record.encoded_lengths[index]), tokens - ahead)
            assert surprise.shape == (tokens,) and np.isnan(surprise[:ahead]).all() and ahead >= 2
            assert np.isfinite(surprise[ahead : ahead + frames]).all()
            for frame in (0, 7, frames - 1):
                log_probs = model.next_token_decoders[0](encoder_output=record.encoded[index : index + 1])[0, frame]
                targets = record.tokens[index, frame + ahead]
                expected = -log_probs.view(model.quantizer.num_classes, -1).gather(0, targets.view(1, -1)).mean()
                assert surprise[frame + ahead] == pytest.approx(expected.item(), rel=1e-5)


def test_the_surprise_is_what_evaluation_measures():
    model, batch = tiny_model(NEXT_TOKEN), noise_batch((3.0, 2.0))
    likelihood, _, frames = evaluate(model, [batch], [[20, 0]]).parts['next_0']['20_0'].columns()
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        utterance = seen_utterance(model, model.encode_batch(batch, None), index=1)
    assert utterance.masks is None and np.isfinite(utterance.surprise).sum() == frames[1]
    assert np.nansum(utterance.surprise) == pytest.approx(likelihood[1], rel=1e-5)
    drawn = draw_utterance(model, utterance, 'it')
    assert list(drawn) == ['surprise'] and drawn['surprise'].axes[0].get_title() == 'it, in context [20, 0]'
    assert drawn['surprise'].axes[1].lines[1].get_ydata()[0] == pytest.approx(math.log(32))


def test_both_objectives_have_both_pictures():
    model, batch = tiny_model(BOTH).eval(), noise_batch((3.0, 2.0))
    with torch.no_grad(), model.encoder.using_att_context_size([20, 0]):
        record = model.encode_batch(batch, partial(model.mask_processor, effective_left_context=20))
        utterance = seen_utterance(model, record)
        kept = seen_utterance(model, record.to_keep())
    drawn = draw_utterance(model, utterance, 'it')
    assert list(drawn) == ['masked_spectrogram', 'surprise'] and kept.surprise is None
    hatched = [len(figure.axes[0].patches) for figure in drawn.values()]
    assert hatched[0] == hatched[1] > 0


@pytest.mark.integration
@pytest.mark.parametrize('objective, contexts', [(NEXT_TOKEN, 'all'), (NEXT_TOKEN, 'null'), (BOTH, 'all')])
def test_surprise_goes_to_tensorboard_without_another_pass(tmp_path, objective, contexts):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, passes = tiny_model(objective, f'model.validate_contexts={contexts}'), []
    model.encoder.register_forward_hook(lambda *_: passes.append(model.training))
    run = trainer(1, logger=TensorBoardLogger(tmp_path, name=None, version=''), val_check_interval=1)
    model.set_trainer(run)
    run.fit(model, train_dataloaders=batches(1), val_dataloaders=batches(1, (3.0, 2.0)))
    assert passes.count(False) == (4 if contexts == 'all' else 1)  # those of validation
    events = EventAccumulator(str(tmp_path), size_guidance={'images': 0})
    events.Reload()
    expected = ['attention_windows', 'surprise'] + ['learning_curves'] * (contexts == 'all')
    expected += ['masked_spectrogram'] * (objective == BOTH)
    assert sorted(events.Tags()['images']) == sorted(f'contexts/{name}' for name in expected)
