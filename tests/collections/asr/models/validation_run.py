# SPDX-License-Identifier: Apache-2.0
"""A validation in several contexts on two CPU processes; run by test_ssl_models_validation.py.

Usage: validation_run.py FOLDER, with MASTER_ADDR and MASTER_PORT set. Each rank validates and tests its share of six
batches, of other sizes and lengths (but as many: NeMo's encoder waits for the other ranks in each forward); then one
process does so with all of them. Leaves FOLDER/RANK.json and FOLDER/alone.json: what they report.
"""

import json
import sys
from pathlib import Path

from ranks import gloo_ddp, run_ranks
from tiny_nest import noise_batch, tiny_model, trainer
from torch.utils.data import DataLoader

SECONDS = [(1.5, 0.7), (1.0,), (2.0, 0.4, 1.1), (0.9,), (1.3, 1.2), (0.5,)]  # of each batch
SHARES = ((0, 1, 2), (3, 4, 5))  # the batches of each rank


def loader(indices):
    return DataLoader([noise_batch(SECONDS[index], seed=index) for index in indices], batch_size=None)


def report(indices, **kwargs) -> dict:
    """Validate and test; returns what is logged."""
    model, run = tiny_model(), trainer(1, **kwargs)
    model.set_trainer(run)
    validated = run.validate(model, dataloaders=loader(indices), verbose=False)[0]
    return {**validated, **run.test(model, dataloaders=loader(indices), verbose=False)[0]}


if __name__ == '__main__':
    run_ranks(lambda rank, folder: report(SHARES[rank], devices=2, strategy=gloo_ddp()))
    alone = report(range(len(SECONDS)))
    (Path(sys.argv[1]) / 'alone.json').write_text(json.dumps(alone))
