"""Commands for the server's certificate and for the keys of nodes that may connect."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="Make, register, list, revoke and restore the keys of nodes.")
app.add_typer(keys_app, name="keys")

KeysFolder = Annotated[Path, typer.Option("--keys", metavar="DIR", help="The registered nodes' public keys.")]


@app.command(epilog="Example: tsugiki certs --host fed.example.org --host 203.0.113.7")
def certs(
    hosts: Annotated[list[str] | None, typer.Option("--host", help="A name or address of the server; repeat.")] = None,
    tls: Annotated[Path, typer.Option("--tls", metavar="DIR", help="Where the files go.")] = Path("tls"),
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is good for.")] = 397,
) -> None:
    """Make the server's certificate, and the CA that signs it if there is none yet."""
    from tsugiki.server.deploy.certs import make_certificates, names_in

    # The CA is announced only when this call makes it; later certificates reuse it.
    new_authority = not (tls / "ca.crt").exists()
    files = make_certificates(tls, hosts or [], days)
    if new_authority:
        typer.echo(f"{files.ca}: the CA's certificate; give it to every site")
        typer.echo(f"{files.ca_key}: the CA's key; keep it safe, the running server does not need it")
    typer.echo(f"{files.server}, {files.server_key}: the server's, for {', '.join(names_in(files))}")


@keys_app.command(epilog="Example: tsugiki keys new acme")
def new(path: Annotated[Path, typer.Argument(help="The private key; PATH.pub is the public one.")]) -> None:
    """Make a node's key pair, at the site."""
    from tsugiki.common.keys import fingerprint, new_key_pair, read_public_key

    public = new_key_pair(path)
    typer.echo(f"{path}: the private key; it stays here")
    typer.echo(f"{public}: the public key; send it to the operator")
    typer.echo(fingerprint(read_public_key(public)))


@keys_app.command("fingerprint", epilog="Examples: tsugiki keys fingerprint; tsugiki keys fingerprint bolt.pub")
def show_fingerprint(
    file: Annotated[Path | None, typer.Argument(help="A key, public or own; default: the one in site.toml.")] = None,
    site_file: Annotated[Path, typer.Option("--site", help="The site's file.")] = Path("site.toml"),
) -> None:
    """Print a site's name and its key's fingerprint, as other sites list it under [policy] members."""
    from tsugiki.common.keys import fingerprint

    if file is None:
        name, file = _own_key(site_file)
    else:
        name = file.name.removesuffix(".pub").removesuffix(".key")
    typer.echo(f"{name} {fingerprint(_public_part(file))}")


def _public_part(file: Path) -> EllipticCurvePublicKey:
    """Return the public key in a file that ends in .pub, or that of a private key in any other file."""
    from tsugiki.common.keys import read_private_key, read_public_key

    if file.suffix == ".pub":
        return read_public_key(file)
    return read_private_key(file).public_key()


def _own_key(site_file: Path) -> tuple[str, Path]:
    """Return the name and the private key that a site.toml has.

    Raises:
        UsageError: it lacks one of them.
    """
    from tsugiki.common.config.files import read_toml
    from tsugiki.common.errors import UsageError

    raw = read_toml(site_file)
    about = raw.get("site")
    server = raw.get("server")
    if isinstance(about, dict) and isinstance(server, dict) and about.get("name") and server.get("key"):
        return str(about["name"]), site_file.parent / str(server["key"])
    raise UsageError(
        f"{site_file} names no site or no key", "name under [site], and key under [server]", "or give the key's file"
    )


@keys_app.command(epilog="Example: tsugiki keys register acme.pub")
def register(
    public: Annotated[Path, typer.Argument(help="The site's public key.")],
    name: Annotated[str, typer.Option(help="The site's name; default: that of the file.")] = "",
    folder: KeysFolder = Path("keys"),
) -> None:
    """Let a node take part."""
    from tsugiki.server.deploy import keyring

    registered_name, fingerprint = keyring.register(folder, public, name)
    typer.echo(f"{registered_name} {fingerprint}")
    typer.echo("compare this fingerprint with the site's over another channel")


@keys_app.command("list", epilog="Example: tsugiki keys list")
def list_keys(folder: KeysFolder = Path("keys")) -> None:
    """List the registered nodes and their keys' fingerprints, then the revoked keys."""
    from tsugiki.common.keys import fingerprint, read_public_key
    from tsugiki.server.deploy.keyring import registered, revoked

    for name, path in registered(folder).items():
        typer.echo(f"{name:<24} {fingerprint(read_public_key(path))}")
    for revocation in revoked(folder).values():
        typer.echo(f"{revocation.name:<24} {revocation.fingerprint} revoked {revocation.date}")


@keys_app.command(epilog="Example: tsugiki keys revoke acme")
def revoke(name: Annotated[str, typer.Argument(help="The node's name.")], folder: KeysFolder = Path("keys")) -> None:
    """Shut a node out. Its key is not taken again, under any name."""
    from tsugiki.server.deploy import keyring

    keyring.revoke(folder, name)
    typer.echo(f"{name} is revoked; a running server shuts it out within seconds")


@keys_app.command(epilog="Example: tsugiki keys restore acme")
def restore(
    key: Annotated[str, typer.Argument(help="The revoked key's fingerprint, or its node's name.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for a confirmation.")] = False,
    folder: KeysFolder = Path("keys"),
) -> None:
    """Let a revoked key be registered again."""
    from tsugiki.server.deploy import keyring

    found = keyring.find_revoked(folder, key)
    if not yes:
        typer.confirm(
            f"{found.name} {found.fingerprint} was revoked on {found.date}. Can it be trusted again?", abort=True
        )
    keyring.restore(folder, found.fingerprint)
    typer.echo(f"{found.name} {found.fingerprint} can be registered again; a running server takes it when it restarts")
