"""``python -m dien_kernels info``: what a bug report starts with."""

from __future__ import annotations

import argparse

from dien_kernels import _info


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dien_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, build facts, and which backend can run which op, or why not")
    parser.parse_args()
    print(_info.report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
