# SPDX-License-Identifier: Apache-2.0
"""Where the audit was in version 0.1; see ``nemo.collections.asr.parts.ssl_reports``."""

from nemo.collections.asr.parts.ssl_reports.audit import *  # noqa: F401,F403
