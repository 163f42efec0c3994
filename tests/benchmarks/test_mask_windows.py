# SPDX-License-Identifier: Apache-2.0
"""The picture of what masks ask shows what the masking draws."""

from pathlib import Path

import pytest
from load_script import load_script

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks/mask_windows.py'


@pytest.fixture(scope='module')
def script():
    return load_script(SCRIPT)


def test_only_stock_masks_leave_frames_without_a_visible_one(script):
    stock, own = script.mean_shares(5, 4.0).values()
    assert stock[0] > 0.1 > stock[1] and own == (0, 0)


def test_the_picture_marks_the_window_of_a_frame_without_an_answer(script, tmp_path):
    rows = script.draw_masks(5, 8.0, 28)
    stock, own = rows.values()
    assert stock.masked.shape == own.masked.shape == (100,)
    shown = stock.in_window.nonzero().max().item()
    for axis in script.figure(rows, 5).axes:
        *cells, window = axis.patches
        assert len(cells) == 100 and (window.get_x(), window.get_width()) == (shown - 5, 6)
    with pytest.raises(ValueError, match='take another --seed'):
        script.figure({'own': own}, 5)
    script.main([f"--output={tmp_path / 'picture.png'}", '--seconds=4'])
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')
