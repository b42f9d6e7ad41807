import type { FlowGraph } from '../../graph/graph'

/** Attention that moves something from one position to another within a layer. */
export interface Arc {
  layer: number
  position: number
  source: number
  head: number
  attention: number
  /** The head's share of all heads, times the source's share of the head; signed. */
  share: number
  /** Id of the value that is moved. */
  value: string
}

/** The arcs into one position, layer by layer, weakest first so that the strong are drawn above. */
export function arcsInto(graph: FlowGraph, position: number, minimum = 0.01): Arc[] {
  const arcs: Arc[] = []
  for (const layer of graph.layers) {
    for (const head of graph.partsOf(`L${layer}/p${position}/ATTENTION_CONCAT`)) {
      for (const value of graph.partsOf(head.node.id)) {
        const share = (head.edge.share ?? 0) * (value.edge.share ?? 0)
        if (value.node.source === undefined || Math.abs(share) < minimum) continue
        arcs.push({
          layer,
          position,
          source: value.node.source,
          head: head.node.head ?? 0,
          attention: value.edge.attention ?? 0,
          share,
          value: value.node.id,
        })
      }
    }
  }
  return arcs.sort((a, b) => Math.abs(a.share) - Math.abs(b.share))
}
