# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tiny_nest import CONFIGS

PAGE_FILE = Path(__file__).resolve().parents[2] / 'docs/reports.md'
PAGE = PAGE_FILE.read_text()


def snippets(language):
    return re.findall(rf'```{language}\n(.*?)```', PAGE, flags=re.DOTALL)


def test_the_snippet_runs():
    (snippet,) = snippets('python')
    names = {}
    exec(snippet, names)
    assert names['audit'].masked_share() > 0.1 and names['audit'].unanswerable_share()['low'] == 0
    assert isinstance(names['audit'].runs, torch.Tensor)


def test_the_keys_are_those_of_the_streaming_configs():
    (keys,) = (OmegaConf.create(snippet).model for snippet in snippets('yaml'))
    config = OmegaConf.load(CONFIGS / 'nest_fast-conformer_streaming.yaml').model
    assert len(keys) == 4 and all(config[name] == value for name, value in keys.items())


def test_its_pictures_are_there():
    pictures = re.findall(r'!\[.*?\]\((.*?)\)', PAGE)
    assert len(pictures) == 3 and all((PAGE_FILE.parent / picture).is_file() for picture in pictures)
