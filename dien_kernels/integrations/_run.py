"""Run a script of somebody's with other libraries patched: ``dien-kernels run --patch NAME script.py ...``."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Sequence

from dien_kernels.integrations._patch import patch


def run_script(names: Sequence[str], script: str, arguments: Sequence[str]) -> int:
    """Run ``script`` as Python would, with ``arguments``, and print the report of the patch to standard error.

    Returns the exit status: that of the script, 1 where it ended in an error, whose traceback is printed. Raises
    ``FileNotFoundError`` for a script that there is not, and what ``patch`` raises.
    """
    if not os.path.isfile(script):
        raise FileNotFoundError(f"there is no script {script}")
    report = patch(*names)
    before, path = sys.argv, sys.path[:]
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.abspath(script))
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before, path
        print(report, file=sys.stderr)
        report.undo()
    return 0
