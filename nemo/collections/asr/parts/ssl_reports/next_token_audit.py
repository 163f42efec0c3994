# SPDX-License-Identifier: Apache-2.0
"""What next-token prediction asks: how many frames have a token at each horizon. New in this project.

Shapes: B batch, F frames, K horizons.
"""

import torch

from nemo.collections.asr.losses.ssl_losses.next_token import next_token_indices
from nemo.collections.asr.parts.ssl_reports.batch_record import BatchRecord


def counted_shares(record: BatchRecord, horizons: int) -> dict[str, torch.Tensor]:
    """Return the share of a batch's frames that are asked for a token, by horizon; scalars on the lengths' device.

    The others stand so near to the end of their utterance that there is none, or behind it.

    Args:
        record: of the batch's forward pass.
        horizons: K.
    """
    lengths, frames = record.encoded_lengths, record.tokens.shape[1]  # later frames have no next token
    index = next_token_indices(frames, horizons, record.next_token_offset, record.next_token_chunk, lengths.device)
    inside = torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)  # [B, F]
    predicts = (index >= 0) & (index < record.token_lengths.view(-1, 1, 1)) & inside.unsqueeze(2)
    shares = predicts.sum(dim=(0, 1)) / lengths.sum().clamp(min=1)
    return {f'audit/counted_share/next_{horizon}': share for horizon, share in enumerate(shares)}
