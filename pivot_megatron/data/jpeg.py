"""The segments of a JPEG (ITU-T T.81, annex B)."""

from __future__ import annotations

import re

_START = b"\xff\xd8"
_END = 0xD9
_SCAN = 0xDA
_PROGRESSIVE = 0xC2
_FRAMES = (0xC0, 0xC1, _PROGRESSIVE)  # baseline, extended
_TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xEE)  # Huffman, quantisation, restarts; JFIF's and Adobe's words on colours
_METADATA = (*range(0xE1, 0xEE), 0xEF, 0xFE)
# Not the stuffed bytes and restarts that stand inside coded pixels.
_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")


def plain_jpeg(encoded: bytes) -> bytes | None:
    """A JPEG of usual make that comes to its end, less all that says nothing of its pixels; None of any other.

    What is coded inside the segments is not looked at.
    """
    if not encoded.startswith(_START):
        return None
    kept = [_START]
    at, frame, scans = len(_START), 0, 0
    while at + 4 <= len(encoded) and encoded[at] == 0xFF and encoded[at + 1] != _END:
        code = encoded[at + 1]
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4])
        # Past its one scan a decoder need not read what is not progressive: what is there is seen by some alone.
        if end < at + 4 or (scans and frame != _PROGRESSIVE):
            return None
        if code == _SCAN:
            after = _MARKER_AFTER_SCAN.search(encoded, end)
            if not frame or after is None:
                return None
            end = after.start()
            scans += 1
        elif code in _FRAMES and not frame:
            frame = code
        elif code not in _TABLES and code not in _METADATA:
            return None
        if code not in _METADATA:
            kept.append(encoded[at:end])
        at = end
    is_whole = scans and encoded[at : at + 2] == bytes((0xFF, _END))
    return b"".join([*kept, encoded[at : at + 2]]) if is_whole else None
