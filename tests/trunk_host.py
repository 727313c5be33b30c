"""Serves the trunks named in FOLDER/trunks.json from one process: `python -m tests.trunk_host FOLDER`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import torch

from contract.records import CutLayers
from server_trunk.server import ServeOptions, TrunkServer


async def host(folder: Path) -> None:
    asked = json.loads((folder / "trunks.json").read_text())
    torch.set_num_threads(1)
    addresses = {}
    servers = []
    for name, settings in asked["trunks"].items():
        cut = CutLayers(settings.pop("head"), settings.pop("tail"))
        state_dir = Path(asked["state_dir"]) / name
        server = TrunkServer(
            ServeOptions(cut=cut, listen="127.0.0.1:0", state_dir=state_dir, device="cpu", batch_tokens=512, **settings)
        )
        addresses[name], _ = await server.start()
        servers.append(server)
    (folder / "announce.new").write_text(json.dumps(addresses))
    os.replace(folder / "announce.new", folder / "announce")
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(host(Path(sys.argv[1])))
