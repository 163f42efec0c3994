# SPDX-License-Identifier: Apache-2.0
import os
import re

import pytest

from nemo.utils.atomic_files import remove_partial_files, replacing


def test_the_new_file_takes_the_old_ones_place(tmp_path):
    target = tmp_path / 'report.json'
    target.write_text('old')
    with replacing(target) as partial:
        partial.write_text('new')
        assert target.read_text() == 'old' and partial.parent == target.parent
    assert target.read_text() == 'new' and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize('error', [RuntimeError('no'), KeyboardInterrupt(), OSError(28, 'No space left on device')])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / 'report.json'
    target.write_text('old')
    with pytest.raises(type(error)):
        with replacing(target) as partial:
            partial.write_text('half')
            raise error
    assert target.read_text() == 'old' and list(tmp_path.iterdir()) == [target]


def test_an_os_error_names_the_target_and_the_cause(tmp_path):
    message = re.escape(f'could not write {tmp_path}/a.nemo: No space left on device')
    with pytest.raises(OSError, match=message) as error:
        with replacing(tmp_path / 'a.nemo'):
            raise OSError(28, 'No space left on device')
    assert error.value.errno == 28
    with pytest.raises(OSError, match='could not write .*gone/a.nemo'):
        with replacing(tmp_path / 'gone' / 'a.nemo') as partial:
            partial.write_text('x')


def killed_while_writing(target):
    """The process that began to write a file and is no more."""
    child = os.fork()
    if not child:
        with replacing(target) as partial:
            partial.write_text('half')
            os._exit(0)  # as a kill would
    os.waitpid(child, 0)
    return child


def test_only_what_dead_processes_left_is_cleared_by_the_next_write_or_all_at_once(tmp_path):
    children = [killed_while_writing(tmp_path / name) for name in ('a.ckpt', 'b.ckpt')]
    others = [tmp_path / f'.b.ckpt.{os.getpid()}.partial', tmp_path / '.notes.partial', tmp_path / 'c.partial']
    for path in others:
        path.write_text('in use')
    with replacing(tmp_path / 'a.ckpt') as partial:
        partial.write_text('whole')
    assert remove_partial_files(tmp_path) == [tmp_path / f'.b.ckpt.{children[1]}.partial']
    assert sorted(tmp_path.iterdir()) == sorted([*others, tmp_path / 'a.ckpt'])
