# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from load_script import load_script

FOLDER = Path(__file__).resolve().parents[2] / 'benchmarks'


def test_only_stock_masks_leave_frames_without_a_visible_one():
    stock, own = load_script(FOLDER / 'mask_windows.py').mean_shares(5, 4.0).values()
    assert stock[0] > 0.1 > stock[1] and own == (0, 0)


@pytest.mark.integration
def test_every_shipped_config_keeps_a_frame_visible_and_masks_as_much_live_as_offline():
    script = load_script(FOLDER / 'masking_audit.py')
    rows = script.main(['--utterances=120'])
    assert len({row['config'] for row in rows}) == len(list(script.CONFIGS.glob('*.yaml')))
    for row in rows:
        assert row['no_visible_frame'] == row['no_visible_frame_live'] == 0 and row['masked_frames'] > 2500, row
        assert row['masked_live'] == pytest.approx(row['masked'], rel=0.15), row
        assert row['masked'] == pytest.approx(0.33, rel=0.1), row
