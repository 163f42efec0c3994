# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction in the models: nothing leaks, and everything around the loss goes on as with masked tokens."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from next_token_pairs import loss_of_all_pairs
from ranks import run_on_two_ranks
from tiny_nest import HIERARCHY, POSITIONS, batches, fit, noise_batch, signals, tiny_model, trainer

from nemo.collections.asr.losses.ssl_losses.mlm import MultiMLMLoss
from nemo.collections.asr.losses.ssl_losses.next_token import next_token_indices
from nemo.collections.asr.parts.att_context.curriculum import AttContextCurriculum
from nemo.collections.asr.parts.objectives.base import BatchInputs
from nemo.collections.asr.parts.objectives.next_tokens import NextTokens

NEXT, BOTH = '+model.objective=next_token', '+model.objective=both'
OBJECTIVES = pytest.mark.parametrize('objective', [NEXT, BOTH], ids=['next_token', 'both'])
TWO = 'model.encoder.n_layers=2'
FRAMES, FACTOR = 14, 8
WAYS = {
    'causal': (TWO, 'model.encoder.att_context_size=[3,0]'),
    'all of the past': (TWO, 'model.encoder.att_context_size=[-1,0]'),
    'look-ahead': (TWO, 'model.encoder.att_context_size=[3,2]'),
    'chunks': (TWO, 'model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[4,3]'),
    'layers': (*HIERARCHY, 'model.encoder.att_context_size=[-1,1]'),
    'convolutions ahead': (TWO, 'model.encoder.att_context_size=[3,0]', 'model.encoder.conv_context_size=[4,4]'),
    'subsampling ahead': (TWO, 'model.encoder.att_context_size=[3,0]', 'model.encoder.causal_downsampling=false'),
    'sampled': (
        TWO,
        'model.encoder.att_context_style=chunked_limited',
        'model.encoder.att_context_size=[-1,0]',
        '+model.encoder.att_context_sampler={full_prob: 0, chunk_size: [2, 5]}',
    ),
}


def log_probs_of(model, features) -> torch.Tensor:
    """Encode features [1, F, T] as a step of training does; returns every horizon's log-probabilities, [A, K * C]."""
    lengths = torch.tensor([features.shape[2]])
    record = model.encode(BatchInputs((features.detach(), lengths), (features, lengths)), None)
    decoded = [decoder(encoder_output=record.encoded)[0].flatten(1) for decoder in model.next_token_decoders]
    return torch.cat(decoded, dim=1)


def let_gradient_through_subsampling(model):
    """Subsampled frames are the targets of post-conv masking, which detaches them."""
    model.pre_encoder.forward = lambda x, lengths: model.pre_encoder.pre_encode(x=x, lengths=lengths)
    model.pre_encoder.get_current_mask = lambda: torch.zeros(1, 1, 1)
    model.pre_encoder.get_current_feat = lambda: torch.zeros(1, FRAMES, model.encoder.d_model)


def first_feature(token: int, way: str, post_conv: bool) -> int:
    """The first feature of a token that a frame may not depend on.

    Token i begins with feature 8 i, which frame i sees. After the subsampling it is frame i, which ends with feature
    8 i, or 8 i + 7 where the subsampling has look-ahead; what is new in it begins 8 features before.
    """
    ahead = FACTOR - 1 if post_conv and way == 'subsampling ahead' else 0
    return max(FACTOR * (token - post_conv) + ahead + 1, 0)


@pytest.mark.parametrize(
    ('way', 'positions'),
    [*((way, 'all') for way in WAYS), *((way, 'chunk_end') for way in ('causal', 'chunks', 'sampled'))],
)
@POSITIONS
def test_no_output_depends_on_what_it_predicts(way, positions, position):
    """By gradient and by perturbation; with tokens one earlier it would."""
    chosen = f'+model.next_token.positions={positions}', '+model.next_token.horizons=2'
    model = tiny_model(NEXT, *WAYS[way], *position, *chosen, 'model.encoder.dropout=0').train()
    with model.encoder.using_att_context_size(model.encoder.draw_att_context_size(1)):
        objective = model.objectives.find(NextTokens)
        indices = next_token_indices(FRAMES, 2, objective.offset(), objective.chunk())[:, 0].tolist()
        predicted = {frame: token for frame, token in enumerate(indices) if 0 <= token < FRAMES}
        assert all(objective.chunk() - 2 <= frame % objective.chunk() for frame in predicted)
        features = torch.randn(1, 80, FRAMES * FACTOR, requires_grad=True)
        with torch.no_grad():
            before = log_probs_of(model, features)
            for frame, token in predicted.items():
                perturbed = features.detach().clone()
                perturbed[:, :, first_feature(token, way, bool(position)) :] += 3.0
                torch.testing.assert_close(log_probs_of(model, perturbed)[frame], before[frame], rtol=0, atol=1e-6)
        if position:
            let_gradient_through_subsampling(model)
        outputs, leaks_if_wrong = log_probs_of(model, features), False
        for frame, token in predicted.items():
            gradient, *_ = torch.autograd.grad(outputs[frame].square().sum(), features, retain_graph=True)
            gradient = gradient[0].abs().sum(dim=0)
            assert not gradient[first_feature(token, way, bool(position)) :].any(), (frame, token)
            leaks_if_wrong |= bool(gradient[first_feature(token - 1, way, bool(position)) :].any())
    assert leaks_if_wrong


