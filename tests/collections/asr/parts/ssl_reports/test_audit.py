# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from attention_windows import attended
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoder import tiny_encoder
from tiny_nest import tiny_model

from nemo.collections.asr.modules import RandomBlockMasking
from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.objectives.base import BatchRecord
from nemo.collections.asr.parts.ssl_reports.audit import (
    Window,
    audit_masking,
    audit_masks,
    audit_pass,
    windows_of,
)

WINDOWS = {
    'narrow': Window(AttContext(1, 0)),
    'wide': Window(AttContext(4, 2)),
    'past': Window(AttContext(-1, 0)),
    'all': Window(AttContext(-1, -1)),
    'chunks': Window(AttContext(4, 1), 'chunked_limited'),
    'present': Window(AttContext(0, 0)),
}


@st.composite
def masked_batches(draw):
    """Masks [B, M] and lengths [B]; what is masked lies within the lengths, mostly in runs."""
    frames = draw(st.integers(0, 24))
    rows, lengths = [], []
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, frames))
        runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 7)), max_size=8))
        row = [int(flag) for flag, times in runs for _ in range(times)][:length]
        rows.append(row + [0] * (frames - len(row)))
        lengths.append(length)
    return torch.tensor(rows, dtype=torch.float32).view(len(rows), frames), torch.tensor(lengths)


def brute_force(masks, lengths, factor, windows, threshold=0.8):
    """Look at every frame of every utterance, one after the other."""
    found = {'mask_frames': 0, 'mask_frames_masked': 0, 'frames': 0, 'frames_masked': 0, 'runs': {}}
    no_visible_frame = dict.fromkeys(windows, 0)
    for row, length in zip(masks.tolist(), lengths.tolist()):
        row = row[:length]
        shares = [sum(row[start : start + factor]) / factor for start in range(0, length - factor + 1, factor)]
        masked = [share > threshold for share in shares]
        found['mask_frames'] += length
        found['mask_frames_masked'] += sum(row)
        found['frames'] += len(shares)
        found['frames_masked'] += sum(masked)
        for run in ''.join('#' if flag else ' ' for flag in masked).split():
            found['runs'][len(run)] = found['runs'].get(len(run), 0) + 1
        for name, window in windows.items():
            sees = attended(tuple(window.context), window.style, len(shares)).tolist()
            for frame, flag in enumerate(masked):
                answers = [other for other, seen in enumerate(sees[frame]) if seen and shares[other] == 0]
                no_visible_frame[name] += flag and not answers
    return {**found, 'no_visible_frame': no_visible_frame}


class TestAuditMasks:
    @settings(max_examples=150)
    @given(masked_batches(), st.sampled_from([1, 2, 3, 8]))
    def test_against_brute_force(self, batch, factor):
        masks, lengths = batch
        audit = audit_masks(masks.unsqueeze(1).expand(-1, 2, -1), lengths, factor, WINDOWS)
        expected = brute_force(masks, lengths, factor, WINDOWS)
        for name in ('mask_frames', 'mask_frames_masked', 'frames', 'frames_masked'):
            assert getattr(audit, name).item() == expected[name]
        assert {length: count for length, count in enumerate(audit.runs.tolist()) if count} == expected['runs']
        assert {name: count.item() for name, count in audit.no_visible_frame.items()} == expected['no_visible_frame']

    def test_by_eye(self):
        masks = torch.tensor([[1, 1, 0, 1, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]])
        windows = {'layer_00': Window(AttContext(1, 0)), 'layer_01': Window(AttContext(3, 0))}
        audit = audit_masks(masks, torch.tensor([10, 6]), 1, windows)
        assert audit.masked_share().item() == pytest.approx(9 / 16)
        assert audit.runs.tolist() == [0, 0, 3, 1, 0, 0, 0, 0, 0, 0, 0]
        assert audit.mean_run().item() == 9 / 4 and audit.run_quantile(1.0) == 3
        assert audit.run_quantile(0.75) == 2 and audit.run_quantile(0.76) == 3
        shares = {name: share.item() for name, share in audit.no_visible_frame_share().items()}
        # The first two frames see nothing; with one frame of the past so do frames 4, 5 and 9, and one more below.
        assert shares == {'layer_00': pytest.approx(6 / 9), 'layer_01': pytest.approx(2 / 9)}


class TestWindowsOf:
    def test_layers_and_stack(self):
        encoder = tiny_encoder(n_layers=3, layer_att_context_size=[[0, [4, 0]], [2, [8, 0]]])
        with encoder.using_att_context_size([20, 0]):
            windows = windows_of(encoder)
        lefts = {name: window.context.left for name, window in windows.items()}
        before, _ = encoder.conv_context_size
        assert lefts == {'layer_00': 4, 'layer_01': 4, 'layer_02': 8, 'stack': 16 + 3 * before}
        encoder.set_layer_att_context_size(None)
        with encoder.using_att_context_size([-1, 0]):
            found = {name: tuple(window.context) for name, window in windows_of(encoder).items()}
        assert found == {'layers': (-1, 0), 'stack': (-1, 0)}


