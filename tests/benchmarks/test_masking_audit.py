# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
from load_script import load_script

SCRIPT = Path(__file__).resolve().parents[2] / 'benchmarks/masking_audit.py'


@pytest.mark.integration
def test_every_shipped_config_masks_what_can_be_answered_and_as_much_live_as_offline(tmp_path, capsys):
    script = load_script(SCRIPT)
    rows = script.main(['--json', str(tmp_path / 'rows.json')])
    assert len({row['config'] for row in rows}) == len(list(script.CONFIGS.glob('*.yaml')))
    for row in rows:
        assert row['no_visible_frame'] == row['no_visible_frame_live'] == 0 and row['masked_frames'] > 10000, row
        assert row['masked_live'] == pytest.approx(row['masked'], rel=0.15), row
        assert row['masked'] == pytest.approx(0.33, rel=0.1), row
    assert capsys.readouterr().out.count('| `nest_') == len(rows)
