# SPDX-License-Identifier: Apache-2.0
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from nemo.collections.asr.parts.ssl_reports.training_logs import read_curves


def write(logger, *steps):
    for step, value in steps:
        logger.log_metrics({'val_loss/ctx_10_0': value, 'lr': 0.5}, step=step)
    logger.finalize('success')


def test_tensorboard_of_a_resumed_run(tmp_path):
    write(TensorBoardLogger(tmp_path / 'run', name=None, version='one'), (5, 3.0), (10, 2.5), (15, 9.0))
    write(TensorBoardLogger(tmp_path / 'run', name=None, version='two'), (15, 2.0), (20, 1.5))
    curves = read_curves(tmp_path)
    assert curves['val_loss/ctx_10_0'] == [(5, 3.0), (10, 2.5), (15, 2.0), (20, 1.5)]
    (file,) = (tmp_path / 'run/two').glob('events*')
    assert read_curves(file)['lr'] == [(15, 0.5), (20, 0.5)]


def test_a_table(tmp_path):
    write(CSVLogger(tmp_path, name=None, version='run'), (5, 3.0), (10, 2.5))
    assert read_curves(tmp_path) == {'val_loss/ctx_10_0': [(5, 3.0), (10, 2.5)], 'lr': [(5, 0.5), (10, 0.5)]}
    assert read_curves(tmp_path / 'run/metrics.csv') == read_curves(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ValueError, match='nowhere: there is no such file or folder'):
        read_curves(tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='there are no logs in it'):
        read_curves(tmp_path)
