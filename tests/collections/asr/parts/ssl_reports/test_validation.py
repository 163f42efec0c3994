# SPDX-License-Identifier: Apache-2.0
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from spies import recording_contexts
from tiny_nest import POSITIONS, batches, noise_batch, tiny_model, trainer

from nemo.collections.asr.losses.ssl_losses.mlm import MLMLoss, MultiMLMLoss
from nemo.collections.asr.models.ssl_models import EncDecMaskedTokenPredModel
from nemo.collections.asr.modules import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext, context_label
from nemo.collections.asr.parts.att_context.windows import Window
from nemo.collections.asr.parts.objectives import masked_tokens
from nemo.collections.asr.parts.objectives.base import FrameScores, LossPositions
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens
from nemo.collections.asr.parts.ssl_reports.audit import audit_masks
from nemo.collections.asr.parts.ssl_reports.validation import FixedMasks, passes_in_contexts, utterance_seeds

SECONDS = (3.0, 2.0, 1.2)
LABELS = ('10_0', '20_0', '40_0', 'unlimited_0')
BOOKS = ('model.num_books=2', 'model.decoder.num_decoders=2', 'model.loss.num_decoders=2')


def predictions_in_contexts(model, batch, contexts, seed, window=None):
    """Yield context, predictions and record of each pass."""
    for context, record in passes_in_contexts(model, batch, contexts, seed, window):
        yield context, model.objectives.find(MaskedTokens).predictions(record), record


def validate(model, loader=None, mode='val', **kwargs):
    run = trainer(1, **kwargs)
    model.set_trainer(run)
    loader = batches(2, SECONDS) if loader is None else loader
    return (run.validate if mode == 'val' else run.test)(model, dataloaders=loader, verbose=False)[0]


def test_a_batch_in_four_contexts_makes_features_and_tokens_once():
    model, calls = tiny_model().eval(), Counter()
    for name in ('preprocessor', 'quantizer', 'encoder'):
        getattr(model, name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    with torch.no_grad():
        model.inference_pass(noise_batch(SECONDS), 0, apply_mask=True)
    assert calls == {'preprocessor': 2, 'quantizer': 1, 'encoder': 4}


def speech():
    audio = torch.randn(3, 9000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([9000, 5000, 700])
    return audio * (torch.arange(9000) < lengths.unsqueeze(1)), lengths


class TestUtteranceSeeds:
    def test_they_depend_on_an_utterance_and_the_seed_alone(self):
        audio, lengths = speech()
        seeds = utterance_seeds(audio, lengths, 0)
        assert len(set(seeds)) == 3 and all(0 <= seed < 2**32 for seed in seeds)
        padded = torch.nn.functional.pad(audio, (0, 123), value=7.0)
        assert utterance_seeds(padded, lengths, 0) == seeds
        for row in range(3):
            alone = audio[row : row + 1, : lengths[row]]
            assert utterance_seeds(alone, lengths[row : row + 1], 0) == [seeds[row]]
        assert not set(utterance_seeds(audio, lengths, 1)) & set(seeds)

    def test_a_sample_more_or_another_level_is_another_utterance(self):
        audio, lengths = speech()
        seeds = utterance_seeds(audio, lengths, 0)
        assert not set(utterance_seeds(audio, lengths - 1, 0)) & set(seeds)
        assert not set(utterance_seeds(audio * 0.5, lengths, 0)) & set(seeds)


class TestFixedMasks:
    SETTINGS = dict(feat_in=4, mask_prob=0.05, block_size=16, allow_overlap=True, subsampling_factor=8)

    def mask(self, masking, lengths, seeds, left=-1, calls=1):
        feats = torch.randn(len(lengths), 4, int(max(lengths)), generator=torch.Generator().manual_seed(1))
        fixed = FixedMasks(masking, seeds, Window(AttContext(left, 0)))
        for _ in range(calls):
            found = fixed(input_feats=feats, input_lengths=torch.tensor(lengths))
        return feats, *found

    def test_masks_do_not_depend_on_the_batch(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        _, _, together = self.mask(masking, [400, 160, 333], [5, 6, 7], left=10)
        for row, (length, seed) in enumerate([(400, 5), (160, 6), (333, 7)]):
            _, _, alone = self.mask(masking, [length], [seed], left=10)
            assert torch.equal(together[row, :, :length], alone[0]) and not together[row, :, length:].any()
            assert alone.any()

    def test_later_calls_get_the_same(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        feats, masked, masks = self.mask(masking, [400, 160], [1, 2], left=3, calls=3)
        assert torch.equal(self.mask(masking, [400, 160], [1, 2], left=3)[2], masks)
        embedding = masking.mask_embedding.view(1, -1, 1)
        assert torch.equal(masked, torch.where(masks > 0, embedding, feats))
        windows = {'tight': Window(AttContext(3, 0))}
        audit = audit_masks(masks, torch.tensor([400, 160]), 8, windows)
        assert audit.frames_masked > 0 and audit.no_visible_frame['tight'] == 0

    def test_generators_and_module_are_left_as_they_were(self):
        masking = RandomBlockMasking(**self.SETTINGS)
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        self.mask(masking, [400], [1])
        assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])
        assert 'forward' not in vars(masking)

    def test_a_module_that_knows_no_context_and_uses_pythons_generator(self):
        class Own(torch.nn.Module):
            def forward(self, input_feats, input_lengths):
                start = random.randrange(input_feats.shape[-1])
                masks = torch.zeros_like(input_feats)
                masks[..., start : start + 5] = 1
                return input_feats * (1 - masks), masks

        _, _, first = self.mask(Own(), [90, 90, 90], [1, 2, 1], left=4)
        assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])


