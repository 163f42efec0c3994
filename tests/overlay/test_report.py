# SPDX-License-Identifier: Apache-2.0
"""``python -m nemo_streaming_ssl`` and ``require_active()``: active or not, and the reason why not."""

import sys

REPORT = """
    from nemo_streaming_ssl.report import patched_modules, report_lines, require_active
    """


def test_every_module_is_reported_with_its_file(stand_in):
    result = stand_in.python(
        REPORT
        + """
    for module in patched_modules():
        print(module.kind, module.name, module.file, module.original)
    assert 'nemo' not in sys.modules
    """
    )
    saw, plane = stand_in.patches / "nemo/tools/saw.py", stand_in.patches / "nemo/tools/plane.py"
    assert result.stdout.splitlines() == [
        f"added nemo.tools.plane {plane} None",
        f"patched nemo.tools.saw {saw} {stand_in.nemo / 'nemo/tools/saw.py'}",
    ]


def test_require_active_rejects_unknown_names(stand_in):
    result = stand_in.python(REPORT + "\n    require_active('nemo.tools.saw', 'nemo.tools.nail')", check=False)
    assert result.stderr.strip().endswith("ValueError: the patch set has no module nemo.tools.nail")


def test_stock_module_imported_first_is_an_error(stand_in):
    code = """
    import nemo.tools.saw, os
    del os.environ['NEMO_STREAMING_SSL']
    install()
    require_active()
    """
    result = stand_in.python(REPORT + code, check=False, NEMO_STREAMING_SSL="0")
    assert "RuntimeError: the patched NeMo modules are not in use: NeMo's own nemo.tools.saw was" in result.stderr


def test_command_in_this_environment(run):
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


def test_command_when_switched_off(run):
    result = run(sys.executable, "-m", "nemo_streaming_ssl", check=False, NEMO_STREAMING_SSL="0")
    assert result.returncode == 1 and "active: NO, switched off by NEMO_STREAMING_SSL=0" in result.stdout


def test_command_in_an_environment_without_the_start_up_file(fresh_venv, run, checkout):
    result = run(fresh_venv.python, "-m", "nemo_streaming_ssl", check=False, PYTHONPATH=checkout / "src")
    assert result.returncode == 1
    assert "has the start-up file nemo_streaming_ssl.pth (pip install --target, or" in result.stdout


def test_without_nemo(run, checkout):
    code = f"""
import sys
sys.path.insert(0, {str(checkout / 'src')!r})
import nemo_streaming_ssl
nemo_streaming_ssl.install()
from nemo_streaming_ssl.report import report_lines
print(*report_lines(), sep='\\n')
"""
    lines = run(sys.executable, "-S", "-c", code).stdout.splitlines()
    assert lines[1] == "NeMo: not found" and lines[2].startswith("active: NO, NeMo is not installed")
