# SPDX-License-Identifier: Apache-2.0
"""``torch.save`` that says why it failed. New in this project."""

from pathlib import Path

import torch


def save(content, path: str | Path) -> None:
    """Save as ``torch.save`` does.

    Raises:
        OSError: naming the file and the cause (a full disk, say), which torch's own error leaves out.
    """
    try:
        with open(path, 'wb') as file:
            writer = _RemembersWhyItFailed(file)
            try:
                torch.save(content, writer)
            except RuntimeError as error:
                raise writer.error or error from error
    except OSError as error:
        raise OSError(error.errno, f"could not write {path}: {error.strerror or error}") from error


class _RemembersWhyItFailed:
    """What ``torch.save`` needs of a file; keeps the error that torch hides behind its own."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()
