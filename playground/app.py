"""The page: two tabs on one server and a trainer, on loopback, with nothing from anywhere else."""

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from playground.address import trainer_at
from playground.form import read_form
from playground.fusion import FusionTab
from playground.progress import Server
from playground.training import TrainingTab

HOST = "127.0.0.1"
FONT = ("system-ui", "sans-serif")  # Gradio's own would come from elsewhere
HEADER = """
# K-LoRA
A *content* LoRA knows a subject, a *style* LoRA knows a look. K-LoRA lets one of the two act in each layer and at each
step. **The slider says who wins more often.**
"""


def page(server: Server, trainer: str, token: str | None, folder: Path) -> gr.Blocks:
    """The whole page, its forms made from the server's. trainer: its address at first. Raises PlaygroundError."""
    schemas, form = server.schemas()
    own = (server.connection.url, trainer)

    def trainer_there(address: str) -> Server:
        return trainer_at(address, token if address in own else None)

    with gr.Blocks(title="K-LoRA", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)) as blocks:
        gr.Markdown(HEADER)
        with gr.Tab("Fuse", id="fuse"):
            fusing = FusionTab(server, read_form(schemas, form), folder)
        if "TrainingInput" in schemas:
            with gr.Tab("Train", id="train"):
                TrainingTab(trainer_there, trainer, read_form(schemas, "TrainingInput"), fusing, folder)
    return blocks


def serve(server: Server, trainer: str, token: str | None, port: int) -> None:
    """Show the page until interrupted. Raises PlaygroundError where the server cannot be used."""
    with tempfile.TemporaryDirectory(prefix="klora-playground-") as folder:
        blocks = page(server, trainer, token, Path(folder))
        blocks.queue(api_open=False).launch(**_settings(folder) | {"server_port": port})


def _settings(folder: str) -> dict[str, Any]:
    """On loopback, and nothing remembered: a browser would keep the runs, and with them the tokens of the form."""
    here = Path(__file__).parent
    theme = gr.themes.Default(primary_hue="slate", neutral_hue="slate", font=FONT, font_mono=("monospace",))
    return {
        "server_name": HOST, "share": False, "allowed_paths": [folder], "run_history": False, "footer_links": [],
        "theme": theme, "css_paths": here / "style.css", "js": (here / "page.js").read_text(), "ssr_mode": False,
        "pwa": False, "enable_monitoring": False, "mcp_server": False, "max_file_size": "200mb",
    }  # fmt: skip
