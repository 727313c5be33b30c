"""`trunkline trunk serve|status|sessions|drain` and `trunkline model split`. A command imports torch when it runs."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from contract import collector, logs
from contract.openmp import waiting
from contract.output import OutputFormat, OutputOption, cli_errors, emit, talk
from contract.records import CutLayers
from contract.tls import TlsFiles
from contract.tls_options import TrunkCaOption, TrunkCertificateOption, TrunkKeyOption, trunk_tls
from server_trunk.admin_cli import drain, show_sessions
from server_trunk.signers import ticket_signers
from storage.home import home_dir

if TYPE_CHECKING:
    from server_trunk.server import ServeOptions

logger = logging.getLogger("trunkline.server_trunk")

app = typer.Typer(help="The trunk server.", no_args_is_help=True)
model_app = typer.Typer(help="Checkpoints.", no_args_is_help=True)


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Weights(StrEnum):
    PLAIN = "plain"
    INT8 = "int8"


class Attention(StrEnum):
    SDPA = "sdpa"
    EAGER = "eager"


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


ModelOption = Annotated[str, typer.Option("--model", help="Checkpoint directory (the whole model or its trunk part).")]
HeadOption = Annotated[int, typer.Option("--head-layers", min=0, help="Decoder layers that the clients hold below.")]
TailOption = Annotated[int, typer.Option("--tail-layers", min=0, help="Decoder layers that the clients hold above.")]

WeightsOption = Annotated[
    Weights,
    typer.Option(help="int8: the frozen linear layers in 8 bits, by torchao; results are then near the un-split ones."),
]
LanesOption = Annotated[
    int, typer.Option(min=0, help="Passes computed at once; 0 tries out one for each thread, 8 at most.")
]
BatchTokensOption = Annotated[
    int,
    typer.Option(min=0, help="Rows times tokens at which a pass takes in no more clients; 0 tries out what gains."),
]
StateDirOption = Annotated[
    Path | None, typer.Option(help="Adapters and contributions.  [default: TRUNKLINE_HOME/trunk]")
]
MemoryBudgetOption = Annotated[
    str,
    typer.Option(
        metavar="SIZE",
        help="Memory for sessions, beside the model: 8G, 512M; auto takes 60 % of what is free after loading. With "
        "less, graphs are computed again, requests wait, and idle adapters go to disk.",
    ),
]
SpillBudgetOption = Annotated[
    str,
    typer.Option(metavar="SIZE", help="Disk under the state directory for requests that memory has no room for."),
]
SampleCacheOption = Annotated[
    int, typer.Option(min=0, help="Memory that a session by int4-delta may have for samples it sent.")
]
InsecureListenOption = Annotated[
    bool, typer.Option("--insecure-listen", help="Allow an address that other machines reach, without TLS.")
]
TlsCertificateOption = Annotated[
    Path | None, typer.Option(help="Serve by TLS: this trunk's certificate, PEM; needs --tls-key and --client-ca.")
]
TlsKeyOption = Annotated[
    Path | None, typer.Option(help="The certificate's key, a PEM file that its owner alone can read.")
]
ClientCaOption = Annotated[
    Path | None,
    typer.Option(help="Whoever calls must show a certificate that this CA signed; its role says what it may."),
]
_TLS_NAMES = ("--client-ca", "--tls-certificate", "--tls-key")
TicketSignerOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Rounds' sessions need a ticket by this key: the line of `pki ticket-key`, or @FILE of such lines; may be "
        "given more than once.",
    ),
]
MetricsOption = Annotated[
    str,
    typer.Option(
        metavar="HOST:PORT",
        help="Serve /metrics for Prometheus, /healthz and /readyz over HTTP; port 0: any.",
    ),
]
InsecureMetricsOption = Annotated[
    bool, typer.Option("--insecure-metrics", help="Allow --metrics an address that other machines reach, without TLS.")
]
ClientMetricsOption = Annotated[
    bool,
    typer.Option(
        "--client-metrics",
        help="Tell in --metrics how much each client does, by its node id; whoever reads the port sees it.",
    ),
]


@app.callback()
def trunk() -> None:
    """The frozen middle layers, served to clients that hold the rest."""


@model_app.callback()
def model() -> None:
    """Checkpoints and their parts."""


@app.command()
@cli_errors
def serve(
    model: ModelOption,
    head_layers: HeadOption = 1,
    tail_layers: TailOption = 1,
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:50051",
    dtype: Annotated[Dtype, typer.Option(help="Of the frozen weights.")] = Dtype.FLOAT32,
    weights: WeightsOption = Weights.PLAIN,
    attn_implementation: Annotated[Attention, typer.Option(help="As the clients'.")] = Attention.SDPA,
    device: Annotated[Device, typer.Option(help="auto takes CUDA where there is one.")] = Device.AUTO,
    threads: Annotated[int, typer.Option(min=0, help="PyTorch threads; 0 leaves its own choice.")] = 0,
    lanes: LanesOption = 0,
    batch_tokens: BatchTokensOption = 0,
    state_dir: StateDirOption = None,
    max_sessions: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    max_pending: Annotated[int, typer.Option(min=1, help="Forwards of a session that wait for a backward.")] = 16,
    pending_ttl_s: Annotated[float, typer.Option(min=0.1, help="Seconds such a forward may wait.")] = 600.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Rows times tokens of one forward.")] = 32768,
    memory_budget: MemoryBudgetOption = "auto",
    spill_budget: SpillBudgetOption = "16G",
    sample_cache_mib: SampleCacheOption = 64,
    idle_timeout_s: Annotated[float, typer.Option(min=0.1, help="Seconds a session may be silent.")] = 900.0,
    grace_s: Annotated[float, typer.Option(min=0, help="Seconds that open sessions get after SIGTERM.")] = 30.0,
    announce_file: Annotated[Path | None, typer.Option(help="Write HOST:PORT here once ready.")] = None,
    insecure_listen: InsecureListenOption = False,
    tls_certificate: TlsCertificateOption = None,
    tls_key: TlsKeyOption = None,
    client_ca: ClientCaOption = None,
    ticket_signer: TicketSignerOption = None,
    metrics: MetricsOption = "",
    insecure_metrics: InsecureMetricsOption = False,
    client_metrics: ClientMetricsOption = False,
) -> None:
    """Serve the model's middle layers until SIGTERM or Ctrl-C.

    A model too large for one GPU is parted among several processes by its own tensor-parallel plan:
    torchrun --nproc-per-node 2 -m trunkline trunk serve --model MODEL
    """
    _prepare()
    with collector.paused():
        from server_trunk.server import ServeOptions
    options = ServeOptions(
        model=model,
        cut=CutLayers(head_layers, tail_layers),
        listen=listen,
        state_dir=state_dir if state_dir is not None else home_dir() / "trunk",
        dtype=dtype.value,
        weights="" if weights is Weights.PLAIN else weights.value,
        attn_implementation=attn_implementation.value,
        device=device.value,
        threads=threads,
        lanes=lanes,
        batch_tokens=batch_tokens,
        max_sessions=max_sessions,
        max_pending=max_pending,
        pending_ttl_s=pending_ttl_s,
        max_tokens=max_tokens,
        memory_budget=memory_budget,
        spill_budget=spill_budget,
        sample_cache_mib=sample_cache_mib,
        idle_timeout_s=idle_timeout_s,
        grace_s=grace_s,
        announce_file=announce_file,
        insecure_listen=insecure_listen,
        tls=TlsFiles.named((client_ca, tls_certificate, tls_key), _TLS_NAMES),
        ticket_signers=ticket_signers(ticket_signer or []),
        metrics=metrics,
        insecure_metrics=insecure_metrics,
        client_metrics=client_metrics,
    )
    _serve(options)


def _prepare() -> None:
    os.environ.update(waiting(os.environ))
    from server_trunk.log import speak  # with gRPC, which only who serves needs

    speak()


def _serve(options: ServeOptions) -> None:
    from server_trunk import server
    from server_trunk.ranks import Member

    member = Member.told(os.environ)
    if not member.leads:
        server.follow(options, member)
        return
    say = logger.info if logs.wants_json() else talk
    if options.insecure_listen and options.tls is None:
        say("warning: no TLS and no login: whoever reaches this port can use the trunk and read what crosses it")
    say(f"loading the trunk of {options.model}")
    served = asyncio.run(server.serve(options, lambda ready: say(f"trunk ready {ready}")))
    if not served:
        say("told to end before the trunk was ready")
        sys.stderr.flush()
        os._exit(0)  # the interpreter would first wait for the thread that loads the model, minutes for a large one


@app.command("status")
@cli_errors
def show_status(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="Where the trunk listens.")] = "127.0.0.1:50051",
    ca: TrunkCaOption = None,
    certificate: TrunkCertificateOption = None,
    key: TrunkKeyOption = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """What a trunk serves, how many sessions it has, and whether it takes more: exits 0 if it does, 1 if it is ending.

    A readiness probe can run it; a trunk that does not answer exits with 3.
    """
    from server_trunk.status import ask

    found = ask(address, trunk_tls(ca, certificate, key))
    emit(found, output)
    if not found.speaks_ours:
        talk(f"it speaks protocol {found.protocol}, not this installation's: both sides need the same trunkline")
    if not found.ready:
        talk("it takes no new sessions")
        raise typer.Exit(1)


@model_app.command()
@cli_errors
def split(
    model: Annotated[str, typer.Argument(help="Checkpoint directory of the whole model.")],
    out: Annotated[Path, typer.Option("--out", help="Gets the folders client and trunk.")],
    head_layers: HeadOption = 1,
    tail_layers: TailOption = 1,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert the weights; without it they stay as they are.")] = None,
    output: OutputOption = OutputFormat.TABLE,
) -> None:
    """Write the client part and the trunk part of MODEL as checkpoints of their own."""
    talk(f"splitting {model}")
    from contract.checkpoint import write_parts

    sizes = write_parts(model, out, CutLayers(head_layers, tail_layers), None if dtype is None else dtype.value)
    whole = max(sizes["whole"], 1)
    rows = [
        {
            "part": part,
            "size_bytes": sizes[part],
            "size": f"{sizes[part] / 1e6:,.2f} MB",
            "share": f"{100 * sizes[part] / whole:.1f} %",
            "path": str(out / part) if part != "whole" else model,
        }
        for part in ("client", "trunk", "whole")
    ]
    emit(rows, output, columns=("part", "size", "share", "path"))


app.command("sessions")(show_sessions)
app.command("drain")(drain)
