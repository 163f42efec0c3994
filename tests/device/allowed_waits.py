# SPDX-License-Identifier: Apache-2.0
"""The list of allowed host-device synchronisations and copies.

Whatever else a scenario does of the kind fails the tests, and so does an entry of the list that no longer happens.
"""

from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from device.host_traffic import Meeting

ASR = 'nemo/collections/asr/'
WAIT, TO_HOST, TO_DEVICE = 'wait', 'copy to host', 'copy to device'


class Allowed(NamedTuple):
    """What a function may ask of the host, at most ``times`` times in a scenario: once for each step, context or stream.

    The scenario, the file (below nemo/collections/asr/, or from nemo/ on) and the function may be patterns.
    """

    scenario: str
    kind: str
    file: str
    function: str
    times: int
    why: str

    def covers(self, scenario: str, meeting: Meeting) -> bool:
        """Return whether this entry is about a meeting in a scenario."""
        found = (scenario, meeting.file.removeprefix(ASR), meeting.function)
        patterns = (self.scenario, self.file, self.function)
        return meeting.kind == self.kind and all(map(fnmatchcase, found, patterns))


COUNT = 'the number of loss positions is the size of the tensors that follow'
GRADIENTS = 'whether the gradients are finite must be known before the optimizer changes the weights'
SEEDS = 'the masks of a validation are drawn from the audio itself, utterance by utterance'
STREAMS = 'a session that masks or predicts loops over its streams on the host'
FINITE = 'which streams are finite: copied while the device works, and read in the next step; nothing waits'
PLACES = 'the places of the ring buffers that a step writes and sees, CPU scalars; nothing waits'
POSITIONS = 'parts/objectives/base.py', 'gather_loss_positions'
GUARD = 'parts/utils/nonfinite_guard.py', 'gradient_norm'
CONTEXTS = 'parts/ssl_reports/validation.py'
BATCH = 'nemo/collections/common/data/utils.py', 'move_data_to_device'
MASKING, SESSION = 'modules/ssl_modules/masking.py', 'parts/streaming/session.py'
STREAMING, PREPARED = ('parts/streaming/*', '*'), 'parts/streaming/prepared_weights.py'

ALLOWED = (
    Allowed('training, masked*', WAIT, *POSITIONS, 2, COUNT),
    Allowed('training, next_token', WAIT, *POSITIONS, 2, COUNT),
    Allowed('training, both', WAIT, *POSITIONS, 4, COUNT),
    Allowed('training, *', WAIT, *GUARD, 2, GRADIENTS),
    Allowed('run of the trainer*', WAIT, *POSITIONS, 6, COUNT),
    Allowed('run of the trainer*', WAIT, *GUARD, 3, GRADIENTS),
    Allowed('run of the trainer*', TO_DEVICE, *BATCH, 18, 'the batches themselves, six tensors each'),
    Allowed('decoder, masked*', WAIT, *POSITIONS, 1, COUNT),
    Allowed('validation*', WAIT, *POSITIONS, 4, COUNT),
    Allowed('validation*both', WAIT, 'parts/objectives/base.py', 'having_targets', 4, f'{COUNT}; at each horizon'),
    Allowed('validation*', TO_HOST, CONTEXTS, 'utterance_seeds', 2, SEEDS),
    Allowed('validation*', TO_HOST, CONTEXTS, '__call__', 1, f'{SEEDS}: their lengths'),
    Allowed('validation*', TO_HOST, CONTEXTS, 'finish', 1, 'once, after the last batch'),
    Allowed('masking, module not moved', TO_DEVICE, MASKING, '_fill', 25, 'its embedding, in each call'),
    Allowed('live streams', WAIT, SESSION, '_peak', 3, 'samples that lie on the device make it wait'),
    Allowed('live streams', TO_DEVICE, *STREAMING, 28, PLACES),
    Allowed('live streams', TO_HOST, SESSION, '_find_failed', 4, FINITE),
    Allowed('live streams', TO_HOST, PREPARED, '_facts_of', 1, 'samples that identify the weights, once per session'),
    Allowed('live streams, *', WAIT, *STREAMING, 16, STREAMS),
    Allowed('live streams, *', TO_HOST, *STREAMING, 8, STREAMS),
    Allowed('live streams, *', TO_DEVICE, *STREAMING, 8, STREAMS),
)


def not_allowed(scenario: str, traffic: Iterable[tuple[Meeting, int]]) -> list[str]:
    """Return what a scenario asks of the host that the list lacks, or has fewer times, in words."""
    found, operations = Counter(), {}
    for meeting, times in traffic:
        place = meeting._replace(operation='')
        found[place] += times
        operations.setdefault(place, []).append(meeting.operation)
    return [
        f"{scenario}: {times} x {place.kind} ({', '.join(operations[place])}) by {place.function} of {place.file}"
        for place, times in found.items()
        if times > max((entry.times for entry in ALLOWED if entry.covers(scenario, place)), default=0)
    ]