@OBJECTIVES
@POSITIONS
@pytest.mark.parametrize('books', [1, 2])
def test_the_loss_of_a_step_is_that_of_all_log_probabilities(objective, position, books):
    overrides = (f'model.num_books={books}', '+model.next_token.horizons=3')
    weight = ('+model.next_token.weight=0.25',) if objective == BOTH else ()
    model = tiny_model(objective, *position, *overrides, *weight).eval()
    with model.encoder.using_att_context_size([10, 0]):
        record = model.encode_batch(noise_batch((2.0, 1.1)), model.masking_in_context())
        losses = model.objectives.loss(record)
    log_probs = torch.stack([d(encoder_output=record.encoded) for d in model.next_token_decoders], dim=2)
    lengths, loss = (record.encoded_lengths, record.token_lengths), MultiMLMLoss(num_decoders=books)
    expected = loss_of_all_pairs(loss, log_probs, record.tokens, 1 if position else 0, *lengths)
    if objective == BOTH:
        masked = model.loss(
            masks=record.masks,
            decoder_outputs=model.decoder(encoder_output=record.encoded),
            targets=record.tokens,
            decoder_lengths=record.encoded_lengths,
        )
        torch.testing.assert_close(losses.parts['masked'], masked)
        expected = masked + 0.25 * expected
    else:
        assert not record.masks.any() and 'masked' not in losses.parts
    torch.testing.assert_close(losses.loss, expected)
    assert [name for name in losses.parts if name.startswith('next_')] == ['next_0', 'next_1', 'next_2']


def test_tokens_come_from_clean_audio_and_the_encoder_hears_the_noisy_one():
    model = tiny_model(NEXT).eval()
    batch = noise_batch((1.0,))
    louder = batch.__class__(**{**vars(batch), 'noisy_audio': batch.noisy_audio + 0.3 * torch.randn(1, 16000)})
    records = [model.encode_batch(each, None) for each in (batch, louder)]
    assert torch.equal(records[0].tokens, records[1].tokens)
    assert not torch.allclose(records[0].encoded, records[1].encoded)


@OBJECTIVES
@pytest.mark.parametrize('way', ['layers', 'sampled'])
def test_a_training_learns_and_logs_each_horizon(objective, way):
    model = tiny_model(objective, *WAYS[way], 'model.optim.lr=5', 'model.optim.sched.warmup_steps=2')
    run = fit(model, batches(1, (2.0, 1.5)), max_steps=30, max_epochs=-1)
    for name in ('train_loss', 'train_loss/next_0', 'train_loss/next_3'):
        curve = run.logger.column(name)
        assert len(curve) == 30 and sum(curve[-5:]) < 0.9 * sum(curve[:5]), name
    names = set().union(*run.logger.steps.values())
    assert ('train_loss/masked' in names) == ('masked_share' in names) == (objective == BOTH)
    assert {'next_token_offset', 'att_context_left', 'codebook/perplexity'} <= names
    assert ('audit/masked_share' in names) == (objective == BOTH)


@OBJECTIVES
def test_validation_reports_each_context_and_horizon(objective):
    model = tiny_model(objective, 'model.encoder.att_context_size=[[4,0],[-1,0]]', '+model.next_token.horizons=2')
    run = trainer(1)
    model.set_trainer(run)
    found = run.validate(model, dataloaders=batches(2, (2.0, 1.2)), verbose=False)[0]
    for label in ('ctx_4_0', 'ctx_unlimited_0'):
        for part in ('next_0', 'next_1') + (('masked', 'next') if objective == BOTH else ()):
            assert {f'val_{name}/{label}/{part}' for name in ('loss', 'accuracy', 'perplexity')} <= set(found)
    if objective == BOTH:
        whole = found['val_loss/ctx_4_0/masked'] + found['val_loss/ctx_4_0/next']
        assert 'val_accuracy' not in found and 'val_perplexity' not in found
    else:
        whole = found['val_loss/ctx_4_0']
        assert 'val_masked_share' not in found and 0 <= found['val_accuracy'] <= 1
    assert found['val_loss/ctx_4_0'] == pytest.approx(whole, rel=1e-6)
    assert found['val_loss'] == pytest.approx((whole + found['val_loss/ctx_unlimited_0']) / 2, rel=1e-6)


