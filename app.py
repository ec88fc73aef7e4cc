"""`python app.py`: the browser app, on this machine only unless told otherwise."""

import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

AUTH = "LOWMEM_RMU_AUTH"


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_auth(text: str | None, host: str, share: bool) -> tuple[str, str] | None:
    """User and password. Raises UserError where they are malformed, or missing though others can reach the page."""
    from lowmem_rmu.errors import UserError

    if not text:
        if share or not is_loopback(host):
            raise UserError(f"Others could reach this page: give --auth user:password, or set {AUTH}, or leave out --share and --host.")
        return None
    user, separator, password = text.partition(":")
    if not user or not separator or not password:
        raise UserError(f"--auth (or {AUTH}) takes user:password, with a colon between the two.")
    return user, password


def main(
    host: Annotated[str, typer.Option(help="Where it listens; another address than this machine's own takes --auth.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port it listens on.")] = 7860,
    runs_dir: Annotated[Path, typer.Option(help="Where run folders are kept.")] = Path("runs"),
    auth: Annotated[str | None, typer.Option(envvar=AUTH, metavar="USER:PASSWORD", help="Who may use it.")] = None,
    share: Annotated[bool, typer.Option("--share", help="Make a public link through Gradio's server; takes --auth.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> None:
    """Opens the app on http://127.0.0.1:7860."""
    from lowmem_rmu.run import friendly_exit, quiet_libraries

    quiet_libraries()
    with friendly_exit():
        login = parse_auth(auth, host, share)
        runs_dir = runs_dir.resolve()
        # What is uploaded and downloaded passes through here, and not through a folder that all programs share.
        os.environ |= {"GRADIO_TEMP_DIR": str(runs_dir / ".page"), "GRADIO_ANALYTICS_ENABLED": "False"}
        launch(host, port, runs_dir, login, share, device)


def launch(host: str, port: int, runs_dir: Path, login: tuple[str, str] | None, share: bool, device: str) -> None:
    import gradio as gr

    from lowmem_rmu.errors import UserError
    from lowmem_rmu.model.loading import resolve_device
    from lowmem_rmu.ui.chat import LoadedModel, room_made
    from lowmem_rmu.ui.page import FONTS, build_page, style

    on, model = resolve_device(device), LoadedModel()
    page = build_page(runs_dir, on, model)
    try:
        with room_made(model, runs_dir, on):
            page.launch(
                server_name=host, server_port=port, auth=login, share=share, theme=gr.themes.Base(**FONTS), css=style(), footer_links=[],
                max_file_size="50mb", allowed_paths=[], strict_cors=True, run_history=False, enable_monitoring=False, ssr_mode=False,
                pwa=False, mcp_server=False, show_error=False, quiet=True, prevent_thread_lock=True,
            )  # fmt: skip
            print(f"Open {page.share_url or page.local_url} in a browser.", file=sys.stderr, flush=True)
            page.block_thread()
    except OSError as error:
        raise UserError(f"The app cannot listen on {host}:{port}: {error}\nIs it running already? Try --port {port + 1}.") from error


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print("Starting; the page takes some seconds. Ctrl-C ends it, runs go on.", file=sys.stderr)
    typer.run(main)
