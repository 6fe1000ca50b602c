"""A log in several files: the segments that rotation puts beside it, of which each continues the chain of the last.

    audit.jsonl.000000000840    lines   1 to 840, the last of them "log.rotated"
    audit.jsonl.000000001723    lines 841 to 1723, the first of them "log.continued"
    audit.jsonl                 lines 1724 and on, the log that is written to

Numbers and hashes go on over the files: the number and the hash of a segment's last line stand in the first line of
the next file, like those of any line in the one behind it. A segment is named by the number of its last line.
"""

import os
import re
from pathlib import Path
from typing import Any

from saeguard import strict_json
from saeguard.guarding.chain import START, Head
from saeguard.guarding.records import DIGEST, AuditRecord

ROTATED = AuditRecord(request_id="log", decision="refuse", guard_status="not_run", reason_code="log.rotated")
"""The last record of a segment. Nothing was asked and nothing went out."""
CONTINUED = AuditRecord(request_id="log", decision="refuse", guard_status="not_run", reason_code="log.continued")
"""The first record of a file that continues a segment."""
SEAMS = (ROTATED, CONTINUED)
DIGITS, MOST_DIGITS = 12, 16
MOST_LINES = 10**MOST_DIGITS
Inode = tuple[int, int]


def segment_name(path: Path, last: int) -> Path:
    """The segment of the log at ``path`` whose last line has this number."""
    return path.with_name(f"{path.name}.{last:0{DIGITS}}")


def segments_beside(path: Path, *, but: Inode | None = None) -> list[tuple[int, Path]]:
    """The segments beside a log, in the order of their last lines, without the file ``but``. Raises OSError.

    A rotation that was killed leaves the log itself under the name of its segment as well.
    """
    pattern = re.compile(rf"{re.escape(path.name)}\.([0-9]{{{DIGITS},{MOST_DIGITS}}})")
    found = ((pattern.fullmatch(name), path.with_name(name)) for name in os.listdir(path.parent))
    named = sorted((int(match[1]), segment) for match, segment in found if match is not None)
    return [one for one in named if but is None or inode(os.lstat(one[1])) != but]


def inode(status: os.stat_result) -> Inode:
    """What two names of one file have in common."""
    return status.st_dev, status.st_ino


def stands_behind(line: bytes) -> Head:
    """The head that a file's first line says it continues; `START` unless it is one that continues a segment.

    Nothing is verified: `saeguard.guarding.chain.unseal` does that.
    """
    try:
        content: Any = strict_json.parse(line)
    except ValueError:
        return START
    if not isinstance(content, dict) or content.get("reason_code") != CONTINUED.reason_code:
        return START
    seq, prev = content.get("seq"), content.get("prev")
    if type(seq) is not int or not 1 < seq < MOST_LINES or not isinstance(prev, str) or not DIGEST.fullmatch(prev):
        return START
    return Head(seq - 1, prev)


def misplaced(found: Head, expected: Head) -> str:
    """What is wrong with a file that continues ``found`` where ``expected`` is the head."""
    if found == START:
        return "its file begins a chain of its own, and continues no segment"
    if found.seq > expected.seq:
        lines = f"lines {expected.seq + 1} to {found.seq}"
        return f"its file continues line {found.seq}: the segments with {lines} are missing, or not in their place"
    if found.seq < expected.seq:
        return f"its file continues line {found.seq}: a segment stands twice, or not in its place"
    return f"its file continues another line {found.seq}: it is of another chain"
