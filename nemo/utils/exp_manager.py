# SPDX-License-Identifier: Apache-2.0
"""Patch of NeMo's ``exp_manager.py``: a resume at the end of an epoch trains no extra batch."""

from nemo_streaming_ssl import upstream

_up = upstream(globals())


class SkipResumeTrainingValidationLoop(_up.SkipResumeTrainingValidationLoop):
    """NeMo's training loop, which does not validate again when it resumes.

    Lightning waits for that validation before it takes the epoch for finished. NeMo's loop leaves it out and so trains
    one more batch of an epoch that has none left.
    """

    @property
    def _is_validation_done(self) -> bool:
        return True


_up.SkipResumeTrainingValidationLoop = SkipResumeTrainingValidationLoop  # NeMo's function finds it in its own module
