# SPDX-License-Identifier: Apache-2.0
"""The job script's command is one that the training script takes; no cluster is needed to see that."""

import os
import shlex
import subprocess
from pathlib import Path

from hydra import compose, initialize_config_dir

SCRIPT = Path(__file__).resolve().parents[3] / 'examples/slurm/pretrain.sbatch'


def command(*overrides, **environment):
    """The command that each task runs, as the script prints it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith('SLURM_')}
    words = ['bash', SCRIPT, *overrides]
    done = subprocess.run(words, env={**clean, **environment}, capture_output=True, text=True, check=True)
    return shlex.split(done.stdout)


def test_each_task_gets_a_config_that_can_be_composed():
    given = ['model.train_ds.shar_path=/data/my shards/shar', 'model.validation_ds.manifest_filepath=v.json']
    words = command(*given, DRY_RUN='1', SLURM_NNODES='4', SLURM_GPUS_ON_NODE='2')
    assert words[:3] == ['srun', '--kill-on-bad-exit=1', 'python'] and Path(words[3]).is_file()
    options = dict(word.split('=') for word in words[4:6])
    overrides = [word.replace('/data/my shards/shar', '"/data/my shards/shar"') for word in words[6:]]
    with initialize_config_dir(options['--config-path'], version_base=None):
        cfg = compose(options['--config-name'], overrides=overrides)
    assert (cfg.trainer.num_nodes, cfg.trainer.devices, cfg.trainer.precision) == (4, 2, 'bf16-mixed')
    assert cfg.trainer.use_distributed_sampler is False and cfg.exp_manager.resume_if_exists
    assert cfg.model.train_ds.shar_path == '/data/my shards/shar'


def test_without_a_dry_run_srun_is_called(tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/bash\nprintf "%q " "called" "$@"\n')
    srun.chmod(0o755)
    words = command('a=b', PATH=f"{tmp_path}:{os.environ['PATH']}", CONFIG='nest_hierarchical_streaming')
    assert words[0] == 'called' and words[-1] == 'a=b' and '--config-name=nest_hierarchical_streaming' in words
