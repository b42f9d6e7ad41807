"""A block's weights as the flow graph reads them."""

from __future__ import annotations

from januslens_server.graph.dense_mlp import DenseMlp
from januslens_server.graph.weights import AttentionWeights, BlockWeights
from januslens_server.models.views import Block, Mlp


def block_weights(block: Block) -> BlockWeights:
    """Row-convention float32 tensors; views where the model is float32, copies elsewhere."""
    attention, mlp = block.attention, block.mlp
    query = attention.query.weight.float().unflatten(1, (attention.n_heads, -1))
    key = attention.key.weight.float().unflatten(1, (attention.n_kv_heads, -1))
    output = attention.output.weight.float().unflatten(0, (attention.n_heads, -1))
    return BlockWeights(
        attention=AttentionWeights(
            query=query.transpose(0, 1),
            key=key.transpose(0, 1),
            output=output,
            bias=None if attention.output.bias is None else attention.output.bias.float(),
            row_norms=attention.output.row_norms,
            scoring=attention.scoring,
            query_map=attention.query_map,
            key_map=attention.key_map,
            value_clip=attention.value_clip,
            finish=attention.finish,
        ),
        mlp=_dense(mlp) if isinstance(mlp, Mlp) else mlp.mlp(),
        attention_prenorm=block.attention_prenorm,
        mlp_prenorm=block.mlp_prenorm,
    )


def _dense(mlp: Mlp) -> DenseMlp:
    return DenseMlp(
        ff1=mlp.ff1.weight.float(),
        up=None if mlp.up is None else mlp.up.weight.float(),
        ff2=mlp.ff2.weight.float(),
        bias=None if mlp.ff2.bias is None else mlp.ff2.bias.float(),
        row_norms=mlp.ff2.row_norms,
        finish=mlp.finish,
    )
