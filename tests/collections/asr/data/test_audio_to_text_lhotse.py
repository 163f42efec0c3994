# SPDX-License-Identifier: Apache-2.0
"""Recognisers that read through lhotse mix channels down, count what cannot be read, and refuse NaN."""

import lightning.pytorch as pl
import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, Recording, SupervisionSegment
from torch.utils.data import DataLoader

from nemo.collections.asr.data.audio_to_text_lhotse import LhotseSpeechToTextBpeDataset, SilentBatch
from nemo.collections.asr.data.training_data_mixin import MAX_SKIPPED_IN_A_ROW, LogLeftOut
from nemo.collections.common.parts.preprocessing.parsers import make_parser


def test_bad_audio_and_channels(tmp_path, left_out):
    samples = np.full((16000, 2), 0.25, dtype=np.float32)
    samples[:, 1] = -0.75
    broken = np.where(np.arange(16000) == 5, np.nan, 0.1)
    for name, content in (('two', samples), ('gone', samples), ('broken', broken)):
        soundfile.write(tmp_path / f'{name}.wav', content, 16000, subtype='FLOAT')
    cuts = {name: Recording.from_file(tmp_path / f'{name}.wav').to_cut() for name in ('two', 'gone', 'broken')}
    for name, cut in cuts.items():
        cut.supervisions.append(SupervisionSegment(name, name, 0, 1.0, text='ab'))
    (tmp_path / 'gone.wav').unlink()
    dataset = LhotseSpeechToTextBpeDataset(make_parser(labels=['a', 'b'], name='en'))
    audio = dataset[CutSet.from_cuts([cuts['two'], cuts['gone']])][0]
    assert audio.shape == (1, 16000) and audio.mean().item() == pytest.approx(-0.25)
    assert left_out.total() == 1 and 'gone.wav' in left_out.summary()
    with pytest.raises(ValueError, match='broken.wav.*NaN'):
        dataset[CutSet.from_cuts([cuts['broken']])]
    dataset.skip_bad_audio = True
    silence = dataset[CutSet.from_cuts([cuts['broken']])]
    assert isinstance(silence, SilentBatch) and [len(part) for part in silence] == [1] * 4


class Sums(pl.LightningModule):
    """Its gradient is 1."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight + batch[0].sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def same(batch):
    return batch


def fit(batches, validation=()):
    model, options = (
        Sums(),
        dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator='cpu'),
    )
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=0, callbacks=[LogLeftOut()], **options)
    loaders = [DataLoader(each, batch_size=None, collate_fn=same) for each in (batches, validation) if each]
    trainer.fit(model, *loaders)
    return model.weight.item()


def test_a_batch_of_which_nothing_is_left_adds_no_gradient():
    silence, speech = SilentBatch([torch.zeros(1)]), [torch.ones(1)]
    assert fit([speech, silence, silence, speech]) == -2
    with pytest.raises(ValueError, match=f'nothing is left of the last {MAX_SKIPPED_IN_A_ROW} batches'):
        fit([silence] * MAX_SKIPPED_IN_A_ROW)
    with pytest.raises(ValueError, match='each utterance of a batch is bad'):
        fit([speech], [silence])
