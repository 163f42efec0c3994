# SPDX-License-Identifier: Apache-2.0
"""The configs with look-ahead, and dynamic chunk training: from the draw to the logs, and streamed."""

import pytest
import torch
from omegaconf import OmegaConf
from spies import recording_contexts
from tiny_nest import batches, fit, noise_batch, tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.parts.att_context import AttContextCurriculum
from nemo.collections.asr.parts.streaming.session import StreamingOutput, StreamingSession
from nemo.collections.asr.parts.utils.pretraining_checks import check_contexts

DYNAMIC, MULTI_LATENCY = 'nest_fast-conformer_dynamic_chunk', 'nest_fast-conformer_streaming_multi_latency'
CONFIG_NAMES = [DYNAMIC, f'{DYNAMIC}_tiny', MULTI_LATENCY, f'{MULTI_LATENCY}_tiny']
CHUNKED = ['model.encoder.att_context_style=chunked_limited', 'model.encoder.att_context_size=[[8,3],[6,1],[6,0]]']
SAMPLER = '{full_prob: 0.3, chunk_size: [1, 6], left_chunks: [1, 4], left_limited_prob: 0.6}'
SAMPLED = [*CHUNKED, f'+model.encoder.att_context_sampler={SAMPLER}']


def model_of(name, *overrides):
    torch.manual_seed(0)
    return EncDecDenoiseMaskedTokenPredModel(tiny_config(*overrides, name=name).model)


@torch.no_grad()
def assert_streams_as_offline(model, context, seconds=4.0):
    model.eval()
    samples = torch.randn(1, int(seconds * 16000), generator=torch.Generator().manual_seed(1)).cumsum(dim=1) * 0.01
    session = StreamingSession(model, att_context_size=context)
    pieces = [session.step(piece) for piece in samples.split(1000, dim=1)] + [session.finish()]
    with model.encoder.using_att_context_size(context):
        features, lengths = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
        encoded, lengths = model.encoder(audio_signal=features, length=lengths)
    streamed = StreamingOutput.concatenate(pieces).encoded
    torch.testing.assert_close(streamed, encoded[:, :, : int(lengths)], atol=1e-4, rtol=0)


class TestConfigs:
    @pytest.mark.parametrize('name', CONFIG_NAMES)
    def test_it_trains_and_streams_equal_to_offline(self, name):
        model = model_of(name, 'model.encoder.n_layers=2')
        run = fit(model, batches(6, seconds=(3.0, 2.0)), max_steps=6)
        losses = run.logger.column('train_loss')
        assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
        assert run.logger.column('masking/no_visible_frame_in_window') == [0] * 6
        contexts = [list(context) for context in model.encoder.att_context_size_all if context[1] != -1]
        assert {right + 1 for _, right in contexts} == ({1, 4, 14} if DYNAMIC in name else {1, 2, 7, 14})
        for context in contexts:
            assert_streams_as_offline(model, context)


class TestSampledTraining:
    def test_attention_and_masking_follow_each_draw_and_validation_draws_nothing(self):
        model = tiny_model(*SAMPLED)
        sampler = model.encoder.att_context_policy.sampler
        with recording_contexts(model) as record:
            run = fit(model, batches(8), max_steps=8)
        drawn = [sampler.draw(0, step).as_list() for step in range(8)]
        assert record.attention == drawn and len(set(map(tuple, drawn))) > 4
        assert record.masking == [left for left, _ in drawn]
        assert run.logger.column('att_context_left') == [left for left, _ in drawn]
        assert run.logger.column('att_context_right') == [right for _, right in drawn]
        model.eval()
        with recording_contexts(model) as record, torch.no_grad():
            model.inference_pass(noise_batch(), mode='val', apply_mask=True)
        assert record.attention == [[8, 3], [6, 1], [6, 0]]  # model.validate_contexts: all


class TestWithLayersAndCurriculum:
    LAYERS = ['model.encoder.n_layers=2', '+model.encoder.layer_att_context_size=[[4,-1],[3,0]]']

    @pytest.mark.parametrize('context', [[8, 3], [6, 1], [6, 0], [-1, 4]])
    def test_they_stream_equal_to_offline(self, context):
        assert_streams_as_offline(tiny_model(*SAMPLED, *self.LAYERS), context, seconds=2.0)

    def test_a_curriculum_cuts_the_chunks_and_rounds_the_past_down(self):
        model = tiny_model(*SAMPLED)
        curriculum = AttContextCurriculum(milestones=[[0, [4, 0]], [4, [5, 2]], [8, [-1, -1]]])
        run = fit(model, batches(12), max_steps=12, callbacks=[curriculum])
        drawn = [model.encoder.att_context_policy.sampler.draw(0, step) for step in range(12)]
        lefts, rights = (run.logger.column(f'att_context_{side}') for side in ('left', 'right'))
        found = list(zip(lefts, rights))
        assert set(rights[:4]) == {0} and all(0 < left <= 4 for left in lefts[:4])
        for (left, right), context in zip(found[4:8], drawn[4:8]):
            expected = min(context.right, 2) if context.right != -1 else 2
            assert right == expected and left in (0, 3, 4, 5) and left % (right + 1) == 0
        assert found[8:] == [tuple(context) for context in drawn[8:]]

    def test_a_linear_curriculum_keeps_whole_chunks_of_a_context_without_limits(self):
        contexts = 'model.encoder.att_context_size=[[40,0],[-1,-1]]'
        model = tiny_model('model.encoder.att_context_style=chunked_limited', contexts, 'model.validate_contexts=null')
        curriculum = AttContextCurriculum(start=[40, 3], end=[160, 15], warmup_steps=100)
        run = fit(model, batches(12), max_steps=12, callbacks=[curriculum])
        found = [run.logger.column(f'att_context_{side}') for side in ('left', 'right')]
        assert {right for right in found[1]} == {0, 3, 4} and all(
            left % (right + 1) == 0 for left, right in zip(*found)
        )


class TestChecks:
    def test_probabilities_of_the_list_would_be_passed_over(self):
        encoder = OmegaConf.create(
            {
                'att_context_style': 'chunked_limited',
                'att_context_size': [[8, 3], [6, 0]],
                'att_context_probs': [0.5, 0.5],
                'att_context_sampler': {'full_prob': 0.5, 'chunk_size': [1, 2]},
            }
        )
        with pytest.raises(ValueError, match=r'att_context_probs is \[0.5, 0.5\], but .*att_context_sampler draws'):
            check_contexts(encoder)
