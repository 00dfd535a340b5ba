"""The options that say which bundles are opened, declared once for every command that opens one."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["AllowFallback", "PublicKeys", "RequireSignature", "trusted_keys"]

PublicKeys = Annotated[
    list[str] | None,
    typer.Option("--public-key", metavar="PEM", help="Trusted key, a file or its text; may be repeated."),
]
RequireSignature = Annotated[
    bool, typer.Option("--require-signature", help="Refuse what is not a bundle that a --public-key signed.")
]
AllowFallback = Annotated[
    bool, typer.Option("--allow-fallback", help="Step down the chain of backends that a bundle declares.")
]


def trusted_keys(public_key: list[str] | None, *, required: bool) -> tuple[str, ...]:
    """The keys of which one must have signed a bundle; none when none is given.

    Raises:
        ConfigError: a signature is required, and there is no key to check it with.
    """
    if not public_key and not required:
        return ()  # Before the bundle package is imported, which plain files do without.
    from fcos_deploy.bundle import required_keys

    return tuple(str(key) for key in required_keys(tuple(public_key or ()), required=required))
