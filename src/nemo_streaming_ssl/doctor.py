# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl doctor``: check what pre-training needs, with a trial step."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from nemo_streaming_ssl import SWITCH, patch_tree
from nemo_streaming_ssl.report import require_active
from nemo_streaming_ssl.versions import in_tested_range, nemo_version, supported_range

TRIAL = "nemo.collections.asr.models.trial_step"
TRIAL_SECONDS = 300  # to import NeMo on a cold disk takes a minute or two
FREE_MEMORY, FREE_DISK = 4, 5  # GB: of the demo, with a margin


class Finding(NamedTuple):
    """What one check found; the remedy is what to do where it failed."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine() -> Iterator[Finding]:
    """Yield the findings; the trial step comes last and takes longest."""
    for check in (_python, _nemo, _patches, _torch, _cuda, _audio, _memory, _disk, _trial):
        yield check()


def doctor(say: Callable[[str], None] = print) -> int:
    """Print the result of each check; return the exit status, 1 if any fails."""
    wrong = 0
    for finding in examine():
        wrong += not finding.ok
        say(f"{'ok   ' if finding.ok else 'WRONG'} {finding.name}: {finding.found}")
        if finding.remedy:
            say(f"      {finding.remedy}")
    say("All checks passed." if not wrong else f"{wrong} to fix, see above.")
    return int(bool(wrong))


def _python() -> Finding:
    found = f"{sys.version.split()[0]}, {sys.executable}"
    ok = sys.version_info >= (3, 10)
    return Finding("Python", ok, found, "" if ok else "Install Python 3.10 or later; 3.11 was tested.")


def _nemo() -> Finding:
    version = nemo_version()
    wanted = 'Run pip install "nemo_toolkit[asr]>={},<{}"'.format(*supported_range())
    if version is None:
        return Finding("NeMo", False, "not installed", wanted)
    ok = in_tested_range(version)
    return Finding("NeMo", ok, version, "" if ok else wanted)


def _patches() -> Finding:
    try:
        require_active()
    except RuntimeError as error:
        remedy = f"Install this project in the same environment, and leave {SWITCH} unset."
        return Finding("patches", False, str(error), remedy)
    return Finding("patches", True, f"in use, from {os.path.join(patch_tree(), 'nemo')}")


def _torch() -> Finding:
    try:
        import torch
    except Exception as error:  # a library that is missing, or made for another machine: any error
        return Finding("torch", False, repr(error), "Install torch for this machine, see https://pytorch.org.")
    return Finding("torch", True, f"{torch.__version__}, {torch.get_num_threads()} threads")


def _cuda() -> Finding:
    try:
        import torch
    except Exception:
        return Finding("CUDA", False, "unknown without torch", "Mend torch first.")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("CUDA", True, ", ".join(names))
    if torch.version.cuda is None:
        return Finding("CUDA", True, "none: this torch is for CPUs; trainer.accelerator=cpu")
    if shutil.which("nvidia-smi") is None:
        return Finding("CUDA", True, "none: no NVIDIA driver here; trainer.accelerator=cpu")
    remedy = f"Compare nvidia-smi's CUDA version with torch's, {torch.version.cuda}; update the driver or torch."
    return Finding("CUDA", False, f"there is a driver, but torch {torch.__version__} cannot use it", remedy)


def _audio() -> Finding:
    remedy = 'Run pip install --force-reinstall "soundfile"; on Linux it may need the package libsndfile1.'
    try:
        import numpy
        import soundfile

        samples: Any = (numpy.arange(-800, 800) * 20).astype("int16")
        for kind in ("WAV", "FLAC"):
            file = io.BytesIO()
            soundfile.write(file, samples, 16000, format=kind, subtype="PCM_16")
            file.seek(0)
            read, rate = soundfile.read(file, dtype="int16")
            if rate != 16000 or not numpy.array_equal(read, samples):
                return Finding("audio", False, f"{kind} reads other samples than were written", remedy)
    except Exception as error:
        return Finding("audio", False, repr(error), remedy)
    return Finding("audio", True, f"soundfile {soundfile.__version__} writes and reads WAV and FLAC")


def _memory() -> Finding:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024 / 1e9
    except (OSError, KeyError, ValueError):  # of other systems than Linux
        return Finding("memory", True, "the free memory is unknown on this system")
    ok = free >= FREE_MEMORY
    remedy = "" if ok else f"The demo takes up to {FREE_MEMORY} GB; end other programs, or train elsewhere."
    return Finding("memory", ok, f"{free:.1f} GB free", remedy)


def _disk() -> Finding:
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    ok = free >= FREE_DISK
    remedy = "" if ok else f"Checkpoints of the demo take up to {FREE_DISK} GB; work in another folder."
    return Finding("disk", ok, f"{free:.1f} GB free in {os.getcwd()}", remedy)


def _trial() -> Finding:
    name, command = "a pre-training step", f"Run {sys.executable} -m {TRIAL} to see all of it."
    try:
        done = subprocess.run([sys.executable, "-m", TRIAL], capture_output=True, text=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"not done after {TRIAL_SECONDS} s", command)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    printed = lines[-1] if lines else f"exit status {done.returncode}"
    return Finding(name, done.returncode == 0, printed, "" if done.returncode == 0 else command)