class TestPredictions:
    @pytest.mark.parametrize('books', [False, True])
    def test_scores_by_hand(self, books):
        likelihoods = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
        predictions = LossPositions(likelihoods.log(), torch.tensor([0, 1]), torch.tensor([0, 2]))
        expected, correct = [-math.log(0.5), -math.log(0.2)], [1.0, 0.0]
        if books:  # in the second book the tokens are 2 and 2
            log_probs = torch.stack([predictions.outputs] * 2, dim=2)
            predictions = predictions._replace(outputs=log_probs, targets=torch.tensor([[0, 2], [1, 2]]))
            expected = [(expected[0] - math.log(0.25)) / 2, (expected[1] - math.log(0.7)) / 2]
            correct = [0.5, 0.5]
        scores = FrameScores.of(predictions, MultiMLMLoss(num_decoders=2) if books else MLMLoss())
        assert scores.negative_log_likelihood.tolist() == pytest.approx(expected)
        assert scores.correct.tolist() == correct and scores.utterances.tolist() == [0, 2]

    @POSITIONS
    def test_the_same_frames_count_in_every_context(self, position):
        model = tiny_model(*position).eval()
        contexts = [[5, 0], [20, 0], [-1, 0]]
        with recording_contexts(model) as record, torch.no_grad():
            found = list(predictions_in_contexts(model, noise_batch(SECONDS), contexts, seed=0))
        assert record.attention == contexts and record.masking == [5] * len(SECONDS)
        first = found[0][1]
        assert first.targets.shape[0] > 0
        for _, predictions, _ in found[1:]:
            assert torch.equal(predictions.targets, first.targets)
            assert torch.equal(predictions.utterances, first.utterances)
        assert not torch.equal(found[0][1].outputs, found[2][1].outputs)

    def test_utterances_are_predicted_alike_in_any_batch(self):
        model, batch = tiny_model().eval(), noise_batch(SECONDS)
        with torch.no_grad():
            ((_, together, _),) = predictions_in_contexts(model, batch, [[10, 0]], seed=0)
            for row, length in enumerate(batch.audio_len.tolist()):
                rows = slice(row, row + 1)
                tensors = {name: value[rows] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
                cut = {name: value[:, :length] if value.dim() == 2 else value for name, value in tensors.items()}
                one = replace(batch, **cut)
                ((_, single, _),) = predictions_in_contexts(model, one, [[10, 0]], seed=0)
                single, inside = single.having_targets(), together.utterances == row  # it may have no masked frame
                assert torch.equal(together.targets[inside], single.targets)
                torch.testing.assert_close(together.outputs[inside], single.outputs, rtol=1e-4, atol=1e-4)

    def test_a_decoder_that_needs_every_frame_gives_the_same(self, monkeypatch):
        model, found = tiny_model().eval(), []
        for _ in range(2):
            with torch.no_grad():
                found += [pair[1] for pair in predictions_in_contexts(model, noise_batch(SECONDS), [[10, 0]], seed=0)]
            monkeypatch.setattr(masked_tokens, 'why_all_frames', lambda decoder, loss: 'a test')
        for lean, whole in zip(*found, strict=True):
            torch.testing.assert_close(lean, whole)


def brute_force(model, loader, context, seed=0):
    """Loss and accuracy over all frames that count, from full forward passes and the loss's own alignment."""
    total = correct = frames = 0
    for batch in loader:
        with torch.no_grad():
            ((_, _, record),) = predictions_in_contexts(model, batch, [context], seed, Window(AttContext(10, 0)))
            masked = torch.where(
                record.masks > 0, model.mask_processor.mask_embedding.view(1, -1, 1), features(model, batch)
            )
            with model.encoder.using_att_context_size(context):
                encoded, lengths = model.encoder(audio_signal=masked, length=record.mask_lengths)
            log_probs = model.decoder(encoder_output=encoded)
            log_probs, tokens, counted = model.loss.align(log_probs, record.tokens, record.masks, lengths)
        log_probs, tokens = log_probs[counted].squeeze(-1), tokens[counted].squeeze(-1)
        total -= log_probs.gather(1, tokens.unsqueeze(1)).sum().item()
        correct += (log_probs.argmax(dim=1) == tokens).sum().item()
        frames += tokens.shape[0]
    return total / frames, correct / frames


def features(model, batch):
    return model.preprocessor(input_signal=batch.noisy_audio, length=batch.noisy_audio_len)[0]


@pytest.mark.integration
class TestValidation:
    @pytest.mark.parametrize('mode', ['val', 'test'])
    def test_what_is_reported(self, mode):
        model = tiny_model()
        reported = validate(model, mode=mode)
        for context, label in zip([[10, 0], [20, 0], [40, 0], [-1, 0]], LABELS):
            loss, accuracy = brute_force(model, batches(2, SECONDS), context)
            assert reported[f'{mode}_loss/ctx_{label}'] == pytest.approx(loss, rel=1e-5)
            assert reported[f'{mode}_accuracy/ctx_{label}'] == pytest.approx(accuracy)
            assert reported[f'{mode}_perplexity/ctx_{label}'] == pytest.approx(math.exp(loss), rel=1e-4)
            assert reported[f'{mode}_masking/no_visible_frame_in_window/ctx_{label}'] == 0
        for name in ('loss', 'accuracy'):
            values = [reported[f'{mode}_{name}/ctx_{label}'] for label in LABELS]
            assert reported[f'{mode}_{name}'] == pytest.approx(sum(values) / 4)
        assert reported[f'{mode}_perplexity'] == pytest.approx(math.exp(reported[f'{mode}_loss']), rel=1e-4)
        assert 0.1 < reported[f'{mode}_masked_share'] < 0.8
        assert validate(model, mode=mode) == reported

    @pytest.mark.parametrize('masks', ['tightest', 'given'])
    def test_each_context_alone_gives_the_same_numbers(self, masks):
        """With masks for a given left context, or where it is the tightest of several."""
        given = [] if masks == 'tightest' else ['model.validation_masks.left_context=10']
        together = validate(tiny_model(*given))
        for context in ([10, 0],) if masks == 'tightest' else ([10, 0], [40, 0], [-1, 0]):
            alone = validate(tiny_model(f'model.encoder.att_context_size={[context]}'.replace(' ', ''), *given))
            label = context_label(context)
            names = [name for name in together if name.endswith(f'/ctx_{label}')]
            assert len(names) == 4 and {name: alone[name] for name in names} == {n: together[n] for n in names}
            assert alone['val_loss'] == together[f'val_loss/ctx_{label}']

    def test_choices(self):
        only = lambda reported: sorted(name for name in reported if name.startswith('val_loss'))
        assert only(validate(tiny_model('model.validate_contexts=first'))) == ['val_loss', 'val_loss/ctx_10_0']
        assert only(validate(tiny_model('model.validate_contexts=[[33,0]]'))) == ['val_loss', 'val_loss/ctx_33_0']
        by_hand = tiny_model()
        by_hand.set_att_context_size([12, 0])
        assert only(validate(by_hand)) == ['val_loss', 'val_loss/ctx_12_0']

    def test_several_codebooks_clean_batches_and_another_seed(self):
        losses = []
        for seed in (0, 0, 1):
            model = tiny_model(*BOOKS, f'model.validation_masks.seed={seed}', cls=EncDecMaskedTokenPredModel)
            losses.append(validate(model, batches(2, SECONDS, as_tuples=True))['val_loss'])
        assert losses[0] == losses[1] != losses[2]

    def test_several_data_loaders(self):
        model = tiny_model()
        first, second = batches(1, SECONDS), batches(2, (2.0, 1.0))
        run = trainer(1)
        model.set_trainer(run)
        model._validation_dl, model._validation_names = [first, second], ['one_', 'two_']
        model._val_dl_idx = 0
        reported = {}
        for found in run.validate(model, dataloaders=[first, second], verbose=False):
            reported.update(found)
        for name, loader in (('one_', first), ('two_', second)):
            alone = validate(tiny_model(), loader)
            for key in ('val_loss', 'val_accuracy/ctx_20_0'):
                assert reported[f'{name}{key}'] == alone[key]
        assert reported['val_loss'] == reported['one_val_loss']

    def test_without_any_masked_frame_the_loss_is_nan_and_never_the_best(self):
        assert math.isnan(validate(tiny_model('model.masking.mask_prob=0'))['val_loss'])
