"""Encryption of checkpoints for download, by age (https://age-encryption.org)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tickwork.errors import InvalidRequestError
from tickwork.files import sync

SUFFIX = ".age"
MOST_RECIPIENTS = 32


def check_recipients(keys: Sequence[str]) -> tuple[str, ...]:
    """Return age public keys if they are some.

    Args:
        keys: X25519 keys (``age1...``) or SSH public keys.

    Raises:
        InvalidRequestError: one that is no such key, too many, or the package ``pyrage`` is missing.
    """
    if isinstance(keys, str) or len(keys) > MOST_RECIPIENTS:
        raise InvalidRequestError(f"a list of at most {MOST_RECIPIENTS} is needed", field="age_encryption_recipients")
    for key in keys:
        _recipient(key)
    return tuple(keys)


def seal(folder: Path, keys: Sequence[str]) -> None:
    """Put the encrypted form of each file in its place."""
    from pyrage import encrypt_file  # noqa: PLC0415  an extra

    recipients = [_recipient(key) for key in keys]
    for file in sorted(folder.iterdir()):
        sealed = file.with_name(f"{file.name}{SUFFIX}")
        encrypt_file(str(file), str(sealed), recipients)
        sync(sealed)
        file.unlink()


def _recipient(key: str) -> Any:
    try:
        from pyrage import RecipientError, ssh, x25519  # noqa: PLC0415
    except ModuleNotFoundError:
        raise InvalidRequestError(
            "encryption needs pyrage: pip install 'tickwork[server]'", field="age_encryption_recipients"
        ) from None
    kind = ssh if isinstance(key, str) and key.startswith("ssh-") else x25519
    try:
        return kind.Recipient.from_str(key)
    except (RecipientError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"{key!r:.80} is no age key: {error}", field="age_encryption_recipients") from None
