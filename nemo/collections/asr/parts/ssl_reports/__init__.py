# SPDX-License-Identifier: Apache-2.0
"""Measures of an SSL model: masks, targets, validation, pictures. NeMo has no such package."""
