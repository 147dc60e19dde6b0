"""Runs llama.cpp's HTTP server from the package xllamacpp, with the options of llama-server that the benchmark uses."""

import signal

import click
from xllamacpp import CommonParams, Server


@click.command(help=__doc__)
@click.option("--model", required=True)
@click.option("--host", required=True)
@click.option("--port", type=int, required=True)
@click.option("--threads", type=int, required=True)
@click.option("--threads-batch", type=int, required=True)
@click.option("--ctx-size", type=int, required=True)
@click.option("--parallel", type=int, required=True)
def main(model: str, host: str, port: int, threads: int, threads_batch: int, ctx_size: int, parallel: int) -> None:
    params = CommonParams()
    params.model.path = model
    params.hostnames, params.port = [host], port
    params.cpuparams.n_threads, params.cpuparams_batch.n_threads = threads, threads_batch
    params.n_ctx, params.n_parallel = ctx_size, parallel
    server = Server(params)  # serves from threads of its own, as long as it is referenced
    click.echo(f"listening on {server.listening_address}")
    signal.pause()


if __name__ == "__main__":
    main()
