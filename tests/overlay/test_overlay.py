# SPDX-License-Identifier: Apache-2.0
"""The finder and ``upstream()``, over a miniature NeMo (fixture ``stand_in``)."""

import pytest


def test_patched_module_is_served_everywhere(stand_in):
    stand_in.python("""
        import nemo.tools, nemo.tools.saw, nemo.tools.plane
        assert nemo.tools.saw.__file__.startswith(PatchFinder.tree)
        assert nemo.tools.saw.Saw().cut() == 'stock, patched'
        assert nemo.tools.Saw is nemo.tools.saw.Saw is nemo.tools.plane.Saw
        """)


def test_upstream_keeps_names_and_dotted_path(stand_in):
    stand_in.python("""
        import pickle, sys
        from nemo.tools import saw
        assert saw._teeth == 12 and saw.NAIL == 'stock nail' and saw.__all__ == ['Saw', 'Kept']
        assert saw.stock.__name__ == saw.__name__ == 'nemo.tools.saw'
        assert saw.Kept is saw.stock.Kept and saw.Kept.__module__ == 'nemo.tools.saw'
        assert issubclass(saw.Saw, saw.stock.Saw) and saw.Saw is not saw.stock.Saw
        assert sys.modules['nemo.tools.saw'] is saw and not saw.stock.__file__.startswith(PatchFinder.tree)
        assert type(pickle.loads(pickle.dumps(saw.Kept()))) is saw.Kept
        assert type(pickle.loads(pickle.dumps(saw.Saw()))) is saw.Saw
        """)


def test_patched_package_keeps_its_other_submodules(stand_in):
    stand_in.add_patches(
        {"tools/__init__.py": "from nemo_streaming_ssl import upstream\nupstream(globals())\nMINE = 1\n"}
    )
    stand_in.python("""
        import nemo.tools, nemo.tools.nail, nemo.tools.plane
        assert nemo.tools.MINE == 1 and nemo.tools.nail.NAIL == 'stock nail'
        assert nemo.tools.Saw().cut() == 'stock, patched'
        """)


def test_threads_share_one_patched_module(stand_in):
    stand_in.add_nemo({"tools/__init__.py": ""})  # one that imports its own modules deadlocks without patches, too
    stand_in.python("""
        import importlib, threading
        from concurrent.futures import ThreadPoolExecutor
        barrier = threading.Barrier(8)
        def load(number):
            barrier.wait()
            return importlib.import_module(['nemo.tools.saw', 'nemo.tools.plane'][number % 2]).Saw
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(load, range(8)))
        assert len(found) == 1 and found.pop()().cut() == 'stock, patched'
        """)


def test_switch_leaves_stock_nemo_alone(stand_in):
    code = "from nemo.tools.saw import Saw\nassert PatchFinder not in sys.meta_path and Saw().cut() == 'stock'"
    stand_in.python(f"install()\n{code}", NEMO_STREAMING_SSL="0")


def test_finder_answers_for_nothing_else(stand_in):
    stand_in.add_patches({"__init__.py": "raise AssertionError('nemo itself is never patched')\n"})
    stand_in.add_patches({"folder/notes.txt": "no module here\n"})
    stand_in.python("""
        import nemo, nemo.tools.nail
        assert not nemo.tools.nail.__file__.startswith(PatchFinder.tree)
        find = PatchFinder.find_spec
        assert find('nemo') is None and find('nemo.tools.nail', nemo.tools.__path__) is None
        assert find('nemo.folder', nemo.__path__) is None and find('nemo.nowhere.deep', nemo.__path__) is None
        assert find('nemox.tools.saw', ['x']) is None and find('json.tool', ['x']) is None
        """)


UPSTREAM = "from nemo_streaming_ssl import upstream\nupstream(globals())\n"


@pytest.mark.parametrize(
    "nemo, patch, error",
    [
        (None, UPSTREAM, "ModuleNotFoundError: NeMo has no module 'nemo.tools.drill'"),
        ("1 / 0", UPSTREAM, "ZeroDivisionError"),
        (
            "1",
            UPSTREAM.replace("globals()", "{'__name__': 'drill'}"),
            "ModuleNotFoundError: NeMo has no module 'drill'",
        ),
        (UPSTREAM, UPSTREAM, "ImportError: the module found in NeMo's place for 'nemo.tools.drill'"),
    ],
    ids=["no original", "original fails", "not a NeMo name", "patched twice"],
)
def test_upstream_errors_are_clear_and_repeat(stand_in, nemo, patch, error):
    stand_in.add_nemo({} if nemo is None else {"tools/drill.py": nemo})
    stand_in.add_patches({"tools/drill.py": patch})
    code = """
        try:
            import nemo.tools.drill
        except (ImportError, ZeroDivisionError):
            import nemo.tools.drill
        """
    result = stand_in.python(code, check=False)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith(error)
