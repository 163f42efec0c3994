# SPDX-License-Identifier: Apache-2.0
"""The table of config keys says what the code says: names, defaults, and pages that are there."""

import inspect
import re
from pathlib import Path

import pytest
from load_script import load_script
from omegaconf import OmegaConf

from nemo.collections.asr.losses import MLMLoss
from nemo.collections.asr.modules import ConformerEncoder, RandomBlockMasking, RandomProjectionVectorQuantizer
from nemo.collections.asr.parts.att_context import AttContextCurriculum
from nemo.collections.asr.parts.att_context.context_sampler import ContextSampler
from nemo.collections.asr.parts.objectives.next_tokens import NextTokenOptions
from nemo.collections.asr.parts.utils.config_keys import CONFIG_KEYS, keys_below, page_of
from nemo.collections.asr.parts.utils.known_keys import REPORT_KEYS

ROOT = Path(__file__).resolve().parents[5]
BY_NAME = {key.name: key for key in CONFIG_KEYS}
TAKERS = {
    'model.encoder': ConformerEncoder,
    'model.masking': RandomBlockMasking,
    'model.quantizer': RandomProjectionVectorQuantizer,
    'model.loss': MLMLoss,
    'model.next_token': NextTokenOptions,
    'model.encoder.att_context_sampler': ContextSampler,
    'curriculum': AttContextCurriculum,
}


def defaults_of(taker):
    """The defaults of a class's arguments, ``required`` for those without."""
    arguments = inspect.signature(taker).parameters.values()
    return {one.name: 'required' if one.default is inspect.Parameter.empty else one.default for one in arguments}


def anchor(heading):
    """What a heading's link is called, on GitHub and on the site."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


@pytest.mark.parametrize('section', TAKERS)
def test_the_defaults_are_those_of_who_takes_them(section):
    defaults, checked = defaults_of(TAKERS[section]), 0
    for name in keys_below(section):
        key = BY_NAME.get(f'{section}.{name}')
        if key is None:  # a section of its own
            continue
        said = OmegaConf.create(f'value: {key.default}').value
        assert name in defaults and said == defaults[name], (key.name, said, defaults.get(name))
        checked += 1
    assert checked


def test_no_key_of_the_project_is_left_out():
    own = {'audit_every_n_batches', 'log_figures', 'objective', 'target_normalize', 'validate_contexts'}
    assert own | {'next_token', 'validation_masks'} <= set(keys_below('model'))
    assert set(REPORT_KEYS) <= set(keys_below('model'))
    assert {'synced_contexts', 'skip_bad_audio', 'resumable'} == set(keys_below('model.train_ds'))
    stock = {'feat_in', 'mask_prob', 'block_size', 'mask_value', 'freeze', 'allow_overlap', 'max_mask_ratio'}
    assert set(defaults_of(RandomBlockMasking)) - stock == set(keys_below('model.masking'))
    assert set(defaults_of(AttContextCurriculum)) == set(keys_below('curriculum'))


@pytest.mark.parametrize('key', CONFIG_KEYS, ids=lambda key: key.name)
def test_the_page_is_there_and_explains_the_key(key):
    page, _, heading = key.page.partition('#')
    text = (ROOT / f'docs/{page}.md').read_text(encoding='utf-8')
    if heading:
        headings = [anchor(line.lstrip('#')) for line in text.splitlines() if line.startswith('#')]
        assert heading in headings
    assert key.name.rpartition('.')[2] in text


def test_the_reference_page_is_written_from_the_table():
    page = load_script(ROOT / 'docs/configuration_page.py')
    text = page.PAGE.read_text(encoding='utf-8')
    assert page.written(text) == text
    assert len(re.findall(r'^\| `', text, flags=re.MULTILINE)) == len(CONFIG_KEYS)


@pytest.mark.parametrize(
    ('text', 'page'),
    [
        ('model.next_token.weight is -1; it must be above 0', 'objectives'),
        ('train_ds.resumable.sed is not known', 'faults#going-on-exactly'),
        ('model.validation_ds.skip_bad_audio is 3', 'faults'),
        ('encoder.att_context_sampler.full_prob is 2', 'contexts#dynamic-chunks'),
        ('curriculum.milestones: step 0 comes twice; model.objective is fine', 'contexts#a-curriculum'),
        ('the model is in training mode', None),
        ('no masked frames', None),
    ],
)
def test_a_text_leads_to_the_page_of_the_first_key_in_it(text, page):
    assert page_of(text) == page
