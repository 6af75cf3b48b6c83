"""What stored plans were measured to gain where something was otherwise than when they were tuned.

Contract: kept in a file beside the user's plans, which stay as they are: with the versions of old they are as good as
they were. The answer holds for the very plan and the very machine, versions included. A file that cannot be read has no
answers.
"""

import hashlib
import json
from pathlib import Path

from nanoflow.pipeline.plan import Plan
from nanoflow.search.files import replace_file
from nanoflow.search.fingerprint import Fingerprint
from nanoflow.search.store import plan_folders

__all__ = ["keep_recheck", "recheck_of"]

FILE = "measured-again.json"


def recheck_of(plan: Plan, here: Fingerprint) -> float | None:
    """How many times as fast as in sequence `plan` was when it was measured again here; None if it was not."""
    found = _read(_path()).get(_key(plan, here))
    return float(found) if isinstance(found, int | float) else None


def keep_recheck(plan: Plan, here: Fingerprint, ratio: float) -> None:
    """Keep what was measured. Raises OSError if it cannot be written."""
    path = _path()
    replace_file(path, json.dumps({**_read(path), _key(plan, here): round(ratio, 4)}, indent=1) + "\n")


def _path() -> Path:
    return plan_folders()[0] / FILE


def _read(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(plan: Plan, here: Fingerprint) -> str:
    return hashlib.sha256(f"{plan.dumps()}{here}".encode()).hexdigest()[:16]
