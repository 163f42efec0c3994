# SPDX-License-Identifier: Apache-2.0
"""What next-token prediction asks: how many frames have a token at each horizon. New in this project.

Shapes: B batch, K horizons.
"""

import torch

from nemo.collections.asr.parts.ssl_reports.batch_record import BatchRecord


def counted_shares(record: BatchRecord, horizons: int) -> dict[str, torch.Tensor]:
    """Return the share of a batch's frames that are asked for a token, by horizon; scalars on the lengths' device.

    The others stand so near to the end of their utterance that there is none, or behind it.

    Args:
        record: of the batch's forward pass.
        horizons: K.
    """
    frames, ahead = record.encoded_lengths, record.next_token_offset
    shares = {}
    for horizon in range(horizons):
        asked = torch.minimum(frames, (record.token_lengths - ahead - horizon).clamp(min=0))
        shares[f'audit/counted_share/next_{horizon}'] = asked.sum() / frames.sum().clamp(min=1)
    return shares
