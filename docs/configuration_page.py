# SPDX-License-Identifier: Apache-2.0
"""Write the table of configuration.md from the keys that the checks know.

python docs/configuration_page.py
"""

import importlib.util
import sys
from dataclasses import MISSING
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
    """Return all keys by full name; the module that has them imports nothing, so the site needs no NeMo."""
    spec = importlib.util.spec_from_file_location('config_keys', KEYS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module.CONFIG_KEYS


def section_of(name):
    """Return the section that a key is listed under: the longest of ``TITLES`` that it begins with."""
    return max((section for section in TITLES if name.startswith(f'{section}.')), key=len)


def row(name, key):
    """Return the row of a key in the table of its section; ``name`` is the key's in the section."""
    page, _, heading = key['page'].partition('#')
    link = f"[{page}]({page}.md{heading and f'#{heading}'})"
    default, allowed = key['default'], key['allowed'].text
    default = 'required' if default is MISSING else 'null' if default is None else str(default)
    default = default.lower() if isinstance(key['default'], bool) else default
    meaning = f"{key['meaning']}{allowed and f' {allowed[0].upper()}{allowed[1:]}.'}"
    return f'| `{name}` | {default} | {meaning} | {link} |'


def tables():
    """Return the tables of all sections, Markdown."""
    keys, lines = config_keys(), []
    for section, title in TITLES.items():
        rows = [
            row(name.removeprefix(f'{section}.'), key) for name, key in keys.items() if section_of(name) == section
        ]
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
