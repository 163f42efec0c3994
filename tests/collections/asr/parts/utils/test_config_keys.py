# SPDX-License-Identifier: Apache-2.0
"""The table of config keys says what the code says: names, defaults, and pages that are there."""

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from load_script import load_script
from omegaconf import OmegaConf

from nemo.collections.asr.losses import MLMLoss
from nemo.collections.asr.modules import ConformerEncoder, RandomBlockMasking, RandomProjectionVectorQuantizer
from nemo.collections.asr.parts.att_context import AttContextCurriculum
from nemo.collections.asr.parts.att_context.policy import ContextSampler
from nemo.collections.asr.parts.utils.config_keys import (
    CONFIG_KEYS,
    SECTIONS,
    Model,
    NextToken,
    Probe,
    where_to_read,
)

ROOT = Path(__file__).resolve().parents[5]
BY_NAME = {section.name: section for section in SECTIONS}
TAKERS = {
    'model.encoder': ConformerEncoder,
    'model.masking': RandomBlockMasking,
    'model.quantizer': RandomProjectionVectorQuantizer,
    'model.loss': MLMLoss,
    'model.encoder.att_context_sampler': ContextSampler,
    'curriculum': AttContextCurriculum,
}


def anchor(heading):
    """What a heading's link is called, on GitHub and on the site."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-')


@pytest.mark.parametrize('section', TAKERS)
def test_the_defaults_are_those_of_the_classes_that_take_them(section):
    arguments = inspect.signature(TAKERS[section]).parameters
    for each in fields(BY_NAME[section]):
        default = inspect.Parameter.empty if each.default is MISSING else each.default
        assert arguments[each.name].default == default, each.name


@pytest.mark.parametrize('section', SECTIONS, ids=lambda section: section.name)
def test_defaults_are_allowed(section):
    for each in fields(section):
        assert each.default is MISSING or each.metadata['allowed'].test(each.default), each.name


def test_a_section_takes_its_defaults():
    assert NextToken.parse(None) == NextToken.parse({}) == NextToken(horizons=4, positions='all', weight=1.0)
    assert Model.parse(OmegaConf.create({'objective': 'both', 'num_classes': 8})) == Model(objective='both')


@pytest.mark.parametrize(
    ('section', 'given', 'message'),
    [
        (NextToken, {'horizon': 4}, 'model.next_token.horizon is not known; did you mean model.next_token.horizons'),
        (NextToken, {'positions': 'end'}, "model.next_token.positions is 'end'; it must be one of .*chunk_end"),
        (NextToken, {'weight': float('nan')}, 'model.next_token.weight is nan; .* above 0'),
        (Probe, {'every_n_validations': 3}, 'model.probe is .*; it must have train_manifest'),
        (Model, {'audit_every_n_batches': True}, 'audit_every_n_batches is True; it must be null or .* 1 or more'),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(section, given, message):
    with pytest.raises(ValueError, match=message):
        section.parse(given)


@pytest.mark.parametrize('name', CONFIG_KEYS)
def test_the_page_is_there_and_explains_the_key(name):
    page, _, heading = CONFIG_KEYS[name]['page'].partition('#')
    text = (ROOT / f'docs/{page}.md').read_text(encoding='utf-8')
    if heading:
        headings = [anchor(line.lstrip('#')) for line in text.splitlines() if line.startswith('#')]
        assert heading in headings
    assert name.rpartition('.')[2] in text


def test_the_reference_page_is_written_from_the_table():
    page = load_script(ROOT / 'docs/configuration_page.py')
    text = page.PAGE.read_text(encoding='utf-8')
    assert page.written(text) == text
    assert len(re.findall(r'^\| `', text, flags=re.MULTILINE)) == len(CONFIG_KEYS)


@pytest.mark.parametrize(
    ('text', 'page'),
    [
        ('model.next_token.weight is -1; it must be above 0', 'objectives'),
        ('train_ds.resumable.sed is not known', 'faults#exact-resume'),
        ('model.validation_ds.skip_bad_audio is 3', 'faults'),
        ('encoder.att_context_sampler.full_prob is 2', 'contexts#dynamic-chunks'),
        ('curriculum.milestones: step 0 comes twice; model.objective is fine', 'contexts#curriculum'),
        ('the model is in training mode', None),
        ('no masked frames', None),
    ],
)
def test_a_text_leads_to_the_page_of_the_first_key_in_it(text, page):
    found = where_to_read(text)
    assert f'docs/{page.replace("#", ".md#")}'.removesuffix('.md') in found if page else found == ''
