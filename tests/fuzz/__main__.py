"""Fuzz for long: ``python -m tests.fuzz --examples 100000 [--targets yaml jsonl] [--seed 1]``.

Prints how many inputs of each kind were checked, and the smallest input and the traceback of the first that failed.
"""

import argparse
import faulthandler
import sys
import time
import traceback

from tests.fuzz.harness import fuzz
from tests.fuzz.targets import TARGETS

ROUND = 1000
"""Inputs drawn a round: hypothesis remembers all of a round's to draw none twice, and memory is not endless."""
EACH = 9
"""Changed copies of each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000, help="of each target; fewer of a slow one")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    failed = 0
    for name in arguments.targets:
        target = TARGETS[name]
        start, done, examples = time.perf_counter(), 0, arguments.examples // target.share
        number = arguments.seed
        try:
            while done < examples:
                # Ends the process, with a traceback, even where a signal would wait for C code.
                faulthandler.dump_traceback_later(ROUND * target.seconds / 10, exit=True)
                done += fuzz(target, min(ROUND, -(-(examples - done) // (EACH + 1))), number, each=EACH)
                number += 1
        except Exception:
            failed += 1
            traceback.print_exc()
        faulthandler.cancel_dump_traceback_later()
        outcome = "passed" if done >= examples else f"FAILED after {done:,}"
        print(f"{name}: {done:,} inputs {outcome} in {time.perf_counter() - start:.0f} s", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
