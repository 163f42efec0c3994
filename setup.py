# SPDX-License-Identifier: Apache-2.0
"""Packaging: the finder is an ordinary package; one build step adds the patch set and the start-up files."""

import os
import shutil
from glob import glob
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

FINDER = "nemo_streaming_ssl"
# With what ``examples TARGET`` copies out and ``docs`` prints.
PATCH_SET = ("nemo/**/*.py", "examples/**/*.py", "examples/**/*.yaml", "docs/*.md")
EXTRAS = {"demo": "demo", "dev": "test", "docs": "docs"}  # and the files of requirements/ that say what they need
START_UP = {
    f"{FINDER}.pth": f"import {FINDER}; {FINDER}.install()\n",  # CPython up to 3.17
    f"{FINDER}.start": f"{FINDER}:install\n",  # PEP 829, CPython 3.15 and later
}


class BuildPatchSet(Command):
    """Add the start-up files to every wheel, and a copy of the patch set to a regular one."""

    editable_mode = False  # set by setuptools, see setuptools.command.build.SubCommand
    user_options = []

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        # An editable wheel ignores build_lib; what lies in install_lib (the unpacked wheel) is packed as it is.
        target = self.get_finalized_command("install").install_lib if self.editable_mode else self.build_lib
        self.mkpath(target)
        for name, text in START_UP.items():
            with open(os.path.join(target, name), "w", encoding="utf-8") as file:
                file.write(text)
        if not self.editable_mode:
            tree = os.path.join(self.build_lib, FINDER, "_tree")
            shutil.rmtree(tree, ignore_errors=True)  # nothing stale from an earlier build
            for source in self.get_source_files():
                self.mkpath(os.path.dirname(os.path.join(tree, source)))
                self.copy_file(source, os.path.join(tree, source))

    def get_source_files(self):
        return sorted(file for pattern in PATCH_SET for file in glob(pattern, recursive=True))

    def get_outputs(self):
        if self.editable_mode:
            return []  # a strict editable install would try to link each of them out of build_lib
        start_up = [os.path.join(self.build_lib, name) for name in START_UP]
        return start_up + [os.path.join(self.build_lib, FINDER, "_tree", file) for file in self.get_source_files()]

    def get_output_mapping(self):
        return {}


class BuildWithPatchSet(build):
    sub_commands = [*build.sub_commands, ("build_patch_set", None)]


def names_in(file: str) -> list:
    """Return the packages that a file of requirements names."""
    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


setup(
    name="nemo-streaming-ssl",
    version="0.2.0",
    description="Streaming self-supervised speech pre-training: a patch set over NVIDIA NeMo",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    project_urls={  # of this project's own there are none yet: docs/releasing.md
        "NVIDIA NeMo": "https://github.com/NVIDIA/NeMo",
        "NEST": "https://arxiv.org/abs/2408.13106",
        "BEST-RQ": "https://arxiv.org/abs/2202.01855",
    },
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["speech", "self-supervised learning", "streaming", "BEST-RQ", "NEST", "Conformer", "NeMo"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=[FINDER],
    package_dir={"": "src"},
    install_requires=names_in("requirements/runtime.txt"),
    extras_require={extra: names_in(f"requirements/{file}.txt") for extra, file in EXTRAS.items()},
    cmdclass={"build": BuildWithPatchSet, "build_patch_set": BuildPatchSet},
)
