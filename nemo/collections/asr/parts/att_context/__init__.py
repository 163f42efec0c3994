# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""Attention contexts as values, and what follows from them. NeMo has no such package."""

from nemo.collections.asr.parts.att_context.context import PRESETS, UNLIMITED, AttContext, draw_index, tightest

__all__ = ['AttContext', 'PRESETS', 'UNLIMITED', 'draw_index', 'tightest']
