# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tiny_nest import HIERARCHY, POSITIONS, noise_batch, tiny_model

from nemo.collections.asr.parts.ssl_reports.figures import (
    attention_frame_ms,
    attention_windows,
    learning_curves,
    masked_spectrogram,
    read_curves,
    save_figure,
)

CURVES = {
    'val_loss/ctx_10_0': [(10, 3.0), (20, 2.0)],
    'val_loss/ctx_unlimited_0': [(20, 1.5), (10, 2.5)],
    'val_loss/ctx_160_0': [(10, 2.7)],
    'val_accuracy/ctx_10_0': [(10, 0.25), (20, 0.5)],
    'train_loss/ctx_10_0': [(step, 4 - step / 100) for step in range(200)],
    'att_context_ceiling_left': [(0, 10.0), (10, 160.0), (15, -1.0)],
    'val_loss': [(10, 3.0)],
}


def spans(axis, label):
    """Where the patches of a label lie along x, (start, end)."""
    (container,) = (found for found in axis.collections if found.get_label().startswith(label))
    return [tuple(np.round(path.get_extents().intervalx, 6)) for path in container.get_paths()]


class TestMaskedSpectrogram:
    @POSITIONS
    def test_masked_blocks_and_attention_frames(self, position):
        model, batch = tiny_model(*position).eval(), noise_batch((2.0, 3.0))
        with torch.no_grad(), model.encoder.using_att_context_size([1, 0]):
            record = model.encode_batch(batch, None)
            unit, factor = 0.08 / record.factor, record.factor
            record.masks[0, :, 8 // (8 // factor) : 16 // (8 // factor)] = 1
            record.masks[0, :, 3 * factor : 5 * factor] = 1
            figure = masked_spectrogram(model, record, 'a title')
        upper, lower = figure.axes
        blocks = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in upper.patches]
        ends = [8 // (8 // factor) * unit, 16 // (8 // factor) * unit, 0.24, 0.40]
        assert np.array(blocks).flatten() == pytest.approx(ends) and upper.get_title() == 'a title'
        assert spans(lower, 'masked')[-1] == (0.24, 0.4)
        assert spans(lower, 'no visible frame')[-1] == (0.32, 0.4)  # its window holds masked frames alone


def test_a_frame_lasts_as_long_as_its_windows_are_apart():
    in_samples = 'model.preprocessor.window_stride=null', '+model.preprocessor.n_window_stride=160'
    assert [attention_frame_ms(tiny_model(*settings)) for settings in ((), in_samples)] == [80.0, 80.0]


class TestAttentionWindows:
    def test_bars_of_the_receptive_field_and_of_each_layer(self):
        model = tiny_model(*HIERARCHY)
        with model.encoder.using_att_context_size([6, 0]):
            axis = attention_windows(model, frames=40, frame=30).axes[0]
        bars = [(patch.get_x(), patch.get_width(), patch.get_height()) for patch in axis.patches]
        assert [bar[:2] for bar in bars if bar[2] < 0.5] == [(26, 5), (26, 5), (24, 7)]
        assert all(start + width == 31 for start, width, _ in bars) and bars[0][0] < 24
        assert [label.get_text() for label in axis.get_yticklabels()][0].startswith('0  [')


class TestLearningCurves:
    def test_each_context_has_a_line_of_its_own(self):
        loss, accuracy, ceiling = learning_curves(CURVES).axes
        by_label = {line.get_label(): line for line in loss.lines}
        assert list(by_label) == [
            '[10, 0] in training, smoothed',
            '[10, 0] in validation',
            '[160, 0] in validation',
            '[unlimited, 0] in validation',
        ]
        assert by_label['[unlimited, 0] in validation'].get_xydata().tolist() == [[10, 2.5], [20, 1.5]]
        assert len(by_label['[10, 0] in training, smoothed'].get_xdata()) == 40
        styles = {(str(line.get_linestyle()), line.get_marker()) for line in loss.lines[1:]}
        assert len(styles) == 3  # told apart without colour
        assert list(accuracy.lines[0].get_ydata()) == [0.25, 0.5]
        assert ceiling.lines[0].get_ydata()[:2].tolist() == [10, 160] and math.isnan(ceiling.lines[0].get_ydata()[2])


def test_a_picture_is_written_as_png_and_svg_the_same_each_time(tmp_path):
    contents = []
    for _ in range(2):
        files = save_figure(learning_curves(CURVES), tmp_path / 'picture.of.something')
        assert [file.name for file in files] == ['picture.of.something.png', 'picture.of.something.svg']
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]
    assert contents[0][0].startswith(b'\x89PNG') and b'<svg' in contents[0][1]


class TestReadCurves:
    @staticmethod
    def write(folder, *steps):
        logger = TensorBoardLogger(folder, name=None, version='')
        for step, value in steps:
            logger.log_metrics({'val_loss/ctx_10_0': value, 'lr': 0.5}, step=step)
        logger.finalize('success')

    def test_of_a_resumed_run(self, tmp_path):
        self.write(tmp_path / 'run/one', (5, 3.0), (10, 2.5), (15, 9.0))
        self.write(tmp_path / 'run/two', (15, 2.0), (20, 1.5))
        curves = read_curves(tmp_path)
        assert curves['val_loss/ctx_10_0'] == [(5, 3.0), (10, 2.5), (15, 2.0), (20, 1.5)]
        (file,) = (tmp_path / 'run/two').glob('events*')
        assert read_curves(file)['lr'] == [(15, 0.5), (20, 0.5)]

    @pytest.mark.parametrize('folder', ['.', 'nowhere'])
    def test_nothing_to_read(self, tmp_path, folder):
        with pytest.raises(ValueError, match='there are no event files'):
            read_curves(tmp_path / folder)
