# SPDX-License-Identifier: Apache-2.0
"""The pages' links lead to files, their Python runs, and patches.md has a row for each module."""

import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny_nest import noise_batch, tiny_config, tiny_model

from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo_streaming_ssl.report import patched_modules
from nemo_streaming_ssl.versions import supported_range

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *(ROOT / 'docs').glob('*.md')])
EACH_PAGE = pytest.mark.parametrize('page', PAGES, ids=[page.stem for page in PAGES])
MADE_BY_THE_SITE = ('tutorial.ipynb', 'api/')


def snippets(page, language):
    return re.findall(rf'```{language}\n(.*?)```', (ROOT / page).read_text(), flags=re.DOTALL)


@EACH_PAGE
def test_links_and_pictures_lead_to_files(page):
    links = re.findall(r'\]\(((?!http)[^)#\s]+)', page.read_text())
    links = [link for link in links if not link.startswith(MADE_BY_THE_SITE)]
    assert not [link for link in links if not (page.parent / link).exists()]


@EACH_PAGE
def test_configs_are_yaml(page):
    for snippet in snippets(page.relative_to(ROOT), 'yaml'):
        OmegaConf.create(snippet)


def test_the_code_of_the_readme_runs(monkeypatch):
    model = EncDecDenoiseMaskedTokenPredModel(tiny_config('model.encoder.n_layers=3').model)
    monkeypatch.setattr(EncDecDenoiseMaskedTokenPredModel, 'restore_from', lambda path: model)
    samples = torch.randn(1, 32000)
    names = {'audio': samples, 'lengths': torch.tensor([32000]), 'samples': samples}
    for snippet in snippets('README.md', 'python'):
        exec(snippet, names)
    assert names['output'].encoded.shape[2] > 0


@pytest.mark.parametrize('position', ['pre_conv', 'post_conv'])
def test_the_code_about_contexts_runs_and_leaves_the_model_as_it_was(position):
    model = tiny_model(
        'model.encoder.att_context_size=[[80,0],[160,0],[240,0],[320,0],[-1,0]]',
        f'model.mask_position={position}',
        *(['model.quantizer.combine_time_steps=1', 'model.loss.decoder_offset=0'] * (position == 'post_conv')),
    )
    names = {
        'model': model,
        'audio': noise_batch().audio,
        'lengths': noise_batch().audio_len,
        'dataset': [noise_batch(seed=seed) for seed in range(4)],
        'base_collate_fn': lambda samples: samples[0],
    }
    for snippet in snippets('docs/contexts.md', 'python'):
        exec(snippet, names)
        assert model.encoder.att_context_size == [80, 0]


def test_the_code_about_reports_runs():
    for snippet in snippets('docs/reports.md', 'python'):
        exec(snippet, {})


def test_the_table_of_patches_has_every_patched_module_and_no_other():
    rows = re.findall(r'^\| `([\w.]+)` \|', (ROOT / 'docs/patches.md').read_text(), flags=re.MULTILINE)
    named = {name if name.startswith('nemo.') else f'nemo.collections.asr.{name}' for name in rows}
    assert named == {module.name for module in patched_modules() if module.kind == 'patched'}


@pytest.mark.parametrize('page', ['README.md', 'docs/index.md'])
def test_the_range_of_nemo_is_that_of_the_metadata(page):
    (first, last) = re.search(r'`nemo_toolkit` ([\d.]+) \.\.\. ([\d.]+)x', (ROOT / page).read_text()).groups()
    begin, beyond = supported_range()
    assert first == begin and tuple(map(int, last.strip('.').split('.'))) < tuple(map(int, beyond.split('.')))
