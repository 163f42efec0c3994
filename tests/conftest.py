# SPDX-License-Identifier: Apache-2.0
"""What all tests share: they run on the patched modules, and GPU tests only where there is a GPU."""

import importlib
import os
import sys
import weakref

import fresh_process
import pytest
from hypothesis import HealthCheck, settings
from shared_results import shared_folder

# A loaded machine must not fail a property by its clock. CI tries the same examples in every run, the nightly one new ones.
settings.register_profile(
    "nemo_streaming_ssl",
    deadline=None,
    derandomize=bool(os.environ.get("CI")) and not os.environ.get("RANDOM_EXAMPLES"),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("nemo_streaming_ssl")


def pytest_sessionstart(session):
    """Refuse to test stock NeMo by mistake."""
    try:
        from nemo_streaming_ssl.report import require_active

        require_active()
    except (ImportError, RuntimeError) as error:
        raise pytest.UsageError(
            f"{error}\nThe tests need the patch set installed in {sys.prefix} (pip install -e .); "
            "`python -m nemo_streaming_ssl` tells more."
        ) from error


def pytest_configure(config):
    """Start the servers of :mod:`fresh_process`, once for all workers; they cost nothing until they are asked."""
    if not hasattr(config, 'workerinput'):
        servers = fresh_process.start_servers()
        config.add_cleanup(lambda: fresh_process.end_servers(servers))


def pytest_collection_finish(session):
    """Keep NeMo's INFO lines out of the tests' output; its warnings stay, tests look for some of them."""
    if "nemo.utils" in sys.modules:
        from nemo.utils import logging

        logging.setLevel(logging.WARNING)


def pytest_runtest_setup(item):
    """Skip a test marked ``run_only_on('GPU')`` where CUDA is not there."""
    for marker in item.iter_markers("run_only_on"):
        device = marker.args[0].upper()
        if device not in ("CPU", "GPU"):
            raise pytest.UsageError(f"run_only_on takes 'CPU' or 'GPU', not {marker.args[0]!r}")
        if device == "GPU" and not importlib.import_module("torch").cuda.is_available():
            pytest.skip("needs a GPU with CUDA")


@pytest.fixture
def warnings(monkeypatch):
    """The warnings that NeMo's logger gets in this process."""
    from nemo.utils import logging

    messages = []
    monkeypatch.setattr(logging, 'warning', lambda message, *args, **kwargs: messages.append(message))
    return messages


@pytest.fixture
def no_small_weights(monkeypatch):
    """Give small layers of live streams the precision that a session asks for, too."""
    from nemo.collections.asr.parts.streaming import linear, prepared_weights

    monkeypatch.setattr(linear, 'SMALL', 0)
    monkeypatch.setattr(prepared_weights, '_PREPARED', weakref.WeakKeyDictionary())  # those of other tests


@pytest.fixture
def left_out(tmp_path, monkeypatch):
    """The count of the utterances that are left out, from none on."""
    from nemo.utils.left_out import LEFT_OUT

    monkeypatch.setattr(LEFT_OUT, 'path', str(tmp_path / 'left_out'))
    return LEFT_OUT


@pytest.fixture(scope="session")
def speech_corpus(tmp_path_factory):
    """A synthetic speech corpus of a minute and a half; the folder with its NeMo manifests."""
    from corpus import make_small_corpus

    return shared_folder(tmp_path_factory, "speech_corpus", make_small_corpus)
