# SPDX-License-Identifier: Apache-2.0
"""Write the table of configuration.md from the keys that the checks know.

python docs/configuration_page.py
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEYS = HERE.parent / 'nemo/collections/asr/parts/utils/config_keys.py'
PAGE = HERE / 'configuration.md'
MARK = '<!-- keys: written by docs/configuration_page.py -->\n'
TITLES = {
    'model': 'The model',
    'model.train_ds': 'Data',
    'model.masking': 'Masking',
    'model.quantizer': 'Targets',
    'model.encoder': 'Encoder',
    'model.loss': 'Loss',
    'curriculum': 'Curriculum',
    'streaming': 'Streaming pipelines',
}


def config_keys():
    """Return all keys; the module that has them imports nothing, so the site needs no NeMo."""
    spec = importlib.util.spec_from_file_location('config_keys', KEYS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module.CONFIG_KEYS


def section_of(name):
    """Return the section that a key is listed under: the longest of ``TITLES`` that it begins with."""
    return max((section for section in TITLES if name.startswith(f'{section}.')), key=len)


def row(key, section):
    """Return the row of a key in the table of its section."""
    page, _, heading = key.page.partition('#')
    link = f"[{page}]({page}.md{heading and f'#{heading}'})"
    return f"| `{key.name.removeprefix(f'{section}.')}` | {key.default} | {key.meaning} | {link} |"


def tables():
    """Return the tables of all sections, Markdown."""
    lines = []
    for section, title in TITLES.items():
        rows = [row(key, section) for key in config_keys() if section_of(key.name) == section]
        lines += [
            f'## {title}: `{section}`',
            '',
            '| key | default | meaning | more |',
            '| --- | --- | --- | --- |',
            *rows,
            '',
        ]
    return '\n'.join(lines)


def written(text):
    """Return the text of the page with its tables anew."""
    return text.partition(MARK)[0] + MARK + '\n' + tables()


if __name__ == '__main__':
    PAGE.write_text(written(PAGE.read_text(encoding='utf-8')), encoding='utf-8')
