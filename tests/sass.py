"""The instructions of a disassembled kernel, and its loops."""

from __future__ import annotations

import re


def read(listing: str) -> tuple[list[str], list[range]]:
    """Names of all instructions, and for each loop which of them it holds, its branch back included."""
    words: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in listing.splitlines():
        label = re.match(r"\s*(\.L_\w+):", line)
        if label:
            labels[label[1]] = len(words)
            continue
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", line)
        if not found:
            continue
        words.append(found[1])
        target = re.search(r"(\.L_\w+)", line) if found[1] == "BRA" else None
        if target and target[1] in labels:
            loops.append(range(labels[target[1]], len(words)))
    return words, loops
