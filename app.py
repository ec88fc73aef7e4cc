"""`python app.py`: the browser app, on this machine only unless told otherwise."""

import ipaddress
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lowmem_rmu.ui.access import Access

AUTH = "LOWMEM_RMU_AUTH"
SLOWED = "After five wrong passwords there is a pause before each further one."


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_auth(text: str | None, host: str, share: bool) -> tuple[str, str] | None:
    """User and password. Raises UserError where they are malformed, or missing though others can reach the
    page.
    """
    from lowmem_rmu.errors import UserError

    if not text:
        if share or not is_loopback(host):
            raise UserError(
                f"Others could reach this page: give --auth-file FILE, or set {AUTH}, or leave out --share "
                "and --host."
            )
        return None
    user, separator, password = text.partition(":")
    if not user or not separator or not password:
        raise UserError(f"--auth, --auth-file and {AUTH} take user:password, with a colon between the two.")
    return user, password


def read_auth(path: Path) -> str:
    """Return the first line of a file that holds user:password. Raises UserError where it cannot be read."""
    from lowmem_rmu.errors import UserError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--auth-file {path} cannot be read: {reason}.") from error
    # An empty file must not open the page to everybody.
    return next(iter(lines), "") or ":"


def main(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Any but this machine's own needs a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port it listens on.")] = 7860,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders are kept.")] = Path("runs"),
    auth: Annotated[
        str | None,
        typer.Option(
            envvar=AUTH,
            metavar="USER:PASSWORD",
            help="Who may use it. Other users of this machine can read it here.",
        ),
    ] = None,
    auth_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A file with USER:PASSWORD in its first line, instead of --auth."),
    ] = None,
    token: Annotated[
        bool, typer.Option("--token", help="Put a secret into the address, for a machine with several users.")
    ] = False,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:PORT]",
            help="Another name that the page is reached as, behind a proxy or tunnel. Repeatable.",
        ),
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link through Gradio's server. Needs a password.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Open the app on http://127.0.0.1:7860."""
    from lowmem_rmu.cli.errors import friendly_exit
    from lowmem_rmu.cli.startup import quiet_libraries
    from lowmem_rmu.errors import UserError
    from lowmem_rmu.runs.files import make_private
    from lowmem_rmu.ui.access import Access, Sites, Token

    quiet_libraries()
    with friendly_exit():
        is_typed = (
            auth is not None and getattr(context.get_parameter_source("auth"), "name", "") == "COMMANDLINE"
        )
        if is_typed and auth_file:
            raise UserError("--auth and --auth-file both name a password: give one of them.")
        login = parse_auth(read_auth(auth_file) if auth_file else auth, host, share)
        access = Access(
            Sites.bound(host, port, allowed_host or []), Token.drawn(port) if token else None, share
        )
        if is_typed:
            print(
                f"Other users of this machine can read --auth. Use --auth-file FILE or {AUTH} instead.",
                file=sys.stderr,
            )
        runs_dir = runs_dir.resolve()
        make_private(runs_dir / ".page", exist_ok=True)
        # What is uploaded and downloaded passes through here, and not through a folder that all programs
        # share.
        os.environ |= {"GRADIO_TEMP_DIR": str(runs_dir / ".page"), "GRADIO_ANALYTICS_ENABLED": "False"}
        launch(host, port, runs_dir, login, share, device, access)


def launch(
    host: str,
    port: int,
    runs_dir: Path,
    login: tuple[str, str] | None,
    share: bool,
    device: str,
    access: "Access",
) -> None:
    """Serve the page until it is ended. Raises UserError where it cannot listen."""
    import gradio as gr

    from lowmem_rmu.errors import UserError
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.ui.login import Login
    from lowmem_rmu.ui.page import FONTS, TRANSLATIONS, build_page, style
    from lowmem_rmu.ui.tabs.chat import LoadedModel, room_made

    on, model = resolve_device(device), LoadedModel()
    page = build_page(runs_dir, on, model)
    try:
        with room_made(model, runs_dir, on):
            page.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                share=share,
                auth=Login(*login) if login else None,
                auth_message=SLOWED if login else None,
                app_kwargs={"lifespan": access.lifespan()},
                num_workers=0,
                strict_cors=True,
                allowed_paths=[],
                theme=gr.themes.Base(**FONTS),
                css=style(),
                i18n=gr.I18n(en=TRANSLATIONS),
                footer_links=[],
                max_file_size="50mb",
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                show_error=False,
                quiet=True,
                prevent_thread_lock=True,
            )
            if page.share_url:
                access.sites.allow(page.share_url)
            secret = f"?token={access.token.secret}" if access.token else ""
            address = (page.share_url or page.local_url or "").rstrip("/")
            print(f"Open {address}/{secret} in a browser.", file=sys.stderr, flush=True)
            page.block_thread()
    except OSError as error:
        raise UserError(
            f"The app cannot listen on {host}:{port}: {error}",
            f"Is it running already? Try --port {port + 1}.",
        ) from error


if __name__ == "__main__":
    from lowmem_rmu.console import prepare_streams

    prepare_streams()
    if len(sys.argv) == 1:
        print("Starting; the page takes some seconds. Ctrl-C ends it, runs go on.", file=sys.stderr)
    typer.run(main)
