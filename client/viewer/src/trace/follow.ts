// A selection followed through all layers along its sums: up into what it makes up, down into what
// makes it up. What is read through a norm is no part of it, so there the way ends.
import type { FlowGraph } from '../graph/graph'
import type { GraphNode } from '../graph/nodes'

/** How much of each node's ribbon is coloured, 0 to 1, by id. */
export type Followed = ReadonlyMap<string, number>

const LEAST = 0.004 // of a ribbon: less is not seen

/**
 * Upward a ribbon is coloured as far as the selection makes up the node that it leaves; downward as
 * far as the sum that it enters makes up the selection. Both are products of |share|, so that a
 * ribbon's coloured width is its own contribution.
 */
export function follow(graph: FlowGraph, selected: string): Followed {
  const followed = new Map<string, number>()
  const node = graph.node(selected)
  if (!node) return followed
  const part = written(graph, node)
  descend(graph, part, 1, followed)
  let fraction = 1
  for (let at: GraphNode | undefined = part; at && fraction > LEAST; ) {
    followed.set(at.id, fraction)
    const step = upward(graph, at)
    fraction *= step?.share ?? 0
    at = step?.node
  }
  return followed
}

interface Step {
  node: GraphNode
  /** |share|, at most 1. */
  share: number
}

/** What a key, a query or an up column has its effect through: the value or the head's output. */
function written(graph: FlowGraph, node: GraphNode): GraphNode {
  const next = graph.edgesFrom(node.id).find((edge) => {
    if (edge.kind === 'RECALL') return true
    return edge.kind === 'ACTIVATE' && node.kind !== 'MLP_INPUT' && node.kind !== 'ATTENTION_CONCAT'
  })
  if (node.kind === 'HEAD_QUERY') {
    return graph.node(node.id.replace('HEAD_QUERY', 'HEAD_OUTPUT')) ?? node
  }
  return (next && graph.node(next.target)) ?? node
}

/** The sum that a node enters; each enters one. */
function upward(graph: FlowGraph, node: GraphNode): Step | undefined {
  const at = (kind: string) => graph.at(node.layer ?? 0, node.position, kind)
  if (node.kind === 'ATTENTION_CONCAT') {
    const result = at('ATTENTION_SUM') ?? at('ATTENTION_OUTPUT')
    return result && { node: result, share: headsShare(graph, result) }
  }
  const edge = graph.edgesFrom(node.id).find(({ kind }) => kind === 'PART' || isSame(node, kind))
  const sum = edge && graph.node(edge.target)
  return sum && { node: sum, share: edge.kind === 'PART' ? size(edge.share) : 1 }
}

/** Whether an edge gives a sublayer's result in its final form. */
function isSame(node: GraphNode, kind: string): boolean {
  return node.kind.endsWith('_SUM') && (kind === 'NORM' || kind === 'SCALE')
}

function descend(graph: FlowGraph, sum: GraphNode, weight: number, followed: Map<string, number>) {
  if (weight < LEAST) return
  for (const { node, share } of downward(graph, sum)) {
    followed.set(node.id, weight)
    descend(graph, node, weight * share, followed)
  }
}

/** What a node is made of, the heads together being a part of attention's result. */
function downward(graph: FlowGraph, sum: GraphNode): Step[] {
  const parts = graph.partsOf(sum.id).map(({ node, edge }) => ({ node, share: size(edge.share) }))
  const concat = graph.at(sum.layer ?? 0, sum.position, 'ATTENTION_CONCAT')
  const written = parts.some(({ node }) => node.kind === 'ATTENTION_NEURON')
  if (concat && (written || sum.kind === 'ATTENTION_SUM')) {
    parts.push({ node: concat, share: headsShare(graph, sum) })
  }
  const before = parts.length === 0 ? formOf(graph, sum) : undefined
  return before ? [{ node: before, share: 1 }] : parts
}

/** What a node is another form of: the residual, normed or unembedded; a result, normed or scaled. */
function formOf(graph: FlowGraph, node: GraphNode): GraphNode | undefined {
  if (node.kind === 'PREDICTION') return graph.sourceBy(node.id, 'PROJECT')
  if (node.kind !== 'FINAL_NORM' && !node.kind.endsWith('_OUTPUT')) return undefined
  return graph.sourceBy(node.id, 'NORM') ?? graph.sourceBy(node.id, 'SCALE')
}

/** The heads' share of attention's result: all but the bias. */
function headsShare(graph: FlowGraph, result: GraphNode): number {
  const bias = graph.partsOf(result.id).find(({ node }) => node.kind === 'ATTENTION_BIAS')
  return size(1 - (bias?.edge.share ?? 0))
}

function size(share: number | undefined): number {
  return Math.min(1, Math.abs(share ?? 0))
}
