# SPDX-License-Identifier: Apache-2.0
"""The curriculum alone, and in runs of a tiny model on random features, interrupted or not."""

from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_nest import CONFIGS, batches, fit, tiny_model

from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder
from nemo.collections.asr.parts.att_context import AttContextCurriculum

MILESTONES = [[0, [5, 0]], [3, [20, 0]], [6, [40, 0]]]


def make_model():
    layers = 'model.encoder.n_layers=2', '+model.encoder.layer_att_context_size=[[0,[10,0]],[1,[40,0]]]'
    return tiny_model(*layers, 'model.encoder.att_context_size=[[40,0],[20,0],[-1,0]]')


def train(model, max_steps, **settings):
    """Train; return the trainer and, for each batch, its step, contexts and ceiling, and what masking keeps to."""
    encoder, seen = model.encoder, []

    def note(masking, args, kwargs):
        step, contexts = model.trainer.global_step, encoder.effective_att_contexts()
        ceiling = encoder.att_context_policy.ceiling.left
        seen.append((step, encoder.att_context_size, contexts, ceiling, masking.left_context_size))

    model.mask_processor.register_forward_pre_hook(note, with_kwargs=True)
    curriculum = AttContextCurriculum(milestones=MILESTONES)
    return fit(model, batches(4), max_steps, callbacks=[curriculum], max_epochs=-1, **settings), seen


@pytest.mark.integration
class TestRuns:
    def test_masking_keeps_to_the_tightest_layer_in_every_batch(self):
        model = make_model()
        run, seen = train(model, 9)
        for step, (seen_at, _, contexts, ceiling, masking) in enumerate(seen):
            assert seen_at == step and ceiling == {0: 5, 3: 20, 6: 40}[step // 3 * 3]
            assert masking == min(context.left for context in contexts if context.left >= 0) == min(10, ceiling)
        assert len({tuple(context) for _, context, *_ in seen}) > 2
        assert run.logger.column('att_context_ceiling_left') == [ceiling for *_, ceiling, _ in seen]
        assert model.encoder.att_context_policy.ceiling is None

    def test_a_resumed_run_continues_the_sequence(self, tmp_path):
        _, whole = train(make_model(), 8)
        stopped, first = train(make_model(), 5)  # within the second milestone
        stopped.save_checkpoint(tmp_path / 'stopped.ckpt')
        _, second = train(make_model(), 8, ckpt_path=tmp_path / 'stopped.ckpt')
        assert first + second == whole and [step for step, *_ in second] == [5, 6, 7]

    def test_batches_of_one_accumulation_share_the_ceiling(self):
        _, seen = train(make_model(), 4, accumulate_grad_batches=2)
        assert [step for step, *_ in seen] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [ceiling for *_, ceiling, _ in seen] == [5] * 6 + [20] * 2


class TestConfigs:
    @pytest.mark.parametrize('name', ['nest_hierarchical_streaming', 'nest_hierarchical_streaming_tiny'])
    def test_layers_and_curriculum_fit_each_other(self, name):
        with initialize_config_dir(str(CONFIGS), version_base=None):
            cfg = compose(name)
        cfg.model.encoder.update(d_model=16, n_heads=2, subsampling_conv_channels=4)
        encoder = ConformerEncoder(**{key: value for key, value in cfg.model.encoder.items() if key != '_target_'})
        curriculum = AttContextCurriculum(**cfg.curriculum)
        curriculum.on_fit_start(None, SimpleNamespace(encoder=encoder))
        assert len(set(encoder.layer_att_contexts())) == 3
        ceilings = [ceiling.left for _, ceiling in curriculum.schedule.anchors]
        assert ceilings == sorted(ceilings) and ceilings[-1] == encoder.streaming_cfg.last_channel_cache_size


class TestCallback:
    def make_encoder(self, **arguments):
        return ConformerEncoder(feat_in=8, n_layers=2, d_model=8, n_heads=2, conv_context_size='causal', **arguments)

    def test_a_linear_path(self):
        curriculum = AttContextCurriculum(start=[40, 0], end=[320, 0], warmup_steps=100)
        encoder, expected = (
            self.make_encoder(att_context_size=[-1, 0]),
            {0: 40, 1: 42, 50: 180, 99: 317, 100: 320, 999: 320},
        )
        assert {step: curriculum.ceiling_at(step, encoder).left for step in expected} == expected

    def test_a_linear_path_of_whole_chunks(self):
        curriculum = AttContextCurriculum(start=[4, 3], end=[16, 3], warmup_steps=8)
        encoder = self.make_encoder(att_context_size=[16, 3], att_context_style='chunked_limited')
        assert [curriculum.ceiling_at(step, encoder).left for step in range(9)] == [4, 4, 4, 8, 8, 8, 12, 12, 16]
        for step in range(9):
            encoder.check_att_context_ceiling(curriculum.ceiling_at(step, encoder), f'step {step}')

    def test_no_ceiling_before_the_first_milestone(self):
        curriculum = AttContextCurriculum(milestones=OmegaConf.create([[10, [40, 0]]]))
        assert curriculum.ceiling_at(9, self.make_encoder()) is None

    @pytest.mark.parametrize(
        'arguments, message',
        [
            ({}, 'either milestones or all of start, end, warmup_steps'),
            (dict(milestones=MILESTONES, start=[4, 0]), 'either milestones or'),
            (dict(milestones=[[5, [4, 0]], [3, [8, 0]]]), r'curriculum.milestones: item 1, .*step 3 follows step 5'),
            (dict(start=[4, 0], end=[-1, 0], warmup_steps=9), 'linear interpolation needs limits on both ends'),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AttContextCurriculum(**arguments)

    def test_a_ceiling_the_encoder_cannot_follow_is_named_before_training(self):
        curriculum = AttContextCurriculum(milestones=[[0, [4, 3]], [5, [6, 3]]])
        encoder = self.make_encoder(att_context_size=[8, 3], att_context_style='chunked_limited')
        with pytest.raises(ValueError, match=r'curriculum.milestones: item 1, .6, 3.: the left context is 6'):
            curriculum.on_fit_start(None, SimpleNamespace(encoder=encoder))
        with pytest.raises(ValueError, match='has no encoder with a context policy'):
            curriculum.on_fit_start(None, SimpleNamespace())
