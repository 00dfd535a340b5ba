"""Whose word counts when a bundle is opened, and which bundle is meant."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fcos_deploy.core.errors import ConfigError

__all__ = ["Trust"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """What a bundle must be to be opened; the defaults ask for nothing.

    ``public_keys``: PEM texts or files, of which one must have signed it. ``local_builds``: layers that this user built
    on this device count beside it without a signature. ``name``: what it must be called. ``min_version``: the lowest
    version that it must be signed as.
    """

    public_keys: tuple[Path | str, ...] = ()
    local_builds: bool = False
    name: str = ""
    min_version: int = 0

    def __post_init__(self) -> None:
        """Refuse a version without a key, since anybody can claim one.

        Raises:
            ConfigError: there is no key.
        """
        if self.min_version and not self.public_keys:
            raise ConfigError(
                "A lowest version needs a key: only a signature says which version a bundle is.",
                hint="give the signer's public key: --public-key KEY.pub.pem",
            )
