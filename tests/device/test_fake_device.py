# SPDX-License-Identifier: Apache-2.0
"""The device that is not there refuses what a GPU refuses, and tells what would make the host wait."""

import json
from pathlib import Path

import pytest
from device.fake_device import why_not
from fresh_process import run_python

pytestmark = [pytest.mark.integration, pytest.mark.skipif(bool(why_not()), reason=str(why_not()))]
SETUP = """
import json, sys, torch
from device.fake_device import install
from device.gpu_rules import MixedDevices
from device.host_traffic import recorded
device = install()
for statement in json.loads(sys.argv[1]):
    there, here = torch.arange(6., device=device).view(2, 3), torch.arange(6.).view(2, 3)
    mask, found = there > 2, []
    with recorded() as traffic:
        try:
            exec(statement)
        except MixedDevices:
            found = ['mixed']
    print(*found, *(f'{times} {meeting.kind}' for meeting, times in traffic.items()))
"""
EXPECTED = {
    'mixed': [
        'there + here',
        'here * there',
        'torch.cat([there, here])',
        'there.gather(1, here.long())',
        'there @ here.T',
        'here.add_(there)',
        'there[0] + torch.ones(3)',
        'here[mask]',
        'torch.stack([there[0, 0], torch.tensor(1.)])',
    ],
    '1 wait': [
        'there.sum().item()',
        'bool(mask.any())',
        'mask.nonzero()',
        'there[mask]',
        'there[mask] = torch.zeros(3, device=device)',
        'float(there[0, 0])',
        'torch.equal(there, there)',
        'there.repeat_interleave(torch.ones(2, dtype=torch.long, device=device), dim=0)',
    ],
    '1 copy to host': ['there.cpu()', 'there.tolist()', 'there.to("cpu", torch.float64)', 'here.copy_(there)'],
    '1 copy to device': [
        'here.to(device)',
        'torch.tensor([1, 2], device=device)',
        'torch.tensor(1.0, device=device)',
        'there.copy_(here)',
        'there[[0, 1]]',
    ],
    '': [
        'there + torch.tensor(2.)',
        'there[1, 2] + 1',
        'torch.where(mask, there, 0)',
        'there[mask] = 0',
        'torch.zeros(3, device=device)',
        'torch.full((2,), 7, device=device)',
        'there.to(torch.float16)',
        'here.tolist()',
        'there.repeat_interleave(2, dim=0)',
    ],
}


def test_a_statement_does_what_it_would_do_on_a_gpu():
    statements = [statement for several in EXPECTED.values() for statement in several]
    folder = str(Path(__file__).parents[1])
    done = run_python('-c', SETUP, json.dumps(statements), PYTHONPATH=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(zip(statements, done.stdout.splitlines(), strict=True))
    assert found == {statement: expected for expected, several in EXPECTED.items() for statement in several}
