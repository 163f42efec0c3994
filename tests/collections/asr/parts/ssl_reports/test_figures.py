# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from nemo.collections.asr.parts.att_context.context import AttContext
from nemo.collections.asr.parts.ssl_reports import figures


def texts(figure):
    """All that is written in a picture."""
    from matplotlib.text import Text

    return ' | '.join(text.get_text() for text in figure.findobj(Text) if text.get_text())


def spans(axis, label):
    """Where the patches of a label lie along x, (start, end)."""
    for container in axis.collections:
        if container.get_label() == label:
            return [tuple(np.round(path.get_extents().intervalx, 6)) for path in container.get_paths()]
    return None


class TestMaskedSpectrogram:
    FEATURES = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)

    def test_blocks_and_attention_frames(self):
        masks = np.zeros(40)
        masks[8:16], masks[22:30] = 1, 1
        no_visible_frame = np.array([0, 1, 0, 0, 0], dtype=bool)
        figure = figures.masked_spectrogram(self.FEATURES, masks, 0.01, 8, no_visible_frame, 'a title')
        upper, lower = figure.axes
        shown = [(round(patch.get_x(), 4), round(patch.get_x() + patch.get_width(), 4)) for patch in upper.patches]
        assert shown == [(0.08, 0.16), (0.22, 0.3)]
        assert spans(lower, 'masked') == [(0.08, 0.16)]
        assert spans(lower, 'partly masked') == [(0.16, 0.32)]  # 2 of 8 mask frames, then 6 of 8
        assert spans(lower, 'no visible frame (1)') == [(0.08, 0.16)]
        written = texts(figure)
        assert 'seconds (a feature frame: 10 ms)' in written and 'frames of\n80 ms' in written and 'a title' in written

    def test_masks_after_the_subsampling(self):
        figure = figures.masked_spectrogram(self.FEATURES, np.array([0, 1, 1, 0, 0]), 0.01, 8)
        (block,) = figure.axes[0].patches
        assert (round(block.get_x(), 4), round(block.get_width(), 4)) == (0.08, 0.16)
        assert spans(figure.axes[1], 'masked') == [(0.08, 0.24)]

    def test_nothing_masked_and_less_than_a_frame(self, tmp_path):
        for features, masks in ((self.FEATURES, np.zeros(40)), (self.FEATURES[:, :3], np.ones(3))):
            figures.save_figure(figures.masked_spectrogram(features, masks, 0.01, 8), tmp_path / 'picture')


class TestSurprise:
    FEATURES = TestMaskedSpectrogram.FEATURES
    SURPRISE = np.array([np.nan, 2.0, 4.0, 0.5, np.nan])  # five tokens of 80 ms

    def test_each_token_has_its_height_where_it_lies_in_time(self):
        figure = figures.surprise_over_time(self.FEATURES, self.SURPRISE, 0.01, 8, classes=64, title='a title')
        upper, lower = figure.axes
        values, edges, _ = lower.patches[0].get_data()
        np.testing.assert_array_equal(values, self.SURPRISE)
        assert edges == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4]) and not upper.patches
        assert [line.get_ydata()[0] for line in lower.lines] == pytest.approx([6.5 / 3, math.log(64)])
        written = texts(figure)
        for expected in ('a title', 'surprise of\nthe next token\n(nats)', 'mean, 2.17', 'uniform baseline, 4.16'):
            assert expected in written
        assert 'mask' not in written and 'seconds (a token: 80 ms)' in written

    @pytest.mark.parametrize('masks', [np.repeat([0, 1, 1, 0, 0], 8), np.array([0, 1, 1, 0, 0])])
    def test_what_was_not_heard_is_hatched(self, masks):
        upper = figures.surprise_over_time(self.FEATURES, self.SURPRISE, 0.01, 8, masks=masks).axes[0]
        (block,) = upper.patches
        assert (round(block.get_x(), 4), round(block.get_width(), 4)) == (0.08, 0.16)

    def test_no_token_at_all(self, tmp_path):
        for features, surprise in ((self.FEATURES, np.full(5, np.nan)), (self.FEATURES[:, :3], np.zeros(0))):
            figure = figures.surprise_over_time(features, surprise, 0.01, 8)
            figures.save_figure(figure, tmp_path / 'picture')
            assert 'mean' not in texts(figure)


class TestAttentionWindows:
    def test_bars(self):
        windows, seen = [(5, 12), (-math.inf, 12)], [(-3, 12), (2, 12)]
        own = [AttContext(7, 0), None]
        figure = figures.attention_windows(windows, seen, frame=12, frames=20, frame_seconds=0.08, own=own)
        bars = [(patch.get_x(), patch.get_width()) for patch in figure.axes[0].patches]
        assert bars == [(0, 13), (5, 8), (2, 11), (0, 13)]  # field and window of layer 0, then of layer 1
        written = texts(figure)
        for expected in ('0  [7, 0]', '1  -', 'attention frame (80 ms each)', 'seconds', 'what output 12 depends on'):
            assert expected in written


