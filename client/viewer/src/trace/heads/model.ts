// Which heads matter at a position: what each adds to the target's logit, or its share of its layer.
import type { FlowGraph } from '../../graph/graph'
import type { GraphNode } from '../../graph/nodes'
import { percent, signed } from '../../parts/numbers'

export interface Head {
  layer: number
  head: number
  node: GraphNode
  value: number
}

export interface Heads {
  heads: Head[]
  /** Columns: the model's number of heads, or as many as are known. */
  columns: number
  /** Largest |value|. */
  largest: number
  /** What the values are, in words. */
  measure: string
  words: (value: number) => string
}

/** The heads of a position that the graph has; the selection may have left others out. */
export function headsAt(graph: FlowGraph, position: number): Heads {
  const found: { node: GraphNode; logit: number | undefined; share: number }[] = []
  for (const layer of graph.layers) {
    for (const { node, edge } of graph.partsOf(`L${layer}/p${position}/ATTENTION_CONCAT`)) {
      if (node.kind !== 'HEAD_OUTPUT') continue
      found.push({ node, logit: edge.logitContribution, share: edge.share ?? 0 })
    }
  }
  const attributed = found.length > 0 && found.every(({ logit }) => logit !== undefined)
  const heads = found.map(({ node, logit, share }) => ({
    layer: node.layer ?? 0,
    head: node.head ?? 0,
    node,
    value: attributed ? (logit ?? 0) : share,
  }))
  const largest = Math.max(1e-9, ...heads.map(({ value }) => Math.abs(value)))
  const target = graph.targets.get(position)?.target.label ?? 'the target'
  return {
    heads,
    columns: graph.sizes.nHeads ?? Math.max(0, ...heads.map(({ head }) => head + 1)),
    largest,
    measure: attributed ? `adds to the logit of ${target}` : 'share of its layer’s heads',
    words: attributed ? (value) => signed(value, largest < 0.1 ? 3 : 2) : percent,
  }
}
