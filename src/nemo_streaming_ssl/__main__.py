# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl``: print whether the patches are active, and why. Status 1 if not.

``python -m nemo_streaming_ssl examples TARGET`` copies the example scripts and their configs to TARGET;
``python -m nemo_streaming_ssl doctor`` checks all that pre-training needs, and prints what to do about each problem;
``python -m nemo_streaming_ssl docs [PAGE]`` lists the pages of the documentation, or prints one.
"""

import argparse
import sys

from nemo_streaming_ssl.doctor import doctor
from nemo_streaming_ssl.documentation import pages, read_page
from nemo_streaming_ssl.examples import copy_examples
from nemo_streaming_ssl.report import report_lines, require_active


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nemo_streaming_ssl", description=str(__doc__).split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="examples TARGET | doctor | docs [PAGE]")
    examples = commands.add_parser("examples", help="copy the example scripts and their configs to a folder")
    examples.add_argument("target", help="a folder that does not exist yet")
    commands.add_parser("doctor", help="check the installation, with a step of pre-training")
    docs = commands.add_parser("docs", help="list the pages of the documentation, or print one")
    docs.add_argument("page", nargs="?", help="such as contexts")
    options = parser.parse_args(argv)
    if options.command is None:
        return report()
    if options.command == "doctor":
        return doctor()
    try:
        print(copied(options.target) if options.command == "examples" else documentation_text(options.page))
    except (ValueError, OSError) as error:
        print(f"nemo_streaming_ssl: {error}", file=sys.stderr)
        return 1
    return 0


def report() -> int:
    """Print what is active; return the exit status."""
    print("\n".join(report_lines()))
    try:
        require_active()
    except RuntimeError:
        return 1
    return 0


def documentation_text(page: str | None) -> str:
    """Return the text of a page, or the names and titles of all."""
    return read_page(page) if page else "\n".join(f"{name:<18} {title}" for name, title in pages().items())


def copied(target: str) -> str:
    """Copy the examples; return a message."""
    places = f"the scripts are in {target}/asr/speech_pretraining, the configs in {target}/asr/conf"
    return f"{target}: {copy_examples(target)} files; {places}"


if __name__ == "__main__":
    sys.exit(main())