class TestLearningCurves:
    CURVES = {
        'val_loss/ctx_10_0': [(10, 3.0), (20, 2.0)],
        'val_loss/ctx_unlimited_0': [(20, 1.5), (10, 2.5)],
        'val_loss/ctx_160_0': [(10, 2.7)],
        'val_accuracy/ctx_10_0': [(10, 0.25), (20, 0.5)],
        'train_loss/ctx_10_0': [(step, 4 - step / 100) for step in range(200)],
        'att_context_ceiling_left': [(0, 10.0), (10, 160.0), (15, -1.0)],
        'val_loss': [(10, 3.0)],
    }

    def test_each_context_has_a_line_of_its_own(self):
        figure = figures.learning_curves(self.CURVES, 'a run')
        loss, accuracy, ceiling = figure.axes
        by_label = {line.get_label(): line for line in loss.lines}
        assert list(by_label) == [
            '[10, 0] in training, smoothed',
            '[10, 0] in validation',
            '[160, 0] in validation',
            '[unlimited, 0] in validation',
        ]
        assert by_label['[unlimited, 0] in validation'].get_xydata().tolist() == [[10, 2.5], [20, 1.5]]
        assert len(by_label['[10, 0] in training, smoothed'].get_xdata()) == 40
        styles = [(str(line.get_linestyle()), line.get_marker()) for line in loss.lines[1:]]
        assert len(set(styles)) == 3  # told apart without colour
        assert accuracy.lines[0].get_ydata() == pytest.approx([25, 50])
        assert ceiling.lines[0].get_ydata()[:2].tolist() == [10, 160] and math.isnan(ceiling.lines[0].get_ydata()[2])

    def test_groups_of_drawn_chunks_come_after_the_contexts(self):
        names = ['chunk_16_to_31', 'unlimited_unlimited', 'chunk_1', '70_13', 'chunk_4_to_7', '70_0']
        curves = {f'train_loss/ctx_{name}': [(0, 3.0), (1, 2.0)] for name in names}
        contexts = ['70_0', '70_13', 'unlimited_unlimited']
        assert figures.contexts_in(curves) == [*contexts, 'chunk_1', 'chunk_4_to_7', 'chunk_16_to_31']
        (loss,) = figures.learning_curves(curves).axes
        assert loss.lines[-1].get_label() == 'chunks of 16 to 31 in training, smoothed'

    def test_horizons_are_no_contexts_and_have_a_panel_of_their_own(self):
        curves = {'train_loss/next_0': [(1, 3.0)], 'train_loss/ctx_10_0': [(1, 3.5)]}
        for context in ('40_0', '10_0'):
            for place, height in (('', 3.0), ('/next_10', 4.0), ('/next_2', 3.2), ('/next_0', 2.0)):
                curves[f'val_loss/ctx_{context}{place}'] = [(20, height), (10, height + 1)]
                curves[f'val_accuracy/ctx_{context}{place}'] = [(10, 0.1)]
        assert figures.contexts_in(curves) == ['10_0', '40_0']
        assert figures.parts_in(curves) == ['next_0', 'next_2', 'next_10']
        figure = figures.learning_curves(curves)
        loss, horizons, accuracy = figure.axes
        assert len(loss.lines) == 3 and len(horizons.lines) == 6 and len(accuracy.lines) == 2
        assert horizons.lines[0].get_xydata().tolist() == [[10, 3], [20, 2]]
        names = {text.get_text(): text.xy[1] for text in horizons.texts}
        assert list(names) == ['next_10', 'next_2', 'next_0'] and names['next_0'] == pytest.approx(2)
        assert 'mask' not in texts(figure) and 'loss (nats per\nnext token)' in texts(figure)

    def test_both_objectives(self):
        curves = {}
        for part in ('', '/masked', '/next', '/next_0', '/next_1'):
            curves[f'val_loss/ctx_10_0{part}'] = [(10, 4.0), (20, 3.0)]
            if part:
                curves[f'val_accuracy/ctx_10_0{part}'] = [(10, 0.25), (20, float('nan'))]
        figure = figures.learning_curves(curves)
        loss, parts, accuracies = figure.axes
        assert [len(axis.lines) for axis in figure.axes] == [1, 3, 3]
        assert accuracies.lines[0].get_ydata()[0] == 25 and not accuracies.texts  # no end to write names at
        heights = [text.xy[1] for text in parts.texts]
        assert [text.get_text() for text in parts.texts] == ['next_1', 'next_0', 'masked']
        assert heights == sorted(heights, reverse=True) and len(set(heights)) == 3  # lines on each other
        assert 'parts\nadded up' in texts(figure) and 'masked frame' not in texts(figure)

    def test_without_accuracy_ceiling_or_anything(self):
        assert len(figures.learning_curves({'train_loss/ctx_5_0': [(0, 1.0)]}).axes) == 1
        with pytest.raises(ValueError, match='no val_loss/ctx_... or train_loss/ctx_...'):
            figures.learning_curves({'val_loss': [(0, 1.0)]})


class TestSaving:
    def test_png_and_svg_the_same_each_time(self, tmp_path):
        contents = []
        for _ in range(2):
            figure = figures.learning_curves(TestLearningCurves.CURVES)
            files = figures.save_figure(figure, tmp_path / 'picture.of.something')
            assert [file.name for file in files] == ['picture.of.something.png', 'picture.of.something.svg']
            contents.append([file.read_bytes() for file in files])
        assert contents[0] == contents[1]
        assert contents[0][0].startswith(b'\x89PNG') and b'<svg' in contents[0][1]
        assert sorted(path.name for path in tmp_path.iterdir()) == [file.name for file in files]

    def test_a_picture_that_fails_leaves_the_old_one(self, tmp_path):
        old = tmp_path / 'picture.png'
        old.write_bytes(b'old')

        class Broken:
            def savefig(self, path, **kwargs):
                path.write_bytes(b'half')
                raise OSError('no space left')

        with pytest.raises(OSError, match='no space left'):
            figures.save_figure(Broken(), tmp_path / 'picture')
        assert old.read_bytes() == b'old' and [path.name for path in tmp_path.iterdir()] == ['picture.png']
