"""``tickwork keys``: API keys made, and turned into what a server keeps of them."""

from __future__ import annotations

from typing import TextIO

import click

from tickwork.cli_server import server_extra


@click.group()
def keys() -> None:
    """Make API keys, and hash them for the file that `tickwork serve --keys` reads."""


@keys.command()
@click.argument("owner", default="")
@click.option(
    "--share", metavar="SHARE", help="What part of a busy device each of OWNER's models gets; 1 unless given."
)
def new(owner: str, share: str | None) -> None:
    """Make a key for OWNER: itself to standard error, this once, and its line for a keys file to standard output."""
    with server_extra():
        from tickwork.server.keys import Keys, new_key, stored  # noqa: PLC0415

    if len(owner.split()) > 1:
        raise click.UsageError("OWNER is one word: what follows it in a keys file is the owner's share")
    if share is not None and not owner:
        raise click.UsageError("--share is an owner's: name one")
    key = new_key()
    line = stored(" ".join(word for word in (key, owner, share) if word))
    Keys([line])
    click.echo(f"{key}\nThis is the key, for TINKER_API_KEY; it is shown this once. The line to store:", err=True)
    click.echo(line)


@keys.command("hash")
@click.argument("file", type=click.File(), default="-")
def hash_keys(file: TextIO) -> None:
    """Print FILE, or what comes in, with each key replaced by its digest: lines 'KEY [OWNER [SHARE]]'."""
    with server_extra():
        from tickwork.server.keys import stored  # noqa: PLC0415

    for line in file:
        click.echo(stored(line.rstrip("\n")))
