# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``exportable.py``: ONNX export with any torch.

NeMo 2.5.3 leaves the exporter to torch, whose default cannot do with NeMo's dynamic axes since 2.9. Later NeMo traces; so does this.
"""

import functools
from unittest import mock

import torch

from nemo_streaming_ssl import upstream

_up = upstream(globals())


class Exportable(_up.Exportable):
    """NeMo's interface of what can be exported."""

    def _export(self, *args, use_dynamo=False, **kwargs):
        export = torch.onnx.export if use_dynamo else functools.partial(torch.onnx.export, dynamo=False)
        with mock.patch.object(torch.onnx, 'export', export):  # NeMo's method takes no argument for it
            return super()._export(*args, use_dynamo=use_dynamo, **kwargs)
