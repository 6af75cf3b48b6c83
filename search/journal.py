"""What a search has measured, kept in Optuna's journal storage: a file that only grows, a line for each step.

Contract: a trial is written when it has its value, whole, so whatever ends the process, nothing that was told is lost
and no trial is left running. What a kill or a full disk has left of an unfinished line is cut off when the file is
opened again; Optuna itself would append to it, and could read neither line.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial

from nanoflow.pipeline.plan import PlanError

__all__ = ["Journal", "quiet_optuna"]

STUDY = "plans"
LOCK_SECONDS = 3
"""After which a lock that nobody lets go of is taken to be of a process that was killed. Writing takes milliseconds."""


def quiet_optuna() -> None:
    """Keep Optuna from logging every trial, and from saying at each start which of its options may still change."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Journal:
    """The finished trials of one search. Raises PlanError, here and in `add`, if the file cannot be read or written."""

    def __init__(self, path: Path) -> None:
        quiet_optuna()
        self.path = path
        with self._mistakes():
            path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(path)
            lock = JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS)
            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
            self._study = optuna.create_study(
                study_name=STUDY, storage=storage, direction="maximize", load_if_exists=True
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All that were added, by this process and by earlier ones."""
        return self._study.get_trials()

    def add(self, trial: FrozenTrial) -> None:
        """Keep a finished trial."""
        with self._mistakes():
            self._study.add_trial(trial)

    @contextmanager
    def _mistakes(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlanError(
                f"{self.path}: the search cannot be kept: {error.strerror}; give another folder with --out"
            ) from None
        except (ValueError, KeyError) as error:  # json.JSONDecodeError is a ValueError
            raise PlanError(
                f"{self.path}: the file is damaged ({error}); delete it, and the search begins anew"
            ) from None


def _cut_torn_line(path: Path) -> None:
    """Cut off what stands behind the last end of a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
