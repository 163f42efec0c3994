# SPDX-License-Identifier: Apache-2.0
"""Configure the site that ``make docs`` builds.

Sphinx reads Markdown and notebooks with MyST. The API reference comes from the docstrings, which are read and not
imported: the environment of the site has no NeMo.
"""

import ast
import re
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[1]

project = 'nemo-streaming-ssl'
author = 'the nemo-streaming-ssl authors'
project_copyright = f'2026, {author}'
release = version = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']['version']

extensions = ['myst_nb', 'sphinx.ext.napoleon', 'autoapi.extension', 'sphinx_copybutton']
exclude_patterns = ['_build']

myst_heading_anchors = 4
myst_enable_extensions = ['deflist']
nb_execution_mode = 'off'  # `make docs` runs the tutorial before, where NeMo is
nb_output_stderr = 'remove'
napoleon_use_ivar = True

autoapi_dirs = ['../nemo', '../src/nemo_streaming_ssl']
autoapi_root = 'api'
autoapi_python_use_implicit_namespaces = True
autoapi_options = ['members', 'undoc-members', 'show-module-summary']
autoapi_python_class_content = 'both'
autoapi_add_toctree_entry = False
suppress_warnings = ['autoapi.python_import_resolution']  # NeMo itself is not there to be read

html_theme = 'furo'
html_title = f'{project} {release}'
html_show_sourcelink = False
html_static_path = ['_static']
html_css_files = ['custom.css']
copybutton_selector = 'div.highlight pre'

# Files outside of docs/ that are pages of the site, too: links lead to the page.
PAGES = {
    '../CONTRIBUTING.md': 'contributing.md',
    '../CHANGELOG.md': 'changelog.md',
    '../benchmarks/downstream/protocol.md': 'protocol.md',
}


def _link_to_pages(app, name, source):
    """Turn links to files that are included as pages into links to these."""
    for file, page in PAGES.items():
        source[0] = source[0].replace(f']({file}', f']({page}')


# The packages whose ``__all__`` is the public API.
PARTS = 'nemo.collections.asr.parts'
PUBLIC = ('att_context', 'objectives', 'streaming')


def _public_api(folder: Path, package: str) -> list[str]:
    """Return a Markdown table of what a package exports: each name and the first line of its docstring."""
    tree = ast.parse((folder / '__init__.py').read_text(encoding='utf-8'))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    origins = {alias.name: node.module for node in imports for alias in node.names}
    exported = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == '__all__'
    )
    rows = [f'## `{package}`', '', '| name | |', '| --- | --- |']
    for name in sorted(ast.literal_eval(exported), key=str.lower):
        module = origins[name]
        rows.append(f'| {{py:obj}}`{name} <{module}.{name}>` | {_first_line(module, name)} |')
    return [*rows, '']


def _first_line(module: str, name: str) -> str:
    """Return the first line of a definition's docstring, without reStructuredText's marks."""
    file = ROOT / (module.replace('.', '/') + '.py')
    if not file.is_file():
        return ''
    for node in ast.parse(file.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            first = (ast.get_docstring(node) or '').split('\n')[0]
            return re.sub(r':\w+:`|``', '`', first).replace('|', '\\|')
    return ''


def _write_public_api(app):
    """Write the page of the public API, which is made of the packages' ``__all__``."""
    lines = ['# Public API', '', 'What these packages export. Other names that NeMo does not have may change.', '']
    folders = {f'{PARTS}.{name}': ROOT / f'{PARTS}.{name}'.replace('.', '/') for name in PUBLIC}
    for package, folder in folders.items():
        lines += _public_api(folder, package)
    (ROOT / 'docs/public_api.md').write_text('\n'.join(lines), encoding='utf-8')


def setup(app):
    """Called by Sphinx."""
    app.connect('builder-inited', _write_public_api, priority=400)
    app.connect('source-read', _link_to_pages)
