# SPDX-License-Identifier: Apache-2.0
import torch

from nemo.core.classes import Exportable, NeuralModule
from nemo.core.neural_types import ChannelType, NeuralType


class Doubles(NeuralModule, Exportable):
    """The least that can be exported."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    @property
    def input_types(self):
        return {'x': NeuralType(('B', 'D'), ChannelType())}

    @property
    def output_types(self):
        return {'y': NeuralType(('B', 'D'), ChannelType())}

    def input_example(self):
        return (torch.ones(1, 3),)

    def forward(self, x):
        return self.scale * x


def test_onnx_export_traces_and_serves_any_batch(tmp_path):
    from onnxruntime import InferenceSession

    export = torch.onnx.export
    Doubles().export(str(tmp_path / 'doubles.onnx'))
    assert torch.onnx.export is export
    session = InferenceSession(str(tmp_path / 'doubles.onnx'))
    numbers = torch.arange(6.0).view(2, 3).numpy()
    assert (session.run(None, {'x': numbers})[0] == 2 * numbers).all()
