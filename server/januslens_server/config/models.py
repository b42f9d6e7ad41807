"""Which models are served, where they live, and what is kept of them."""

from __future__ import annotations

import click

from januslens_server.config.types import MemoryType, ModelType, SizeType, option

DATA_TYPES = ("auto", "float32", "bfloat16", "float16")

MODELS: tuple[click.Parameter, ...] = (
    option(
        "--model",
        "models",
        type=ModelType(),
        multiple=True,
        help="A model to serve; repeat for several. Replaces the embedded demo.",
    ),
    option(
        "--device",
        default="cpu",
        help="Where models live, as torch names it; auto: split over GPUs, CPU and disk.",
    ),
    option(
        "--data-type",
        type=click.Choice(DATA_TYPES),
        default="auto",
        help="auto: the checkpoint's own type, float32 on a CPU.",
    ),
    option(
        "--max-memory",
        type=MemoryType(),
        multiple=True,
        help="What a model may take of a device, instead of what is free; repeat for several.",
    ),
    option(
        "--offload-dir",
        type=click.Path(file_okay=False),
        default=None,
        help="With --device auto: where weights stay that fit into no memory.",
    ),
    option(
        "--cache-dir",
        type=click.Path(file_okay=False),
        default=None,
        help="Where the next server finds what is computed once per model.",
    ),
    option(
        "--cache-size",
        type=SizeType(),
        default="10GiB",
        help="What may lie there; what was used longest ago is removed.",
    ),
    option(
        "--index-neurons",
        is_flag=True,
        default=False,
        help="Read what all neurons write when a model is loaded, not when it is first asked for.",
    ),
    option(
        "--row-cache",
        type=SizeType(),
        default="512MiB",
        help="Logits of weight rows kept for later traces, of each model on a CPU; 0: none.",
    ),
    option(
        "--processes",
        type=click.IntRange(min=1),
        default=1,
        help="Whole servers that share the port, each with all models in memory and a queue of its "
        "own.",
    ),
    option(
        "--threads",
        type=click.IntRange(min=1),
        default=None,
        help="Cores that compute one request, in each process; the default divides all cores.",
    ),
    option(
        "--chunk-bytes",
        type=SizeType(),
        default="64MiB",
        help="Logits that are held at once, whatever a request asks for.",
    ),
)
