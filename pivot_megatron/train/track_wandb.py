"""Weights & Biases: a run's metrics, or reports, online or in files for `wandb sync`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
import yaml

from pivot_megatron.errors import UserError
from pivot_megatron.train.tracker import SECONDS_TO_FINISH, Held, Subject


def require_login() -> None:
    """Raises UserError where wandb knows no key. Asks the user nothing, and a server that is out of reach makes no difference."""
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "tracking.wandb: expected a login for `online`, found none: run wandb login, set WANDB_API_KEY, "
            "or set tracking.wandb: offline"
        )


class WandbTracker:
    """A run's id is made once and stays in its folder, so a run that is resumed, or moved, is the same to wandb.

    wandb takes steps in rising order only: those that a resumed run makes again stay there as they were made first.
    """

    name = "wandb"

    def __init__(self, subject: Subject) -> None:
        """Offline where the server is out of reach. Raises OSError where the subject's folder cannot be written to, UserError
        where wandb does not start."""
        self._state = Held(subject.folder / "wandb", secrets.token_hex(8))
        self._online = subject.tracking.wandb == "online"
        known = {name: yaml.safe_load(text) for name, text in subject.described.items()}
        if self._online:
            try:
                self._run = self._begun(subject, known, "online")
            except Exception as error:  # of wandb, or of what it talks through
                self._online = False
                _go_offline(subject, error)
        if not self._online:
            try:
                self._run = self._begun(subject, known, "offline")
            except Exception as error:
                raise UserError(
                    f"tracking.wandb: wandb does not start here ({_line(error)}); set tracking.wandb: off"
                ) from None
        # A server knows best what reached it, which may be less than what was sent.
        self.held = self._run.starting_step - 1 if self._online else self._state.step

    def _begun(self, subject: Subject, known: Mapping[str, Any], mode: str) -> Any:
        settings = wandb.Settings(
            console="off",  # it would take the terminal's streams over
            init_timeout=subject.seconds,
            finish_timeout=SECONDS_TO_FINISH,
        )
        return wandb.init(
            project=subject.tracking.project,
            name=subject.name,
            id=self._state.id,
            resume="allow",
            reinit="create_new",
            mode=mode,
            dir=subject.folder,
            config=dict(known),
            allow_val_change=True,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log({name: _given(value) for name, value in values.items()}, step=step, commit=True)
        self._state.up_to(step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _given(value: Any) -> Any:
    """A page as it is: wandb would add a stylesheet of its server's."""
    return wandb.Html(value, inject=False) if isinstance(value, Path) else value


def _go_offline(subject: Subject, error: Exception) -> None:
    wandb.teardown()  # until its service has ended, that holds the id of the run that did not begin
    print(
        f"{subject.name}: tracking.wandb: the server cannot be used ({_line(error)}); going on offline, "
        f"wandb sync {subject.folder / 'wandb' / 'offline-run-*'} sends it later",
        file=sys.stderr,
        flush=True,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
