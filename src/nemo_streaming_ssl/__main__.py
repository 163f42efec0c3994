# Copyright (c) 2026, the nemo-streaming-ssl authors. Apache-2.0 licence.
"""``python -m nemo_streaming_ssl``: which NeMo, active or not and why, which modules. Exits with 1 if inactive."""

import sys

from nemo_streaming_ssl.report import report_lines, require_active


def main():
    print("\n".join(report_lines()))
    try:
        require_active()
    except RuntimeError:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
