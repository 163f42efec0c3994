# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl``: which NeMo, active or not and why, which modules. Exits with 1 if inactive.

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
    documentation = commands.add_parser("docs", help="list the pages of the documentation, or print one")
    documentation.add_argument("page", nargs="?", help="such as contexts")
    options = parser.parse_args(argv)
    if options.command == "docs":
        return show_documentation(options.page)
    if options.command == "doctor":
        return doctor()
    return copy_out(options.target) if options.command == "examples" else report()


def report() -> int:
    """Print what is active; return the exit status."""
    print("\n".join(report_lines()))
    try:
        require_active()
    except RuntimeError:
        return 1
    return 0


def show_documentation(page: str | None) -> int:
    """Print a page, or the names and titles of all; return the exit status."""
    try:
        print(read_page(page) if page else "\n".join(f"{name:<16} {title}" for name, title in pages().items()))
    except ValueError as error:
        print(f"nemo_streaming_ssl: {error}", file=sys.stderr)
        return 1
    return 0


def copy_out(target: str) -> int:
    """Copy the examples; return the exit status."""
    try:
        count = copy_examples(target)
    except (ValueError, OSError) as error:
        print(f"nemo_streaming_ssl: {error}", file=sys.stderr)
        return 1
    print(
        f"{target}: {count} files; the scripts are in {target}/asr/speech_pretraining, the configs in {target}/asr/conf"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
