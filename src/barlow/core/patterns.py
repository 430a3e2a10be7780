"""Glob patterns that choose files by their path: `ingest.include` and `ingest.exclude`.

`*` and `?` match within a name, `**` across folders. A pattern without a slash matches a name at any depth. A pattern
that matches a folder matches all in it.
"""

from __future__ import annotations

import re


class Patterns:
    """The files to take, how many of the others each setting left out, and the patterns that matched none."""

    def __init__(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        self.included = bool(include)
        keys = [("include", pattern) for pattern in include] + [("exclude", pattern) for pattern in exclude]
        self.regexes = {key: re.compile(_regex(key[1])) for key in keys}
        self.matched: set[tuple[str, str]] = set()
        self.left_out = {"include": 0, "exclude": 0}

    def match(self, path: str) -> bool:
        """Tell whether to take a file, by its path relative to the source."""
        matching = {key for key, regex in self.regexes.items() if regex.match(path)}
        self.matched |= matching
        kinds = {kind for kind, _ in matching}
        if self.included and "include" not in kinds:
            self.left_out["include"] += 1
            return False
        self.left_out["exclude"] += "exclude" in kinds
        return "exclude" not in kinds

    def notes(self) -> list[str]:
        """Return how many files were left out, and the patterns that match none."""
        counts = [f"left out: {n} by ingest.{key}" for key, n in self.left_out.items() if n]
        unmatched = [f"ingest.{key}: {pattern} matches no image" for key, pattern in self.regexes.keys() - self.matched]
        return counts + sorted(unmatched)


def _regex(pattern: str) -> str:
    """Translate a glob pattern to a regular expression of the path of a file, or of a folder above it."""
    pattern = pattern.strip().removeprefix("./").strip("/")
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = "".join(
        wild.get(part) or (part.replace("[!", "[^", 1) if part[:1] == "[" and part[-1:] == "]" else re.escape(part))
        for part in parts
    )
    return f"(?s:{'' if '/' in pattern else '(?:.*/)?'}{text}(?:/.*)?)\\Z"
