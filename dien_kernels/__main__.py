"""``python -m dien_kernels``: the command line, as ``dien-kernels`` where the package is installed."""

from __future__ import annotations

from dien_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
