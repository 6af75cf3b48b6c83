"""Which requests of a run have a record, and which custom_ids its input has had so far.

Contract: each line of the input gets exactly one record, however often the run is stopped and started. A request's key
is its `custom_id`; what has none of its own (a line without a usable one, a second line with the same one) has its
line for a key. Keys are kept as 128-bit hashes, some 50 bytes each, so that a million lines take little memory.
"""

import json
import re
from array import array
from bisect import bisect_right
from hashlib import blake2b
from struct import Struct

from nanoflow.batch_file import ErrorRecord, ParsedRequest, place
from nanoflow.input_files import Source
from nanoflow.validation import shorten

__all__ = ["DUPLICATE", "KeyTable", "Ledger"]

DUPLICATE = "duplicate_custom_id"
"""Code of the error record of a line whose custom_id was there before."""

_ID = re.compile(r"batch_req_(\d{1,18})")
_ANSWER = re.compile(rb'\{"id":"batch_req_(\d{1,18})","custom_id":("(?:[^"\\]|\\.)*"),"response":\{')
"""How the record of an answered request begins, as it is written: then the rest, which is long, need not be parsed."""
_ELSEWHERE = 2**62
"""Added to the line of a record whose request is not in the input any more: it comes after all that are."""
_RECORDED = 1
"""Value of a key that has a record and was not met in the input yet; a key met at line n has n + 1."""
_KEY = Struct("<QQ")
_SLOT = 3


class KeyTable:
    """A map from 16-byte keys that are spread evenly to positive numbers; 24 bytes a slot, at most 2 of 3 in use."""

    def __init__(self) -> None:
        self._count = 0
        self._slots = array("Q", bytes(8 * _SLOT * 1024))

    def __len__(self) -> int:
        return self._count

    def get(self, key: bytes) -> int:
        """The key's number; 0 if it has none."""
        high, low = _KEY.unpack(key)
        return self._slots[self._find(high, low) + 2]

    def set(self, key: bytes, number: int) -> None:
        """Give the key a number above 0."""
        if 3 * self._count >= 2 * (len(self._slots) // _SLOT):
            self._grow()
        high, low = _KEY.unpack(key)
        self._put(high, low, number)

    def _find(self, high: int, low: int) -> int:
        """Where the key is, or the free slot where it belongs."""
        slots = self._slots
        end = len(slots)
        at = (low % (end // _SLOT)) * _SLOT
        while slots[at + 2] and (slots[at] != high or slots[at + 1] != low):
            at += _SLOT
            if at == end:
                at = 0
        return at

    def _put(self, high: int, low: int, number: int) -> None:
        at = self._find(high, low)
        self._count += not self._slots[at + 2]
        self._slots[at], self._slots[at + 1], self._slots[at + 2] = high, low, number

    def _grow(self) -> None:
        old, self._slots, self._count = self._slots, array("Q", bytes(16 * len(self._slots))), 0
        for at in range(0, len(old), _SLOT):
            if old[at + 2]:
                self._put(old[at], old[at + 1], old[at + 2])


class Ledger:
    """The records that earlier runs left, and the keys that this run's input has had."""

    def __init__(self) -> None:
        self.completed = 0
        """Requests that earlier runs answered."""
        self.errors = 0
        """Error records of earlier runs."""
        self.dropped = 0
        """Lines that were taken out of the output: no records, or records that are not to be kept."""
        self.skipped = 0
        """Items of the input passed over so far, since they have a record."""
        self._keys = KeyTable()
        self._sources: list[Source] = []

    @property
    def records(self) -> int:
        """Records of earlier runs."""
        return self.completed + self.errors

    def summary(self) -> str:
        """What is there already, in words."""
        errors = f" ({self.errors:,} of them errors)" if self.errors else ""
        dropped = f"; {self.dropped:,} lines were taken out, to be run again" if self.dropped else ""
        return f"going on: {self.records:,} requests have their record{errors}{dropped}"

    def add_record(self, raw: bytes, keep_errors: bool = True) -> bool:
        """Enter a line of the output; whether it is a record and to be kept: whole, and the first with its key."""
        try:
            record = json.loads(raw)
            number = _ID.fullmatch(record["id"])
            custom_id, error = record["custom_id"], record["error"]
            code = error["code"] if error is not None else None
            answered = isinstance(record["response"], dict) and code is None
        except (ValueError, TypeError, KeyError, RecursionError):
            return False
        if number is None or not isinstance(custom_id, str | None) or answered == isinstance(code, str):
            return False
        if not answered and not keep_errors:
            return False
        key = _line_key(int(number[1])) if custom_id is None or code == DUPLICATE else _id_key(custom_id)
        if self._keys.get(key):
            return False
        self._keys.set(key, _RECORDED)
        self.completed += answered
        self.errors += not answered
        return True

    def place(self, raw: bytes) -> int:
        """Where the record `raw` belongs in an output in the order of the input, once all of the input was taken.

        This is the line of its request, by its key; what is not in the input any more comes last, by its old line.
        """
        answer = _ANSWER.match(raw)
        if answer is not None:
            line, custom_id, code = int(answer[1]), json.loads(answer[2]), None
        else:
            record = json.loads(raw)
            line, custom_id = int(record["id"].removeprefix("batch_req_")), record["custom_id"]
            code = record["error"]["code"] if record["error"] is not None else None
        if custom_id is None or code == DUPLICATE:
            return line
        met = self._keys.get(_id_key(custom_id))
        return met - 1 if met > _RECORDED else _ELSEWHERE + line

    def take(self, item: ParsedRequest | ErrorRecord) -> ParsedRequest | ErrorRecord | None:
        """What is to be done about an item of the input: run or write it; None if it has its record already.

        A custom_id that was there before is an error, whatever became of the line that had it first.
        """
        source = item.source
        if source is not None and (not self._sources or self._sources[-1] is not source):
            self._sources.append(source)
        if item.custom_id is not None:
            key = _id_key(item.custom_id)
            met = self._keys.get(key)
            if met <= _RECORDED:
                self._keys.set(key, item.line + 1)
                self.skipped += met
                return None if met else item
            message = (
                f"{item.where}: custom_id {shorten(item.custom_id)} is that of {self._place(met - 1)}; "
                "give each line its own"
            )
            item = ErrorRecord(item.line, item.custom_id, DUPLICATE, message, source)
        # Nothing to remember: the line itself is met once.
        recorded = self._keys.get(_line_key(item.line))
        self.skipped += recorded
        return None if recorded else item

    def _place(self, line: int) -> str:
        at = bisect_right(self._sources, line - 1, key=lambda source: source.offset)
        return place(line, self._sources[at - 1] if at else None)


def _id_key(custom_id: str) -> bytes:
    # JSON may hold half of a surrogate pair, which UTF-8 cannot.
    return blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16, person=b"custom_id").digest()


def _line_key(line: int) -> bytes:
    return blake2b(str(line).encode(), digest_size=16, person=b"line").digest()
