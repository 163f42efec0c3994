# SPDX-License-Identifier: Apache-2.0
"""What a model predicts: masked tokens (NEST), next tokens (NEST-RQ), or both."""

from nemo.collections.asr.parts.objectives.base import BatchRecord, FrameScores, LossPositions, Objective
from nemo.collections.asr.parts.objectives.combination import Objectives, StepLosses
from nemo.collections.asr.parts.objectives.masked_tokens import MaskedTokens
from nemo.collections.asr.parts.objectives.next_tokens import NextTokens

__all__ = [
    'BatchRecord',
    'FrameScores',
    'LossPositions',
    'MaskedTokens',
    'NextTokens',
    'Objective',
    'Objectives',
    'StepLosses',
]
