# SPDX-License-Identifier: Apache-2.0
"""64 live streams that start, end, fail, move and reset at random for 20,000 steps equal offline, in bounded memory."""

import json
from pathlib import Path

import pytest
from fresh_process import run_python


@pytest.mark.integration
def test_streams_stay_exact_and_memory_stays_where_it_was():
    done = run_python(Path(__file__).with_name('live_streams_soak.py'), 20000)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['differ'] == 0 and found['largest'] < 1e-4
    assert min(found['ended'], found['failed'], found['moved'], found['reset']) > 100, found
    middle, end = found['memory']
    assert end < middle * 1.02 + 4e6 and found['cache'][1] == found['cache'][0], found
