# SPDX-License-Identifier: Apache-2.0
"""Configure the site that ``make docs`` builds.

Sphinx reads Markdown and notebooks with MyST. The API reference comes from the docstrings, which are read and not
imported: the environment of the site has no NeMo.
"""

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


def setup(app):
    """Called by Sphinx."""
    app.connect('source-read', _link_to_pages)
