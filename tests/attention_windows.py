# SPDX-License-Identifier: Apache-2.0
"""Who attends to whom, from the definition of the attention styles."""

import torch


def attended(context, style, frames):
    """Which key each query sees, [A, A] bool, for a number of attention frames A."""
    left, right = context
    query, key = torch.arange(frames).unsqueeze(1), torch.arange(frames).unsqueeze(0)
    if style == 'regular' or right < 0:
        return ((key >= query - left) | (left < 0)) & ((key <= query + right) | (right < 0))
    chunks = query // (right + 1) - key // (right + 1)
    return (chunks >= 0) & ((chunks <= left // (right + 1)) | (left < 0))
