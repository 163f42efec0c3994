# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl docs``: the pages that errors name, out of the installed package."""

import pytest

from nemo_streaming_ssl.__main__ import main
from nemo_streaming_ssl.documentation import pages, read_page


def test_all_pages_are_listed_with_their_titles(checkout, capsys):
    assert main(["docs"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    included = {"changelog", "contributing", "protocol"}  # pages of the site only
    assert set(listed) == {path.stem for path in (checkout / "docs").glob("*.md")} - included
    assert pages()["streaming"] == "Live streaming"


@pytest.mark.parametrize("name", ["contexts", "contexts.md", "docs/contexts.md#precedence"])
def test_a_page_is_printed_however_an_error_names_it(checkout, capsys, name):
    assert main(["docs", name]) == 0
    assert capsys.readouterr().out == (checkout / "docs/contexts.md").read_text(encoding="utf-8") + "\n"


def test_a_page_that_is_not_there_is_an_error_with_the_nearest(capsys):
    assert main(["docs", "context"]) == 1
    assert "there is no page 'context'; did you mean contexts?" in capsys.readouterr().err
    with pytest.raises(ValueError, match="the pages are .*contexts"):
        read_page("zzz")
