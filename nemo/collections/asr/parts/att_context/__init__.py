# SPDX-License-Identifier: Apache-2.0
"""Attention contexts as values, and what follows from them. NeMo has no such package."""

from nemo.collections.asr.parts.att_context.context import PRESETS, UNLIMITED, AttContext
from nemo.collections.asr.parts.att_context.curriculum import AttContextCurriculum
from nemo.collections.asr.parts.att_context.dynamic_context import (
    DynamicContextModel,
    EnhancedDynamicContextModel,
    set_dynamic_context,
    sync_masking_to_attention,
)
from nemo.collections.asr.parts.att_context.policy import ContextPolicy
from nemo.collections.asr.parts.att_context.receptive_field import context_table, receptive_field
from nemo.collections.asr.parts.att_context.schedule import ContextSchedule, parse_layer_contexts
from nemo.collections.asr.parts.att_context.synced_collate import create_synced_context_collate
from nemo.collections.asr.parts.att_context.windows import Window

__all__ = [
    'AttContext',
    'AttContextCurriculum',
    'ContextPolicy',
    'ContextSchedule',
    'DynamicContextModel',
    'EnhancedDynamicContextModel',
    'PRESETS',
    'UNLIMITED',
    'Window',
    'context_table',
    'create_synced_context_collate',
    'parse_layer_contexts',
    'receptive_field',
    'set_dynamic_context',
    'sync_masking_to_attention',
]
