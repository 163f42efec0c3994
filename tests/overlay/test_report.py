# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl`` and ``require_active()``: active or not, and the reason why not."""

import sys

MODULE = (sys.executable, "-m", "nemo_streaming_ssl")
REPORT = "from nemo_streaming_ssl.report import patched_modules, report_lines, require_active\n"


def test_every_module_is_reported_with_its_file(stand_in):
    code = "for m in patched_modules(): print(m.kind, m.name, m.file, m.original)\nassert 'nemo' not in sys.modules"
    saw, plane = stand_in.patches / "nemo/tools/saw.py", stand_in.patches / "nemo/tools/plane.py"
    assert stand_in.python(REPORT + code).stdout.splitlines() == [
        f"added nemo.tools.plane {plane} None",
        f"patched nemo.tools.saw {saw} {stand_in.nemo / 'nemo/tools/saw.py'}",
    ]


def test_a_stock_module_imported_first_is_an_error(stand_in):
    code = "import nemo.tools.saw, os\ndel os.environ['NEMO_STREAMING_SSL']\ninstall()\nrequire_active()\n"
    result = stand_in.python(REPORT + code, check=False, NEMO_STREAMING_SSL="0")
    assert "RuntimeError" in result.stderr and "NeMo's own nemo.tools.saw was imported first" in result.stderr


def test_the_command_imports_nothing_heavy(run):
    code = """
import runpy, sys
try:
    runpy.run_module('nemo_streaming_ssl', run_name='__main__', alter_sys=True)
except SystemExit as end:
    heavy = {'nemo', 'torch', 'numpy', 'lightning'} & set(sys.modules)
    sys.exit(end.code or len(heavy))
"""
    lines = run(sys.executable, "-c", code).stdout.splitlines()
    assert lines[2].startswith("active: yes")
    assert any(line.startswith("patched  nemo.collections.asr.") for line in lines)


def test_the_command_when_switched_off(run):
    result = run(*MODULE, check=False, NEMO_STREAMING_SSL="0")
    assert result.returncode == 1 and "active: NO, switched off by NEMO_STREAMING_SSL=0" in result.stdout


def test_the_command_in_an_environment_without_the_start_up_file(fresh_venv, run, checkout):
    result = run(fresh_venv.python, *MODULE[1:], check=False, PYTHONPATH=checkout / "src")
    assert result.returncode == 1 and "has the start-up file nemo_streaming_ssl.pth" in result.stdout


def test_without_nemo(run, checkout):
    code = f"import sys\nsys.path.insert(0, {str(checkout / 'src')!r})\nimport nemo_streaming_ssl\n"
    code += f"nemo_streaming_ssl.install()\n{REPORT}print(*report_lines(), sep='\\n')\n"
    lines = run(sys.executable, "-S", "-c", code).stdout.splitlines()
    assert lines[1] == "NeMo: not found" and lines[2].startswith("active: NO, NeMo is not installed")