class OwnMasking(torch.nn.Module):
    """Hides the second half of every utterance, and takes no context."""

    def forward(self, input_feats, input_lengths):
        index = torch.arange(input_feats.shape[-1])
        hidden = (index >= input_lengths.unsqueeze(1) // 2) & (index < input_lengths.unsqueeze(1))
        masks = hidden.unsqueeze(1).expand_as(input_feats).to(input_feats.dtype)
        return input_feats * (1 - masks), masks


class TestAuditMasking:
    def test_any_masking_module(self):
        windows = {'layers': Window(AttContext(2, 0)), 'stack': Window(AttContext(9, 0))}
        audit = audit_masking(OwnMasking(), torch.tensor([40, 24]), features=4, factor=4, windows=windows, draws=3)
        assert audit.frames_masked == 3 * 8 and audit.masked_share() == 0.5 and audit.run_quantile(1.0) == 5
        # of five masked frames the first two see the unmasked half; of three, two
        assert audit.no_visible_frame_share()['layers'].item() == pytest.approx(4 / 8)
        assert audit.no_visible_frame_share()['stack'] == 0

    def test_ours_asks_for_nothing_impossible_and_stocks_does(self):
        windows, lengths = {'layers': Window(AttContext(5, 0))}, torch.tensor([800, 640])
        settings = dict(feat_in=8, mask_prob=0.5, block_size=48, subsampling_factor=8)
        ours = audit_masking(RandomBlockMasking(**settings), lengths, 8, 8, windows, draws=20)
        assert ours.frames_masked > 0 and ours.no_visible_frame['layers'] == 0

        class Regardless(torch.nn.Module):
            masking = RandomBlockMasking(**settings)

            def forward(self, input_feats, input_lengths):
                return self.masking(input_feats, input_lengths)

        unbound = audit_masking(Regardless(), lengths, 8, 8, windows, draws=20)
        assert unbound.no_visible_frame_share()['layers'] > 0.2

    def test_seeds_and_generators(self):
        masking, lengths, before = RandomBlockMasking(feat_in=8), torch.tensor([300]), torch.get_rng_state()
        first, again = (audit_masking(masking, lengths, 8, draws=2, seed=1) for _ in range(2))
        assert torch.equal(first.runs, again.runs) and torch.equal(torch.get_rng_state(), before)


def record_of(masks, lengths=(40, 21), factor=4):
    """A batch of utterances of 40 and 21 mask frames, 4 to an attention frame."""
    nothing, lengths = torch.zeros(2), torch.tensor(lengths)
    targets = dict(tokens=nothing.long().view(2, 1), token_lengths=nothing, features=nothing, feature_lengths=nothing)
    arguments = dict(mask_lengths=lengths, encoded_lengths=lengths // factor, factor=factor)
    return BatchRecord(None, masks=masks, **arguments, **targets, threshold=0.8, decoder_offset=1)


@pytest.mark.parametrize('layers', [1, 2])
def test_a_pass_is_audited_in_the_window_and_in_the_stack(layers):
    """Left context 2, convolution 3: an output of the stack sees 4 frames before it for each layer."""
    encoder = tiny_encoder(n_layers=layers, att_context_size=[2, 0], conv_kernel_size=3, conv_context_size='causal')
    record = record_of(torch.tensor([[0.0] + [1.0] * 12]).unsqueeze(1), lengths=[13], factor=1)
    shares = audit_pass(record, encoder).no_visible_frame_share()
    assert shares == {'window': pytest.approx(10 / 12), 'stack': pytest.approx((12 - 4 * layers) / 12)}
    assert audit_pass(record, torch.nn.Linear(1, 1)).no_visible_frame == {}


class TestTrainingBatches:
    @pytest.mark.parametrize('context, milliseconds', [([8, 3], 240.0), ([8, 0], 0.0), ([-1, -1], -1.0)])
    def test_the_look_ahead_of_the_audited_context_is_logged(self, context, milliseconds):
        style = 'regular' if context[1] < 0 else 'chunked_limited'
        contexts = f'model.encoder.att_context_size=[{context}]'.replace(' ', '')
        model = tiny_model(contexts, f'model.encoder.att_context_style={style}')
        logs = model.reports.of_training_batch(model, record_of(torch.zeros(2, 4, 40)))
        assert logs['audit/look_ahead_ms'] == milliseconds

    def test_counts_all_along_and_audits_at_its_interval(self):
        model = tiny_model('model.audit_every_n_batches=2', 'model.encoder.att_context_size=[[3,0]]')
        masked, empty = torch.zeros(2, 4, 40), torch.zeros(2, 4, 40)
        masked[0, :, 8:16] = 1
        seen = [model.reports.of_training_batch(model, record_of(masks)) for masks in (masked, empty, empty, masked)]
        assert [logs['audit/empty_batches'] for logs in seen] == [0, 1, 2, 2]
        assert [logs.get('audit/run_frames/longest') for logs in seen] == [2, None, 0, None]
        assert seen[0]['audit/masked_share'] == seen[0]['masked_share'] == pytest.approx(8 / 61)
        assert {'audit/no_visible_frame/layers', 'audit/no_visible_frame/stack'} <= set(seen[0])
