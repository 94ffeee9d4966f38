"""Weights & Biases: a run's metrics, online or in files for `wandb sync`."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping
from typing import Any

import wandb
import yaml

from pivot_megatron.config.schema import RunConfig
from pivot_megatron.errors import UserError
from pivot_megatron.train.tracking import SECONDS_TO_FINISH, SECONDS_TO_START, Held


def require_login() -> None:
    """Raises UserError where wandb knows no key. Asks the user nothing, and a server that is out of reach makes no difference."""
    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "tracking.wandb: expected a login for `online`, found none: run wandb login, set WANDB_API_KEY, "
            "or set tracking.wandb: offline"
        )


class WandbTracker:
    """The run's id is made once and stays in its folder, so a run that is resumed, or moved, is the same to wandb.

    wandb takes steps in rising order only: those that a resumed run makes again stay there as they were made first.
    """

    name = "wandb"

    def __init__(self, config: RunConfig, described: Mapping[str, str], seconds: float = SECONDS_TO_START) -> None:
        """`described`: YAML or JSON texts of what the run is, by name. `seconds`: after which a server counts as out of reach;
        the run is offline then. Raises OSError where the run's folder cannot be written to, UserError where wandb does
        not start."""
        self._state = Held(config.out / "wandb", secrets.token_hex(8))
        self._online = config.tracking.wandb == "online"
        known = {name: yaml.safe_load(text) for name, text in described.items()}
        if self._online:
            try:
                self._run = self._begun(config, known, "online", seconds)
            except Exception as error:  # of wandb, or of what it talks through
                self._online = False
                _go_offline(config, error)
        if not self._online:
            try:
                self._run = self._begun(config, known, "offline", seconds)
            except Exception as error:
                raise UserError(
                    f"tracking.wandb: wandb does not start here ({_line(error)}); set tracking.wandb: off"
                ) from None
        # A server knows best what reached it, which may be less than what was sent.
        self.held = self._run.starting_step - 1 if self._online else self._state.step

    def _begun(self, config: RunConfig, known: Mapping[str, Any], mode: str, seconds: float) -> Any:
        settings = wandb.Settings(
            console="off",  # it would take the terminal's streams over
            init_timeout=min(seconds, config.faults.seconds_for_files / 4),
            finish_timeout=SECONDS_TO_FINISH,
        )
        return wandb.init(
            project=config.tracking.project,
            name=config.name,
            id=self._state.id,
            resume="allow",
            reinit="create_new",
            mode=mode,
            dir=config.out,
            config=dict(known),
            allow_val_change=True,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values), step=step, commit=True)
        self._state.up_to(step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _go_offline(config: RunConfig, error: Exception) -> None:
    wandb.teardown()  # until its service has ended, that holds the id of the run that did not begin
    print(
        f"{config.name}: tracking.wandb: the server cannot be used ({_line(error)}); going on offline, "
        f"wandb sync {config.out / 'wandb' / 'offline-run-*'} sends it later",
        file=sys.stderr,
        flush=True,
    )


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