def test_validation_equals_loops_over_frames():
    model = tiny_model(NEXT, 'model.encoder.att_context_size=[4,0]', '+model.next_token.horizons=2').eval()
    run = trainer(1)
    model.set_trainer(run)
    found = run.validate(model, dataloaders=batches(2, (2.0, 1.2)), verbose=False)[0]
    lost, right, count = ([0.0, 0.0] for _ in range(3))
    with torch.no_grad():
        for batch in batches(2, (2.0, 1.2)):
            record = model.encode_batch(batch, None)
            for row in range(2):
                frames, tokens = int(record.encoded_lengths[row]), int(record.token_lengths[row])
                for frame in range(frames):
                    for horizon in range(2):
                        if frame + horizon < tokens:
                            encoded = record.encoded[row : row + 1, :, frame : frame + 1]
                            log_probs = model.next_token_decoders[horizon](encoder_output=encoded)[0, 0, :, 0]
                            token = record.tokens[row, frame + horizon, 0]
                            lost[horizon] -= float(log_probs[token])
                            right[horizon] += float(log_probs.argmax() == token)
                            count[horizon] += 1
    for horizon in range(2):
        assert found[f'val_loss/ctx_4_0/next_{horizon}'] == pytest.approx(lost[horizon] / count[horizon], rel=1e-5)
        assert found[f'val_accuracy/ctx_4_0/next_{horizon}'] == pytest.approx(right[horizon] / count[horizon])
    assert found['val_loss'] == pytest.approx(sum(lost) / sum(count), rel=1e-5)
    assert found['val_accuracy'] == pytest.approx(sum(right) / sum(count), rel=1e-5)


NO_DITHER = 'model.preprocessor.dither=0'  # NeMo adds it to the batch in place, which comes again here


class SeedOfStep(Callback):
    """Lets each step draw its masks by its number."""

    def on_train_batch_start(self, trainer, *args):
        """Seed torch."""
        torch.manual_seed(trainer.global_step)


@OBJECTIVES
def test_a_resumed_run_is_the_uninterrupted_one(objective, tmp_path):
    overrides = (objective, 'model.encoder.att_context_size=[[4,0],[8,0],[-1,0]]', NO_DITHER)
    at_half = ModelCheckpoint(tmp_path, filename='{step}', every_n_train_steps=3, save_top_k=-1)
    milestones = [[0, [4, 0]], [4, [-1, 0]]]
    settings = dict(max_epochs=-1)
    curriculum = AttContextCurriculum(milestones=milestones)
    model = tiny_model(*overrides)
    callbacks = [at_half, curriculum, SeedOfStep()]
    whole = fit(model, batches(1), 6, callbacks=callbacks, enable_checkpointing=True, **settings)
    resumed = tiny_model(*overrides, seed=1)
    curriculum = AttContextCurriculum(milestones=milestones)
    run = fit(resumed, batches(1), 6, tmp_path / 'step=3.ckpt', callbacks=[curriculum, SeedOfStep()], **settings)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=1e-7, msg=name)
    assert run.logger.column('train_loss') == pytest.approx(whole.logger.column('train_loss')[3:], rel=1e-6)


def test_a_run_cannot_go_on_with_another_objective(tmp_path):
    at_end = ModelCheckpoint(tmp_path, filename='{step}', every_n_train_steps=1)
    fit(tiny_model(), batches(1), 1, callbacks=[at_end], enable_checkpointing=True)
    with pytest.raises(ValueError, match='model.objective is next_token with 4 horizons; the checkpoint .*init_from'):
        fit(tiny_model(NEXT), batches(1), 2, ckpt_path=tmp_path / 'step=1.ckpt')


def test_a_saved_model_keeps_its_objective(tmp_path):
    model = tiny_model(NEXT, '+model.next_token.horizons=2').eval()
    model.save_to(tmp_path / 'model.nemo')
    restored = type(model).restore_from(str(tmp_path / 'model.nemo'), map_location='cpu').eval()
    assert restored.objective == 'next_token' and len(restored.next_token_decoders) == 2
    with torch.no_grad():
        first = restored.next_token_decoders[0](encoder_output=restored.encode_batch(noise_batch(), None).encoded)
        torch.testing.assert_close(model(**signals(noise_batch()), apply_mask=False)[0], first)


@OBJECTIVES
@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        (('model.encoder.att_context_size=[[4,0],[-1,-1]]',), r'att_context_size \[-1, -1\] .*whole utterance'),
        (
            (
                'model.encoder.att_context_style=chunked_limited',
                'model.encoder.att_context_size=[-1,0]',
                '+model.encoder.att_context_sampler={full_prob: 0.5, chunk_size: [1, 4]}',
            ),
            'att_context_sampler.full_prob is 0.5; .*it must be 0',
        ),
        (
            ('model.quantizer.combine_time_steps=4', 'model.loss.combine_time_steps=4'),
            'model.quantizer.combine_time_steps is 4; .*it must be 8',
        ),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(objective, overrides, message):
    with pytest.raises(ValueError, match=message):
        fit(tiny_model(objective, *overrides), batches(1), 1)


@pytest.mark.integration
def test_two_ranks_train_one_model_and_every_weight_gets_a_gradient(tmp_path):
    """DistributedDataParallel fails on a weight without one."""
    first, second = run_on_two_ranks(Path(__file__).with_name('objectives_run.py'), tmp_path)
    assert first == second and first['next_token']['losses'] and first['both']['losses']
