# SPDX-License-Identifier: Apache-2.0
"""The build step that adds the patch set and the start-up files; pyproject.toml has the metadata."""

import os
import shutil
from glob import glob

from setuptools import Command, setup
from setuptools.command.build import build

FINDER = "nemo_streaming_ssl"
# With what ``examples TARGET`` copies out and ``docs`` prints.
PATCH_SET = ("nemo/**/*.py", "examples/**/*.py", "examples/**/*.yaml", "examples/**/*.sbatch", "docs/*.md")
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
        # An editable wheel ignores build_lib; what is in install_lib (the unpacked wheel) is packed as it is.
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


setup(cmdclass={"build": BuildWithPatchSet, "build_patch_set": BuildPatchSet})
