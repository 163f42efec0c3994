# SPDX-License-Identifier: Apache-2.0
"""The README is short, its links lead somewhere, and its lines of code run as they are."""

import re
from pathlib import Path

import torch
from tiny_nest import tiny_config

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / 'README.md').read_text()


def test_it_is_read_in_a_minute():
    assert len(README.splitlines()) <= 90


def test_its_links_and_pictures_are_there():
    found = re.findall(r'\]\(((?!http)[^)#]+)', README)
    assert len(found) > 10
    assert not [path for path in found if not (ROOT / path).is_file()]


def test_its_code_runs_as_it_is(monkeypatch):
    (code,) = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)
    model = EncDecDenoiseMaskedTokenPredModel(tiny_config('model.encoder.n_layers=3').model)
    monkeypatch.setattr(EncDecDenoiseMaskedTokenPredModel, 'restore_from', lambda path: model)
    samples = torch.randn(1, 32000)
    names = {'audio': samples, 'lengths': torch.tensor([32000]), 'samples': samples}
    exec(code, names)
    assert names['masks'].any() and names['output'].encoded.shape[2] > 0
    assert [context.left for context in model.encoder.effective_att_contexts([100, 0])][:3] == [40, 40, 80]
