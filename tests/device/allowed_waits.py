# SPDX-License-Identifier: Apache-2.0
"""The list of allowed host-device synchronisations and copies.

Whatever else a scenario does of the kind fails the tests, and so does what is in the list and no longer happens.
"""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from device.host_traffic import Meeting

WAIT, TO_HOST, TO_DEVICE = 'wait', 'copy to host', 'copy to device'


class Allowed(NamedTuple):
    """What a function may ask of the host, at most so many times in a scenario."""

    scenario: str
    """Name of scenarios, or a pattern of names."""
    kind: str
    file: str
    """Below ``nemo/collections/asr/``, or else from ``nemo/`` on; it and the function may be patterns, too."""
    function: str
    times: int
    """In one scenario; steps, contexts and streams count each."""
    why: str

    def covers(self, scenario: str, meeting: Meeting) -> bool:
        """Tell whether this entry is about a meeting in a scenario."""
        patterns = (scenario, self.scenario), (_short(meeting.file), self.file), (meeting.function, self.function)
        return meeting.kind == self.kind and all(fnmatchcase(name, pattern) for name, pattern in patterns)


COUNT = 'the number of frames that count is the size of the tensors that follow'
GRADIENTS = 'whether the gradients are finite must be known before the optimizer changes the weights'
SEEDS = 'the masks of a validation are drawn from the audio itself, utterance by utterance'
STREAMS = 'a session that masks or predicts walks over its streams one by one, on the host'
FINITE = 'which streams are finite: copied while the device works, and read in the next step; nobody waits for it'
PLACES = 'which places of the rings a step writes and sees, a few numbers that the host counts; nobody waits for them'
UTTERANCES = 'negatives come from the same utterance, so many for each: the count is a size'
MASKED_FILES = 'parts/objectives/base.py', 'gather_loss_positions'
GUARD_FILES = 'parts/utils/nonfinite_guard.py', 'gradient_norm'
FIXED_MASKS, CONTRASTIVE = 'parts/ssl_reports/fixed_masks.py', 'losses/ssl_losses/contrastive.py'
COLLAPSE_FILES = 'parts/ssl_reports/codebook_use.py', 'collapse'
BATCH_FILES = 'nemo/collections/common/data/utils.py', 'move_data_to_device'

ALLOWED = (
    Allowed('training, masked*', WAIT, *MASKED_FILES, 2, f'{COUNT}; once in each of two steps'),
    Allowed('training, next_token', WAIT, *MASKED_FILES, 2, f'{COUNT}; once in each of two steps'),
    Allowed('training, both', WAIT, *MASKED_FILES, 4, f'{COUNT}; once for each of the two losses of a step'),
    Allowed('training, *', WAIT, *GUARD_FILES, 2, f'{GRADIENTS}; once in each of two steps'),
    Allowed('gradient check', WAIT, *GUARD_FILES, 1, GRADIENTS),
    Allowed('run of the trainer*', WAIT, *MASKED_FILES, 6, f'{COUNT}; three steps are watched, `both` asks twice'),
    Allowed('run of the trainer*', WAIT, *GUARD_FILES, 3, f'{GRADIENTS}; three steps are watched'),
    Allowed('run of the trainer*', TO_DEVICE, *BATCH_FILES, 18, 'the batches themselves, six tensors each'),
    Allowed('use of the codebook', TO_HOST, *COLLAPSE_FILES, 1, 'once in 100 batches'),
    Allowed(
        'training*refined', TO_HOST, *COLLAPSE_FILES, 1, 'once before each refinement, after which counts begin anew'
    ),
    Allowed('decoder, masked*', WAIT, *MASKED_FILES, 1, COUNT),
    Allowed('model, masked*', WAIT, *MASKED_FILES, 1, COUNT),
    Allowed('validation*', WAIT, *MASKED_FILES, 4, f'{COUNT}; in each of two contexts, `both` asks twice'),
    Allowed('validation*both', WAIT, 'parts/objectives/next_tokens.py', 'scores', 4, f'{COUNT}; at each horizon'),
    Allowed('validation*', TO_HOST, FIXED_MASKS, 'utterance_seeds', 1, SEEDS),
    Allowed('validation*', TO_HOST, FIXED_MASKS, '_mask_one_by_one', 1, f'{SEEDS}: their lengths'),
    Allowed('validation*', WAIT, 'parts/ssl_reports/validation.py', '_result', 1, 'once, after the last batch'),
    Allowed('contrastive*', WAIT, CONTRASTIVE, 'forward', 1, 'the number of masked frames is a size'),
    Allowed(
        'contrastive*', WAIT, CONTRASTIVE, '_calculate_similarity', 1, 'stock NeMo looks for negatives like the target'
    ),
    Allowed('contrastive*batch', WAIT, CONTRASTIVE, '_negatives', 1, 'the number of candidates is a size'),
    Allowed('contrastive*utterance', WAIT, CONTRASTIVE, '_negatives_of_each_utterance', 1, UTTERANCES),
    Allowed('contrastive*utterance', TO_HOST, CONTRASTIVE, '_negatives_of_each_utterance', 1, UTTERANCES),
    Allowed(
        'masking, module not moved',
        TO_DEVICE,
        'modules/ssl_modules/masking.py',
        'fill',
        25,
        'its embedding, in each call',
    ),
    Allowed(
        'live streams',
        WAIT,
        'parts/streaming/session.py',
        '_check_finite',
        3,
        'samples are looked at where they come from: only those that lie on the device make it wait; in each of three steps',
    ),
    Allowed('live streams', TO_DEVICE, 'parts/streaming/*', '*', 28, PLACES),
    Allowed('live streams', TO_HOST, 'parts/streaming/session.py', '_find_failed', 4, FINITE),
    Allowed('live streams, *', WAIT, 'parts/streaming/*', '*', 16, STREAMS),
    Allowed('live streams, *', TO_HOST, 'parts/streaming/*', '*', 8, STREAMS),
    Allowed('live streams, *', TO_DEVICE, 'parts/streaming/*', '*', 8, STREAMS),
)


def not_allowed(scenario: str, traffic: Iterable[tuple[Meeting, int]]) -> list[str]:
    """Return what a scenario asked of the host that the list lacks, or that it has fewer times, in words."""
    found = Counter()
    for meeting, times in traffic:
        found[meeting.kind, meeting.file, meeting.function] += times
    surplus = []
    for (kind, file, function), times in found.items():
        operations = sorted(
            {m.operation for m, _ in traffic if (m.kind, m.file, m.function) == (kind, file, function)}
        )
        meeting = Meeting(kind, operations[0], file, function)
        if times > max((entry.times for entry in ALLOWED if entry.covers(scenario, meeting)), default=0):
            surplus.append(
                f"{scenario}: {times} x {kind} ({', '.join(operations)}) by {function} of {file or 'torch'}"
            )
    return surplus


def _short(file: str) -> str:
    return file.removeprefix('nemo/collections/asr/')
